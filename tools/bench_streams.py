"""Our row kernels, ggml's dot products and plain reading on matrices in RAM and one token, by one thread and by several.

    python -m tools.bench_streams [--types Q4_K,Q2_K] [--threads 1,2] [--rounds 150] [--memory 448MiB] [--ways]

Meant for busy machines. Contenders take turns with slices of 24 MiB, each another one than before, so that nothing is in a cache.
Other programs can only slow a slice, so the 85th percentile of the rounds counts. Each thread is pinned to a core. With `--ways`
our kernels read in every way that they know (`offload/kernels/reading.py`): to find out which one suits a processor.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import threading
import time
from dataclasses import dataclass
from typing import Final

import numba as nb
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.alignment import align_up
from localrun.ggml.types import block_type
from localrun.kernel_cache import cached_cfunc
from localrun.offload.kernels.cpu import level
from localrun.offload.kernels.interleaved.rows import rows_function
from localrun.offload.kernels.kernel import PackedMatrix
from localrun.offload.kernels.lowlevel import ROWS, atomic_add, call_9, load_i64, pointer, store_i64
from localrun.offload.kernels.reading import Reading
from localrun.offload.kernels.reading import reading as way_to_read
from localrun.offload.kernels.records import Layout, Record
from localrun.pages import HUGE_PAGE_BYTES, anonymous
from localrun.units import parse_size
from tools.bench_kernels import quantized_rows
from tools.bench_rows import N_IN, ggml_dot

PIECE_ROWS: Final = 256
SLICE_BYTES: Final = 24 << 20
PERCENTILE: Final = 85
_TYPES: Final = "Q8_0,Q6_K,Q5_K,Q4_K,MXFP4,Q3_K,Q2_K,IQ2_XXS"


class _Slice(Layout):
    """What threads share of a slice; Python writes, threads claim pieces."""

    rows: int
    """Address of a row kernel, signature `lowlevel.ROWS`."""
    extra: int
    """Its second argument."""
    matrix: int
    """Address."""
    n_pieces: int
    """Of `PIECE_ROWS` rows."""
    panel: int
    """Address of activations, zeros."""
    out: int
    """Address of `PIECE_ROWS` F32 per thread."""
    next_piece: int
    """Threads count up."""


SLICE = _Slice()


@cached_cfunc("void(intp, intp)")
def _work(slice_: int, thread: int) -> None:
    """Computes pieces until none is left."""
    out = load_i64(slice_ + SLICE.out * 8) + thread * PIECE_ROWS * 4
    while True:
        piece = atomic_add(slice_ + SLICE.next_piece * 8, 1)
        if piece >= load_i64(slice_ + SLICE.n_pieces * 8):
            return
        matrix, extra = load_i64(slice_ + SLICE.matrix * 8), load_i64(slice_ + SLICE.extra * 8)
        panel, rows = load_i64(slice_ + SLICE.panel * 8), load_i64(slice_ + SLICE.rows * 8)
        call_9(rows, matrix, extra, piece * PIECE_ROWS, PIECE_ROWS, N_IN, panel, 1, out, PIECE_ROWS * 4)


@cached_cfunc(ROWS)
def _dot_products(
    matrix: int, extra: int, row0: int, n_rows: int, n_in: int, panel: int, _nt: int, out: int, _stride: int
) -> None:
    """extra: int64 ggml's dot product, bytes of a row."""
    for r in range(n_rows):
        row = matrix + (row0 + r) * load_i64(extra + 8)
        call_9(load_i64(extra), n_in, out + 4 * r, 0, row, 0, panel, 0, 1, 0)


