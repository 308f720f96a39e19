"""Reads a model's dense tensors at the speed of the drive: several reads in flight, each straight to a thread that hashes, decodes
and places what it read while the others read on.

Every thread reads one tensor after the other, in slices that stay in its processor's cache until they are where they belong. The
page cache is left out where the file system allows it: these bytes are read once.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from localrun.errors import ChecksumError, StoreError
from localrun.quant.convert.direct_io import AlignedBuffer, DirectReader
from localrun.quant.model.source import DenseReading, DenseSlice, ModelSource

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

SLICE_BYTES: Final = 2 << 20
"""Of ggml rows: with several in flight as fast as larger ones, and small enough for a second-level cache."""

_READERS: Final = max(8, min(32, os.cpu_count() or 1))
"""Threads. They wait for the drive most of the time, or for a core where they decode."""


@dataclass(frozen=True, slots=True)
class WantedTensor:
    """A tensor to read.

    Attributes:
        put: takes ggml bytes, of which the first is at a place in the tensor; any thread, the bytes are valid during the call.
        in_slices: it may be called for slices of `SLICE_GRAIN_ROWS` rows; otherwise once, for all.
    """

    name: str
    n_bytes: int
    put: Callable[[int, Bytes], None]
    in_slices: bool = True


class Keeper(Protocol):
    """Takes what was decoded, to keep it for the next start. Any thread; never raises."""

    def write(self, name: str, begin: int, rows: Bytes, room: Callable[[int], Bytes], *, is_last: bool) -> None:
        """Some rows of a tensor, in `room`'s buffer."""

    def finished(self, name: str, digest: str, sources: Sequence[str]) -> None:
        """A tensor is complete: xxh3_64 of its bytes, and of the weights and scales that it was made from."""


class _StoppedError(Exception):
    """Another tensor could not be read."""


def read_dense(
    source: ModelSource,
    wanted: Sequence[WantedTensor],
    *,
    admit: Callable[[WantedTensor], None] = lambda wanted: None,
    progress: Callable[[int], None] = lambda done: None,
    copy: ModelSource | None = None,
    keeper: Keeper | None = None,
) -> bool:
    """Reads all tensors; returns whether everything that should come from `copy` did.

    Args:
        admit: called before each is read, one at a time; raises to refuse it.
        progress: called with the number of complete tensors, by the caller's thread.
        copy: has the same tensors in files that are faster to read. What is damaged there is read from `source`.
        keeper: takes what was decoded.

    Raises:
        StoreError, FormatError, ChecksumError: of the first tensor that can't be read; and what `admit` or `progress` raises.
    """
    reads = _Reads(source, admit, copy, keeper)
    with ThreadPoolExecutor(_READERS, "localrun-dense") as pool:
        # The largest first: one that begins late would be read alone.
        order = sorted(wanted, key=lambda tensor: -tensor.n_bytes)
        futures: list[Future[None]] = [pool.submit(reads.read, tensor) for tensor in order]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress(done)
        except _StoppedError:
            assert reads.error is not None
            raise reads.error from None
        finally:
            reads.stop()
            pool.shutdown(cancel_futures=True)
            reads.close()
    return not reads.copy_is_damaged


class _Buffers:
    """One thread's memory: weights, scales, decoded rows."""

    def __init__(self) -> None:
        self.raw = AlignedBuffer(), AlignedBuffer()
        self._rows = AlignedBuffer()

    def room(self, n_bytes: int) -> Bytes:
        return self._rows.array(n_bytes)


class _Reads:
    """What the threads share. `_lock` protects the open files, and admission."""

    def __init__(
        self,
        source: ModelSource,
        admit: Callable[[WantedTensor], None],
        copy: ModelSource | None,
        keeper: Keeper | None,
    ) -> None:
        self._source, self._admit, self._copy, self._keeper = source, admit, copy, keeper
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._files: dict[Path, DirectReader] = {}
        self._buffers: queue.SimpleQueue[_Buffers] = queue.SimpleQueue()
        for _ in range(_READERS):
            self._buffers.put(_Buffers())
        self.error: BaseException | None = None
        self.copy_is_damaged = False

    def stop(self) -> None:
        """Threads leave after the slice in work."""
        self._stop.set()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def read(self, wanted: WantedTensor) -> None:
        """One tensor, completely."""
        buffers = self._buffers.get()
        try:
            with self._lock:
                self._check_stop()
                self._admit(wanted)
            if self._copy is None or self.copy_is_damaged or not self._from_copy(self._copy, wanted, buffers):
                self._from(self._source, wanted, buffers, self._keeper)
        except _StoppedError:
            raise
        except BaseException as error:
            self.error = self.error or error
            self._stop.set()
            raise
        finally:
            self._buffers.put(buffers)

    def _from_copy(self, copy: ModelSource, wanted: WantedTensor, buffers: _Buffers) -> bool:
        try:
            self._from(copy, wanted, buffers, None)
        except (ChecksumError, StoreError) as error:
            self.copy_is_damaged = True
            log.info("%s", error)
            return False
        return True

    def _from(self, source: ModelSource, wanted: WantedTensor, buffers: _Buffers, keeper: Keeper | None) -> None:
        reading = source.dense_reading(wanted.name, SLICE_BYTES if wanted.in_slices else wanted.n_bytes)
        if reading is None:
            wanted.put(0, source.read_tensor(wanted.name))
            return
        digest, sources = xxhash.xxh3_64(), (xxhash.xxh3_64(), xxhash.xxh3_64())
        for slice_ in reading.slices:
            self._check_stop()
            raw = self._raw(reading, slice_, buffers)
            rows = reading.rows(slice_, raw, buffers.room)
            digest.update(rows.data)
            wanted.put(slice_.begin, rows)
            if keeper is not None:
                for hasher, data in zip(sources, raw, strict=False):
                    hasher.update(data.data)
                keeper.write(wanted.name, slice_.begin, rows, buffers.room, is_last=slice_.is_last)
        reading.check(digest.hexdigest)
        if keeper is not None:
            keeper.finished(wanted.name, digest.hexdigest(), [hasher.hexdigest() for hasher in sources])

    def _raw(self, reading: DenseReading, slice_: DenseSlice, buffers: _Buffers) -> list[Bytes]:
        return [
            self._file(reading.files[extent.file]).read(extent.offset, extent.n_bytes, buffer)
            for extent, buffer in zip(slice_.extents, buffers.raw, strict=False)
        ]

    def _file(self, path: Path) -> DirectReader:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = DirectReader(path, path.stat().st_size)
            return file

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise _StoppedError
