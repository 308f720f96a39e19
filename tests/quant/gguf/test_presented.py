"""How tensors are shown that llama.cpp would not take as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.errors import FormatError, UnsupportedModelError
from localrun.quant.gguf.presented import converted, present, refuse_scale
from localrun.quant.model.source import TensorInfo

PATH = Path("m.gguf")


def tensors(*infos: TensorInfo) -> dict[str, TensorInfo]:
    return {info.name: info for info in infos}


def test_a_fused_stack_is_shown_as_gate_and_up() -> None:
    fused = TensorInfo("blk.3.ffn_gate_up_exps.weight", (64, 32, 8), QT.MXFP4, 8704)
    shown = present(tensors(fused), drop_scales=True)
    gate, up = "blk.3.ffn_gate_exps.weight", "blk.3.ffn_up_exps.weight"
    assert shown.tensors == {name: TensorInfo(name, (64, 16, 8), QT.MXFP4, 4352) for name in (gate, up)}
    assert shown.fused == {gate: (fused.name, 0), up: (fused.name, 1)}


@pytest.mark.parametrize(
    "info",
    [
        TensorInfo("blk.3.ffn_gate_up_exps.weight", (64, 33, 8), QT.MXFP4, 8976),  # no two halves
        TensorInfo("blk.3.ffn_gate_up_exps.weight", (64, 32), QT.MXFP4, 1088),
        TensorInfo("blk.03.ffn_gate_up_exps.weight", (64, 32, 8), QT.MXFP4, 8704),
        TensorInfo("blk.3.attn_norm.weight", (64,), QT.F32, 256),
        TensorInfo("blk.3.attn_q.weight", (64, 64), QT.BF16, 8192),
        TensorInfo("blk.3.other.weight", (64,), QT.I64, 512),
    ],
)
def test_others_are_shown_as_they_are(info: TensorInfo) -> None:
    shown = present(tensors(info), drop_scales=True)
    assert shown.tensors == {info.name: info}
    assert (shown.stored, shown.fused, shown.scales) == ({}, {}, [])


@pytest.mark.parametrize("kind", [QT.F16, QT.BF16])
def test_vectors_of_half_precision_are_shown_as_f32(kind: QT) -> None:
    info = TensorInfo("blk.0.attn_norm.weight", (64, 1), kind, 128)
    shown = present(tensors(info), drop_scales=False)
    assert shown.tensors == {info.name: TensorInfo(info.name, (64, 1), QT.F32, 256)}
    assert shown.stored == {info.name: info}


def test_a_table_of_experts_is_shown_as_i32() -> None:
    info = TensorInfo("blk.0.ffn_gate_tid2eid.weight", (6, 100), QT.I64, 4800)
    assert present(tensors(info), drop_scales=False).tensors[info.name].type is QT.I32
    assert present(tensors(info), drop_scales=False).tensors[info.name].n_bytes == 2400


def test_scales_of_weights_are_left_out_and_must_be_one() -> None:
    names = ("blk.0.attn_q.weight", "blk.0.attn_q.scale", "blk.0.attn_q.input_scale", "alone.scale")
    infos = tensors(*(TensorInfo(name, (1,), QT.F32, 4) for name in names))
    shown = present(infos, drop_scales=True)
    assert list(shown.tensors) == ["blk.0.attn_q.weight", "alone.scale"]
    assert shown.scales == ["blk.0.attn_q.scale"]
    assert list(present(infos, drop_scales=False).tensors) == list(names)
    refuse_scale(PATH, "s", np.ones(3, np.float32))
    with pytest.raises(UnsupportedModelError, match=r"^m\.gguf: s: a scale of 0\.5, which"):
        refuse_scale(PATH, "s", np.array([1, 0.5], np.float32))


def test_values_are_converted_exactly() -> None:
    values = np.array([1.5, -0.25, 65504, 2**-24], np.float32)
    half = TensorInfo("v", (4,), QT.F16, 8)
    assert converted(PATH, half, values.astype("<f2").view(np.uint8)).view(np.float32).tolist() == values.tolist()
    brain = TensorInfo("v", (2,), QT.BF16, 4)
    raw = np.array([0x3FC0, 0xBE80], np.uint16).view(np.uint8)
    assert converted(PATH, brain, raw).view(np.float32).tolist() == [1.5, -0.25]
    table = TensorInfo("blk.0.ffn_gate_tid2eid.weight", (2,), QT.I64, 16)
    assert converted(PATH, table, np.array([0, 2**31 - 1], "<i8").view(np.uint8)).view("<i4").tolist() == [0, 2**31 - 1]
    for wrong in (-1, 2**31):
        with pytest.raises(FormatError, match="is not a valid expert number"):
            converted(PATH, table, np.array([0, wrong], "<i8").view(np.uint8))
