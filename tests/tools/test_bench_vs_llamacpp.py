"""The comparison with llama.cpp: both engines run, the result is complete, limits hold, and wrong logits are noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localrun.errors import LocalrunError
from localrun.quant.checkpoint.mapping import ConversionOptions
from localrun.quant.convert.converter import convert
from tests.checkpoints import write_small
from tests.gguf_models import TinyDeepseek4, write_deepseek4
from tools import bench_vs_llamacpp as versus
from tools import engine_run
from tools.memory_limit import MemoryLimit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every token uses all experts: near-ties of a random router would decide about the few positions that are compared."""
    tiny = TinyDeepseek4(n_experts=4, n_used=4)
    return write_deepseek4(tmp_path_factory.mktemp("model") / "m.gguf", tiny)[0]


@pytest.fixture
def limited() -> MemoryLimit:
    try:
        with MemoryLimit(1 << 30):
            pass
    except LocalrunError as error:
        pytest.skip(str(error))
    return MemoryLimit(64 << 20)


def test_both_engines_are_measured_and_agree(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "r.json"
    options = ["--pairs", "1", "--prompt-tokens", "24", "--new-tokens", "3", "--threads", "1", "--warm-rounds", "0"]
    options += ["--warm-up", "2", "--busy", "1"]
    assert versus.main([str(model), *options, "--llamacpp", "experts", "--json", str(result)]) == 0
    value = json.loads(result.read_text())
    assert [run["engine"] for run in value["runs"]] == ["llama.cpp", "localrun"]
    assert all(len(run["decode_ms"]) == 2 + 3 and run["prefill_s"] > 0 for run in value["runs"])
    assert value["fault"] is None
    assert [agreement["positions"] for agreement in value["agreement"]] == [1 + 2 + 3]
    assert all(agreement["correlation"] > 0.99 for agreement in value["agreement"])
    ratios = [a["prefill_s"] / b["prefill_s"] for a, b in zip(value["runs"][::2], value["runs"][1::2], strict=True)]
    assert value["summary"]["prefill_ratio"] == pytest.approx(np.median(ratios))
    assert "ratio" in capsys.readouterr().out


def test_disagreeing_logits_void_the_result(tmp_path: Path) -> None:
    comparison = versus.Comparison.__new__(versus.Comparison)
    comparison._args = versus.parser().parse_args(["m.gguf"])
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((10, 50)).astype(np.float32)
    np.savez(tmp_path / "reference.npz", logits=logits, again=logits + 1e-3)
    np.savez(tmp_path / "same.npz", logits=logits)
    np.savez(tmp_path / "wrong.npz", logits=rng.standard_normal((10, 50)).astype(np.float32))
    run = engine_run.Measured(
        engine="llama.cpp",
        variant="",
        load_s=1,
        prefill_s=1,
        decode_ms=[9.0, 1.0],
        warm_up=1,
        rss_bytes=1,
        peak_rss_bytes=1,
    )
    assert run.decode_median_ms == 1.0
    comparison.runs = [run, replace(run, engine="localrun")]
    comparison.notes = []
    comparison.agreements = []
    comparison._compare(tmp_path / "reference.npz", tmp_path / "same.npz")
    assert comparison.fault is None
    assert "DISAGREE" not in "".join(versus.report(comparison))
    comparison._compare(tmp_path / "reference.npz", tmp_path / "wrong.npz")  # one wrong pair is enough
    comparison._compare(tmp_path / "reference.npz", tmp_path / "same.npz")
    assert "typical KL" in str(comparison.fault)
    assert "DISAGREE (typical KL" in versus.report(comparison)[-1]


def test_engine_that_fails_is_reported_with_its_reason(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--pairs", "1", "--prompt-tokens", "4", "--new-tokens", "1", "--llamacpp", "none", "--ram", "1KB"]
    assert versus.main([str(model), *options]) == 1
    error = capsys.readouterr().err
    assert "error: localrun: --ram" in error
    assert "hint:" in error


def test_experts_that_stay_in_a_checkpoint_are_no_file_for_llamacpp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_small(tmp_path / "source")
    convert(source, tmp_path / "small", ConversionOptions(keep_experts=True))
    assert versus.main([str(tmp_path / "small")]) == 1
    error = capsys.readouterr().err
    assert f"its experts are in the checkpoint {source}" in error
    assert "hint:" in error


def test_a_model_beyond_ram_is_mapped_and_not_warmed_in_whole_prefills(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = versus.parser().parse_args([str(model)])
    assert versus.Comparison(args).variant == "default"
    monkeypatch.setattr("localrun.engine.memory.total_memory", lambda: model.stat().st_size)
    assert versus.Comparison(args).variant == "none"


def test_process_beyond_the_limit_is_killed_and_the_group_is_removed(limited: MemoryLimit) -> None:
    code = "import sys; from tools.memory_limit import join; from pathlib import Path; join(Path(sys.argv[1])); "
    with limited:
        modest = subprocess.run([sys.executable, "-c", code + "bytearray(8 << 20)", str(limited.folder)])
        greedy = subprocess.run([sys.executable, "-c", code + "bytearray(256 << 20)", str(limited.folder)])
        kills, peak = limited.out_of_memory_kills(), limited.peak_bytes()
        counts = any((limited.folder / name).exists() for name in ("memory.max_usage_in_bytes", "memory.peak"))
    assert modest.returncode == 0
    assert greedy.returncode == -9
    assert kills == 1
    assert (peak is not None) == counts
    assert (peak or 0) <= 64 << 20
    assert not limited.folder.exists()
