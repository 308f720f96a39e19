"""Zeros that a lost range leaves are found and named; zeros that a model may have are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from localrun import cli
from localrun.errors import FormatError
from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.quant.convert.converter import convert
from localrun.quant.convert.lost_weights import find_lost_weights
from localrun.quant.gguf.file import read_gguf
from localrun.quant.model.source import ModelSource
from localrun.quant.open import open_model
from localrun.quant.zeros import refuse_zero_norm, refuse_zero_scales, torn_rows
from tests.checkpoints import write_small
from tests.offload.models import logits
from tools.make_moe_gguf import MoeDims, write_moe_gguf

KIB = 1 << 10
DIMS = MoeDims(n_layers=1, n_embd=512, n_ff=512, n_experts=4)
"""A matrix of an expert has 272 KiB."""


def noise(n_bytes: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, n_bytes, np.uint8)


@pytest.mark.parametrize("row_bytes", [544, 2048, 2176, 8192])
def test_lost_ranges_are_found_wherever_they_begin(row_bytes: int) -> None:
    rng = np.random.default_rng(row_bytes)
    for case in range(100):
        data = noise(512 * row_bytes, case)
        n_bytes = int(rng.integers(128 * KIB, data.size))
        begin = int(rng.integers(0, data.size - n_bytes + 1))
        data[begin : begin + n_bytes] = 0
        if begin % row_bytes == 0 and (begin + n_bytes) % row_bytes == 0:
            continue
        torn = torn_rows(data, row_bytes)
        # Noise may go on with zeros of its own.
        assert torn is not None or min(-begin % row_bytes, (begin + n_bytes) % row_bytes) < 20
        assert torn is None or (begin - 4 <= torn[0] <= begin and begin + n_bytes <= torn[1] <= begin + n_bytes + 4)


def test_rows_and_matrices_of_zeros_belong_to_the_model() -> None:
    data, row_bytes = noise(400 * 2176), 2176
    assert torn_rows(data, row_bytes) is None
    data[100 * row_bytes : 250 * row_bytes] = 0
    data[300 * row_bytes :] = 0
    assert torn_rows(data, row_bytes) is None
    data[250 * row_bytes : 250 * row_bytes + 2] = 0  # the low byte of the next row's scale
    data[100 * row_bytes - 3 : 100 * row_bytes] = 0  # its last weights
    assert torn_rows(data, row_bytes) is None
    data[:] = 0
    assert torn_rows(data, row_bytes) is None
    assert torn_rows(data[:1000], row_bytes) is None


def test_short_runs_are_not_searched_for() -> None:
    data = noise(1 << 20)
    data[100 : 100 + 64 * KIB - 1] = 0
    assert torn_rows(data, 4096) is None


def test_scales_and_norms_of_zeros() -> None:
    refuse_zero_scales("f: t", noise(1 << 18))
    refuse_zero_norm("f: t", noise(64))
    scale = noise(1 << 18)
    scale[: 128 * KIB] = 0
    with pytest.raises(FormatError, match=r"f: t: 131072 bytes from 0 on are zeros instead of weights"):
        refuse_zero_scales("f: t", scale)
    with pytest.raises(FormatError, match=r"f: t: all scales are zero"):
        refuse_zero_scales("f: t", np.zeros(64, np.uint8))
    with pytest.raises(FormatError, match=r"f: t: all weights of a norm are zero"):
        refuse_zero_norm("f: t", np.zeros(64, np.uint8))


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    write_moe_gguf(path, "olmoe", DIMS)
    return path


def erase(path: Path, begin: int, end: int) -> None:
    """Writes zeros."""
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(bytes(end - begin))


def stack(path: Path) -> tuple[int, int]:
    """Where the first layer's gate matrices begin, and the size of one."""
    tensor = read_gguf(path).tensors["blk.0.ffn_gate_exps.weight"]
    return tensor.offset, tensor.info.n_bytes // DIMS.n_experts


def answer(source: ModelSource) -> None:
    with open_offloaded(source, OffloadOptions(n_threads=1)) as model:
        logits(model, batch=5)


def test_an_intact_gguf_has_nothing_to_find(gguf: Path) -> None:
    assert find_lost_weights(open_model(gguf)) == []
    answer(open_model(gguf))


def test_a_lost_range_among_experts_is_named_also_where_whole_experts_are_gone(
    gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin, size = stack(gguf)
    # Half of expert 0, all of 1 and 2, a part of 3.
    erase(gguf, begin + size // 2 + 7, begin + 3 * size + size // 3)
    source = open_model(gguf)
    problems = find_lost_weights(source)
    where = f"{gguf}: blk.0.ffn_gate_exps.weight: expert"
    assert [problem.partition(" bytes from ")[0].rpartition(": ")[0] for problem in problems] == [
        f"{where} {expert}" for expert in range(4)
    ]
    with pytest.raises(
        FormatError, match=r"ffn_gate_exps\.weight: expert \d: \d+ bytes from \d+ on are zeros"
    ) as caught:
        answer(source)
    assert caught.value.hint is not None
    assert cli.main(["verify", str(gguf)]) == 1
    printed = capsys.readouterr().err
    assert f"damaged: {where} 1" in printed
    assert "download these files again" in printed


def test_experts_that_are_zero_on_purpose_are_accepted(gguf: Path) -> None:
    begin, size = stack(gguf)
    erase(gguf, begin + size, begin + 3 * size)
    assert find_lost_weights(open_model(gguf)) == []
    answer(open_model(gguf))


@pytest.mark.parametrize("what", ["blk.0.attn_q.weight", "blk.0.attn_norm.weight"])
def test_lost_dense_tensors_are_named_when_they_are_loaded(gguf: Path, what: str) -> None:
    tensor = read_gguf(gguf).tensors[what]
    edge = 1000 if tensor.info.n_bytes > 64 * KIB else 0
    erase(gguf, tensor.offset + edge, tensor.offset + tensor.info.n_bytes - edge)
    with pytest.raises(FormatError, match=rf"m\.gguf: {what}: "):
        answer(open_model(gguf))


@pytest.mark.parametrize("suffix", ["weight", "scale"])
def test_lost_ranges_of_a_checkpoint_are_named_when_it_runs_and_when_it_is_converted(
    tmp_path: Path, suffix: str
) -> None:
    folder = write_small(tmp_path / "source", hidden_size=1024, moe_intermediate_size=512)
    source = open_model(folder)
    assert find_lost_weights(source) == []
    (_, up, _) = source.expert(1, 2)
    extent = up.extents[("weight", "scale").index(suffix)]
    edge = 1000 if suffix == "weight" else 0
    erase(source.files[extent.file], extent.offset + edge, extent.offset + extent.n_bytes)
    (problem,) = find_lost_weights(open_model(folder))
    assert f"{source.files[extent.file]}: blk.1.ffn_up_exps.weight: expert 2: " in problem
    with pytest.raises(FormatError, match=r"layers\.1\.ffn\.experts\.2\.w3\.weight: "):
        convert(folder, tmp_path / "target")
