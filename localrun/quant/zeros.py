"""Zeros where a model has weights: what a download that never ended, or a drive that lost data, leaves in a file of the right size.

`unfinished.refuse_holes` asks the file system for ranges that were never written; these zeros were. A file without checksums says
nothing about them, but their ends do: a model may have rows, matrices or experts of zeros on purpose, and those begin and end
where rows do. A lost range begins and ends anywhere.

Not found: fewer than 64 to 128 KiB of zeros in a row, and a lost range whose two ends happen to fall on ends of rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from localrun.errors import FormatError
from localrun.quant.model.source import PROJECTIONS, Projection

Bytes = npt.NDArray[np.uint8]

_BLOCK_BYTES: Final = 64 << 10
_PROBE_BYTES: Final = 64
"""A cache line per block: 64 of them per expert, about 10 µs."""

_LAST_ZEROS: Final = 16
"""Zeros that a row of weights may end with; smallest values are rarely zero."""
_FIRST_ZEROS: Final = 4
"""Zeros that a row may begin with: low bytes of its first value or scale."""

_BETWEEN_ZEROS: Final = 32 + _LAST_ZEROS
"""Zeros beside a whole matrix: GGUF aligns stacks to 32 bytes, and a neighbour may end or begin with some."""

_WINDOW_BYTES: Final = 1 << 20
_MAX_AROUND_BYTES: Final = 256 << 20
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


def refuse_lost_weights(
    files: Sequence[Path], layer: int, expert: int, projections: Sequence[Projection], raw: Sequence[Sequence[Bytes]]
) -> None:
    """Raises FormatError if bytes of an expert were lost.

    Args:
        files: what extents point into.
        projections: gate, up and down; those with a checksum are left to that.
        raw: for each the bytes of its extents.
    """
    for name, projection, pieces in zip(PROJECTIONS, projections, raw, strict=True):
        if projection.checksum is not None:
            continue
        extent = projection.extents[0]
        path, what = files[extent.file], f"blk.{layer}.ffn_{name}_exps.weight: expert {expert}"
        refuse_torn(f"{path}: {what}", pieces[0], pieces[0].size // projection.n_out, extent.offset)
        if len(pieces) == 1:
            _refuse_lost_matrix(path, what, pieces[0], extent.offset)
        else:
            refuse_zero_scales(f"{path}: {what}", pieces[1])


def _refuse_lost_matrix(path: Path, what: str, data: Bytes, offset: int) -> None:
    """Raises FormatError if an expert's matrix is all zero, and so is a part of what is before or behind it.

    Args:
        path: the file, of which `data` are the bytes from `offset` on.
        what: the tensor and the expert, for the message.
    """
    if data[:_PROBE_BYTES].any() or data.any():
        return
    begin, end = _around(path, offset, offset + data.size)
    before, behind = offset - begin, end - offset - data.size
    # Neighbours may be zero, too, but whole.
    if max(before % data.size, behind % data.size) > _BETWEEN_ZEROS:
        raise _lost(f"{path}: {what}", end - begin, begin)


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


def _around(path: Path, begin: int, end: int) -> tuple[int, int]:
    """How far the zeros from `begin` to `end` go on in the file, at most 256 MiB on either side."""
    with path.open("rb", buffering=0) as file:
        fd, first, last = file.fileno(), max(0, begin - _MAX_AROUND_BYTES), end + _MAX_AROUND_BYTES
        while begin > first:
            start = max(first, begin - _WINDOW_BYTES)
            window = os.pread(fd, begin - start, start)
            if rest := window.rstrip(b"\0"):
                begin = start + len(rest)
                break
            begin = start
        while end < last and (window := os.pread(fd, _WINDOW_BYTES, end)):
            if rest := window.lstrip(b"\0"):
                end += len(window) - len(rest)
                break
            end += len(window)
    return begin, end
