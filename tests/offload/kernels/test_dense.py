from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from localrun.offload.kernels import DenseKernel, threads
from localrun.offload.kernels.layouts import CALL
from tests.offload.kernels.support import dequantize, ggml_matrix, quantize, relative_error


@pytest.mark.parametrize("type_", [T.Q8_0, T.Q4_K, T.BF16, T.Q4_1], ids=lambda t: t.name)
@pytest.mark.parametrize("n_tokens", [1, 21])
def test_product_is_no_worse_than_ggmls(type_: T, n_tokens: int, kernel_level: str) -> None:
    rng = np.random.default_rng(int(type_))
    rows = quantize(type_, rng.standard_normal((1000, 512), dtype=np.float32))
    kernel = DenseKernel(type_, 1000, 512, n_threads=2)
    memory = np.zeros(kernel.packed_bytes + 64, np.uint8)
    packed = -(-memory.ctypes.data // 64) * 64
    kernel.pack(rows.reshape(-1), packed)
    x, out = rng.standard_normal((n_tokens, 512), dtype=np.float32), np.full((n_tokens, 1024), 7, np.float32)
    kernel.run(packed, x, out[:, :1000])
    want = x.astype(np.float64) @ dequantize(type_, rows).T
    # 1000 outputs: 5 % is chance. ggml's floats are products of F32 too, but for BF16 activations rounded to BF16.
    assert relative_error(out[:, :1000], want) <= 1.05 * relative_error(ggml_matrix(type_, rows, x), want)
    assert (out[:, 1000:] == 7).all()


def test_many_tokens_equal_one_at_a_time() -> None:
    rng = np.random.default_rng(1)
    rows = quantize(T.Q8_0, rng.standard_normal((64, 64), dtype=np.float32))
    kernel = DenseKernel(T.Q8_0, 64, 64, n_threads=2)
    memory = np.zeros(kernel.packed_bytes + 64, np.uint8)
    packed = -(-memory.ctypes.data // 64) * 64
    kernel.pack(rows.reshape(-1), packed)
    x = rng.standard_normal((1500, 64), dtype=np.float32)  # several windows
    together, alone = np.zeros((1500, 64), np.float32), np.zeros((1500, 64), np.float32)
    kernel.run(packed, x, together)
    for token in range(0, 1500, 100):
        kernel.run(packed, x[token : token + 1], alone[token : token + 1])
        np.testing.assert_array_equal(together[token], alone[token])


def test_where_no_threads_can_help_the_caller_computes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another system than Linux: two threads were asked for, and there is no pool to call."""
    rng = np.random.default_rng(2)
    rows = quantize(T.Q8_0, rng.standard_normal((640, 64), dtype=np.float32))
    x, outputs = rng.standard_normal((33, 64), dtype=np.float32), []
    for supported in (True, False):
        monkeypatch.setattr(threads, "is_supported", lambda supported=supported: supported)
        kernel = DenseKernel(T.Q8_0, 640, 64, n_threads=2)
        assert bool(kernel._call._fields[CALL.pool]) == supported
        memory = np.zeros(kernel.packed_bytes + 64, np.uint8)
        packed = -(-memory.ctypes.data // 64) * 64
        kernel.pack(rows.reshape(-1), packed)
        outputs.append(np.zeros((33, 640), np.float32))
        kernel.run(packed, x, outputs[-1])
    np.testing.assert_array_equal(outputs[0], outputs[1])
