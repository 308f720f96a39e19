"""GGUF headers: read with every field checked, and written.

Knows keys, values, tensor descriptions and where tensors lie; knows nothing about architectures or weights. Layout:
ggml `docs/gguf.md`, versions 2 and 3 (same bytes for little endian), with llama.cpp's limits (`ggml/src/gguf.cpp`).

Why not `gguf.GGUFReader`: it maps the whole file, builds several numpy objects per token (seconds for a vocabulary of
129,280) and trusts counts, offsets and types. Here a value keeps the bytes that the file has (`GgufValue.raw`) and is
decoded when somebody asks, so a header that is read and written again keeps every value's type and width exactly.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from localrun.errors import FormatError, StoreError, UnsupportedModelError
from localrun.quant.source import TensorInfo

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

MAX_HEADER_BYTES = 256 << 20
"""The real model's header is about 7 MB; a larger claim than this is damage, and reading it would cost memory."""
MAX_ARRAY_STRINGS = 1 << 22
"""Sixteen times the largest vocabulary in use; bounds the time that a hostile count can cost."""
MAX_TENSORS = 1 << 20
MAX_KEYS = 1 << 16
MAX_KEY_BYTES = 1 << 16
MAX_NAME_BYTES = 63
"""llama.cpp's GGML_MAX_NAME is 64 with the terminating zero."""
MAX_ALIGNMENT = 1 << 20
_FIRST_READ = 1 << 20

_SCALAR_FORMATS: dict[int, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_SCALAR_BYTES = {value_type: struct.calcsize("<" + code) for value_type, code in _SCALAR_FORMATS.items()}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_PREAMBLE = struct.Struct("<4sIQQ")


def tensor_bytes(ggml_type: GGMLQuantizationType, shape: Sequence[int]) -> int:
    """Size of a tensor of `shape` (ggml order, innermost first).

    Raises:
        ValueError: a row is no multiple of the type's block.
    """
    block, block_bytes = GGML_QUANT_SIZES[ggml_type]
    if shape[0] % block:
        raise ValueError(f"row of {shape[0]} values is not a multiple of {ggml_type.name}'s {block}")
    n = shape[0] // block * block_bytes
    for extent in shape[1:]:
        n *= extent
    return int(n)


class GgufValue:
    """One metadata value with its GGUF type, as the bytes that a file holds. Immutable; equal when type and bytes are.

    Attributes:
        type: a scalar type, STRING or ARRAY.
        item_type: type of an array's items, None otherwise.
        count: items of an array, 1 otherwise.
        raw: little-endian payload after the type fields; strings with their 8-byte lengths.
    """

    __slots__ = ("_decoded", "count", "item_type", "raw", "type")

    def __init__(self, type: GGUFValueType, raw: bytes, item_type: GGUFValueType | None = None, count: int = 1) -> None:
        self.type = type
        self.raw = raw
        self.item_type = item_type
        self.count = count
        self._decoded: Any = None

    @classmethod
    def scalar(cls, type: GGUFValueType, value: float | bool) -> GgufValue:
        """A number or bool of exactly this width, e.g. `GgufValue.scalar(GGUFValueType.UINT32, 43)`."""
        return cls(type, struct.pack("<" + _SCALAR_FORMATS[type], value))

    @classmethod
    def uint32(cls, value: int) -> GgufValue:
        return cls.scalar(GGUFValueType.UINT32, value)

    @classmethod
    def float32(cls, value: float) -> GgufValue:
        return cls.scalar(GGUFValueType.FLOAT32, value)

    @classmethod
    def boolean(cls, value: bool) -> GgufValue:
        return cls.scalar(GGUFValueType.BOOL, value)

    @classmethod
    def string(cls, value: str) -> GgufValue:
        return cls(GGUFValueType.STRING, _pack_string(value))

    @classmethod
    def array(cls, item_type: GGUFValueType, items: Sequence[float] | Sequence[bool]) -> GgufValue:
        """An array of numbers or bools of exactly this width."""
        raw = struct.pack(f"<{len(items)}{_SCALAR_FORMATS[item_type]}", *items)
        return cls(GGUFValueType.ARRAY, raw, item_type, len(items))

    @classmethod
    def strings(cls, items: Sequence[str]) -> GgufValue:
        return cls(GGUFValueType.ARRAY, b"".join(map(_pack_string, items)), GGUFValueType.STRING, len(items))

    @property
    def value(self) -> Any:
        """The Python value: str, int, float, bool or a list of them (decoded once, don't change it).

        Bytes that are not UTF-8 become U+FFFD; `raw` keeps them.
        """
        if self._decoded is None:
            self._decoded = self._decode()
        return self._decoded

    def string_items(self) -> list[bytes]:
        """Undecoded items of a string array."""
        items, pos, raw, unpack = [], 0, self.raw, _U64.unpack_from
        for _ in range(self.count):
            start = pos + 8
            pos = start + unpack(raw, pos)[0]
            items.append(raw[start:pos])
        return items

    def _decode(self) -> Any:
        if self.type == GGUFValueType.STRING:
            return self.raw[8:].decode(errors="replace")
        if self.type != GGUFValueType.ARRAY:
            return struct.unpack("<" + _SCALAR_FORMATS[self.type], self.raw)[0]
        if self.item_type is None or self.item_type == GGUFValueType.STRING:
            return [item.decode(errors="replace") for item in self.string_items()]
        return list(struct.unpack(f"<{self.count}{_SCALAR_FORMATS[self.item_type]}", self.raw))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GgufValue):
            return NotImplemented
        return (self.type, self.item_type, self.count, self.raw) == (
            other.type,
            other.item_type,
            other.count,
            other.raw,
        )

    def __hash__(self) -> int:
        return hash((self.type, self.item_type, self.raw))

    def __repr__(self) -> str:
        if self.item_type is not None:
            return f"GgufValue({self.item_type.name}[{self.count}])"
        return f"GgufValue({self.type.name} {self.value!r})"


