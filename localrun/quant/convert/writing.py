"""Writes the file of a plan: streaming, resumable after a kill at any point, reproducible.

Each thread takes a part (a dense tensor, or one expert's matrix), reads it slice by slice, converts each slice and writes it to
its position. There are more threads than cores, because most wait for the disk. A thread's memory is bounded by the slice size,
independent of the model. The main thread makes finished parts durable in batches and only then records them in the journal.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path

import numpy as np
import xxhash

from localrun.alignment import PAGE_BYTES, align_up
from localrun.disk_space import check_free
from localrun.errors import LocalrunError, StoreError
from localrun.quant.checkpoint.mapping import ALIGNMENT, ConversionPlan, TensorPart
from localrun.quant.convert.direct_io import AlignedBuffer, DirectReader, DirectWriter
from localrun.quant.convert.journal import Journal, PartResult
from localrun.quant.formats.transcode import Loss

SLICE_BYTES = 8 << 20
"""Maximum bytes that a thread reads or writes at a time: 2-4 MiB pieces reach an NVMe's full speed."""

DEFAULT_JOBS = max(8, os.cpu_count() or 1)
"""Reads and writes in flight; one leaves a third of an NVMe idle. Threads, so at most a core's worth each of conversion."""

_SYNC_SECONDS = 3.0
_SYNC_BYTES = 2 << 30
_SPARE_BYTES = 64 << 20
_PART_ALIGN = 128
"""FP8 scale blocks span 128 rows; slices begin at their borders."""


@dataclass(frozen=True, slots=True)
class ConversionProgress:
    """State of a running conversion.

    Attributes:
        done_bytes, total_bytes: of the output's tensors.
        resumed_bytes: part of done_bytes that an earlier run had written.
        elapsed_s: of this run.
    """

    done_bytes: int
    total_bytes: int
    resumed_bytes: int
    elapsed_s: float

    @property
    def bytes_per_s(self) -> float:
        return (self.done_bytes - self.resumed_bytes) / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def remaining_s(self) -> float | None:
        """At this run's average rate; None before anything is written."""
        rate = self.bytes_per_s
        return (self.total_bytes - self.done_bytes) / rate if rate > 0 else None


@dataclass(frozen=True, slots=True)
class ConversionResult:
    """What was written.

    Attributes:
        path: the directory.
        file_bytes: size of the GGUF.
        seconds: duration of this run.
        read_bytes, written_bytes: by this run, tensor bytes.
        losses: rounding loss by `source dtype -> ggml type`; empty for an exact conversion.
    """

    path: Path
    file_bytes: int
    seconds: float
    read_bytes: int
    written_bytes: int
    losses: dict[str, Loss]


@dataclass(frozen=True, slots=True)
class _Work:
    """A part with its place in the file."""

    number: int
    part: TensorPart
    offset: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class OutputFile:
    """Where a file is made.

    Attributes:
        final: its path, which appears once it is completely on disk.
        work: folder of the unfinished file and its journal.
    """

    final: Path
    work: Path

    @property
    def partial(self) -> Path:
        return self.work / (self.final.name + ".partial")

    def check_space(self, plan: ConversionPlan) -> int:
        """Bytes still to allocate for the output.

        Raises:
            DiskSpaceError: more than the disk has.
        """
        if self.final.exists():
            return 0
        allocated = self.partial.stat().st_blocks * 512 if self.partial.exists() else 0
        needed = max(0, plan.file_size - allocated) + _SPARE_BYTES
        check_free(self.final.parent, needed, what="the model", otherwise="choose a directory on another disk")
        return needed


def write_file(
    plan: ConversionPlan,
    output: OutputFile,
    options: Mapping[str, str],
    publish: Callable[[Mapping[int, PartResult], Mapping[str, Loss]], None],
    *,
    jobs: int = DEFAULT_JOBS,
    progress: Callable[[ConversionProgress], None] | None = None,
) -> ConversionResult:
    """Writes a plan's file, or completes an earlier run.

    Args:
        options: the user's choices by option name; an unfinished file started with other options is rejected.
        publish: called once the file is complete and in place, with the results of all parts by number and the rounding losses.

    Raises:
        As `write_plan`.
    """
    output.check_space(plan)
    facts = {
        "source": str(plan.checkpoint.path.resolve()),
        "identity": plan.checkpoint.identity,
        "plan": plan.digest,
    }
    try:
        journal = Journal(output.work, options, facts)
    except OSError as e:
        if isinstance(e, LocalrunError):
            raise
        raise StoreError(f"{output.work}: {e.strerror}") from e
    try:
        result = _Run(plan, output, journal, jobs, progress).execute()
        publish(journal.done, result.losses)
    finally:
        journal.close()
    shutil.rmtree(output.work)
    return replace(result, path=output.final.parent)


