from __future__ import annotations

import math

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from localrun.errors import UnsupportedModelError
from localrun.offload.kernels import FfnSpec, make_kernel
from tests.offload.kernels.support import Experts, Pairs, relative_error

TYPES = [
    T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K,
    T.IQ2_XXS, T.IQ2_XS, T.IQ3_XXS, T.IQ1_S, T.IQ4_NL, T.IQ3_S, T.IQ2_S, T.IQ4_XS, T.TQ1_0, T.TQ2_0, T.MXFP4,
]  # fmt: skip


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_every_ggml_type_agrees_with_gguf_dequantization(type_: T) -> None:
    rng = np.random.default_rng(int(type_))
    spec = FfnSpec((type_, type_, type_), 256, 512, 1.0)
    kernel = make_kernel(spec, math="f32", n_threads=2)
    experts = Experts.random(spec, 3, rng)
    memory, slots = experts.pack(kernel)
    pairs = Pairs.random([2, 0, 5], 4, rng)
    x, out = rng.standard_normal((4, 256), dtype=np.float32), np.zeros((7, 256), np.float32)
    kernel.run(slots, pairs.starts, pairs.x_rows, pairs.out_rows, x, out)
    for expert in (0, 2):
        of = pairs.of(expert)
        # Rounding of F32 sums only; gguf-py's own F32 arithmetic differs from ggml's in the last bit.
        assert relative_error(out[pairs.out_rows[of]], experts.ffn(expert, x[pairs.x_rows[of]])) < 1e-6
    assert memory.size


def test_mixed_types_odd_shapes_and_strided_rows() -> None:
    rng = np.random.default_rng(1)
    spec = FfnSpec((T.MXFP4, T.Q8_0, T.F32), 96, 160 + 32, math.inf)
    kernel = make_kernel(spec, math="f32", n_threads=2)
    experts = Experts.random(spec, 2, rng)
    _memory, slots = experts.pack(kernel)
    pairs = Pairs.random([300, 1], 9, rng)
    x = rng.standard_normal((9, 200), dtype=np.float32)[:, 32:128]
    out = np.full((301, 112), 7, np.float32)
    kernel.run(slots, pairs.starts, pairs.x_rows, pairs.out_rows, x, out[:, :96])
    for expert in range(2):
        of = pairs.of(expert)
        assert relative_error(out[pairs.out_rows[of], :96], experts.ffn(expert, x[pairs.x_rows[of]])) < 1e-6
    assert (out[:, 96:] == 7).all()


@pytest.mark.parametrize("which", range(3))
def test_project_is_one_matrix_alone(which: int) -> None:
    rng = np.random.default_rng(2)
    spec = FfnSpec((T.Q4_K, T.Q4_K, T.Q6_K), 256, 512, math.inf)
    kernel = make_kernel(spec, math="f32", n_threads=2)
    experts = Experts.random(spec, 2, rng)
    _memory, slots = experts.pack(kernel)
    pairs = Pairs.random([3, 2], 4, rng)
    n_out, n_in = (256, 512) if which == 2 else (512, 256)
    x, out = rng.standard_normal((4, n_in), dtype=np.float32), np.zeros((5, n_out), np.float32)
    kernel.project(which, slots, pairs.starts, pairs.x_rows, pairs.out_rows, x, out)
    for expert in range(2):
        of = pairs.of(expert)
        want = x[pairs.x_rows[of]].astype(np.float64) @ experts.matrix(expert, which).T
        assert relative_error(out[pairs.out_rows[of]], want) < 1e-6


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="1000 values is not a multiple of Q4_K's 256"):
        make_kernel(FfnSpec((T.Q4_K, T.Q4_K, T.Q4_K), 1000, 512, math.inf), math="f32", n_threads=1)
