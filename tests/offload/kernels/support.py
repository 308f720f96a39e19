"""Experts made by ggml's own quantizers, and what they should compute, in F64 through gguf-py's dequantization."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as T

from localrun.ggml.types import block_type
from localrun.offload.kernels import FfnKernel, FfnSpec

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_folder = os.path.join(os.path.dirname(llama_cpp.__file__), "lib")
_base = ctypes.CDLL(os.path.join(_folder, "libggml-base.so"))
_base.ggml_quantize_chunk.restype = ctypes.c_size_t


# ggml's quantizers of these search grids for seconds; their blocks start with an F16 scale and allow any bits after it.
_SLOW = {T.IQ1_S, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S}


def quantize(type_: T, weights: F32) -> Bytes:
    """ggml rows (n_out, row_bytes) of `weights` (n_out, n_in); random rows of the same size for types slow to quantize."""
    n_out, n_in = weights.shape
    rows = np.zeros((n_out, block_type(type_).row_bytes(n_in)), np.uint8)
    if type_ in _SLOW:
        rng = np.random.default_rng(n_out * n_in)
        blocks = rng.integers(
            0, 256, (rows.nbytes // block_type(type_).block_bytes, block_type(type_).block_bytes), dtype=np.uint8
        )
        blocks[:, :2] = rng.uniform(0.5, 2, (len(blocks), 1)).astype(np.float16).view(np.uint8)
        rows = blocks.reshape(rows.shape)
        scale = np.float16(weights.std() / dequantize(type_, rows).std())
        blocks[:, :2] = (blocks[:, :2].copy().view(np.float16) * scale).view(np.uint8)
        return rows
    weights, importance = np.ascontiguousarray(weights), np.ones(n_in, np.float32)
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    written = _base.ggml_quantize_chunk(
        int(type_),
        pointer(weights.ctypes.data),
        pointer(rows.ctypes.data),
        i64(0),
        i64(n_out),
        i64(n_in),
        pointer(importance.ctypes.data),
    )
    assert written == rows.nbytes
    return rows


def dequantize(type_: T, rows: Bytes) -> npt.NDArray[np.float64]:
    return np.asarray(gguf.quants.dequantize(rows, type_), np.float64)


@dataclass
class Experts:
    """Experts of one layer as ggml rows, their exact matrices, and the slots of one kernel."""

    spec: FfnSpec
    raw: list[tuple[Bytes, Bytes, Bytes]]

    @classmethod
    def random(cls, spec: FfnSpec, n_experts: int, rng: np.random.Generator) -> Experts:
        shapes = ((spec.n_ff, spec.n_embd), (spec.n_ff, spec.n_embd), (spec.n_embd, spec.n_ff))

        def one() -> tuple[Bytes, Bytes, Bytes]:
            gate, up, down = (
                quantize(t, rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[1])))
                for t, shape in zip(spec.types, shapes, strict=True)
            )
            return gate, up, down

        return cls(spec, [one() for _ in range(n_experts)])

    def pack(self, kernel: FfnKernel) -> tuple[Bytes, npt.NDArray[np.uint64]]:
        """Aligned slots (kept by the caller) and their addresses."""
        memory = np.full(len(self.raw) * kernel.slot_bytes + 64, 0xAA, np.uint8)
        first = -(-memory.ctypes.data // 64) * 64
        addresses = np.array([first + i * kernel.slot_bytes for i in range(len(self.raw))], np.uint64)
        for address, parts in zip(addresses, self.raw, strict=True):
            kernel.pack(np.concatenate([part.reshape(-1) for part in parts]), int(address))
        return memory, addresses

    def matrix(self, expert: int, which: int) -> npt.NDArray[np.float64]:
        return dequantize(self.spec.types[which], self.raw[expert][which])

    def ffn(self, expert: int, x: F32) -> npt.NDArray[np.float64]:
        gate, up, down = (self.matrix(expert, which) for which in range(3))
        limit, x64 = self.spec.limit, x.astype(np.float64)
        g, u = np.minimum(x64 @ gate.T, limit), np.clip(x64 @ up.T, -limit, limit)
        return np.asarray((g / (1 + np.exp(-g)) * u) @ down.T)


@dataclass
class Pairs:
    """A random assignment of tokens to experts, some experts with no token, output rows shuffled."""

    starts: npt.NDArray[np.int32]
    x_rows: npt.NDArray[np.int32]
    out_rows: npt.NDArray[np.int32]

    @classmethod
    def random(cls, counts: list[int], n_tokens: int, rng: np.random.Generator) -> Pairs:
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        n = int(starts[-1])
        return cls(starts, rng.integers(0, n_tokens, n).astype(np.int32), rng.permutation(n).astype(np.int32))

    def of(self, expert: int) -> slice:
        return slice(int(self.starts[expert]), int(self.starts[expert + 1]))


def relative_error(got: npt.NDArray[np.float32], want: npt.NDArray[np.float64]) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


class _CpuTraits(ctypes.Structure):
    """`struct ggml_type_traits_cpu` of ggml-cpu.h."""

    _fields_ = (
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        (
            "vec_dot",
            ctypes.CFUNCTYPE(
                None, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p,
                ctypes.c_size_t, ctypes.c_int,
            ),
        ),
        ("vec_dot_type", ctypes.c_int),
        ("n_rows", ctypes.c_int64),
    )  # fmt: skip


_cpu = ctypes.CDLL(os.path.join(_folder, "libggml-cpu.so"))
_cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_CpuTraits)
_cpu.ggml_cpu_init()


def ggml_matrix(type_: T, rows: Bytes, x: F32) -> F32:
    """x (T, n_in) times the matrix as ggml's CPU backend does it: activations quantized to 8 bits, its own dot product."""
    traits = _cpu.ggml_get_type_traits_cpu(int(type_))[0]
    n_in = x.shape[1]
    quantizer = _cpu.ggml_get_type_traits_cpu(traits.vec_dot_type)[0].from_float
    quantized = np.zeros(n_in * 2, np.uint8)  # more than Q8_0 and Q8_K need
    rows, x = np.ascontiguousarray(rows), np.ascontiguousarray(x)
    out = np.zeros((x.shape[0], rows.shape[0]), np.float32)
    # Addresses are computed once: asking numpy for each took longer than the products.
    dot, activations = traits.vec_dot, quantized.ctypes.data
    starts = range(rows.ctypes.data, rows.ctypes.data + rows.nbytes, rows.strides[0])
    target = out.ctypes.data
    for t in range(x.shape[0]):
        quantizer(x.ctypes.data + t * x.strides[0], activations, n_in)
        for row in starts:
            dot(n_in, target, 0, row, 0, activations, 0, 1)
            target += out.itemsize
    return out


def ggml_ffn(experts: Experts, expert: int, x: F32) -> F32:
    """A whole expert with ggml's 8-bit arithmetic."""
    limit = np.float32(experts.spec.limit)
    g, u = (ggml_matrix(experts.spec.types[which], experts.raw[expert][which], x) for which in (0, 1))
    g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    return ggml_matrix(experts.spec.types[2], experts.raw[expert][2], (g / (1 + np.exp(-g)) * u).astype(np.float32))
