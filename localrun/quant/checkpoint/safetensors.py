"""One safetensors file: its header, fully checked, and positional reads of its bytes.

The `safetensors` library is not used because it maps the file, can't read into our buffers (so no O_DIRECT and unbounded page
cache use), and supports F8_E8M0 only through torch. We need byte ranges, checks of every header field before allocating
anything, and errors that name the file and the tensor.

Layout (safetensors format, https://github.com/huggingface/safetensors#format): u64 little endian header length N, N bytes of JSON
`{name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {str: str}}`, then the data; offsets count from 8 + N, ranges
are little endian, row-major, without holes, and end with the file.

Knows nothing about models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from localrun.errors import FormatError, StoreError
from localrun.quant.unfinished import refuse_holes, refuse_unfinished
from localrun.reading import read_fully

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; Pro's largest official shard has 0.3 MB."""

MAX_DIMS = 8
"""More than any tensor of any model has; keeps products of hostile shapes small."""

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
"""Bytes per element of the dtypes whose elements fill whole bytes."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file; `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A checked header. Holds no descriptor: every read opens the file, so objects need no closing.

    Attributes:
        path: the file.
        size: its size when the header was read; reads fail when it has changed since.
        header_digest: xxh3_128 hex digest of the header bytes.
        tensors: by name, in the order of their bytes.
    """

    path: Path
    size: int
    header_digest: str
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Reads and checks the header.

        Raises:
            FormatError: not a safetensors file, truncated, or a header that contradicts itself or the file's size.
        """
        refuse_unfinished(path)
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header = _read_header(path, file.read(8), size, file.read)
                refuse_holes(path, file.fileno(), 8 + len(header), size)
        except OSError as e:
            raise FormatError(f"{path}: can't be read: {e.strerror or e}") from e
        entries = _parse_entries(path, header, data_start=8 + len(header))
        return cls(path, size, xxhash.xxh3_128_hexdigest(header), _check_ranges(path, entries, 8 + len(header), size))

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """All bytes of a tensor.

        Raises:
            StoreError: I/O error, or the file has changed since it was opened.
        """
        entry = self.tensors[name]
        out = np.empty(entry.n_bytes, np.uint8)
        self.read_at(entry.offset, out)
        return out

    def read_at(self, offset: int, out: npt.NDArray[np.uint8]) -> None:
        """Fills `out` with the file's bytes from `offset` on.

        Raises:
            StoreError: I/O error, or the file has changed since it was opened.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise StoreError(f"{self.path}: can't be opened: {e.strerror}") from e
        try:
            if os.fstat(fd).st_size != self.size:
                raise StoreError(f"{self.path}: size changed since it was opened", hint="open the model again")
            read_fully(fd, self.path, offset, out.data)
        finally:
            os.close(fd)


def _read_header(path: Path, prefix: bytes, size: int, read: Any) -> bytes:
    if len(prefix) < 8:
        raise FormatError(f"{path}: {size} bytes are too few for a safetensors file", hint="download the file again")
    n_header = int.from_bytes(prefix, "little")
    if n_header > MAX_HEADER_BYTES:
        raise FormatError(
            f"{path}: header of {n_header} bytes, the format allows {MAX_HEADER_BYTES}",
            hint="this is not a safetensors file; download it again",
        )
    if 8 + n_header > size:
        raise FormatError(
            f"{path}: truncated: header of {n_header} bytes in a file of {size}", hint="download the file again"
        )
    header: bytes = read(n_header)
    if len(header) != n_header:
        raise FormatError(f"{path}: header ends after {len(header)} of {n_header} bytes")
    return header


def _parse_entries(path: Path, header: bytes, data_start: int) -> list[TensorEntry]:
    document = parse_json_object(path, header, what="header")
    document.pop("__metadata__", None)
    return [_parse_entry(path, name, value, data_start) for name, value in document.items()]


def _parse_entry(path: Path, name: str, value: object, data_start: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise FormatError(f"{path}: {name}: description is not an object")
    dtype: Any = value.get("dtype")
    shape: Any = value.get("shape")
    offsets: Any = value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise FormatError(f"{path}: {name}: unknown dtype {str(dtype)[:40]!r}")
    if not _is_size_list(shape) or len(shape) > MAX_DIMS:
        raise FormatError(f"{path}: {name}: shape {str(shape)[:80]} is not a list of up to {MAX_DIMS} sizes")
    if not _is_size_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{path}: {name}: data_offsets {str(offsets)[:80]} are not a [begin, end] pair")
    n_bytes = DTYPE_BYTES[dtype]
    for n in shape:
        n_bytes *= n
    if n_bytes != offsets[1] - offsets[0]:
        raise FormatError(
            f"{path}: {name}: {dtype} {shape} takes {n_bytes} bytes, data_offsets hold {offsets[1] - offsets[0]}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], n_bytes)


def _is_size_list(value: Any) -> bool:
    # bool is an int in Python; 2**63 bounds every product by the shape check against real bytes.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_ranges(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> dict[str, TensorEntry]:
    entries.sort(key=lambda entry: (entry.offset, entry.n_bytes))
    end, before = data_start, "the header"
    for entry in entries:
        if entry.offset != end:
            what = "overlaps" if entry.offset < end else "leaves a hole after"
            raise FormatError(
                f"{path}: {entry.name}: starts at byte {entry.offset}, {what} {before} that ends at {end}"
            )
        end, before = entry.offset + entry.n_bytes, entry.name
    if end != size:
        what = "truncated" if end > size else "has bytes after its last tensor"
        raise FormatError(
            f"{path}: {what}: header describes {end} bytes, the file has {size}", hint="download the file again"
        )
    return {entry.name: entry for entry in entries}


def parse_json_object(path: Path, data: bytes, *, what: str = "file") -> dict[str, Any]:
    """Parses a JSON object, rejecting duplicate keys, NaN and anything that is not an object.

    Raises:
        FormatError: with `path` and `what` in the message.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"{path}: {what} has the key {twice[:80]!r} twice")
        return result

    def no_constant(text: str) -> float:
        raise FormatError(f"{path}: {what} contains {text}")

    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except FormatError:
        raise
    # RecursionError: deep nesting; ValueError: bad UTF-8, bad JSON, or an integer of more than 4300 digits.
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{path}: {what} is not JSON: {str(e)[:120]}") from e
    if not isinstance(document, dict):
        raise FormatError(f"{path}: {what} is not a JSON object")
    return document