def _pack_string(text: str) -> bytes:
    data = text.encode()
    return _U64.pack(len(data)) + data


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's description and the absolute offset of its first byte in the file."""

    info: TensorInfo
    offset: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A checked header.

    Attributes:
        path: the file.
        size_bytes: its size when the header was read.
        version: 2 or 3.
        alignment: `general.alignment` or 32.
        data_offset: where tensor data starts.
        metadata: keys in file order.
        tensors: by name, in file order.
        header_digest: xxh3_128 of all bytes before the data.
    """

    path: Path
    size_bytes: int
    version: int
    alignment: int
    data_offset: int
    metadata: dict[str, GgufValue]
    tensors: dict[str, GgufTensor]
    header_digest: str


def read_gguf(path: Path) -> GgufFile:
    """Reads and checks a GGUF's header; no tensor data is read.

    Raises:
        FormatError: damaged, truncated or not a GGUF; names the key or tensor.
        UnsupportedModelError: big-endian, of another version, or with a ggml type that the installed gguf doesn't know.
        StoreError: can't be opened or read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise StoreError(f"{path}: can't be opened: {error.strerror}") from error
    try:
        return _HeaderReader(path, fd).read()
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path}: can't be read: {error.strerror}") from error
    finally:
        os.close(fd)


class _HeaderReader:
    """Walks one header; `pos` never passes `len(buffer)`, and the buffer never passes the file or MAX_HEADER_BYTES."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.size = os.fstat(fd).st_size
        self.buffer = b""
        self.pos = 0

    def read(self) -> GgufFile:
        version, n_tensors, n_keys = self._preamble()
        metadata: dict[str, GgufValue] = {}
        for index in range(n_keys):
            key = self._name(f"key {index}", MAX_KEY_BYTES)
            if key in metadata:
                raise self._error(f"key '{key}' occurs twice")
            metadata[key] = self._value(key)
        alignment = self._alignment(metadata)
        described = self._tensor_infos(n_tensors)
        header_end = self.pos
        data_offset = align_up(header_end, alignment)
        if n_tensors and data_offset > self.size:
            raise self._error(f"truncated: tensor data should start at byte {data_offset}, the file has {self.size}")
        return GgufFile(
            path=self.path,
            size_bytes=self.size,
            version=version,
            alignment=alignment,
            data_offset=data_offset,
            metadata=metadata,
            tensors=self._place(described, data_offset, alignment),
            header_digest=xxhash.xxh3_128_hexdigest(memoryview(self.buffer)[:header_end]),
        )

    def _error(self, problem: str) -> FormatError:
        return FormatError(
            f"{self.path}: {problem}", hint="the file is damaged or incomplete: fetch or convert it again"
        )

    def _need(self, n_bytes: int, what: str) -> int:
        """Makes `n_bytes` from `pos` on available, moves `pos` behind them and returns their start."""
        start, end = self.pos, self.pos + n_bytes
        if end > len(self.buffer):
            self._grow(end, what)
        self.pos = end
        return start

    def _grow(self, end: int, what: str) -> None:
        if end > self.size:
            raise self._error(f"{what}: needs bytes up to {end}, the file has {self.size}")
        if end > MAX_HEADER_BYTES:
            raise self._error(f"{what}: header larger than {MAX_HEADER_BYTES} bytes")
        target = min(self.size, MAX_HEADER_BYTES, max(end, 2 * len(self.buffer), _FIRST_READ))
        parts, have = [self.buffer], len(self.buffer)
        while have < target:
            part = os.pread(self.fd, target - have, have)
            if not part:
                raise self._error(f"{what}: the file ended at byte {have} while it was read")
            parts.append(part)
            have += len(part)
        self.buffer = b"".join(parts)

    def _preamble(self) -> tuple[int, int, int]:
        if self.size < _PREAMBLE.size:
            raise self._error(f"{self.size} bytes are too few for a GGUF")
        self._need(_PREAMBLE.size, "header")
        magic, version, n_tensors, n_keys = _PREAMBLE.unpack_from(self.buffer)
        if magic != MAGIC:
            raise FormatError(
                f"{self.path}: not a GGUF file (starts with {magic!r})", hint="name a .gguf file or a model directory"
            )
        if version & 0xFFFF == 0:
            raise UnsupportedModelError(f"{self.path}: a big-endian GGUF")
        if version not in (2, 3):
            raise UnsupportedModelError(f"{self.path}: GGUF version {version}; versions 2 and 3 are supported")
        # The smallest key takes 8 + 1 + 4 + 1 bytes, the smallest tensor 8 + 1 + 4 + 8 + 4 + 8.
        for name, count, limit, least in (("keys", n_keys, MAX_KEYS, 14), ("tensors", n_tensors, MAX_TENSORS, 33)):
            if count > min(limit, self.size // least):
                raise self._error(f"claims {count} {name}")
        return version, n_tensors, n_keys

    def _u32(self, what: str) -> int:
        start = self._need(4, what)
        return int(_U32.unpack_from(self.buffer, start)[0])

    def _u64(self, what: str) -> int:
        start = self._need(8, what)
        return int(_U64.unpack_from(self.buffer, start)[0])

    def _name(self, what: str, max_bytes: int) -> str:
        n = self._u64(what)
        if not 0 < n <= max_bytes:
            raise self._error(f"{what}: name of {n} bytes, expected 1 to {max_bytes}")
        start = self._need(n, what)
        try:
            name = self.buffer[start : start + n].decode()
        except UnicodeDecodeError:
            raise self._error(f"{what}: name is not UTF-8") from None
        if "\0" in name:
            raise self._error(f"{what}: name with a zero byte")
        return name

    def _value(self, key: str) -> GgufValue:
        value_type = self._value_type(key)
        if value_type != GGUFValueType.ARRAY:
            return GgufValue(value_type, self._payload(key, value_type, 1))
        item_type = self._value_type(key)
        if item_type == GGUFValueType.ARRAY:
            raise self._error(f"{key}: array of arrays")
        count = self._u64(key)
        return GgufValue(value_type, self._payload(key, item_type, count), item_type, count)

    def _value_type(self, key: str) -> GGUFValueType:
        code = self._u32(key)
        try:
            return GGUFValueType(code)
        except ValueError:
            raise self._error(f"{key}: unknown value type {code}") from None

    def _payload(self, key: str, value_type: GGUFValueType, count: int) -> bytes:
        start = self.pos
        if value_type == GGUFValueType.STRING:
            self._skip_strings(key, count)
        else:
            self._need(count * _SCALAR_BYTES[value_type], key)
        raw = self.buffer[start : self.pos]
        if value_type == GGUFValueType.BOOL and raw.strip(b"\0\1"):
            raise self._error(f"{key}: a bool that is neither 0 nor 1")
        return raw

    def _skip_strings(self, key: str, count: int) -> None:
        if count > min(MAX_ARRAY_STRINGS, (self.size - self.pos) // 8):
            raise self._error(f"{key}: claims {count} strings")
        # 257,000 strings of a real vocabulary pass here at every start: no calls inside except the unpacking.
        pos, buffer, unpack = self.pos, self.buffer, _U64.unpack_from
        for _ in range(count):
            if pos + 8 > len(buffer):
                self._grow(pos + 8, key)
                buffer = self.buffer
            pos += 8 + unpack(buffer, pos)[0]
        self.pos = pos
        self._need(0, key)

    def _alignment(self, metadata: Mapping[str, GgufValue]) -> int:
        value = metadata.get(ALIGNMENT_KEY)
        if value is None:
            return DEFAULT_ALIGNMENT
        if value.type != GGUFValueType.UINT32:
            raise self._error(f"{ALIGNMENT_KEY}: expected UINT32, got {value.type.name}")
        alignment = int(value.value)
        if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._error(f"{ALIGNMENT_KEY}: {alignment} is not a power of two from 8 to {MAX_ALIGNMENT}")
        return alignment

    def _tensor_infos(self, count: int) -> list[tuple[TensorInfo, int]]:
        described: list[tuple[TensorInfo, int]] = []
        names: set[str] = set()
        for index in range(count):
            name = self._name(f"tensor {index}", MAX_NAME_BYTES)
            if name in names:
                raise self._error(f"tensor '{name}' occurs twice")
            names.add(name)
            n_dims = self._u32(name)
            if n_dims > 4:
                raise self._error(f"{name}: {n_dims} dimensions, at most 4 exist")
            shape = tuple(self._u64(name) for _ in range(n_dims)) or (1,)
            code = self._u32(name)
            offset = self._u64(name)
            described.append((self._describe(name, shape, code), offset))
        return described

    def _describe(self, name: str, shape: tuple[int, ...], code: int) -> TensorInfo:
        try:
            ggml_type = GGMLQuantizationType(code)
        except ValueError:
            raise UnsupportedModelError(
                f"{self.path}: {name}: unknown ggml type {code}", hint="the file is damaged or newer than this program"
            ) from None
        if 0 in shape:
            raise self._error(f"{name}: empty dimension in shape {shape}")
        try:
            n_bytes = tensor_bytes(ggml_type, shape)
        except ValueError as error:
            raise self._error(f"{name}: {error}") from None
        return TensorInfo(name, shape, ggml_type, n_bytes)

    def _place(
        self, described: Iterable[tuple[TensorInfo, int]], data_offset: int, alignment: int
    ) -> dict[str, GgufTensor]:
        tensors = {}
        for info, offset in described:
            if offset % alignment:
                raise self._error(f"{info.name}: offset {offset} is not a multiple of the alignment {alignment}")
            end = data_offset + offset + info.n_bytes
            if end > self.size:
                raise self._error(f"{info.name}: ends at byte {end}, the file has {self.size}")
            tensors[info.name] = GgufTensor(info, data_offset + offset)
        previous: GgufTensor | None = None
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            if previous is not None and tensor.offset < previous.offset + previous.info.n_bytes:
                raise self._error(f"{tensor.info.name}: overlaps {previous.info.name}")
            previous = tensor
        return tensors


def align_up(n: int, alignment: int) -> int:
    """The smallest multiple of `alignment` (a power of two) that is not below `n`."""
    return (n + alignment - 1) & -alignment


def tensor_offsets(tensors: Iterable[TensorInfo], alignment: int) -> list[int]:
    """Offsets of tensors from the start of the data when they follow one another, each padded to `alignment`."""
    offsets, position = [], 0
    for tensor in tensors:
        offsets.append(position)
        position = align_up(position + tensor.n_bytes, alignment)
    return offsets


def build_header(metadata: Mapping[str, GgufValue], tensors: Sequence[TensorInfo], alignment: int) -> bytes:
    """Everything before the tensor data of a GGUF version 3, padded to `alignment`.

    Tensor i's data belongs at `len(header) + tensor_offsets(tensors, alignment)[i]`: llama.cpp accepts no gaps and no
    other order. `general.alignment` is written as given here, whatever `metadata` says.
    """
    values = dict(metadata)
    if alignment != DEFAULT_ALIGNMENT or ALIGNMENT_KEY in values:
        values[ALIGNMENT_KEY] = GgufValue.uint32(alignment)
    parts = [_PREAMBLE.pack(MAGIC, VERSION, len(tensors), len(values))]
    for key, value in values.items():
        parts += (_pack_string(key), _U32.pack(value.type))
        if value.type == GGUFValueType.ARRAY:
            parts += (_U32.pack(value.item_type), _U64.pack(value.count))
        parts.append(value.raw)
    for tensor, offset in zip(tensors, tensor_offsets(tensors, alignment), strict=True):
        parts.append(_pack_string(tensor.name))
        parts.append(struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape))
        parts.append(struct.pack("<IQ", tensor.type, offset))
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)