class _Run:
    """One run of a conversion: its threads, files and counters.

    Threads: workers take work from an iterator under `_lock` and add results to `_finished` under the same lock; only the main
    thread uses the journal. The first error stops all threads.
    """

    reserves_space = True

    def __init__(
        self,
        plan: ConversionPlan,
        output: OutputFile,
        journal: Journal,
        jobs: int,
        progress: Callable[[ConversionProgress], None] | None,
    ) -> None:
        self._plan = plan
        self._partial, self._final = output.partial, output.final
        self._journal = journal
        self._jobs = max(1, jobs)
        self._progress = progress
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._finished: list[tuple[int, PartResult]] = []
        self._error: BaseException | None = None
        self._n_running = 0
        self._read_bytes = 0
        self._written_bytes = 0
        self._work = list(_in_reading_order(plan))
        self._resumed = sum(w.part.n_bytes for w in self._work if w.number in journal.done)
        self._total = sum(w.part.n_bytes for w in self._work)

    def execute(self) -> ConversionResult:
        start, final = time.perf_counter(), self._final
        # A run that was killed after the rename has a whole journal, no partial file, and only lacks its manifest.
        complete = len(self._journal.done) == len(self._work) and final.exists() and not self._partial.exists()
        if not complete:
            if self._journal.done and not self._partial.exists():
                raise StoreError(
                    f"{self._partial} has disappeared", hint=f"delete {self._partial.parent} to start again"
                )
            self._write_all(start)
            self._partial.rename(final)
            _sync_folder(final.parent)
        losses: dict[str, Loss] = {}
        for work in sorted(self._work, key=lambda work: work.number):
            loss = self._journal.done[work.number].loss
            if loss is not None:
                key = f"{work.part.source.dtype} -> {work.part.target.name}"
                losses[key] = losses.get(key, Loss()) + loss
        seconds = time.perf_counter() - start
        return ConversionResult(final, self._plan.file_size, seconds, self._read_bytes, self._written_bytes, losses)

    def _write_all(self, start: float) -> None:
        readers: list[DirectReader] = []
        writer = DirectWriter(self._partial, self._plan.file_size, reserve=self.reserves_space)
        try:
            readers.extend(DirectReader(shard.path, shard.size) for shard in self._plan.checkpoint.shards)
            header = np.frombuffer(self._plan.header, np.uint8)
            writer.write(0, header)
            open_work = iter([work for work in self._work if work.number not in self._journal.done])
            threads = [
                threading.Thread(
                    target=self._worker, args=(open_work, readers, writer), name=f"convert-{i}", daemon=True
                )
                for i in range(self._jobs)
            ]
            self._n_running = len(threads)
            for thread in threads:
                thread.start()
            try:
                self._supervise(writer, start)
            finally:
                self._stop.set()
                for thread in threads:
                    thread.join()
                # also after an error: finished work need not be repeated
                self._record(writer)
            if self._error is not None:
                raise self._error
        finally:
            for reader in readers:
                reader.close()
            writer.close()

    def _supervise(self, writer: DirectWriter, start: float) -> None:
        """Reports and records until the last worker leaves or somebody fails."""
        synced_at, synced_bytes = time.monotonic(), 0
        while self._n_running > 0 and not self._stop.is_set():
            self._wake.wait(0.2)
            self._wake.clear()
            if self._progress is not None:
                with self._lock:
                    done = self._resumed + self._written_bytes
                self._progress(ConversionProgress(done, self._total, self._resumed, time.perf_counter() - start))
            late = time.monotonic() - synced_at > _SYNC_SECONDS
            if late or self._written_bytes - synced_bytes > _SYNC_BYTES:
                synced_bytes = self._written_bytes
                self._record(writer)
                synced_at = time.monotonic()
        if self._progress is not None and self._error is None:
            self._progress(ConversionProgress(self._total, self._total, self._resumed, time.perf_counter() - start))

    def _record(self, writer: DirectWriter) -> None:
        """Syncs, then records what was finished before the sync."""
        with self._lock:
            finished, self._finished = self._finished, []
        writer.sync()
        if finished:
            self._journal.append(finished)
            self._journal.done.update(finished)

    def _worker(self, open_work: Iterator[_Work], readers: list[DirectReader], writer: DirectWriter) -> None:
        pipeline = _Pipeline(self._plan, readers, writer)
        try:
            while not self._stop.is_set():
                with self._lock:
                    work = next(open_work, None)
                if work is None:
                    return
                result = pipeline.run(work, self._stop, self._count)
                if result is None:
                    return
                with self._lock:
                    self._finished.append((work.number, result))
        except BaseException as e:
            with self._lock:
                self._error = self._error or e
            self._stop.set()
        finally:
            with self._lock:
                self._n_running -= 1
            self._wake.set()

    def _count(self, read_bytes: int, written_bytes: int) -> None:
        with self._lock:
            self._read_bytes += read_bytes
            self._written_bytes += written_bytes


