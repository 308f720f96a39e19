"""ggml's number formats: sizes as gguf has them, rows to F32 and back."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from localrun.errors import IncompatibleLibraryError, UnsupportedModelError
from localrun.ggml import types


def test_row_bytes_by_hand() -> None:
    assert types.block_type(T.Q8_0).row_bytes(64) == 2 * 34  # per 32 values a scale of 2 bytes and 32 int8
    assert types.block_type(T.F32).row_bytes(3) == 12


@pytest.mark.parametrize("n", [0, -32, 33])
def test_a_row_that_is_no_whole_number_of_blocks_is_refused(n: int) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"a row of {n} values is not a multiple of MXFP4's 32"):
        types.block_type(T.MXFP4).row_bytes(n)


def test_integers_are_no_block_type() -> None:
    with pytest.raises(UnsupportedModelError, match="can't dequantize type I32"):
        types.block_type(T.I32)


def test_f32_is_not_dequantized() -> None:
    with pytest.raises(UnsupportedModelError, match="F32 needs no dequantization"):
        types.dequantize(T.F32, 0, 0, 0)


def test_a_type_that_gguf_knows_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GGML_QUANT_SIZES, T.Q5_1, (32, 25))
    types.block_type.cache_clear()
    with pytest.raises(IncompatibleLibraryError, match="type 7 is Q5_1, not Q5_1 as gguf knows it"):
        types.block_type(T.Q5_1)


@pytest.mark.parametrize("kind", [T.Q8_0, T.Q4_0, T.MXFP4, T.Q6_K])
def test_rows_are_what_gguf_py_reads(kind: T) -> None:
    values = np.random.default_rng(3).standard_normal((2, 256)).astype(np.float32)
    rows = np.zeros((2, types.block_type(kind).row_bytes(256)), np.uint8)
    assert types.quantize(kind, values.ctypes.data, 2, 256, rows.ctypes.data) == rows.nbytes
    out = np.zeros_like(values)
    types.dequantize(kind, rows.ctypes.data, values.size, out.ctypes.data)
    np.testing.assert_allclose(out, gguf.quants.dequantize(rows, kind), rtol=1e-6, atol=1e-7)


def test_importance_is_needed_where_ggml_would_abort_without() -> None:
    assert [kind for kind in (T.Q2_K, T.IQ2_XXS, T.IQ2_XS, T.MXFP4) if types.needs_importance(kind)] == [
        T.IQ2_XXS,
        T.IQ2_XS,
    ]
