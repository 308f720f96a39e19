"""Checks every byte of a converted model against its manifest's checksums.

Reads from disk, bypassing the page cache, with several reads in flight, in file order. Damage is reported rather than raised,
so that one bad expert does not hide another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import local

import xxhash
from gguf import GGMLQuantizationType

from localrun.errors import StoreError
from localrun.quant.convert.direct_io import AlignedBuffer, DirectReader
from localrun.quant.convert.verify_journal import VerifyJournal
from localrun.quant.gguf.checks import EXPERT_STACK
from localrun.quant.gguf.overlay_index import stack_name
from localrun.quant.gguf.source import GgufSource
from localrun.quant.model.manifest import Manifest, Overlay
from localrun.quant.model.source import PROJECTIONS

READS_IN_FLIGHT = 8
_PIECE_BYTES = 8 << 20
HEADER = "header"


@dataclass(frozen=True, slots=True)
class Check:
    """A byte range and its expected digest.

    Attributes:
        file: index into the source's files.
        tensor: tensor name, or `header` for everything before the data.
        expert: expert number within a stack, else None.
        digest: xxh3_64 hex.
    """

    file: int
    offset: int
    n_bytes: int
    tensor: str
    expert: int | None
    digest: str


@dataclass(frozen=True, slots=True)
class Damage:
    """A range that does not match its checksum, or (`found` None) could not be read."""

    check: Check
    path: Path
    found: str | None
    problem: str

    def __str__(self) -> str:
        expert = "" if self.check.expert is None else f", expert {self.check.expert}"
        return f"{self.path}: {self.check.tensor}{expert}: {self.problem} (byte {self.check.offset} on)"


def planned_checks(source: GgufSource, manifest: Manifest) -> list[Check]:
    """Everything that the manifest has a checksum for, in file order."""
    checks = []
    overlay = manifest.overlay
    files = manifest.files if overlay is None else (*manifest.files, *overlay.files)
    stacks = _overlay_stacks(overlay) if overlay is not None else {}
    for file, part in enumerate(source.headers):
        checks.append(Check(file, 0, part.data_offset, HEADER, None, files[file].header_checksum))
        for tensor in part.tensors.values():
            name, offset, n_bytes = tensor.info.name, tensor.offset, tensor.info.n_bytes
            if name in stacks:
                experts, digests = stacks[name]
            elif stack := EXPERT_STACK.fullmatch(name):
                digests = manifest.experts[int(stack[1])][PROJECTIONS.index(stack[2])]
                experts = range(len(digests))
            else:
                checks.append(Check(file, offset, n_bytes, name, None, manifest.tensors[name]))
                continue
            size = n_bytes // len(digests)
            checks += [
                Check(file, offset + number * size, size, name, expert, digest)
                for number, (expert, digest) in enumerate(zip(experts, digests, strict=True))
            ]
    return sorted(checks, key=lambda check: (check.file, check.offset))


def _overlay_stacks(overlay: Overlay) -> dict[str, tuple[Sequence[int], Sequence[str]]]:
    """Expert numbers and checksums by the overlay's tensor names."""
    return {
        stack_name(layer, projection, GGMLQuantizationType[kind.upper()]): (stack.ids, stack.checksums[projection])
        for layer, by_type in overlay.experts.items()
        for kind, stack in by_type.items()
        for projection in range(len(PROJECTIONS))
    }


def verify(
    source: GgufSource,
    manifest: Manifest,
    progress: Callable[[int, int], None] = lambda done, total: None,
    journal: VerifyJournal | None = None,
) -> list[Damage]:
    """Reads everything once and returns the damage, in file order.

    Args:
        progress: called with (bytes done, total bytes), from this thread.
        journal: skips what an interrupted run has read, and records progress for the next one.
    """
    checks = planned_checks(source, manifest)
    first = min(journal.next_check, len(checks)) if journal is not None else 0
    total, done = sum(check.n_bytes for check in checks), sum(check.n_bytes for check in checks[:first])
    damages = []
    if journal is not None:
        known = [(checks[i], found, problem) for i, found, problem in journal.damaged if i < first]
        damages = [Damage(check, source.files[check.file], found, problem) for check, found, problem in known]
    with ExitStack() as opened:
        if journal is not None:
            opened.callback(journal.save)
        readers = []
        for part in source.headers:
            readers.append(_reader(part.path, part.size_bytes))
            opened.callback(readers[-1].close)
        pool = opened.enter_context(ThreadPoolExecutor(READS_IN_FLIGHT, thread_name_prefix="verify"))
        for number, (check, damage) in enumerate(_in_order(pool, checks[first:], readers), first):
            if damage is not None:
                damages.append(damage)
            if journal is not None:
                journal.done(number + 1, None if damage is None else (number, damage.found, damage.problem))
            done += check.n_bytes
            progress(done, total)
        if journal is not None:
            opened.pop_all().close()
            journal.clear()
    return damages


def recheck(source: GgufSource, damages: Sequence[Damage]) -> list[Damage]:
    """The ranges that are still damaged."""
    with ExitStack() as opened:
        readers = []
        for part in source.headers:
            readers.append(_reader(part.path, part.size_bytes))
            opened.callback(readers[-1].close)
        pool = opened.enter_context(ThreadPoolExecutor(READS_IN_FLIGHT, thread_name_prefix="verify"))
        results = _in_order(pool, [damage.check for damage in damages], readers)
        return [damage for _, damage in results if damage is not None]


def _reader(path: Path, size: int) -> DirectReader:
    reader = DirectReader(path, size)
    # Cached pages would hide damage on the disk.
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return reader


def _digest(reader: DirectReader, check: Check, buffer: AlignedBuffer) -> str:
    """In pieces: an output matrix of a gigabyte must not become eight gigabytes of buffers."""
    digest = xxhash.xxh3_64()
    for start in range(0, check.n_bytes, _PIECE_BYTES):
        n_bytes = min(_PIECE_BYTES, check.n_bytes - start)
        digest.update(reader.read(check.offset + start, n_bytes, buffer).data)
    return digest.hexdigest()


def _in_order(
    pool: ThreadPoolExecutor, checks: list[Check], readers: list[DirectReader]
) -> Iterator[tuple[Check, Damage | None]]:
    """Results in the order of the checks, with a bounded number of reads waiting."""
    buffers = local()

    def run(check: Check) -> Damage | None:
        if not hasattr(buffers, "own"):
            buffers.own = AlignedBuffer()
        reader = readers[check.file]
        try:
            found = _digest(reader, check, buffers.own)
        except StoreError as error:
            return Damage(check, reader.path, None, f"can't be read: {error}")
        return None if found == check.digest else Damage(check, reader.path, found, "checksum differs")

    waiting: list[tuple[Check, Future[Damage | None]]] = []
    try:
        for check in checks:
            waiting.append((check, pool.submit(run, check)))
            if len(waiting) > 2 * READS_IN_FLIGHT:
                first, result = waiting.pop(0)
                yield first, result.result()
        for check, result in waiting:
            yield check, result.result()
    finally:
        for _, result in waiting:
            result.cancel()
