"""Zeros where a model has weights: what a download that never ended, or a drive that lost data, leaves in a file of the right size.

`unfinished.refuse_holes` asks the file system for ranges that were never written; these zeros were. A file without checksums says
nothing about them, but their ends do: a model may have rows, matrices or experts of zeros on purpose, and those begin and end
where rows do. A lost range begins and ends anywhere.

Not found: fewer than 64 to 128 KiB of zeros in a row, and a lost range whose two ends happen to fall on ends of rows.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from localrun.errors import FormatError
from localrun.quant.model.source import PROJECTIONS, Extent, ModelSource, Projection

Bytes = npt.NDArray[np.uint8]

_BLOCK_BYTES: Final = 64 << 10
_PROBE_BYTES: Final = 64
"""A cache line per block: 64 of them per expert, about 10 µs."""

_LAST_ZEROS: Final = 16
"""Zeros that a row of weights may end with; smallest values are rarely zero."""
_FIRST_ZEROS: Final = 4
"""Zeros that a row may begin with: low bytes of its first value or scale."""

_BETWEEN_ZEROS: Final = 32 + _LAST_ZEROS
"""Zeros beside a whole matrix: files align to 32 bytes, and a neighbour may end or begin with some."""

_WINDOW_BYTES: Final = 1 << 20
_HINT: Final = "the file is incomplete or the drive lost data: download it again"


def refuse_torn(where: str, data: Bytes, row_bytes: int, offset: int = 0) -> None:
    """Raises FormatError if `data`, whole rows of a matrix, has a long run of zeros that isn't a number of whole rows.

    Args:
        where: file and tensor, for the message.
        offset: of `data` in the file, likewise.
    """
    if (torn := torn_rows(data, row_bytes)) is not None:
        begin, end = torn
        raise _lost(where, end - begin, offset + begin)


def torn_rows(data: Bytes, row_bytes: int) -> tuple[int, int] | None:
    """The first run of zeros (begin, end) of at least a block that doesn't begin and end with a row."""
    n_blocks = data.size // _BLOCK_BYTES
    blocks = data[: n_blocks * _BLOCK_BYTES].reshape(n_blocks, _BLOCK_BYTES)
    candidates = np.flatnonzero(~blocks[:, :_PROBE_BYTES].any(axis=1))
    end = 0
    for number in candidates:
        if number * _BLOCK_BYTES < end or blocks[number].any():
            continue
        begin, end = _run(data, int(number) * _BLOCK_BYTES)
        whole = -begin % row_bytes <= _LAST_ZEROS and (end == data.size or end % row_bytes <= _FIRST_ZEROS)
        if not whole:
            return begin, end
    return None


def refuse_zero_scales(where: str, scale: Bytes) -> None:
    """Raises FormatError for E8M0 scales that are all zero (2^-127), or have a block of zeros: no quantizer writes those."""
    if scale.size and not scale.any():
        raise FormatError(f"{where}: all scales are zero", hint=_HINT)
    refuse_torn(where, scale, scale.size + _BLOCK_BYTES)


def refuse_zero_norm(where: str, weights: Bytes) -> None:
    """Raises FormatError if all weights of a norm are zero: nothing would come out of it."""
    if weights.size and not weights.any():
        raise FormatError(f"{where}: all weights of a norm are zero", hint=_HINT)


