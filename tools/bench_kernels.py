"""Speed of the expert kernels compared with the machine's read bandwidth and ggml's mul_mat_id, all on the same expert shapes.

    python -m tools.bench_kernels [--types MXFP4,Q4_K] [--threads 2] [--n-embd 4096 --n-ff 2048] [--memory 1GiB] [--rounds 5]

Decode: six experts per call, another six each time, from memory too large for the caches. Prefill: calls with the same number of
tokens for each of six experts. Every round measures each contender once, so that a busy machine slows all of them; prints medians
over rounds. GB/s always count ggml's bytes per weight; GMAC/s are multiplications per second.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import time
from collections.abc import Callable
from typing import Any

import llama_cpp
import numba as nb
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.ggml.types import block_type
from localrun.kernel_cache import cached_cfunc
from localrun.offload.kernels import FfnSpec, make_kernel
from localrun.offload.kernels.lowlevel import atomic_add, load_i64, pointer, store_i64
from localrun.units import parse_size

K = 6  # experts per token
CHUNK = 1 << 20
REST_S = 0.05
"""OpenMP's threads, which ggml and plain reading use, wait for more work by computing: whoever comes next lacks their cores."""


@cached_cfunc("void(intp)")
def _read(call: int) -> None:
    """call: int64 address, number of chunks, ticket, sum."""
    while True:
        chunk = atomic_add(call + 16, 1)
        if chunk >= load_i64(call + 8):
            return
        values, total = nb.carray(pointer(load_i64(call) + chunk * CHUNK), CHUNK // 8, np.int64), 0
        for i in range(CHUNK // 8):
            total += values[i]
        store_i64(call + 24, total)


def reader(memory: npt.NDArray[np.uint8], n_threads: int) -> Callable[[], float]:
    """A function that reads all of `memory` and returns bytes per second."""
    parallel = ctypes.CDLL("libgomp.so.1").GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    call, address = np.zeros(4, np.int64), _read.address
    call[:2] = memory.ctypes.data, memory.size // CHUNK

    def read() -> float:
        call[2] = 0
        start = time.perf_counter()
        parallel(address, call.ctypes.data, n_threads, 0)
        return memory.size / (time.perf_counter() - start)

    return read


class Ggml:
    """gate, up and down of stacked experts as three mul_mat_id in ggml's CPU backend."""

    def __init__(self, spec: FfnSpec, memory: npt.NDArray[np.uint8], n_experts: int, n_threads: int) -> None:
        self.lib = llama_cpp.llama_cpp._lib
        self.spec, self.n_threads, self.n_experts = spec, n_threads, n_experts
        sizes = [n * block_type(t).row_bytes(m) for t, (n, m) in zip(spec.types, self.shapes(), strict=True)]
        offsets = np.cumsum([0] + [s * n_experts for s in sizes])
        self.weights = [int(memory.ctypes.data + o) for o in offsets[:3]]
        assert offsets[3] <= memory.size
        for name in (
            "ggml_init",
            "ggml_new_tensor_3d",
            "ggml_new_tensor_2d",
            "ggml_mul_mat_id",
            "ggml_new_graph",
            "ggml_get_data",
        ):
            getattr(self.lib, name).restype = ctypes.c_void_p

    def shapes(self) -> tuple[tuple[int, int], ...]:
        return (
            (self.spec.n_ff, self.spec.n_embd),
            (self.spec.n_ff, self.spec.n_embd),
            (self.spec.n_embd, self.spec.n_ff),
        )

    def prepare(
        self, n_tokens: int, n_calls: int, rng: np.random.Generator
    ) -> Callable[[npt.NDArray[np.int32]], float]:
        """A function that computes all three projections for ids (T, K) and returns seconds, `n_calls` times at most."""
        lib, p, i64, spec = self.lib, ctypes.c_void_p, ctypes.c_int64, self.spec

        class Params(ctypes.Structure):
            _fields_ = (("size", ctypes.c_size_t), ("memory", p), ("no_alloc", ctypes.c_bool))

        lib.ggml_init.argtypes = [Params]
        need = (
            (160 << 20)
            + n_calls * (2 << 20)  # each call takes scratch anew
            + n_tokens * K * (2 * spec.n_ff + spec.n_embd) * 4
            + n_tokens * K * (spec.n_embd + spec.n_ff) * 16
        )
        ctx = p(lib.ggml_init(Params(need, None, False)))
        graph, keep = p(lib.ggml_new_graph(ctx)), []
        ids = p(lib.ggml_new_tensor_2d(ctx, 26, i64(K), i64(n_tokens)))
        for (n_out, n_in), type_, address in zip(self.shapes(), spec.types, self.weights, strict=True):
            no_alloc = ctypes.c_bool(True)
            lib.ggml_set_no_alloc(ctx, no_alloc)
            w = p(lib.ggml_new_tensor_3d(ctx, int(type_), i64(n_in), i64(n_out), i64(self.n_experts)))
            lib.ggml_set_no_alloc(ctx, ctypes.c_bool(False))
            _set_data(w, address)
            columns = 1 if n_in == spec.n_embd else K
            x = p(lib.ggml_new_tensor_3d(ctx, 0, i64(n_in), i64(columns), i64(n_tokens)))
            values = rng.standard_normal(n_in * columns * n_tokens, dtype=np.float32)
            ctypes.memmove(lib.ggml_get_data(x), values.ctypes.data, values.nbytes)
            lib.ggml_build_forward_expand(graph, p(lib.ggml_mul_mat_id(ctx, w, x, ids)))
            keep.append(values)

        def compute(values: npt.NDArray[np.int32]) -> float:
            ctypes.memmove(lib.ggml_get_data(ids), values.ctypes.data, values.nbytes)
            start = time.perf_counter()
            assert lib.ggml_graph_compute_with_ctx(ctx, graph, self.n_threads) == 0
            return time.perf_counter() - start

        compute.free = lambda: lib.ggml_free(ctx)  # type: ignore[attr-defined]
        return compute


def _set_data(tensor: Any, address: int) -> None:
    from localrun.ggml.structures import Tensor

    Tensor.from_address(tensor.value).data = address


def quantized_rows(type_: GGMLQuantizationType, n_out: int, n_in: int) -> npt.NDArray[np.uint8]:
    """A matrix of the type, 64 rows of normal weights repeated, flat."""
    row_bytes = block_type(type_).row_bytes(n_in)
    rows = np.zeros((64, row_bytes), np.uint8)
    weights = np.random.default_rng(1).standard_normal((64, n_in), dtype=np.float32) / np.float32(math.sqrt(n_in))
    ones, p, i64 = np.ones(n_in, np.float32), ctypes.c_void_p, ctypes.c_int64
    llama_cpp.llama_cpp._lib.ggml_quantize_chunk(
        int(type_), p(weights.ctypes.data), p(rows.ctypes.data), i64(0), i64(64), i64(n_in), p(ones.ctypes.data)
    )
    return np.resize(rows.reshape(-1), n_out * row_bytes)


def bench(
    type_names: tuple[GGMLQuantizationType, ...],
    args: argparse.Namespace,
    memory: npt.NDArray[np.uint8],
    plain: npt.NDArray[np.uint8],
) -> None:
    """Prints the table's lines of one combination of types: ours with each number of tokens, ggml's, and plain reading."""
    rng = np.random.default_rng(0)
    gate, down = type_names[0], type_names[-1]
    spec = FfnSpec((gate, gate, down), args.n_embd, args.n_ff, 10.0)
    kernel = make_kernel(spec, n_threads=args.threads)
    shapes = ((args.n_ff, args.n_embd), (args.n_ff, args.n_embd), (args.n_embd, args.n_ff))
    parts = [quantized_rows(t, *shape) for t, shape in zip(spec.types, shapes, strict=True)]
    raw = np.concatenate(parts)
    raw_bytes = raw.size
    n_experts = min(memory.size // kernel.slot_bytes, plain.size // raw_bytes)
    end = 0
    for part in parts:
        plain[end : end + part.size * n_experts].reshape(n_experts, -1)[:] = part
        end += part.size * n_experts
    slots = np.array([memory.ctypes.data + i * kernel.slot_bytes for i in range(n_experts)], np.uint64)
    for slot in slots:  # once before it counts: compiling, and pages that nobody has touched
        kernel.pack(raw, int(slot))
    start = time.perf_counter()
    for slot in slots:
        kernel.pack(raw, int(slot))
    pack = n_experts * raw_bytes / (time.perf_counter() - start)
    macs = 3 * args.n_embd * args.n_ff
    read, ggml = reader(memory, args.threads), Ggml(spec, plain, n_experts, args.threads)
    label = "+".join(dict.fromkeys(t.name for t in type_names))

    def ours(n_tokens: int) -> Callable[[npt.NDArray[np.int32]], float]:
        x, out = (
            rng.standard_normal((n_tokens, args.n_embd), dtype=np.float32),
            np.zeros((n_tokens * K, args.n_embd), np.float32),
        )

        def compute(experts: npt.NDArray[np.int32]) -> float:
            starts = np.arange(K + 1, dtype=np.int32) * n_tokens
            tokens = np.tile(np.arange(n_tokens, dtype=np.int32), K)
            rows, chosen = np.arange(n_tokens * K, dtype=np.int32), slots[experts[0]]
            start = time.perf_counter()
            kernel.run(chosen, starts, tokens, rows, x, out)
            return time.perf_counter() - start

        return compute

    for n_tokens in args.tokens:
        repeat = max(1, min(n_experts // K, 24 // n_tokens))
        mine, theirs = ours(n_tokens), ggml.prepare(n_tokens, (args.rounds + 1) * repeat, rng)
        results = []
        for round_ in range(args.rounds + 1):
            first = round_ * repeat * K
            calls = [(first + i * K + np.arange(K)) % n_experts for i in range(repeat)]
            experts = [np.tile(call.astype(np.int32), (n_tokens, 1)) for call in calls]
            bandwidth = read()
            time.sleep(REST_S)
            spent = [sum(map(mine, experts)), math.inf if args.no_ggml else sum(map(theirs, experts))]
            time.sleep(REST_S)
            per_s = [repeat * K / seconds / 1e9 for seconds in spent]
            results.append(
                [bandwidth / 1e9, *(raw_bytes * rate for rate in per_s), *(macs * n_tokens * rate for rate in per_s)]
            )
        table = np.array(results[1:])
        bw, gb, ggb, mac, gmac = np.median(table, axis=0)
        share, ratio = np.median(table[:, 1] / table[:, 0]), np.median(table[:, 1] / table[:, 2])
        print(
            f"{label:16} {n_tokens:4} tok  read {bw:5.1f} GB/s | ours {gb:5.1f} GB/s = {share * 100:4.0f} % | "
            f"ggml {ggb:5.1f} GB/s | ours {mac:6.1f} ggml {gmac:6.1f} GMAC/s | x{ratio:4.2f}"
            + (f" | pack {pack / 1e9:.1f} GB/s" if n_tokens == args.tokens[0] else ""),
            flush=True,
        )
        theirs.free()  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--types", default="MXFP4,Q8_0,Q4_K,Q2_K,Q3_K", help="comma-separated; A+B means gate and up A, down B"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n-embd", type=int, default=4096)
    parser.add_argument("--n-ff", type=int, default=2048)
    parser.add_argument("--memory", type=parse_size, default=parse_size("1GiB"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=lambda s: [int(v) for v in s.split(",")], default=[1, 4, 12, 64])
    parser.add_argument("--no-ggml", action="store_true")
    args = parser.parse_args()
    memory, plain = np.zeros(args.memory, np.uint8), np.zeros(args.memory, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :]
    for name in args.types.split(","):
        bench(tuple(GGMLQuantizationType[part] for part in name.split("+")), args, memory, plain)


if __name__ == "__main__":
    main()
