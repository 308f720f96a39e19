"""What one core makes of a matrix and one token: our row kernels and ggml's dot products, from the second-level cache and from RAM.

    python -m tools.bench_rows [--types Q4_K,Q2_K] [--rounds 25] [--memory 128MiB]

Everything runs in one thread and is timed by its CPU time; the best of several rounds counts, and contenders take turns. So the
figures hold on a busy machine, too, except that others' memory traffic slows what is read from RAM, plain reading included.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numba as nb
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.ggml.types import block_type
from localrun.kernel_cache import cached_cfunc
from localrun.offload.kernels.cpu import level
from localrun.offload.kernels.kernel import PackedMatrix
from localrun.offload.kernels.lowlevel import call_9, load_i64, pointer, store_i64
from localrun.units import parse_size
from tools.bench_kernels import quantized_rows

N_IN = 4096
CACHED_ROWS = 256
_T = GGMLQuantizationType


@cached_cfunc("void(intp)")
def _dot_products(call: int) -> None:
    """call: int64 dot product, elements of a row, rows, weights, bytes of a row, activations, results."""
    for r in range(load_i64(call + 16)):
        row = load_i64(call + 24) + r * load_i64(call + 32)
        call_9(load_i64(call), load_i64(call + 8), load_i64(call + 48) + 4 * r, 0, row, 0, load_i64(call + 40), 0, 1, 0)


@cached_cfunc("void(intp)")
def _read(call: int) -> None:
    """call: int64 address, number of values, sum."""
    values, total = nb.carray(pointer(load_i64(call)), load_i64(call + 8), np.int64), 0
    for i in range(load_i64(call + 8)):
        total += values[i]
    store_i64(call + 16, total)


def ggml_dot(kind: GGMLQuantizationType) -> int:
    """Address of ggml's dot product of a row with 8-bit activations."""
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-cpu.so"))
    library.ggml_cpu_init()
    name = kind.name if kind.name.endswith("_K") else kind.name.lower()
    name = name.replace("Q", "q", 1)
    other = "q8_0" if kind in (_T.MXFP4, _T.Q8_0) else "q8_K"
    return ctypes.cast(getattr(library, f"ggml_vec_dot_{name}_{other}"), ctypes.c_void_p).value or 0


def best_times(contenders: list[Callable[[], None]], rounds: int, repeats: int) -> list[float]:
    """Seconds of CPU time of each, the best round's."""
    best = [float("inf")] * len(contenders)
    for _ in range(rounds):
        for i, run in enumerate(contenders):
            start = time.thread_time()
            for _ in range(repeats):
                run()
            best[i] = min(best[i], (time.thread_time() - start) / repeats)
    return best


def contenders_for(
    kind: GGMLQuantizationType, n_out: int, plain: npt.NDArray[np.int64]
) -> tuple[int, list[Callable[[], None]]]:
    """Bytes of a matrix of `n_out` rows; ours, ggml's and, of as many bytes as `plain` has, plain reading."""
    matrix = PackedMatrix.choose(kind, n_out, N_IN, math="int8")
    raw = quantized_rows(kind, n_out, N_IN)
    memory = np.zeros(matrix.packed_bytes + 64, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :]
    matrix.pack(raw.ctypes.data, memory.ctypes.data)
    panel, out = np.zeros((N_IN // 32 + 1) * 160, np.int8), np.zeros(n_out, np.float32)
    rows = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 9)(matrix.rows_address)
    one = ctypes.CFUNCTYPE(None, ctypes.c_int64)
    dots, read = one(_dot_products.address), one(_read.address)
    activations = np.zeros(2 * N_IN, np.uint8)
    values = (ggml_dot(kind), N_IN, n_out, raw.ctypes.data, raw.size // n_out, activations.ctypes.data, out.ctypes.data)
    call, reading = np.array(values, np.int64), np.array([plain.ctypes.data, plain.size, 0], np.int64)
    mine = (memory.ctypes.data, matrix.extra, 0, n_out, N_IN, panel.ctypes.data, 1, out.ctypes.data, 4 * n_out)

    def ours(_kept: object = (memory, panel, out)) -> None:
        rows(*mine)

    def theirs(_kept: object = (raw, activations, out)) -> None:
        dots(call.ctypes.data)

    def plainly() -> None:
        read(reading.ctypes.data)

    return raw.nbytes, [ours, theirs, plainly]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="MXFP4,Q8_0,Q4_K,Q3_K,Q2_K,IQ2_XXS")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--memory", type=parse_size, default=parse_size("128MiB"))
    args = parser.parse_args()
    plain = np.ones(args.memory // 8, np.int64)
    print(f"{level().value}; GB/s of one core; load {os.getloadavg()[0]:.1f}")
    print("          in cache: ours   ggml   | from RAM: reading   ours          ggml")
    for name in args.types.split(","):
        kind = _T[name]
        n_bytes, cached = contenders_for(kind, CACHED_ROWS, plain[:16])
        near = [n_bytes / seconds / 1e9 for seconds in best_times(cached[:2], 6 * args.rounds, 4)]
        n_out = args.memory // block_type(kind).row_bytes(N_IN) // 16 * 16
        n_bytes, streamed = contenders_for(kind, n_out, plain)
        times = best_times(streamed, args.rounds, 1)
        ours, ggml, reading = n_bytes / times[0] / 1e9, n_bytes / times[1] / 1e9, plain.nbytes / times[2] / 1e9
        print(
            f"{name:10} {near[0]:14.1f} {near[1]:6.1f}   | {reading:17.1f} {ours:6.1f} ({ours / reading:4.0%})"
            f" {ggml:6.1f} ({ggml / reading:4.0%})   x{ours / ggml:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
