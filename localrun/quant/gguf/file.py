"""Reads and writes GGUF headers; checks every field.

Knows keys, values, tensor descriptions and offsets; nothing about architectures or weights. Layout:
ggml `docs/gguf.md`, versions 2 and 3 (same bytes for little endian), with llama.cpp's limits (`ggml/src/gguf.cpp`).

Why not `gguf.GGUFReader`: it maps the whole file, builds several numpy objects per token and trusts counts, offsets and
types. A header with DeepSeek-V4's vocabulary (129,280 tokens, 127,741 merges) takes it 11 s and this module 0.1 s.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import xxhash
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from localrun.alignment import align_up
from localrun.errors import FormatError, StoreError, UnsupportedModelError
from localrun.ggml import extra_types as extra_types
from localrun.quant.gguf.value import SCALAR_BYTES, GgufValue, pack_string
from localrun.quant.model.source import TensorInfo
from localrun.reading import read_fully

__all__ = [
    "GgufFile",
    "GgufTensor",
    "GgufValue",
    "align_up",
    "build_header",
    "read_gguf",
    "tensor_bytes",
    "tensor_offsets",
]

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

# ik_llama.cpp, ggml/include/ggml.h: types of its own, and those that it also has with rows interleaved (number + 200).
_IK_TYPES = {
    **{36: "I2_S", 133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K"},
    **{141: "IQ6_K", 144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 151: "Q8_KV", 152: "IQ5_KS", 153: "IQ2_KT"},
    **{154: "IQ3_KT", 155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT"},
}
_IK_REPACKED = {
    **{2: "Q4_0", 6: "Q5_0", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS"},
    **{17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M"},
    **{30: "BF16", 133: "Q6_0", 135: "IQ2_BN", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 144: "IQ4_KS"},
    **{152: "IQ5_KS"},
}

MAX_HEADER_BYTES = 256 << 20
"""A vocabulary of V4's size makes a header of 6 MB; a larger claim than this is damage, and reading it costs memory."""
MAX_ARRAY_STRINGS = 1 << 22
"""Sixteen times the largest vocabulary in use; limits the cost of a malicious count."""
MAX_TENSORS = 1 << 20
MAX_KEYS = 1 << 16
MAX_KEY_BYTES = 1 << 16
MAX_NAME_BYTES = 63
"""llama.cpp's GGML_MAX_NAME is 64 with the terminating zero."""
MAX_ALIGNMENT = 1 << 20
_FIRST_READ = 1 << 20

