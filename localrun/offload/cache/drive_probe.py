"""Measures read speeds: of the model's drive, bypassing the page cache, and of RAM.

The disk probe determines how many reads of what size keep the drive busy (`ExpertStore`'s readers and pieces), and the resulting
bandwidth (for the planner). It reads random positions of the model's files for three seconds, once a day and drive; the result is
cached under `cache_dir()`. Nothing here may fail a start: if measuring or caching fails, published values are used, with a
warning.

A drive may be faster for a moment than for long (a burst of 2.5 GB/s, then 1.5), or slower, because other programs use it, and on a
virtual machine its neighbours. So each combination is read for a third of a second, and the best two again when the drive has been
busy for longer than a second. The rate is the median of the runs after that second, of all combinations that are not clearly
slower: on a virtual drive, runs of the same combination differed by a factor of two, and the best of a few is an accident. The
slowest and the fastest are kept beside it. A later measurement counts as much as all earlier ones together.

Method: threads keep reads in flight, like the store. A rate is all bytes divided by the time from the first read's start to the
last one's end. (Excluding start and end would be worse: with 16 reads of 4 MiB, completions come in bursts, and the time between
two of them gave three times the drive's rate. Runs of 0.1 s lose too much of their time to them: 0.2 and 1.2 GB/s in the first two
tenths, 1.8 for the next five seconds, and the number of reads could not be told: 4 of 4 MiB sustain 1.2 GB/s, 8 sustain 1.8.)
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import re
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import preadv
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from localrun.alignment import PAGE_BYTES
from localrun.atomic import replacing
from localrun.kernel_cache import cached_jit
from localrun.pages import anonymous
from localrun.paths import cache_dir

log = logging.getLogger(__name__)

DEFAULT_READS: Final = 8
DEFAULT_PIECE_BYTES: Final = 2 << 20
"""Where nothing can be measured: published measurements of several engines agree on 8 to 16 reads of 2 to 4 MB."""

READS: Final = (4, 8, 16)
"""Not fewer, even where two saturate a drive: the store's readers also decode and pack what they have read."""

PIECES: Final = (1 << 20, 2 << 20)
"""Not larger, even where that is a little faster: what is awaited queues behind reads that have begun, and an expert's matrices are
packed as they arrive."""
MIN_FILE_BYTES: Final = 64 << 20
"""Smaller files would measure the drive's cache rather than the drive."""

MAX_AGE_S: Final = 86400.0
UNSTEADY_AGE_S: Final = 600.0
"""Profiles of unsteady moments are measured again soon."""
_UNSTEADY: Final = 1.5
_VERSION: Final = 6
_RUN_S: Final = 0.33
_AGAIN: Final = 2
"""How many combinations are read again, and how often each."""
_SLOWER: Final = 0.8
"""A combination that never reached this share of the best one's slowest later run is slower, and not just unlucky."""
_TIE: Final = 0.97
"""Fewer and smaller reads in flight win when they reach this share of the best rate: they cost less memory and latency."""


@dataclass(frozen=True, slots=True)
class DiskProfile:
    """A drive's bandwidth, and how to reach it.

    Attributes:
        n_reads: reads in flight.
        piece_bytes: size of one read.
        bytes_per_s: bandwidth, for long; None: not measured.
        slowest_bytes_per_s, fastest_bytes_per_s: of the runs that this comes from; 0.0: not measured.
        direct: the reads bypassed the page cache (O_DIRECT).
        device: `major:minor`, file system and source of the mount.
        measured_at: seconds since the epoch; 0.0: not measured.
        tried: "reads x KiB" -> bytes per second of every combination that was measured.
        unsteady: something else used the drive or the cores: runs of the same kind differed much, or more programs computed
            than there are cores, which keeps the readers waiting.
    """

    n_reads: int = DEFAULT_READS
    piece_bytes: int = DEFAULT_PIECE_BYTES
    bytes_per_s: float | None = None
    direct: bool = False
    device: str = ""
    measured_at: float = 0.0
    tried: dict[str, float] = field(default_factory=dict)
    unsteady: bool = False
    slowest_bytes_per_s: float = 0.0
    fastest_bytes_per_s: float = 0.0

    @property
    def max_age_s(self) -> float:
        """How long it is good for."""
        return UNSTEADY_AGE_S if self.unsteady else MAX_AGE_S

    @property
    def spread(self) -> tuple[float, float]:
        """The slowest and the fastest run relative to the rate; 1.0 within."""
        if not self.bytes_per_s or not self.slowest_bytes_per_s:
            return 1.0, 1.0
        slowest, fastest = self.slowest_bytes_per_s / self.bytes_per_s, self.fastest_bytes_per_s / self.bytes_per_s
        return min(1.0, slowest), max(1.0, fastest)

    @property
    def measured(self) -> bool:
        """False: these are the defaults."""
        return self.bytes_per_s is not None


