from __future__ import annotations

import ctypes

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from numba.core import config

from localrun.offload.kernels.cpu import level
from localrun.offload.kernels.interleaved.formats import runnable
from localrun.offload.kernels.interleaved.rows import rows_function
from localrun.offload.kernels.kernel import PackedMatrix
from localrun.offload.kernels.reading import Reading, reading
from tests.offload.kernels.support import quantize


@pytest.mark.parametrize(
    ("name", "best"),
    [("znver5", Reading.AHEAD), ("emeraldrapids", Reading.PAGES), ("znver4", Reading.IN_ORDER), ("x86-64", Reading.IN_ORDER)],
)  # fmt: skip
def test_processors_read_as_they_were_measured(name: str, best: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CPU_NAME", name)
    assert reading() is best


@pytest.mark.parametrize("type_", [T.MXFP4, T.Q2_K, T.Q4_K], ids=lambda t: t.name)
def test_all_ways_to_read_give_the_same_bits(type_: T) -> None:
    if not runnable(type_):
        pytest.skip("plain vector code")
    rng = np.random.default_rng(4)
    n_out, n_in = 48, 1024
    matrix = PackedMatrix.choose(type_, n_out, n_in, math="int8")
    packed = np.zeros(matrix.packed_bytes + 64, np.uint8)
    packed = packed[-packed.ctypes.data % 64 :]
    rows = quantize(type_, rng.standard_normal((n_out, n_in), dtype=np.float32))
    matrix.pack(rows.ctypes.data, packed.ctypes.data)
    panel = rng.integers(0, 64, 8 * n_in, dtype=np.int8)  # of any layout: four such bytes are a small F32, too
    for n_tokens in (1, 2, 4):
        results = []
        for way in Reading:
            out = np.zeros((n_tokens, n_out), np.float32)
            run = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 9)(rows_function(type_, level(), way).address)
            run(packed.ctypes.data, 0, 0, n_out, n_in, panel.ctypes.data, n_tokens, out.ctypes.data, 4 * n_out)
            results.append(out.tobytes())
        assert np.frombuffer(results[0], np.float32).any()
        assert results == [results[0]] * len(Reading)