class LostWeights:
    """Looks for lost bytes in the experts of one copy of a model as they are read. Any thread.

    An expert's matrix of zeros alone says nothing, so what is around it is read: what the copy's stack of such matrices has, once.

    Args:
        source: the copy.
    """

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._runs: dict[tuple[int, str, int], list[tuple[int, int]]] = {}  # (layer, projection, file) -> zeros

    def refuse_one(self, layer: int, expert: int, name: str, projection: Projection, pieces: Sequence[Bytes]) -> None:
        """Raises FormatError if bytes of one matrix of an expert were lost.

        Args:
            name: `gate`, `up` or `down`.
            projection: the matrix; one with a checksum is left to that.
            pieces: the bytes of its extents.
        """
        if projection.checksum is not None:
            return
        extent = projection.extents[0]
        where = f"{self._source.files[extent.file]}: blk.{layer}.ffn_{name}_exps.weight: expert {expert}"
        refuse_torn(where, pieces[0], pieces[0].size // projection.n_out, extent.offset)
        if len(pieces) > 1:
            refuse_zero_scales(where, pieces[1])
        elif not pieces[0][:_PROBE_BYTES].any() and not pieces[0].any():
            self._refuse_lost_matrix(where, layer, name, extent)

    def _refuse_lost_matrix(self, where: str, layer: int, name: str, extent: Extent) -> None:
        """Raises FormatError if all of an expert's matrix is zero, and so is a part of the one before or behind it."""
        first, last = self._stack(layer, name, extent)
        begin, end = self._zeros_around(layer, name, extent, first, last)
        before, behind = extent.offset - begin, end - extent.offset - extent.n_bytes
        torn_before = begin > first and before % extent.n_bytes > _BETWEEN_ZEROS
        torn_behind = end < last and behind % extent.n_bytes > _BETWEEN_ZEROS
        # Neighbours may be zero, too, but whole.
        if torn_before or torn_behind:
            raise _lost(where, end - begin, begin)

    def _stack(self, layer: int, name: str, extent: Extent) -> tuple[int, int]:
        """Where this matrix of the layer's first expert begins and that of its last one ends, in the file of `extent`."""
        index, n_experts = PROJECTIONS.index(name), self._source.moe_layers[layer].n_experts
        extents = [self._source.base_expert(layer, expert)[index].extents[0] for expert in range(n_experts)]
        extents = [extent, *(other for other in extents if other.file == extent.file)]
        return min(other.offset for other in extents), max(other.offset + other.n_bytes for other in extents)

    def _zeros_around(self, layer: int, name: str, extent: Extent, first: int, last: int) -> tuple[int, int]:
        """How far the zeros of `extent` go on in the file, from `first` to `last` at most; read only once."""
        with self._lock:  # whoever else finds zeros here waits for what has been found
            runs = self._runs.setdefault((layer, name, extent.file), [])
            for begin, end in runs:
                if begin <= extent.offset and extent.offset + extent.n_bytes <= end:
                    return begin, end
            path, end = self._source.files[extent.file], extent.offset + extent.n_bytes
            runs.append(_around(path, extent.offset, end, first, last))
            return runs[-1]


def _lost(where: str, n_bytes: int, offset: int) -> FormatError:
    return FormatError(f"{where}: {n_bytes} bytes from {offset} on are zeros instead of weights", hint=_HINT)


def _run(data: Bytes, inside: int) -> tuple[int, int]:
    """Begin and end of the run of zeros around `inside`."""
    begin = inside
    while begin > 0:
        window = data[max(0, begin - _WINDOW_BYTES) : begin]
        if (nonzero := np.flatnonzero(window)).size:
            begin -= window.size - 1 - int(nonzero[-1])
            break
        begin -= window.size
    end = inside
    while end < data.size:
        window = data[end : end + _WINDOW_BYTES]
        if (nonzero := np.flatnonzero(window)).size:
            end += int(nonzero[0])
            break
        end += window.size
    return begin, end


def _around(path: Path, begin: int, end: int, first: int, last: int) -> tuple[int, int]:
    """How far the zeros from `begin` to `end` go on in the file, from `first` to `last` at most."""
    with path.open("rb", buffering=0) as file:
        fd = file.fileno()
        while begin > first:
            start = max(first, begin - _WINDOW_BYTES)
            window = _read_once(fd, start, begin)
            if (nonzero := np.flatnonzero(window)).size:
                begin = start + int(nonzero[-1]) + 1
                break
            begin = start
        while end < last and (window := _read_once(fd, end, min(last, end + _WINDOW_BYTES))).size:
            if (nonzero := np.flatnonzero(window)).size:
                end += int(nonzero[0])
                break
            end += window.size
    return begin, end


def _read_once(fd: int, begin: int, end: int) -> Bytes:
    """Bytes of a file, which don't stay in the page cache: there may be gigabytes."""
    data = os.pread(fd, end - begin, begin)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, begin, end - begin, os.POSIX_FADV_DONTNEED)
    return np.frombuffer(data, np.uint8)
