"""Number formats' loops, by the formats' definitions: every code of FP8 and FP4, every half, and Q8_0 as gguf-py makes it."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.quant.formats import kernels
from tests.reference import dequantize

Bytes = npt.NDArray[np.uint8]


def e8m0(rng: np.random.Generator, *shape: int) -> Bytes:
    return rng.integers(110, 140, shape).astype(np.uint8)


@pytest.fixture
def fp8() -> tuple[Bytes, Bytes, npt.NDArray[np.float32]]:
    """Weights (130, 160) with every code but NaN, scales of 128 x 128, and what they are."""
    rng = np.random.default_rng(1)
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    weight = rng.permutation(np.resize(codes, 130 * 160)).astype(np.uint8)
    scale = e8m0(rng, 2, 2)
    return weight, scale.reshape(-1), dequantize("F8_E4M3", [130, 160], weight.tobytes(), scale.tobytes())


def test_fp8_to_f32_and_bf16_are_exact(fp8: tuple[Bytes, Bytes, npt.NDArray[np.float32]]) -> None:
    weight, scale, expected = fp8
    row, out, out16 = np.empty(128, np.float32), np.empty(130 * 160, np.float32), np.empty(130 * 160, np.uint16)
    kernels.fp8_to_f32(weight, scale, 130, 160, row, out)
    np.testing.assert_array_equal(out.reshape(130, 160), expected)
    kernels.fp8_to_bf16(weight, scale, 130, 160, row, out16)
    np.testing.assert_array_equal((out16.astype(np.uint32) << 16).view(np.float32), out)


def test_fp4_becomes_mxfp4_and_f32_without_a_loss() -> None:
    rng = np.random.default_rng(2)
    weight, scale = rng.integers(0, 256, 16 * 64).astype(np.uint8), e8m0(rng, 64)
    scale[0] = 0  # 2^-127
    expected = dequantize("I8", [64, 16], weight.tobytes(), scale.tobytes()).reshape(-1)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    out, packed = np.empty(64 * 32, np.float32), np.empty(64 * 17, np.uint8)
    kernels.fp4_to_f32(weight, scale, magnitudes, out)
    np.testing.assert_array_equal(out, expected)
    kernels.fp4_to_mxfp4(weight, scale, packed)
    np.testing.assert_array_equal(gguf.quants.dequantize(packed, QT.MXFP4)[32:], expected[32:])
    np.testing.assert_array_equal(packed.reshape(64, 17)[:, 0], scale)


def test_q8_0_is_gguf_s() -> None:
    values = np.random.default_rng(3).standard_normal(32 * 21).astype(np.float32)
    values[:32] = 0
    out = np.empty(34 * 21, np.int8)
    bad, error, power = kernels.f32_to_q8_0(values, np.empty(128, np.float32), out, out.view(np.uint16))
    assert bad == -1
    np.testing.assert_array_equal(out.view(np.uint8), gguf.quants.quantize(values, QT.Q8_0))
    decoded = gguf.quants.dequantize(out.view(np.uint8), QT.Q8_0)
    assert error == pytest.approx(np.square(values.astype(np.float64) - decoded).sum(), rel=1e-4)
    assert power == pytest.approx(np.square(values.astype(np.float64)).sum(), rel=1e-5)


def test_fp8_to_q8_0_is_the_two_steps_in_one(fp8: tuple[Bytes, Bytes, npt.NDArray[np.float32]]) -> None:
    weight, scale, exact = fp8
    out, row = np.empty(130 * 5 * 34, np.int8), np.empty(128, np.float32)
    bad, *_ = kernels.fp8_to_q8_0(weight, scale, 130, 160, row, out, out.view(np.uint16))
    assert bad == -1
    np.testing.assert_array_equal(out.view(np.uint8), gguf.quants.quantize(exact.reshape(-1), QT.Q8_0))


def test_a_scale_that_is_no_half_is_told_with_its_place() -> None:
    values = np.ones(32 * 9, np.float32)
    values[32 * 6 + 5] = 127 * 65520  # the least scale that rounds to infinity
    out = np.empty(34 * 9, np.int8)
    bad, *_ = kernels.f32_to_q8_0(values, np.empty(128, np.float32), out, out.view(np.uint16))
    assert bad == 32 * 6
    values[32 * 6 + 5] = 127 * 65504
    assert kernels.f32_to_q8_0(values, np.empty(128, np.float32), out, out.view(np.uint16))[0] == -1


def test_bf16_rounds_to_even_and_back_is_exact() -> None:
    bits = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000, 0x7F7FFFFF], np.uint32)
    out, back = np.empty(len(bits), np.uint16), np.empty(len(bits), np.uint32)
    kernels.f32_to_bf16(bits, out)
    assert [hex(int(value)) for value in out] == ["0x3f80", "0x3f80", "0x3f82", "0x3f81", "0x3f80", "0xbf82", "0x7f80"]
    kernels.bf16_to_f32(out, back)
    np.testing.assert_array_equal(back, out.astype(np.uint32) << 16)


def test_halves_are_numpy_s() -> None:
    halves = np.arange(0x7C00, dtype=np.uint16)
    values = halves.view(np.float16).astype(np.float32)
    between = (values[:-1].astype(np.float64) + values[1:]) / 2
    near = np.concatenate([values, between, np.nextafter(between.astype(np.float32), np.float32(0))]).astype(np.float32)
    found = [kernels._f16_bits(value) for value in near[::37]]
    np.testing.assert_array_equal(found, near[::37].astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal([kernels._f16_value(half) for half in halves[::13]], values[::13])
    assert kernels._f16_bits(np.float32(65520)) == 0x7C00


def test_small_helpers() -> None:
    assert not kernels.any_above(np.array([1, 0x80FF], np.uint16), np.uint16(0x7F), np.uint16(0x7F))
    assert kernels.any_above(np.array([1, 0x80FF], np.uint16), np.uint16(0xFF), np.uint16(0x7F))
    x, out = np.array([1e-9, -1e-9, 1e-8, -1.0, 0], np.float32), np.full(5, 7, np.float32)
    kernels.flush_tiny(x, np.float32(1e-8), out)
    np.testing.assert_array_equal(out, np.array([0, 0, 1e-8, -1, 0], np.float32))


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e15])
def test_errors_are_summed_where_f32_alone_would_underflow(scale: float) -> None:
    rng = np.random.default_rng(5)
    x = (rng.standard_normal(10_000) * scale).astype(np.float32)
    y = (x * (1 + 0.01 * rng.standard_normal(10_000))).astype(np.float32)
    error, power = kernels.squared_error(x, y)
    assert error == pytest.approx(np.square(x.astype(np.float64) - y).sum(), rel=1e-4)
    assert power == pytest.approx(np.square(x.astype(np.float64)).sum(), rel=1e-4)
