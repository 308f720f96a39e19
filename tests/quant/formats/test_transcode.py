"""Number formats: against definitions written out in numpy, gguf-py's decoders and ggml's own quantizer."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as QT
from hypothesis import given, settings
from hypothesis import strategies as st

from localrun.errors import FormatError
from localrun.quant.formats.transcode import (
    Bytes,
    Loss,
    Rows,
    can_convert,
    convert_rows,
    decode_projection,
)
from localrun.quant.gguf.file import tensor_bytes
from localrun.quant.model.source import Encoding, Extent, Projection
from tests.reference import dequantize

NO_SCALE = np.empty(0, np.uint8)


def convert(
    dtype: str, target: QT, weight: npt.NDArray[Any], scale: Bytes, n_out: int, n_in: int
) -> tuple[Bytes, Loss | None]:
    out = np.empty(tensor_bytes(target, (n_in, n_out)), np.uint8)
    raw = np.ascontiguousarray(weight).view(np.uint8).reshape(-1)
    loss = convert_rows(Rows(dtype, raw, scale.reshape(-1), n_out, n_in, "file: tensor"), target, out)
    return out, loss


def decoded(target: QT, out: Bytes, n_out: int, n_in: int) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = gguf.quants.dequantize(out, target).reshape(n_out, n_in)
    return values


def ggml_quantize(target: QT, values: npt.NDArray[np.float32]) -> Bytes:
    """What ggml makes of F32 rows."""
    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so"))))
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    rows = np.ascontiguousarray(values)
    out = np.empty(tensor_bytes(target, rows.shape[::-1]), np.uint8)
    assert function(int(target), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None) == out.size
    return out


def random_fp8(rng: np.random.Generator, n_out: int, n_in: int) -> Bytes:
    magnitude = rng.integers(0, 127, (n_out, n_in), dtype=np.uint8)
    sign = rng.integers(0, 2, (n_out, n_in), dtype=np.uint8)
    return magnitude | sign << np.uint8(7)


def test_mxfp4_block_written_out_by_hand() -> None:
    # elements 0..31 have codes 0..15, 0..15; official byte i holds elements 2i and 2i + 1
    weight = np.array([(2 * i) % 16 | ((2 * i + 1) % 16) << 4 for i in range(16)], np.uint8)
    out, loss = convert("I8", QT.MXFP4, weight, np.array([130], np.uint8), 1, 32)
    assert out.tolist() == [130] + [j | j << 4 for j in range(16)]
    assert loss is None


def test_mxfp4_is_exact_for_every_code_and_every_scale_that_f32_holds() -> None:
    rng = np.random.default_rng(1)
    scale = np.repeat(np.arange(253, dtype=np.uint8), 3)
    weight = rng.integers(0, 256, (scale.size, 16), dtype=np.uint8)
    weight[:, 0] = np.resize(np.arange(256), scale.size)
    expected = dequantize("I8", [scale.size, 16], weight.tobytes(), scale.tobytes())
    for target in (QT.MXFP4, QT.F32):
        out, _ = convert("I8", target, weight, scale, scale.size, 32)
        np.testing.assert_array_equal(decoded(target, out, scale.size, 32), expected)


@settings(max_examples=40, deadline=None)
@given(n_out=st.integers(1, 5), n_blocks=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_mxfp4_is_exact_for_any_shape(n_out: int, n_blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 256, (n_out, n_blocks * 16), dtype=np.uint8)
    scale = rng.integers(90, 140, (n_out, n_blocks), dtype=np.uint8)
    out, _ = convert("I8", QT.MXFP4, weight, scale, n_out, n_blocks * 32)
    expected = dequantize("I8", [n_out, n_blocks * 16], weight.tobytes(), scale.tobytes())
    np.testing.assert_array_equal(decoded(QT.MXFP4, out, n_out, n_blocks * 32), expected)


@pytest.mark.parametrize("scale", [253, 254])
def test_fp4_scales_near_f32s_limit_pass_only_with_codes_that_fit(scale: int) -> None:
    fits, too_large = np.full(16, 0x11, np.uint8), np.full(16, 0x17, np.uint8)
    out, _ = convert("I8", QT.MXFP4, fits, np.array([scale], np.uint8), 1, 32)
    assert decoded(QT.MXFP4, out, 1, 32).max() == 2.0 ** (scale - 128)
    with pytest.raises(FormatError, match="can't be represented exactly"):
        convert("I8", QT.MXFP4, too_large, np.array([scale], np.uint8), 1, 32)


@pytest.mark.parametrize(("n_out", "n_in"), [(1, 32), (128, 128), (130, 160), (300, 224), (257, 544), (3, 48)])
@pytest.mark.parametrize("scales", [(110, 130), (3, 140), (60, 134)])
def test_fp8_to_bf16_and_f32_is_exact_on_ragged_shapes(n_out: int, n_in: int, scales: tuple[int, int]) -> None:
    rng = np.random.default_rng(n_out + n_in)
    weight = random_fp8(rng, n_out, n_in)
    scale = rng.integers(*scales, (-(-n_out // 128), -(-n_in // 128)), dtype=np.uint8)
    expected = dequantize("F8_E4M3", [n_out, n_in], weight.tobytes(), scale.tobytes())
    for target in (QT.BF16, QT.F32):
        out, loss = convert("F8_E4M3", target, weight, scale, n_out, n_in)
        np.testing.assert_array_equal(decoded(target, out, n_out, n_in), expected)
        assert loss is None


@pytest.mark.parametrize(("n_out", "n_in"), [(1, 32), (128, 128), (130, 160), (257, 544)])
@pytest.mark.parametrize("scales", [(110, 130), (3, 40), (60, 134)])
def test_fp8_to_q8_0_rounds_as_ggml_does(n_out: int, n_in: int, scales: tuple[int, int]) -> None:
    rng = np.random.default_rng(n_out * n_in)
    weight = random_fp8(rng, n_out, n_in)
    scale = rng.integers(*scales, (-(-n_out // 128), -(-n_in // 128)), dtype=np.uint8)
    out, loss = convert("F8_E4M3", QT.Q8_0, weight, scale, n_out, n_in)
    values = dequantize("F8_E4M3", [n_out, n_in], weight.tobytes(), scale.tobytes())
    np.testing.assert_array_equal(out, ggml_quantize(QT.Q8_0, values))
    error = (decoded(QT.Q8_0, out, n_out, n_in).astype(np.float64) - values) ** 2
    assert loss is not None
    assert loss.relative_rms == pytest.approx((error.sum() / (values.astype(np.float64) ** 2).sum()) ** 0.5, rel=1e-5)


def test_f32_to_q8_0_and_bf16_rounds_as_ggml_does() -> None:
    rng = np.random.default_rng(2)
    ties = np.array([127, 0.5, -0.5, 1.5, -1.5, 2.5, 0.49999997, -0.49999997] * 4, np.float32)
    tiny = np.array([1e-40, -3e-39, 0, 6e-8] * 8, np.float32)
    normal = rng.standard_normal(32 * 500).astype(np.float32) * np.float32(10.0) ** rng.integers(-6, 5, 32 * 500)
    values = np.concatenate([ties, tiny, np.zeros(32, np.float32), normal.astype(np.float32)]).reshape(-1, 32)
    for target in (QT.Q8_0, QT.BF16):
        out, loss = convert("F32", target, values, NO_SCALE, *values.shape)
        np.testing.assert_array_equal(out, ggml_quantize(target, values))
        error = (decoded(target, out, *values.shape).astype(np.float64) - values) ** 2
        assert loss is not None
        assert loss.relative_rms == pytest.approx(
            (error.sum() / (values.astype(np.float64) ** 2).sum()) ** 0.5, rel=1e-4
        )


def test_bf16_to_f32_and_q8_0() -> None:
    rng = np.random.default_rng(3)
    bits = (rng.standard_normal((6, 64)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    out, _ = convert("BF16", QT.F32, bits, NO_SCALE, 6, 64)
    np.testing.assert_array_equal(out.view(np.float32).reshape(6, 64), values)
    out, _ = convert("BF16", QT.Q8_0, bits, NO_SCALE, 6, 64)
    np.testing.assert_array_equal(out, ggml_quantize(QT.Q8_0, values))


def test_bytes_at_an_odd_address_are_read_right() -> None:
    values = np.arange(64, dtype=np.float32)
    memory = np.zeros(64 * 4 + 1, np.uint8)
    memory[1:] = values.view(np.uint8)
    out = np.empty(64 * 4, np.uint8)
    convert_rows(Rows("F32", memory[1:], NO_SCALE, 1, 64, "w"), QT.F32, out)
    np.testing.assert_array_equal(out.view(np.float32), values)
    q8 = np.empty(68, np.uint8)
    convert_rows(Rows("F32", memory[1:], NO_SCALE, 1, 64, "w"), QT.Q8_0, q8)
    np.testing.assert_array_equal(q8, ggml_quantize(QT.Q8_0, values.reshape(1, 64)))


def nan_case(dtype: str) -> tuple[npt.NDArray[Any], Bytes]:
    if dtype == "I8":
        return np.zeros(16, np.uint8), np.array([0xFF], np.uint8)
    if dtype == "F8_E4M3":
        return np.array([0] * 31 + [0xFF], np.uint8), np.array([127], np.uint8)
    if dtype == "BF16":
        return np.array([0] * 31 + [0xFFC0], np.uint16), NO_SCALE
    return np.array([0] * 31 + [np.nan], np.float32), NO_SCALE


CONVERSIONS = [
    (dtype, target)
    for dtype in ("I8", "F8_E4M3", "BF16", "F32")
    for target in (QT.MXFP4, QT.Q8_0, QT.BF16, QT.F32)
    if can_convert(dtype, target)
]


@pytest.mark.parametrize(("dtype", "target"), CONVERSIONS)
def test_nan_is_refused_with_the_tensors_name(dtype: str, target: QT) -> None:
    weight, scale = nan_case(dtype)
    with pytest.raises(FormatError, match=r"file: tensor: .* NaN"):
        convert(dtype, target, weight, scale, 1, 32)


@pytest.mark.parametrize("target", [QT.Q8_0, QT.BF16, QT.F32])
def test_nan_scale_of_fp8_is_refused(target: QT) -> None:
    with pytest.raises(FormatError, match="scale 0 is NaN"):
        convert("F8_E4M3", target, np.zeros(32, np.uint8), np.array([0xFF], np.uint8), 1, 32)


def test_fp8_beyond_the_targets_range_is_refused_and_zero_is_not() -> None:
    zero, one, small = (np.full(32, code, np.uint8) for code in (0, 0x7E, 1))
    for target in (QT.BF16, QT.F32):
        with pytest.raises(FormatError, match="can't be represented exactly"):
            convert("F8_E4M3", target, one, np.array([250], np.uint8), 1, 32)
        convert("F8_E4M3", target, zero, np.array([250], np.uint8), 1, 32)
    with pytest.raises(FormatError, match="can't be represented exactly in BF16"):
        convert("F8_E4M3", QT.BF16, small, np.array([0], np.uint8), 1, 32)
    with pytest.raises(FormatError, match="too large"):
        convert("F8_E4M3", QT.Q8_0, one, np.array([200], np.uint8), 1, 32)


def test_infinite_weights_do_not_become_q8_0() -> None:
    values = np.full(32, np.inf, np.float32)
    with pytest.raises(FormatError, match="too large"):
        convert("F32", QT.Q8_0, values, NO_SCALE, 1, 32)


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_expert_tables_are_range_checked(dtype: type[Any]) -> None:
    name = "I64" if dtype is np.int64 else "I32"
    out = np.empty(16, np.uint8)
    table = np.array([0, 5, 2, 7], dtype)

    def run(limit: int) -> None:
        convert_rows(Rows(name, table.view(np.uint8), NO_SCALE, 2, 2, "file: tid2eid", limit), QT.I32, out)

    run(8)
    assert out.view(np.int32).tolist() == [0, 5, 2, 7]
    with pytest.raises(FormatError, match="entry 3 is 7, expected 0 to 6"):
        run(7)
    table[1] = -1
    with pytest.raises(FormatError, match="entry 1 is -1"):
        run(8)


def test_decode_projection_serves_both_encodings() -> None:
    rng = np.random.default_rng(4)
    fp4, fp4_scale = rng.integers(0, 256, 64 * 32, dtype=np.uint8), rng.integers(100, 130, 64 * 2, dtype=np.uint8)
    projection = Projection(QT.MXFP4, 64, 64, Encoding.FP4, (Extent(0, 0, 0),) * 2, 64 * 34)
    rows = decode_projection(projection, fp4, fp4_scale)
    np.testing.assert_array_equal(rows, convert("I8", QT.MXFP4, fp4, fp4_scale, 64, 64)[0])
    fp8 = random_fp8(rng, 64, 64).reshape(-1)
    projection = Projection(QT.BF16, 64, 64, Encoding.FP8, (Extent(0, 0, 0),) * 2, 64 * 128)
    rows = decode_projection(projection, fp8, np.array([120], np.uint8))
    np.testing.assert_array_equal(rows, convert("F8_E4M3", QT.BF16, fp8, np.array([120], np.uint8), 64, 64)[0])