# --- disk -------------------------------------------------------------------------------------------------------------


def probe_disk(
    paths: Sequence[Path], *, refresh: bool = False, max_age_s: float | None = None, memory: Path | None = None
) -> DiskProfile:
    """The profile of the drive that holds most of these files, cached or measured (three seconds).

    Args:
        paths: files of the model; folders stand for the files in them.
        refresh: measure even if there is a cached profile.
        max_age_s: older profiles are remeasured; None: after a day, or ten minutes if the drive was in use.
        memory: file of cached profiles, by default `disk_profiles_path()`.

    Returns:
        The defaults, not `measured`, for small or unreadable files.
    """
    memory = memory or disk_profiles_path()
    files, device = _largest_group(paths)
    if not files:
        return DiskProfile()
    known = _recall(memory, device)
    if known is not None and not refresh:
        limit_s = known.max_age_s if max_age_s is None else max_age_s
        if 0 <= time.time() - known.measured_at < limit_s:
            return known
    if sum(size for _, size in files) < MIN_FILE_BYTES:
        return known or DiskProfile(device=device)
    try:
        with _Files(files) as opened:
            profile = _measure(opened, device, known)
    except OSError as error:
        log.warning("%s: could not measure the drive: %s", files[0][0], error.strerror)
        return known or DiskProfile(device=device)
    _remember(memory, profile)
    return profile


def disk_profiles_path() -> Path:
    """The file with one profile per drive."""
    return cache_dir() / "disks.json"


def device_name(st_dev: int) -> str:
    """`254:0 ext4 /dev/vda`: number alone is not enough, it changes owners between boots."""
    number = f"{os.major(st_dev)}:{os.minor(st_dev)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")  # proc(5), mountinfo: ... major:minor ... - type source options
            if fields.split()[2] == number:
                return " ".join((number, *rest.split()[:2]))
    return number


def _largest_group(paths: Sequence[Path]) -> tuple[list[tuple[Path, int]], str]:
    """Files of the drive that holds the most bytes, with their sizes."""
    groups: dict[int, list[tuple[Path, int]]] = {}
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else (path,):
            with contextlib.suppress(OSError):
                status = file.stat()
                if file.is_file() and status.st_size > 0:
                    groups.setdefault(status.st_dev, []).append((file, status.st_size))
    if not groups:
        return [], ""
    best = max(groups, key=lambda device: sum(size for _, size in groups[device]))
    return groups[best], device_name(best)