@cached_cfunc(ROWS)
def _read(
    matrix: int, extra: int, row0: int, n_rows: int, _n_in: int, _panel: int, _nt: int, out: int, _stride: int
) -> None:
    """Adds up 64-bit numbers."""
    row_bytes, total = load_i64(extra + 8), 0
    values = nb.carray(pointer(matrix + row0 * row_bytes), n_rows * row_bytes // 8, np.int64)
    for i in range(values.size):
        total += values[i]
    store_i64(out, total)


class Team:
    """Threads that compute a slice together, each on a core of its own."""

    def __init__(self, n_threads: int) -> None:
        self._go = [threading.Semaphore(0) for _ in range(n_threads)]
        self._done = threading.Semaphore(0)
        self._slice = 0
        self._work = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(_work.address)
        for i, core in zip(range(n_threads), sorted(os.sched_getaffinity(0)) * n_threads, strict=False):
            threading.Thread(target=self._serve, args=(i, core), daemon=True).start()

    def _serve(self, thread: int, core: int) -> None:
        os.sched_setaffinity(0, {core})
        while True:
            self._go[thread].acquire()
            self._work(self._slice, thread)
            self._done.release()

    def run(self, record: Record, n_threads: int) -> float:
        """Seconds that the first `n_threads` take."""
        record[SLICE.next_piece], self._slice = 0, record.ctypes.data
        start = time.perf_counter()
        for go in self._go[:n_threads]:
            go.release()
        for _ in range(n_threads):
            self._done.acquire()
        return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Contender:
    """A row kernel and the memory that it works through.

    Attributes:
        slice_bytes: of `n_slices` slices from `memory` on, in its layout.
    """

    rows: int
    memory: int
    slice_bytes: int
    n_slices: int


def _filled(memory: npt.NDArray[np.uint8], content: npt.NDArray[np.uint8]) -> int:
    """Address of `memory` full of copies of `content`, whole ones."""
    for start in range(0, memory.size - content.size + 1, content.size):
        memory[start : start + content.size] = content
    return memory.ctypes.data


def _huge(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Memory that begins with a huge page."""
    memory = np.frombuffer(anonymous(n_bytes + HUGE_PAGE_BYTES), np.uint8)
    start = align_up(memory.ctypes.data, HUGE_PAGE_BYTES) - memory.ctypes.data
    return memory[start : start + n_bytes]


def rates(
    kind: GGMLQuantizationType, team: Team, thread_counts: list[int], rounds: int, n_bytes: int, ways: list[Reading]
) -> list[dict[str, float]]:
    """Bytes per second for each number of threads, as ggml counts bytes: of plain reading, ours, ggml's, and ours in each of
    `ways`, by its value, if the kernel knows any."""
    row_bytes = block_type(kind).row_bytes(N_IN)
    n_rows = max(1, min(SLICE_BYTES, n_bytes) // row_bytes // PIECE_ROWS) * PIECE_ROWS
    matrix = PackedMatrix.choose(kind, n_rows, N_IN, math="int8")
    raw, packed = quantized_rows(kind, n_rows, N_IN), _huge(matrix.packed_bytes)
    matrix.pack(raw.ctypes.data, packed.ctypes.data)
    n_slices = max(1, n_bytes // matrix.packed_bytes)
    plain, ours = _huge(n_slices * raw.size), _huge(n_slices * matrix.packed_bytes)
    _filled(plain, raw)
    _filled(ours, packed)
    contenders = {
        "reading": Contender(_read.address, plain.ctypes.data, raw.size, n_slices),
        "ours": Contender(matrix.rows_address, ours.ctypes.data, matrix.packed_bytes, n_slices),
        "ggml": Contender(_dot_products.address, plain.ctypes.data, raw.size, n_slices),
    }
    for way in ways if matrix.interleaved else []:
        address = int(rows_function(kind, level(), way).address)
        contenders[way.value] = Contender(address, ours.ctypes.data, matrix.packed_bytes, n_slices)
    extra, panel = np.array([ggml_dot(kind), row_bytes], np.int64), np.zeros(8 * N_IN, np.uint8)
    out = np.zeros(max(thread_counts) * PIECE_ROWS, np.float32)
    results, turn = [], 0
    for n_threads in thread_counts:
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for round_ in range(rounds):
            order = list(contenders)
            first = round_ % len(order)
            for name in order[first:] + order[:first]:
                c, turn = contenders[name], turn + 1
                record = SLICE.make(
                    rows=c.rows,
                    extra=extra.ctypes.data,
                    matrix=c.memory + turn % c.n_slices * c.slice_bytes,
                    n_pieces=n_rows // PIECE_ROWS,
                    panel=panel.ctypes.data,
                    out=out.ctypes.data,
                    next_piece=0,
                )
                seconds[name].append(team.run(record, n_threads))
        results.append(
            {name: raw.size / float(np.percentile(taken, 100 - PERCENTILE)) for name, taken in seconds.items()}
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=_TYPES)
    parser.add_argument("--threads", type=lambda s: [int(v) for v in s.split(",")], default=[1, 2])
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--memory", type=parse_size, default=parse_size("448MiB"))
    parser.add_argument("--ways", action="store_true", help="ours in every way to read")
    args = parser.parse_args()
    ways = list(Reading) if args.ways else []
    team = Team(max(args.threads))
    print(f"{level().value}; GB/s, {PERCENTILE}th percentile of {args.rounds}; load {os.getloadavg()[0]:.1f}")
    print(f"our way to read here: {way_to_read().value}")
    print("           threads   reading          ours          ggml")
    for name in args.types.split(","):
        measured = rates(GGMLQuantizationType[name], team, args.threads, args.rounds, args.memory, ways)
        for n_threads, rate in zip(args.threads, measured, strict=True):
            reading, ours, ggml = (rate[k] / 1e9 for k in ("reading", "ours", "ggml"))
            print(
                f"{name:10} {n_threads:7} {reading:9.1f} {ours:6.1f} ({ours / reading:4.0%}) {ggml:6.1f} ({ggml / reading:4.0%})"
                f"   x{ours / ggml:.2f}" + "".join(f"   {way} {rate[way] / 1e9:.1f}" for way in list(rate)[3:]),
                flush=True,
            )


if __name__ == "__main__":
    main()
