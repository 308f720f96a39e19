"""Row kernels for any processor, one matrix and one tile at a time, against float64 on the very same integers."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as T

from localrun.ggml.types import block_type
from localrun.offload.kernels.generic import _half, generic_panel, generic_rows, supports
from localrun.offload.kernels.panels import BLOCK32, Panel, fill_panel
from tests.offload.kernels.support import dequantize, quantize

F32 = npt.NDArray[np.float32]
TYPES = [T.MXFP4, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ2_XXS, T.IQ3_XXS]
N_IN, N_ROWS = 512, 48

ROWS = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 9)


def panel_of(panel: Panel, x: F32) -> npt.NDArray[np.uint8]:
    memory = np.zeros(-(-x.shape[1] // panel.unit) * panel.unit_bytes * len(x) + 64, np.uint8)
    for token, row in enumerate(x):
        fill_panel(panel.kind, panel.offset, row.ctypes.data, row.size, memory.ctypes.data, 0, token, len(x))
    return memory


def rounded(panel: Panel, x: F32) -> npt.NDArray[np.float64]:
    """What the activations are after rounding to 8 bits."""
    group = 32 if panel.kind == BLOCK32 else 256
    groups = x.reshape(len(x), -1, group)
    largest = np.abs(groups).max(2, keepdims=True)
    q = np.rint(groups * (np.float32(127) / largest))
    return (q.astype(np.float64) * (largest / np.float32(127))).reshape(x.shape)


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("n_tokens", [1, 3, 16])
def test_rows_are_exact_but_for_the_sums(type_: T, n_tokens: int) -> None:
    rng = np.random.default_rng(int(type_))
    assert supports(type_)
    matrix = quantize(type_, rng.standard_normal((N_ROWS, N_IN), dtype=np.float32))
    x, panel = rng.standard_normal((n_tokens, N_IN), dtype=np.float32), generic_panel(type_)
    memory, out = panel_of(panel, x), np.full((n_tokens, 64), np.nan, np.float32)
    address, extra = generic_rows(type_)
    row0, n_rows = 16, 17
    ROWS(address)(
        matrix.ctypes.data, extra, row0, n_rows, N_IN, memory.ctypes.data, n_tokens, out.ctypes.data, out.strides[0]
    )
    expected = rounded(panel, x) @ dequantize(type_, matrix)[row0 : row0 + n_rows].T
    scale = np.abs(rounded(panel, x)) @ np.abs(dequantize(type_, matrix)[row0 : row0 + n_rows]).T
    # F32 sums of some hundred terms; a wrong weight of 512 would be a hundred times as much.
    assert (np.abs(out[:, :n_rows] - expected) < 3e-6 * scale).all()
    assert np.isnan(out[:, 32:]).all(), "rows up to the next multiple of 16 at most"


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_each_weight_is_in_its_place(type_: T) -> None:
    """A token that is 127 in one place and next to nothing elsewhere reads that column."""
    rng = np.random.default_rng(3)
    matrix = quantize(type_, rng.standard_normal((1, 256), dtype=np.float32))
    panel, (address, extra) = generic_panel(type_), generic_rows(type_)
    weights = dequantize(type_, matrix)[0]
    found = []
    for first in range(0, 256, 16):
        x = np.zeros((16, 256), np.float32)
        x[np.arange(16), first + np.arange(16)] = 127
        memory, out = panel_of(panel, x), np.zeros((16, 16), np.float32)
        ROWS(address)(matrix.ctypes.data, extra, 0, 1, 256, memory.ctypes.data, 16, out.ctypes.data, out.strides[0])
        found.append(out[:, 0] / 127)
    np.testing.assert_allclose(np.concatenate(found), weights, rtol=1e-5, atol=1e-6 * np.abs(weights).max())


def test_types_without_a_row_kernel_are_left_to_others() -> None:
    assert [t for t in T if supports(t)] == sorted(TYPES)
    for type_ in TYPES:
        assert generic_panel(type_).unit % 32 == 0
        assert block_type(type_).block_elements % 32 == 0


def test_halves_with_their_subnormals() -> None:
    bits = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0xC000, 0x7BFF], np.uint16)
    found = [_half(bits[i:].ctypes.data) for i in range(len(bits))]
    np.testing.assert_array_equal(np.array(found, np.float32), bits.view(np.float16).astype(np.float32))
