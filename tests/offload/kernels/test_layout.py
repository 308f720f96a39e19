"""Sizes of experts without a kernel agree with the kernels', so that a plan counts what a load takes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.offload.kernels import FfnSpec, make_kernel
from localrun.offload.kernels.layout import expert_layout
from localrun.offload.kernels.spec import Math
from localrun.pages import anonymous

MIXES = [(QT.MXFP4,) * 3, (QT.Q8_0,) * 3, (QT.F32,) * 3, (QT.Q2_K, QT.Q2_K, QT.Q4_K), (QT.Q8_0, QT.Q8_0, QT.F32)]


@pytest.mark.parametrize(("types", "math"), list(product(MIXES, ("int8", "f32"))))
def test_the_layout_is_the_kernels(types: tuple[QT, QT, QT], math: Math) -> None:
    layout = expert_layout(types, 512, 256, math=math)
    kernel = make_kernel(FfnSpec(types, 512, 256, 10.0), math=math, n_threads=1)
    assert layout.raw_bytes == kernel.raw_bytes
    assert layout.raw_is_packed == kernel.raw_is_packed
    assert layout.slot_bytes == kernel.slot_bytes


@pytest.mark.parametrize(("types", "math"), list(product(MIXES, ("int8", "f32"))))
def test_matrices_may_be_packed_one_by_one(types: tuple[QT, QT, QT], math: Math) -> None:
    kernel = make_kernel(FfnSpec(types, 512, 256, 10.0), math=math, n_threads=1)
    raw = np.random.default_rng(7).integers(0, 256, sum(kernel.raw_bytes), np.uint8)
    at_once, one_by_one = (np.frombuffer(anonymous(kernel.slot_bytes, forked=False), np.uint8) for _ in range(2))
    kernel.pack(raw, at_once.ctypes.data)
    rows = np.split(raw, np.cumsum(kernel.raw_bytes)[:2])
    for which in (2, 0, 1):
        kernel.pack_matrix(which, rows[which], one_by_one.ctypes.data)
    np.testing.assert_array_equal(one_by_one, at_once)


def test_rows_that_no_kernel_rearranges_lie_back_to_back() -> None:
    layout = expert_layout((QT.F32, QT.F32, QT.F32), 96, 40, math="f32")
    matrix = 96 * 40 * 4
    assert layout.raw_is_packed
    assert layout.raw_bytes == (matrix, matrix, matrix)
    assert layout.offsets == (0, matrix, 2 * matrix)
    assert layout.slot_bytes == -(-3 * matrix // 64) * 64