FOREIGN_TYPES: Mapping[int, str] = MappingProxyType(
    {
        **{31 + i: f"{name}, retired from llama.cpp" for i, name in enumerate(("Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8"))},
        **{number: f"{name} of ik_llama.cpp" for number, name in _IK_TYPES.items()},
        **{number + 200: f"{name}_R4 of ik_llama.cpp" for number, name in _IK_REPACKED.items()},
    }
)
"""Types of other programs by number: they can be named, not read."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_PREAMBLE = struct.Struct("<4sIQQ")


def tensor_bytes(ggml_type: GGMLQuantizationType, shape: Sequence[int]) -> int:
    """Size of a tensor of `shape` (ggml order, innermost first).

    Raises:
        ValueError: a row is not a multiple of the type's block.
    """
    block, block_bytes = GGML_QUANT_SIZES[ggml_type]
    if shape[0] % block:
        raise ValueError(f"row of {shape[0]} values is not a multiple of {ggml_type.name}'s {block}")
    n = shape[0] // block * block_bytes
    for extent in shape[1:]:
        n *= extent
    return int(n)


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
        header_digest: xxh3_128 of all bytes before the data, without padding.
        header_checksum: xxh3_64 of the same with padding, as manifests have it.
    """

    path: Path
    size_bytes: int
    version: int
    alignment: int
    data_offset: int
    metadata: dict[str, GgufValue]
    tensors: dict[str, GgufTensor]
    header_digest: str
    header_checksum: str


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
        self._need(min(self.size, data_offset) - header_end, "padding")
        header = memoryview(self.buffer)
        return GgufFile(
            path=self.path,
            size_bytes=self.size,
            version=version,
            alignment=alignment,
            data_offset=data_offset,
            metadata=metadata,
            tensors=self._place(described, data_offset, alignment),
            header_digest=xxhash.xxh3_128_hexdigest(header[:header_end]),
            header_checksum=xxhash.xxh3_64_hexdigest(header[: self.pos]),
        )

    def _error(self, problem: str) -> FormatError:
        return FormatError(
            f"{self.path}: {problem}", hint="the file is damaged or incomplete: download or convert it again"
        )

    def _need(self, n_bytes: int, what: str) -> int:
        """Makes `n_bytes` from `pos` on available, advances `pos` and returns their start."""
        start, end = self.pos, self.pos + n_bytes
        if end > len(self.buffer):
            self._grow(end, what)
        self.pos = end
        return start

    def _grow(self, end: int, what: str) -> None:
        if end > self.size:
            raise self._error(f"{what}: needs {end} bytes, the file has {self.size}")
        if end > MAX_HEADER_BYTES:
            raise self._error(f"{what}: header larger than {MAX_HEADER_BYTES} bytes")
        target = min(self.size, MAX_HEADER_BYTES, max(end, 2 * len(self.buffer), _FIRST_READ))
        have = len(self.buffer)
        buffer = bytearray(target)
        buffer[:have] = self.buffer
        read_fully(self.fd, f"{self.path}: {what}", have, memoryview(buffer)[have:])
        self.buffer = bytes(buffer)

    def _preamble(self) -> tuple[int, int, int]:
        if self.size < _PREAMBLE.size:
            raise self._error(f"{self.size} bytes are too few for a GGUF")
        self._need(_PREAMBLE.size, "header")
        magic, version, n_tensors, n_keys = _PREAMBLE.unpack_from(self.buffer)
        if magic != MAGIC:
            raise FormatError(
                f"{self.path}: not a GGUF file (starts with {magic!r})", hint="pass a .gguf file or a model directory"
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
            self._need(count * SCALAR_BYTES[value_type], key)
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
                raise self._error(f"{name}: {n_dims} dimensions, the maximum is 4")
            shape = tuple(self._u64(name) for _ in range(n_dims)) or (1,)
            code = self._u32(name)
            offset = self._u64(name)
            described.append((self._describe(name, shape, code), offset))
        return described

    def _describe(self, name: str, shape: tuple[int, ...], code: int) -> TensorInfo:
        try:
            ggml_type = GGMLQuantizationType(code)
        except ValueError:
            raise self._unknown_type(name, code) from None
        if 0 in shape:
            raise self._error(f"{name}: empty dimension in shape {shape}")
        try:
            n_bytes = tensor_bytes(ggml_type, shape)
        except ValueError as error:
            raise self._error(f"{name}: {error}") from None
        return TensorInfo(name, shape, ggml_type, n_bytes)

    def _unknown_type(self, name: str, code: int) -> UnsupportedModelError:
        what, hint = f"unknown ggml type {code}", "the file is damaged or newer than this program"
        if foreign := FOREIGN_TYPES.get(code):
            what = f"type {foreign}, which is not one of llama.cpp's ({code})"
            hint = "use a file quantized for llama.cpp, or convert the official checkpoint"
        return UnsupportedModelError(f"{self.path}: {name}: {what}", hint=hint)

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
        self._check_order(tensors.values(), data_offset, alignment)
        return tensors

    def _check_order(self, tensors: Iterable[GgufTensor], data_offset: int, alignment: int) -> None:
        """Checks that tensors are contiguous and in header order, as llama.cpp requires (gguf.cpp, `gguf_init_from_reader`). A
        gap or an overlap indicates a wrong type or shape."""
        expected, previous = data_offset, "the header"
        for tensor in tensors:
            if tensor.offset != expected:
                problem = "overlaps" if tensor.offset < expected else f"starts {tensor.offset - expected} bytes after"
                raise self._error(
                    f"{tensor.info.name}: {problem} {previous}; tensors must be contiguous, so a type or a shape is"
                    " wrong"
                )
            expected, previous = align_up(tensor.offset + tensor.info.n_bytes, alignment), tensor.info.name


def tensor_offsets(tensors: Iterable[TensorInfo], alignment: int) -> list[int]:
    """Offsets of contiguous tensors from the start of the data, each padded to `alignment`."""
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
        parts += (pack_string(key), _U32.pack(value.type))
        if value.type == GGUFValueType.ARRAY:
            parts += (_U32.pack(value.item_type), _U64.pack(value.count))
        parts.append(value.raw)
    for tensor, offset in zip(tensors, tensor_offsets(tensors, alignment), strict=True):
        parts.append(pack_string(tensor.name))
        parts.append(struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape))
        parts.append(struct.pack("<IQ", tensor.type, offset))
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)