class _Files:
    """The files opened for the probe, and random places in them. O_DIRECT where it works for all."""

    def __init__(self, files: Sequence[tuple[Path, int]]) -> None:
        self.direct = False
        self._fds: list[int] = []
        flag = getattr(os, "O_DIRECT", 0)
        if flag:
            try:
                self._open(files, flag)
                preadv(self._fds[0], [mmap.mmap(-1, PAGE_BYTES)], 0)
                self.direct = True
            except OSError:  # tmpfs, some network file systems
                self.close()
        if not self.direct:
            self._open(files, 0)
        self._sizes = np.array([size for _, size in files], np.float64)
        self._random = np.random.default_rng()

    def _open(self, files: Sequence[tuple[Path, int]], flag: int) -> None:
        try:
            for path, _ in files:
                self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag))
        except OSError:
            self.close()
            raise

    def random_extents(self, n: int, piece_bytes: int) -> list[tuple[int, int]]:
        """n random page-aligned (descriptor, offset), files weighted by size."""
        which = self._random.choice(len(self._fds), n, p=self._sizes / self._sizes.sum())
        room = np.maximum(self._sizes[which] - piece_bytes, 0)
        offsets = (self._random.random(n) * room) // PAGE_BYTES * PAGE_BYTES
        return [(self._fds[i], int(offset)) for i, offset in zip(which, offsets, strict=True)]

    def read(self, fd: int, offset: int, target: mmap.mmap) -> int:
        """Bytes read. Uses the page cache only if it can't be bypassed, and then only for pages that it has dropped."""
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, offset, len(target), os.POSIX_FADV_DONTNEED)
        return preadv(fd, [target], offset)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _measure(files: _Files, device: str, known: DiskProfile | None = None) -> DiskProfile:
    """Numbers of reads with large pieces, then pieces with the best number, then the best two in turns.

    Args:
        known: an earlier profile of the same drive.
    """
    runs: dict[tuple[int, int], list[float]] = {}
    later: list[tuple[tuple[int, int], float]] = []  # when the drive has been busy for a second
    crowded = _crowded()

    def run(n_reads: int, piece: int) -> None:
        rate = _measured_bytes_per_s(files, n_reads, piece)
        runs.setdefault((n_reads, piece), []).append(rate)
        if sum(map(len, runs.values())) > len(READS):
            later.append(((n_reads, piece), rate))

    for n_reads in READS:
        run(n_reads, PIECES[-1])
    best_reads = max(READS, key=lambda n_reads: runs[n_reads, PIECES[-1]][0])
    for piece in PIECES[:-1]:
        run(best_reads, piece)
    best = sorted(runs, key=lambda pair: -runs[pair][0])[:_AGAIN]
    for _ in range(_AGAIN):  # in turns: a bad moment then meets all of them
        for pair in best:
            run(*pair)
    # A first run may be a burst, or the drive's waking up.
    lasting = {pair: own[1:] or own for pair, own in runs.items()}
    rates = {pair: sum(own) / len(own) for pair, own in lasting.items()}
    if known is not None and not known.unsteady:
        for name, rate in known.tried.items():
            n_reads, kib = (int(part) for part in name.split(" x "))
            pair = n_reads, kib << 10
            rates[pair] = (rates[pair] + rate) / 2 if pair in rates else rate
    if max(rates.values()) <= 0:
        return DiskProfile(device=device)
    fastest = max(rates[pair] for pair in best)
    n_reads, piece = min((pair for pair in best if rates[pair] >= _TIE * fastest), key=lambda p: (p[0] * p[1], p[0]))
    own = lasting[n_reads, piece]
    typical = _typical(runs, later, min(own))
    bytes_per_s = statistics.median(typical)
    if known is not None and not known.unsteady and known.bytes_per_s:
        bytes_per_s = (bytes_per_s + known.bytes_per_s) / 2
    return DiskProfile(
        n_reads=n_reads,
        piece_bytes=piece,
        bytes_per_s=bytes_per_s,
        direct=files.direct,
        device=device,
        measured_at=time.time(),
        tried={f"{n_reads} x {piece >> 10}": round(rate) for (n_reads, piece), rate in sorted(rates.items())},
        unsteady=crowded or max(own) > _UNSTEADY * min(own),
        slowest_bytes_per_s=min(typical),
        fastest_bytes_per_s=max(typical),
    )


def _typical(
    runs: Mapping[tuple[int, int], Sequence[float]], later: Sequence[tuple[tuple[int, int], float]], slowest: float
) -> list[float]:
    """Rates of the later runs, without combinations that were clearly slower each time.

    Args:
        runs: all of them, by combination.
        later: those after the first second.
        slowest: later run of the best combination.
    """
    return [rate for pair, rate in later if max(runs[pair]) >= _SLOWER * slowest]


