from __future__ import annotations

import math

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from localrun.offload.kernels import FfnSpec, make_kernel
from localrun.offload.kernels.interleaved.formats import FORMATS
from tests.offload.kernels.support import Experts, Pairs, dequantize, ggml_ffn, quantize, relative_error

QUANTIZED = [t for t in FORMATS if t not in (T.F32, T.F16, T.BF16)]


def heavy_tailed(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Activations as models have them: most small, some channels large."""
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[1]))).astype(np.float32)


@pytest.mark.parametrize("type_", QUANTIZED, ids=lambda t: t.name)
def test_error_is_not_above_ggmls_own_8_bit_arithmetic(type_: T) -> None:
    rng = np.random.default_rng(int(type_))
    spec = FfnSpec((type_, type_, type_), 512, 768, 10.0)
    kernel = make_kernel(spec, n_threads=2)
    assert kernel.name.startswith(type_.name.lower())
    experts = Experts.random(spec, 1, rng)
    _memory, slots = experts.pack(kernel)
    x, out = heavy_tailed((48, 512), rng), np.zeros((48, 512), np.float32)
    rows = np.arange(48, dtype=np.int32)
    kernel.run(slots, np.array([0, 48], np.int32), rows, rows, x, out)
    want = experts.ffn(0, x)
    # Same rounding of activations, so the same error but for chance: 48 x 512 outputs leave a few percent.
    assert relative_error(out, want) < 1.03 * relative_error(ggml_ffn(experts, 0, x), want)


@pytest.mark.parametrize("counts", [[1] * 6, [0, 3, 0, 13, 2], [40, 300, 1]], ids=["decode", "small", "prefill"])
@pytest.mark.parametrize(
    "types", [(T.MXFP4,) * 3, (T.Q4_K, T.Q2_K, T.Q3_K), (T.Q8_0, T.BF16, T.MXFP4), (T.Q2_K, T.Q2_K, T.IQ4_XS)]
)
def test_any_mix_of_types_and_pairs(types: tuple[T, T, T], counts: list[int]) -> None:
    rng = np.random.default_rng(3)
    spec = FfnSpec(types, 256, 512, 2.0)
    kernel = make_kernel(spec, n_threads=2)
    experts = Experts.random(spec, len(counts), rng)
    _memory, slots = experts.pack(kernel)
    pairs = Pairs.random(counts, 7, rng)
    x, out = rng.standard_normal((7, 256), dtype=np.float32), np.zeros((sum(counts), 256), np.float32)
    kernel.run(slots, pairs.starts, pairs.x_rows, pairs.out_rows, x, out)
    for expert in range(len(counts)):
        of = pairs.of(expert)
        if of.stop > of.start:
            # 8-bit activations twice: about 1 % on random data.
            assert relative_error(out[pairs.out_rows[of]], experts.ffn(expert, x[pairs.x_rows[of]])) < 0.02


@pytest.mark.parametrize(
    ("type_", "n_embd", "n_ff"), [(T.MXFP4, 96, 160), (T.Q8_0, 32, 32), (T.MXFP4, 4128, 64), (T.BF16, 70, 45)]
)
def test_shapes_that_are_not_multiples_of_16_rows_or_128_columns(type_: T, n_embd: int, n_ff: int) -> None:
    rng = np.random.default_rng(4)
    spec = FfnSpec((type_,) * 3, n_embd, n_ff, math.inf)
    kernel = make_kernel(spec, n_threads=2)
    experts = Experts.random(spec, 2, rng)
    _memory, slots = experts.pack(kernel)
    pairs = Pairs.random([1, 19], 5, rng)
    x, out = rng.standard_normal((5, n_embd), dtype=np.float32), np.full((20, n_embd + 16), 7, np.float32)
    kernel.run(slots, pairs.starts, pairs.x_rows, pairs.out_rows, x, out[:, :n_embd])
    for expert in range(2):
        of = pairs.of(expert)
        assert relative_error(out[pairs.out_rows[of], :n_embd], experts.ffn(expert, x[pairs.x_rows[of]])) < 0.03
    assert (out[:, n_embd:] == 7).all()


@pytest.mark.parametrize("type_", QUANTIZED, ids=lambda t: t.name)
@pytest.mark.parametrize("factor", [0.0, 1e-34, 1e-12, 1e12])
def test_zero_tiny_and_huge_activations_stay_finite(type_: T, factor: float) -> None:
    rng = np.random.default_rng(5)
    kernel = make_kernel(FfnSpec((type_,) * 3, 256, 256, math.inf), n_threads=1)
    experts = Experts.random(FfnSpec((type_,) * 3, 256, 256, math.inf), 1, rng)
    _memory, slots = experts.pack(kernel)
    x, out = (rng.standard_normal((3, 256)) * factor).astype(np.float32), np.zeros((3, 256), np.float32)
    x[1] = 0
    rows = np.arange(3, dtype=np.int32)
    kernel.project(2, slots, np.array([0, 3], np.int32), rows, rows, x, out)
    want = x.astype(np.float64) @ experts.matrix(0, 2).T
    assert np.isfinite(out).all()
    assert (out[1] == 0).all()
    assert np.abs(out - want).max() <= 0.02 * np.abs(want).max() + 1e-30


def test_infinite_input_is_not_hidden() -> None:
    rng = np.random.default_rng(6)
    spec = FfnSpec((T.MXFP4,) * 3, 64, 64, 10.0)
    kernel = make_kernel(spec, n_threads=1)
    _memory, slots = Experts.random(spec, 1, rng).pack(kernel)
    x, out = np.ones((1, 64), np.float32), np.zeros((1, 64), np.float32)
    x[0, 3] = np.inf
    zero = np.zeros(1, np.int32)
    kernel.project(0, slots, np.array([0, 1], np.int32), zero, zero, x, out)
    assert not np.isfinite(out).any()


def test_mxfp4_scales_from_the_smallest_to_the_largest() -> None:
    exponents = np.repeat(np.array([1, 2, 64, 127, 190, 253], np.uint8), 16)
    rows = np.full((96, 17), 0x22, np.uint8)  # every element is 1.0
    rows[:, 0] = exponents
    matrix = rows
    spec = FfnSpec((T.MXFP4,) * 3, 32, 96, math.inf)
    kernel = make_kernel(spec, n_threads=1)
    down = quantize(T.MXFP4, np.zeros((32, 96), np.float32))
    memory = np.zeros(kernel.slot_bytes + 64, np.uint8)
    slot = -(-memory.ctypes.data // 64) * 64
    kernel.pack(np.concatenate([matrix.reshape(-1), matrix.reshape(-1), down.reshape(-1)]), slot)
    x, out, zero = np.full((1, 32), 2.0**-10, np.float32), np.zeros((1, 96), np.float32), np.zeros(1, np.int32)
    kernel.project(0, np.array([slot], np.uint64), np.array([0, 1], np.int32), zero, zero, x, out)
    want = dequantize(T.MXFP4, matrix) @ x[0].astype(np.float64)
    np.testing.assert_allclose(out[0], want, rtol=1e-6, atol=1e-38)  # below 2**-126 F32 loses bits


def test_result_does_not_depend_on_the_number_of_threads_or_tokens() -> None:
    rng = np.random.default_rng(7)
    spec = FfnSpec((T.MXFP4, T.MXFP4, T.Q2_K), 256, 512, 10.0)
    one, two = make_kernel(spec, n_threads=1), make_kernel(spec, n_threads=2)
    experts = Experts.random(spec, 1, rng)
    _memory, slots = experts.pack(one)
    x = rng.standard_normal((21, 256), dtype=np.float32)
    rows, together, alone = (
        np.arange(21, dtype=np.int32),
        np.zeros((21, 256), np.float32),
        np.zeros((21, 256), np.float32),
    )
    two.run(slots, np.array([0, 21], np.int32), rows, rows, x, together)
    for token in range(21):
        one.run(slots, np.array([0, 1], np.int32), rows[token:], rows[token:], x, alone)
    np.testing.assert_array_equal(together, alone)