class _Pipeline:
    """One thread's buffers: read a slice, convert it, write it."""

    def __init__(self, plan: ConversionPlan, readers: list[DirectReader], writer: DirectWriter) -> None:
        self._readers = readers
        self._writer = writer
        self._importance = plan.options.importance
        self._weights, self._scales, self._out = AlignedBuffer(), AlignedBuffer(), AlignedBuffer()

    def run(self, work: _Work, stop: threading.Event, count: Callable[[int, int], None]) -> PartResult | None:
        """Writes a part; None if stopped before its end."""
        part = work.part
        output, weights, scales = xxhash.xxh3_64(), xxhash.xxh3_64(), xxhash.xxh3_64()
        loss: Loss | None = None
        importance = part.importance(self._importance)
        step = slice_rows(part)
        for first in range(0, part.n_out, step):
            if stop.is_set():
                return None
            n_rows = min(step, part.n_out - first)
            weight_extent, scale_extent = part.extents(first, n_rows)
            reader = self._readers[weight_extent.file]
            weight = reader.read(weight_extent.offset, weight_extent.n_bytes, self._weights)
            weights.update(weight.data)
            scale = np.empty(0, np.uint8)
            if scale_extent is not None:
                scale_reader = self._readers[scale_extent.file]
                scale = scale_reader.read(scale_extent.offset, scale_extent.n_bytes, self._scales)
                scales.update(scale.data)
            begin, n_bytes = work.offset + part.output_bytes(first), part.output_bytes(n_rows)
            memory = self._out.array(n_bytes + ALIGNMENT)
            slice_loss = part.convert(
                n_rows, weight, scale, memory[:n_bytes], f"{reader.path}: {part.source.spec.name}", importance
            )
            if slice_loss is not None:
                loss = slice_loss if loss is None else loss + slice_loss
            output.update(memory[:n_bytes].data)
            written = n_bytes
            if work.is_last and first + n_rows == part.n_out:
                # The tensor's padding belongs to it: whole pages can go around the page cache.
                written = align_up(begin + n_bytes, ALIGNMENT) - begin
                memory[n_bytes:written] = 0
            self._writer.write(begin, memory[:written])
            count(weight.size + scale.size, n_bytes)
        scale_digest = scales.hexdigest() if part.source.scale is not None else ""
        return PartResult(output.hexdigest(), weights.hexdigest(), scale_digest, loss)


def slice_rows(part: TensorPart) -> int:
    """Rows per slice: at most SLICE_BYTES on either side, beginning and ending at whole pages of the output if possible."""
    row = part.output_bytes(1)
    source_row = max(1, part.source.weight.n_bytes // part.n_out)
    unit = PAGE_BYTES // gcd(row, PAGE_BYTES)
    unit = unit * _PART_ALIGN // gcd(unit, _PART_ALIGN)
    return max(1, SLICE_BYTES // (max(row, source_row) * unit)) * unit


def _in_reading_order(plan: ConversionPlan) -> Iterator[_Work]:
    """All parts: dense tensors first, largest first (one thread each, so a late one would run alone), then the experts in shard
    order."""
    numbered: list[_Work] = []
    for tensor in plan.tensors.values():
        for part in tensor.parts:
            numbered.append(_Work(len(numbered), part, tensor.offset + part.offset, is_last=part is tensor.parts[-1]))
    dense = [work for work in numbered if work.part.source.spec.expert is None]
    experts = [work for work in numbered if work.part.source.spec.expert is not None]
    yield from sorted(dense, key=lambda work: -work.part.n_bytes)
    yield from sorted(experts, key=lambda work: (work.part.source.weight.file, work.part.source.weight.offset))


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
