"""ggml's quantizers behind our checks: every type within its error, and nothing that makes the C code abort gets to it."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.errors import FormatError
from localrun.quant.formats.k_quantize import TYPES as K_TYPES
from localrun.quant.formats.quantize import dequantize_rows, prepare_weights, quantize_rows
from localrun.quant.formats.transcode import Rows, convert_rows
from localrun.quant.gguf.file import tensor_bytes
from tests.reference import dequantize

# Relative RMS error on Gaussian weights: measured, plus a tenth. One bit less doubles it, or nearly so.
# IQ2_XS and IQ2_S are left to users: their tables take seconds to compute.
BOUNDS = {
    QT.MXFP4: 0.13,
    QT.Q8_0: 0.008,
    QT.Q6_K: 0.022,
    QT.Q5_K: 0.042,
    QT.Q4_K: 0.085,
    QT.IQ4_XS: 0.09,
    QT.Q3_K: 0.19,
    QT.IQ3_S: 0.18,
    QT.IQ3_XXS: 0.24,
    QT.Q2_K: 0.34,
    QT.IQ2_XXS: 0.42,
}


UNSHRUNK = (QT.Q2_K, QT.IQ2_XXS)
"""Formats whose steps are not those of least squares."""


def relative_rms(values: npt.NDArray[Any], decoded: npt.NDArray[Any]) -> float:
    return float(np.sqrt(np.square(decoded - values).sum() / np.square(values).sum()))


@pytest.mark.parametrize("kind", BOUNDS)
def test_every_type_keeps_its_error_and_decodes_as_gguf_says(kind: QT) -> None:
    rng = np.random.default_rng(int(kind))
    values = rng.standard_normal((4, 512), dtype=np.float32) * np.float32(0.02)
    for weights in (None, rng.lognormal(0, 2, 512).astype(np.float32)):
        rows = quantize_rows(values, kind, weights)
        decoded = gguf.quants.dequantize(rows, kind).reshape(values.shape)
        np.testing.assert_allclose(dequantize_rows(rows, kind).reshape(values.shape), decoded, rtol=1e-6, atol=1e-9)
        if weights is None:
            assert 0 < relative_rms(values, decoded) < BOUNDS[kind]


@pytest.mark.parametrize("kind", [QT.Q2_K, QT.Q3_K, QT.Q4_K, QT.IQ3_XXS, QT.IQ2_XXS])
def test_importance_moves_the_error_to_where_it_counts_less(kind: QT) -> None:
    rng = np.random.default_rng(7)
    values = rng.standard_normal((64, 256), dtype=np.float32)
    weights = np.where(rng.permutation(256) < 64, np.float32(50), np.float32(1))
    before = np.square(dequantize_rows(quantize_rows(values, kind), kind).reshape(values.shape) - values).mean(0)
    after = np.square(dequantize_rows(quantize_rows(values, kind, weights), kind).reshape(values.shape) - values).mean(
        0
    )
    assert (after * weights).sum() < 0.9 * (before * weights).sum()


@pytest.mark.parametrize("kind", BOUNDS)
def test_what_makes_the_c_code_abort_is_refused_or_made_harmless(kind: QT) -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal((2, 512), dtype=np.float32)
    for bad in (np.nan, np.inf, 1e6):
        damaged = values.copy()
        damaged[1, 77] = bad
        with pytest.raises(FormatError, match=r"file: w: .*(NaN|too large)"):
            quantize_rows(damaged, kind, where="file: w")
    with pytest.raises(FormatError, match="rows of 100 values"):
        quantize_rows(values[:, :100].copy(), kind)
    zero_block, tiny = values.copy(), values.copy()
    zero_block[:, 256:] = 0
    tiny[0], tiny[1, 100:200] = tiny[0] * np.float32(1e-30), tiny[1, 100:200] * np.float32(1e-14)
    sparse = np.zeros(512, np.float32)
    sparse[3] = 1e-20
    for hard in (values, zero_block, tiny, np.zeros_like(values)):
        for weights in (None, np.zeros(512, np.float32), sparse, np.full(512, 1e30, np.float32)):
            decoded = dequantize_rows(quantize_rows(hard, kind, weights), kind)
            assert np.isfinite(decoded).all()
    for weights in (np.ones(4, np.float32), np.full(512, -1, np.float32), np.full(512, np.nan, np.float32)):
        with pytest.raises(FormatError, match="importance"):
            quantize_rows(values, kind, weights)


def test_scale_of_the_importance_does_not_matter() -> None:
    rng = np.random.default_rng(5)
    weights = rng.lognormal(0, 1, 256).astype(np.float32)
    values = rng.standard_normal((3, 256), dtype=np.float32)
    prepared = prepare_weights(weights * np.float32(2**20), 256, QT.Q2_K, "w")
    np.testing.assert_array_equal(prepared, prepare_weights(weights, 256, QT.Q2_K, "w"))
    np.testing.assert_array_equal(quantize_rows(values, QT.Q2_K, prepared), quantize_rows(values, QT.Q2_K, weights))


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "BF16", "F32"])
def test_every_source_dtype_is_decoded_right_and_its_loss_is_measured(dtype: str) -> None:
    rng = np.random.default_rng(11)
    n_out, n_in = 200, 256
    if dtype == "I8":
        weight, scale = (
            rng.integers(0, 256, n_out * n_in // 2, dtype=np.uint8),
            rng.integers(116, 120, n_out * n_in // 32),
        )
        values = dequantize(dtype, [n_out, n_in // 2], weight.tobytes(), scale.astype(np.uint8).tobytes())
    elif dtype == "F8_E4M3":
        weight, scale = rng.integers(0, 0x7F, n_out * n_in, dtype=np.uint8), rng.integers(112, 118, 2 * 2)
        values = dequantize(dtype, [n_out, n_in], weight.tobytes(), scale.astype(np.uint8).tobytes())
    else:
        values, scale = rng.standard_normal((n_out, n_in), dtype=np.float32), np.empty(0)
        if dtype == "BF16":
            values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
        weight = (values.view(np.uint16)[:, 1::2].copy() if dtype == "BF16" else values).view(np.uint8).reshape(-1)
    importance = rng.lognormal(0, 1, n_in).astype(np.float32)
    for kind in (QT.Q3_K, QT.IQ2_XXS):
        out = np.empty(tensor_bytes(kind, (n_in, n_out)), np.uint8)
        rows = Rows(dtype, weight, scale.astype(np.uint8), n_out, n_in, "file: w", importance=importance)
        loss = convert_rows(rows, kind, out)
        np.testing.assert_array_equal(out, quantize_rows(values.reshape(n_out, n_in), kind, importance))
        decoded = gguf.quants.dequantize(out, kind).reshape(values.shape)
        assert loss is not None
        assert loss.relative_rms == pytest.approx(relative_rms(values.astype(np.float64), decoded), rel=1e-4)


@pytest.mark.parametrize("kind", [*sorted(K_TYPES), QT.IQ2_XXS])
@pytest.mark.parametrize("fp4", [True, False])
def test_our_quantizers_lose_no_more_than_ggmls_and_do_not_depend_on_how_rows_are_cut(kind: QT, fp4: bool) -> None:
    rng = np.random.default_rng(13)
    values = rng.standard_normal((37, 768), dtype=np.float32) * np.float32(0.02)
    values[5, 256:512] = 0
    values[6, :256] = 0.25
    if fp4:
        values = dequantize_rows(quantize_rows(values, QT.MXFP4), QT.MXFP4).reshape(values.shape)
    importance = rng.lognormal(0, 1.5, 768).astype(np.float32)
    for weights in (None, importance):
        counts = np.float32(1) if weights is None else weights

        def decoded(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
            return gguf.quants.dequantize(rows, kind).reshape(-1, 256).astype(np.float64)

        exact, counts = values.reshape(-1, 256), np.broadcast_to(counts, values.shape).reshape(-1, 256)
        theirs = (np.square(decoded(quantize_rows(values, kind, weights, ours=False)) - exact) * counts).sum()
        ours = quantize_rows(values, kind, weights)
        mine = decoded(ours)
        if kind in UNSHRUNK:  # the same with the step of least squares
            along, own = ((product * counts).sum(1, keepdims=True) for product in (mine * exact, np.square(mine)))
            mine *= np.divide(along, own, out=np.zeros_like(own), where=own > 0)
        # On FP4 sources and with importance it is far less; Gaussian weights are the hardest case.
        assert (np.square(mine - exact) * counts).sum() < theirs
        cut = [quantize_rows(values[a:b], kind, weights) for a, b in ((0, 1), (1, 6), (6, 30), (30, 37))]
        np.testing.assert_array_equal(np.concatenate(cut), ours)


def test_rows_of_more_groups_than_are_searched_together_are_quantized_like_their_parts() -> None:
    rng = np.random.default_rng(17)
    values, importance = rng.standard_normal((3, 2304), dtype=np.float32), rng.lognormal(0, 1, 2304).astype(np.float32)
    importance[0] = importance[2048] = importance.max()  # so that the parts' importance is scaled alike
    parts = [
        quantize_rows(np.ascontiguousarray(values[:, a:b]), QT.IQ2_XXS, importance[a:b].copy()).reshape(3, -1)
        for a, b in ((0, 2048), (2048, 2304))
    ]
    whole = quantize_rows(values, QT.IQ2_XXS, importance).reshape(3, -1)
    np.testing.assert_array_equal(np.concatenate(parts, 1), whole)


@pytest.mark.parametrize("kind", UNSHRUNK)
def test_two_bits_do_not_shrink_the_weights(kind: QT) -> None:
    rng = np.random.default_rng(19)
    values, importance = rng.standard_normal((64, 1024), dtype=np.float32), rng.lognormal(0, 1, 1024).astype(np.float32)
    decoded = dequantize_rows(quantize_rows(values, kind, importance), kind).reshape(values.shape)
    kept = float((importance * values * decoded).sum() / (importance * np.square(values)).sum())
    assert kept == pytest.approx(1, abs=0.012)  # [m] by least squares 0.96 and 0.94
