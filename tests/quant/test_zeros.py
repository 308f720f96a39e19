"""Zeros that a lost range leaves are found and named; zeros that a model may have are not."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType

from localrun import cli
from localrun.errors import FormatError
from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.quant.convert.converter import convert
from localrun.quant.convert.lost_weights import find_lost_weights
from localrun.quant.gguf.file import read_gguf
from localrun.quant.model.source import PROJECTIONS, Encoding, Extent, ModelSource, MoeLayer, Projection
from localrun.quant.open import open_model
from localrun.quant.zeros import LostWeights, refuse_zero_norm, refuse_zero_scales, torn_rows
from tests.checkpoints import write_small
from tests.commands.test_verify import DAMAGE_KEYS
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
    assert [str(problem).partition(" bytes from ")[0].rpartition(": ")[0] for problem in problems] == [
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


@dataclass
class Stacks:
    """A stack of matrices of 4.25 MiB that is a hole in a file; gate and down are taken for its neighbours with checksums."""

    path: Path
    n_experts: int
    n_bytes: int = 4352 * KIB
    start: int = 4096 + 32

    def __post_init__(self) -> None:
        self.files = [self.path]
        kinds = (GGMLQuantizationType.Q8_0,) * 3
        self.moe_layers = {0: MoeLayer(0, self.n_experts, 2048, 2048, kinds, 3 * self.n_bytes)}
        with self.path.open("wb") as file:
            file.write(noise(self.start))
            file.seek(self.at(self.n_experts))
            file.write(noise(4096))

    def at(self, expert: int) -> int:
        return self.start + expert * self.n_bytes

    def base_expert(self, layer: int, expert: int) -> tuple[Projection, ...]:
        return tuple(
            Projection(
                GGMLQuantizationType.Q8_0,
                2048,
                2048,
                Encoding.GGML,
                (Extent(0, self.at(expert), self.n_bytes),),
                self.n_bytes,
                None if name == "up" else "checksum",
            )
            for name in PROJECTIONS
        )

    def look(self, lost: LostWeights, expert: int) -> None:
        """As if the expert had been read."""
        projections = self.base_expert(0, expert)
        raw = [[np.fromfile(self.path, np.uint8, self.n_bytes, offset=self.at(expert))]] * 3
        for name, projection, pieces in zip(PROJECTIONS, projections, raw, strict=True):
            lost.refuse_one(0, expert, name, projection, pieces)


def test_a_stack_of_zeros_is_accepted_at_any_size_and_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that someone removed: hundreds of MiB, all of which are around each of its experts."""
    stacks = Stacks(tmp_path / "m", n_experts=64)
    lost, read, n_read = LostWeights(cast("ModelSource", stacks)), os.pread, 0

    def counting(fd: int, size: int, offset: int) -> bytes:
        nonlocal n_read
        n_read += size
        return read(fd, size, offset)

    monkeypatch.setattr(os, "pread", counting)
    for expert in (0, 30, 31, 63):
        stacks.look(lost, expert)
    assert n_read == (stacks.n_experts - 1) * stacks.n_bytes


@pytest.mark.parametrize("torn", [3, 4])
def test_a_range_lost_from_before_a_stack_is_found_from_each_of_its_experts(tmp_path: Path, torn: int) -> None:
    stacks = Stacks(tmp_path / "m", n_experts=5)
    lost = LostWeights(cast("ModelSource", stacks))
    with stacks.path.open("r+b") as file:
        file.seek(stacks.at(torn) + stacks.n_bytes // 2)
        file.write(noise(stacks.n_bytes // 2))
    for expert in range(torn):
        with pytest.raises(FormatError, match=rf"m: blk\.0\.ffn_up_exps\.weight: expert {expert}: \d+ bytes from"):
            stacks.look(lost, expert)
    for expert in range(torn + 1, 5):  # whole on both sides
        stacks.look(lost, expert)


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
    assert f"{source.files[extent.file]}: blk.1.ffn_up_exps.weight: expert 2: " in str(problem)
    with pytest.raises(FormatError, match=r"layers\.1\.ffn\.experts\.2\.w3\.weight: "):
        convert(folder, tmp_path / "target")


def test_lost_dense_tensors_are_reported_in_the_model_s_order(gguf: Path) -> None:
    tensors = read_gguf(gguf).tensors
    norms = [name for name in open_model(gguf).tensors if name.endswith("norm.weight")]
    assert len(norms) > 3
    for name in norms:
        erase(gguf, tensors[name].offset, tensors[name].offset + tensors[name].info.n_bytes)
    assert [lost.tensor for lost in find_lost_weights(open_model(gguf))] == norms


def test_lost_weights_as_json_have_the_keys_of_wrong_checksums(gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin, size = stack(gguf)
    norm = read_gguf(gguf).tensors["blk.0.attn_norm.weight"]
    erase(gguf, norm.offset, norm.offset + norm.info.n_bytes)
    erase(gguf, begin + size // 2 + 7, begin + size)
    assert cli.main(["verify", str(gguf), "--json"]) == 1
    dense, expert = json.loads(capsys.readouterr().out)["damaged"]
    assert set(dense) == set(expert) == DAMAGE_KEYS
    assert (dense["file"], dense["tensor"], dense["expert"]) == (gguf.name, "blk.0.attn_norm.weight", None)
    assert (dense["offset"], dense["bytes"]) == (norm.offset, norm.info.n_bytes)
    assert (expert["file"], expert["tensor"], expert["expert"]) == (gguf.name, "blk.0.ffn_gate_exps.weight", 0)
    assert (expert["offset"], expert["bytes"]) == (begin, size)