def _crowded() -> bool:
    """Over the last minute, more threads wanted to compute than there are cores."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)


def _measured_bytes_per_s(files: _Files, n_reads: int, piece_bytes: int) -> float:
    """Bytes per second with that many reads in flight."""
    errors: list[OSError] = []
    n_bytes = [0] * n_reads
    # More extents than any drive can serve in time; repeating them would let its cache answer.
    work = [files.random_extents(256, piece_bytes) for _ in range(n_reads)]
    targets = [anonymous(piece_bytes, forked=False) for _ in range(n_reads)]  # as the store's
    for target in targets:
        target.write(bytes(piece_bytes))  # page faults belong to no drive

    def read(index: int) -> None:
        try:
            for fd, offset in work[index]:
                n_bytes[index] += files.read(fd, offset, targets[index])
                if time.perf_counter() >= deadline:
                    return
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(index,), daemon=True) for index in range(n_reads)]
    start = time.perf_counter()
    deadline = start + _RUN_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - start
    for target in targets:
        target.close()
    if errors:
        raise errors[0]
    return sum(n_bytes) / elapsed


def _recall(memory: Path, device: str) -> DiskProfile | None:
    try:
        entry: Any = _stored(memory).get(device)
        if entry is None:
            return None
        profile = DiskProfile(**entry)
        sound = (
            1 <= int(profile.n_reads) <= 256
            and PAGE_BYTES <= int(profile.piece_bytes) <= 1 << 30
            and profile.piece_bytes % PAGE_BYTES == 0
            and profile.bytes_per_s is not None
            and float(profile.bytes_per_s) > 0
            and float(profile.measured_at) >= 0
            and 0 <= profile.slowest_bytes_per_s <= profile.fastest_bytes_per_s
            and all(
                re.fullmatch(r"[1-9]\d{0,2} x [1-9]\d{0,6}", name) and rate > 0 for name, rate in profile.tried.items()
            )
        )
        if not sound:
            raise ValueError("impossible values")
    except (ValueError, TypeError, AttributeError) as error:
        log.warning("%s: ignoring the saved drive profile: %s", memory, error)
        return None
    return profile


def _stored(memory: Path) -> dict[str, Any]:
    """The file's profiles; empty if there is no file. Raises ValueError if it is damaged."""
    try:
        values = json.loads(memory.read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(error.strerror) from error
    if not isinstance(values, dict) or values.get("version") != _VERSION or not isinstance(values.get("drives"), dict):
        raise ValueError("not a list of drives of this version")
    return dict(values["drives"])


def _remember(memory: Path, profile: DiskProfile) -> None:
    if not profile.measured:
        return
    try:
        drives = _stored(memory)
    except ValueError:
        drives = {}
    drives[profile.device] = asdict(profile)
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with replacing(memory) as file:
            file.write(json.dumps({"version": _VERSION, "drives": drives}, indent=1).encode() + b"\n")
    except OSError as error:
        log.warning("could not save the drive profile: %s", error)


# --- memory -----------------------------------------------------------------------------------------------------------


@cached_jit(nogil=True)
def read_memory(values: npt.NDArray[np.int64], rounds: int) -> Any:
    """Adds up an array, again and again, without the interpreter lock."""
    total = np.int64(0)
    for _ in range(rounds):
        for i in range(values.size):
            total += values[i]
    return total


def probe_memory(n_threads: int = 0, *, buffer_bytes: int = 256 << 20) -> float:
    """RAM read bandwidth of all cores together, bytes per second, in about 0.2 s: what a fifth of the passes exceed, because others
    may interrupt one, and what one reads may still be in a cache.

    Passes over everything lose least to the threads' starts. Beside other programs each of these is interrupted; passes over an
    eighth are shorter than a time slice.

    Args:
        n_threads: 0: as many as this process may use.
        buffer_bytes: must exceed the last-level cache.
    """
    if not n_threads:
        n_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = anonymous(buffer_bytes)
    values = np.frombuffer(memory, np.int64)
    values.fill(1)  # untouched pages would all be the same one
    read_memory(values[:8], 1)
    return max(_passes_bytes_per_s(np.array_split(values, n_parts), n_threads) for n_parts in (1, 8))


def _passes_bytes_per_s(parts: Sequence[npt.NDArray[np.int64]], n_threads: int) -> float:
    """Passes over each part in turns."""
    rates: list[float] = []
    end = time.perf_counter() + 0.08
    while not rates or time.perf_counter() < end:
        part = parts[len(rates) % len(parts)]
        threads = [threading.Thread(target=read_memory, args=(share, 1)) for share in np.array_split(part, n_threads)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rates.append(part.nbytes / (time.perf_counter() - start))
    return float(np.quantile(rates, 0.8))
