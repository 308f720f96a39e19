"""Which row kernel a matrix gets, what its copy in a slot takes, and what a kernel is called."""

from __future__ import annotations

import math

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from localrun.errors import UnsupportedModelError
from localrun.ggml.types import block_type
from localrun.offload.kernels import FfnSpec
from localrun.offload.kernels.cpu import level
from localrun.offload.kernels.kernel import ExpertKernel, PackedMatrix, make_kernel, warm_up
from localrun.offload.kernels.panels import FLOAT32


def test_rows_go_to_vector_code_where_there_is_some(kernel_level: str) -> None:
    chosen = {type_: PackedMatrix.choose(type_, 64, 256, math="int8") for type_ in (T.Q8_0, T.Q5_K, T.Q5_1, T.F32)}
    fast = "generic" if kernel_level == "generic" else level().value
    assert {type_: matrix.arithmetic for type_, matrix in chosen.items()} == {
        T.Q8_0: fast,
        T.Q5_K: fast,
        T.Q5_1: "f32",  # no kernel of its own: ggml dequantizes
        T.F32: "f32" if kernel_level == "generic" else fast,
    }
    assert chosen[T.Q8_0].interleaved == (kernel_level != "generic")
    assert chosen[T.F32].panel.kind == FLOAT32


@pytest.mark.parametrize("type_", [T.MXFP4, T.Q8_0, T.Q2_K, T.BF16], ids=lambda type_: type_.name)
def test_exact_arithmetic_keeps_ggml_s_rows(type_: T) -> None:
    matrix = PackedMatrix.choose(type_, 48, 256, math="f32")
    assert (matrix.arithmetic, matrix.interleaved) == ("f32", False)
    assert matrix.raw_bytes == matrix.packed_bytes == 48 * block_type(type_).row_bytes(256)
    raw = np.random.default_rng(1).integers(0, 256, matrix.raw_bytes).astype(np.uint8)
    packed, back = np.empty_like(raw), np.empty_like(raw)
    matrix.pack(raw.ctypes.data, packed.ctypes.data)
    np.testing.assert_array_equal(packed, raw)
    matrix.unpack(packed.ctypes.data, back.ctypes.data)
    np.testing.assert_array_equal(back, raw)


def test_a_view_lies_at_its_offset() -> None:
    matrix = PackedMatrix.choose(T.Q8_0, 64, 256, math="int8")
    view = matrix.at(4096)
    assert (view.offset, view.n_in, view.n_out, view.rows_address) == (4096, 256, 64, matrix.rows_address)


def test_a_kernel_is_named_after_its_types_and_their_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALRUN_KERNELS", "generic")
    mixed = make_kernel(FfnSpec((T.MXFP4, T.MXFP4, T.Q8_0), 64, 96, math.inf), n_threads=1)
    assert isinstance(mixed, ExpertKernel)
    assert mixed.name == "mxfp4-generic+q8_0-generic"
    assert mixed.raw_bytes == (96 * 34, 96 * 34, 64 * 3 * 34)
    assert mixed.slot_bytes >= sum(mixed.raw_bytes)
    exact = make_kernel(FfnSpec((T.F32,) * 3, 64, 96, math.inf), math="f32", n_threads=1)
    assert exact.name == "f32-f32"


def test_rows_that_are_no_whole_blocks_have_no_kernel() -> None:
    with pytest.raises(UnsupportedModelError, match="not a multiple"):
        PackedMatrix.choose(T.Q4_K, 64, 100, math="int8")
    warm_up([T.F32])
