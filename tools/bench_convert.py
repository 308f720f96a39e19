"""Speed of `localrun convert` compared with the disk's speed at the same time.

    python -m tools.bench_convert CHECKPOINT SCRATCH [--rounds 3] [--jobs 8]

Each round measures, on the same disk and one after another:
    write    zeros to a new file, as many threads and as large pieces as the converter's
    copy     the checkpoint's shards read and written likewise, without converting: what a converter could reach
    convert  the conversion, from opening the checkpoint to the manifest
The medians of the rounds are compared. SCRATCH needs room for the result once; what is written there is deleted.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from localrun.quant.convert.converter import convert, open_checkpoint
from localrun.quant.convert.direct_io import AlignedBuffer, DirectReader, DirectWriter
from localrun.quant.convert.writing import DEFAULT_JOBS, SLICE_BYTES
from localrun.units import format_size


def in_threads(jobs: int, pieces: Iterator[tuple[int, int, int]], work: Callable[[tuple[int, int, int]], None]) -> None:
    """Runs `work` on every piece, in several threads."""
    lock = threading.Lock()

    def loop() -> None:
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            work(piece)

    threads = [threading.Thread(target=loop) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def pieces_of(sizes: list[int]) -> Iterator[tuple[int, int, int]]:
    """(file number, offset, size) of pieces of SLICE_BYTES / 2, the converter's for Flash's experts."""
    step = SLICE_BYTES // 2
    for number, size in enumerate(sizes):
        for offset in range(0, size - step, step):
            yield number, offset, step


def measure_write(target: Path, size: int, jobs: int) -> float:
    """Bytes per second of writing `size` bytes."""
    writer = DirectWriter(target, size)
    local = threading.local()

    def work(piece: tuple[int, int, int]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = AlignedBuffer()
        writer.write(piece[1], local.buffer.array(piece[2])[: piece[2]])

    return _timed(target, size, writer, lambda: in_threads(jobs, pieces_of([size]), work))


def measure_copy(source: list[tuple[Path, int]], target: Path, jobs: int) -> float:
    """Bytes per second (of either side) of copying files into one, converting nothing."""
    total = sum(size for _, size in source)
    readers = [DirectReader(path, size) for path, size in source]
    bases = [sum(size for _, size in source[:i]) // 4096 * 4096 for i in range(len(source))]
    writer = DirectWriter(target, total)
    local = threading.local()

    def work(piece: tuple[int, int, int]) -> None:
        number, offset, size = piece
        if not hasattr(local, "buffer"):
            local.buffer = AlignedBuffer()
        writer.write(bases[number] + offset, readers[number].read(offset, size, local.buffer))

    rate = _timed(target, total, writer, lambda: in_threads(jobs, pieces_of([size for _, size in source]), work))
    for reader in readers:
        reader.close()
    return rate


def _timed(target: Path, size: int, writer: DirectWriter, action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    writer.sync()
    seconds = time.perf_counter() - start
    writer.close()
    target.unlink()
    return size / seconds


def measure_convert(source: Path, target: Path, jobs: int) -> float:
    """Written bytes per second of a whole conversion."""
    start = time.perf_counter()
    result = convert(source, target, jobs=jobs)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return result.file_bytes / seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=DEFAULT_JOBS)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    shards = [(shard.path, shard.size) for shard in open_checkpoint(args.checkpoint).shards]
    size = sum(n for _, n in shards)
    rates: dict[str, list[float]] = {"write": [], "copy": [], "convert": []}
    for number in range(args.rounds):
        rates["write"].append(measure_write(args.scratch / "bench.partial", size, args.jobs))
        rates["copy"].append(measure_copy(shards, args.scratch / "bench.partial", args.jobs))
        rates["convert"].append(measure_convert(args.checkpoint, args.scratch / "bench.out", args.jobs))
        speeds = ", ".join(f"{name} {values[-1] / 1e9:.2f} GB/s" for name, values in rates.items())
        print(f"round {number + 1}: {speeds}", file=sys.stderr, flush=True)
    median = {name: statistics.median(values) for name, values in rates.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    summary = {
        "bytes": size,
        "jobs": args.jobs,
        **{f"{name}_gb_per_s": round(value / 1e9, 3) for name, value in median.items()},
        "convert_to_copy": round(median["convert"] / median["copy"], 3),
        "convert_to_write": round(median["convert"] / median["write"], 3),
        "peak_memory": format_size(peak),
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
