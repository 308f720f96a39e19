from __future__ import annotations

import math

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from localrun.ggml.types import block_type
from localrun.offload.kernels import FfnSpec, make_kernel
from localrun.offload.kernels.cpu import Level, levels
from localrun.offload.kernels.interleaved.formats import FORMATS


def rows_of(spec: FfnSpec) -> np.ndarray:
    """Random bytes of the size of gate|up|down: layouts don't care what they mean."""
    shapes = ((spec.n_ff, spec.n_embd), (spec.n_ff, spec.n_embd), (spec.n_embd, spec.n_ff))
    size = sum(n * block_type(t).row_bytes(m) for t, (n, m) in zip(spec.types, shapes, strict=True))
    return np.random.default_rng(1).integers(0, 256, size, np.uint8)


@pytest.mark.parametrize("level", [Level.GENERIC, levels()[-1]], ids=lambda level: level.value)
@pytest.mark.parametrize("shape", [(512, 768), (256, 256)])
@pytest.mark.parametrize("type_", [*FORMATS, T.IQ2_S], ids=lambda t: t.name)
def test_unpacking_gives_back_what_was_packed(
    type_: T, shape: tuple[int, int], level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows as they are, and interleaved, which is one layout for all levels."""
    monkeypatch.setenv("LOCALRUN_KERNELS", level.value)
    check(FfnSpec((type_,) * 3, *shape, math.inf))


@pytest.mark.parametrize("types", [(T.MXFP4, T.Q8_0, T.F16), (T.BF16, T.F32, T.MXFP4)])
def test_rows_that_fill_no_group_and_no_block(types: tuple[T, T, T]) -> None:
    check(FfnSpec(types, 96, 160, math.inf))
    if types[0] == T.BF16:
        check(FfnSpec((T.BF16, T.F32, T.F16), 70, 45, math.inf))


def check(spec: FfnSpec) -> None:
    kernel = make_kernel(spec, n_threads=1)
    rows = rows_of(spec)
    memory = np.full(kernel.slot_bytes + 64, 0xAA, np.uint8)
    slot = -(-memory.ctypes.data // 64) * 64
    kernel.pack(rows, slot)
    found = np.full(rows.size + 64, 0x55, np.uint8)
    kernel.unpack(slot, found[: rows.size])
    np.testing.assert_array_equal(found[: rows.size], rows)
    assert (found[rows.size :] == 0x55).all()
