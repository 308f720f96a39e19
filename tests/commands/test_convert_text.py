"""A conversion's plan and result in words and as JSON."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from localrun.commands.convert_text import describe, describe_result, plan_as_json, result_as_json
from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.checkpoint.mapping import ConversionPlan, make_plan
from localrun.quant.convert.report import summarize
from localrun.quant.convert.writing import ConversionResult
from localrun.quant.formats.transcode import Loss
from tests.checkpoints import write_small


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ConversionPlan:
    return make_plan(Checkpoint.open(write_small(tmp_path_factory.mktemp("source") / "small", mtp=True)))


def test_the_table_has_every_tensor_once_and_its_bytes(plan: ConversionPlan) -> None:
    lines = summarize(plan)
    assert sum(line.n_tensors for line in lines) == len(plan.tensors)
    assert sum(line.target_bytes for line in lines) == sum(tensor.info.n_bytes for tensor in plan.tensors.values())
    (experts,) = [line for line in lines if line.source == "I8"]
    n_weights = 3 * 3 * 4 * 64 * 32  # layers, matrices, experts, rows and columns
    assert (experts.n_tensors, experts.target, experts.exact) == (9, "MXFP4", True)
    assert experts.source_bytes == experts.target_bytes == n_weights // 32 * 17
    assert all(not line.exact for line in lines if line.target == "Q8_0")


def test_the_plan_in_words_and_for_programs_says_the_same(plan: ConversionPlan) -> None:
    value, words = plan_as_json(plan), describe(plan)
    assert value["source_tensors"] == plan.checkpoint.n_tensors
    assert value["output_bytes"] == plan.file_size
    assert [step["tensors"] for step in value["steps"]] == [line.n_tensors for line in summarize(plan)]
    assert value["left_out"]["tensors"] == plan.checkpoint.mtp.n_tensors  # type: ignore[union-attr]
    assert len(words) == 2 + len(value["steps"]) + 2
    assert str(plan.checkpoint.path) in words[0]
    assert "4 experts of 32" in words[1]
    assert "mtp" in words[-2]
    assert f"{len(plan.tensors)} tensors" in words[-1]


def test_a_result_has_its_rate_and_what_rounding_changed() -> None:
    result = ConversionResult(
        Path("/m"),
        file_bytes=1 << 30,
        seconds=2.0,
        read_bytes=5,
        written_bytes=3 * 10**9,
        losses={"a -> b": Loss(1, 4)},
    )
    first, second = describe_result(result)
    assert describe_result(replace(result, written_bytes=276 << 20, seconds=165.0))[0].endswith("1.75 MB/s")
    assert "/m (1.00 GiB)" in first
    assert first.endswith("1.50 GB/s")
    assert second == "  a -> b: relative RMS error 50.0000%"
    assert result_as_json(result) == {
        "path": "/m",
        "output_bytes": 1 << 30,
        "seconds": 2.0,
        "read_bytes": 5,
        "written_bytes": 3 * 10**9,
        "relative_rms_error": {"a -> b": 0.5},
    }
