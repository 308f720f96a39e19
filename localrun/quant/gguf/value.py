"""One value of a GGUF's metadata: its type and its bytes in the file.

Stored as bytes and decoded on demand, so that rewriting a header preserves every type and width, and an unused vocabulary costs
nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from gguf import GGUFValueType

SCALAR_FORMATS: dict[int, str] = {
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
SCALAR_BYTES = {value_type: struct.calcsize("<" + code) for value_type, code in SCALAR_FORMATS.items()}
_U64 = struct.Struct("<Q")


def pack_string(text: str) -> bytes:
    """UTF-8, preceded by its length as u64."""
    data = text.encode()
    return _U64.pack(len(data)) + data


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
        return cls(type, struct.pack("<" + SCALAR_FORMATS[type], value))

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
        return cls(GGUFValueType.STRING, pack_string(value))

    @classmethod
    def array(cls, item_type: GGUFValueType, items: Sequence[float] | Sequence[bool]) -> GgufValue:
        """An array of numbers or bools of exactly this width."""
        raw = struct.pack(f"<{len(items)}{SCALAR_FORMATS[item_type]}", *items)
        return cls(GGUFValueType.ARRAY, raw, item_type, len(items))

    @classmethod
    def strings(cls, items: Sequence[str]) -> GgufValue:
        return cls(GGUFValueType.ARRAY, b"".join(map(pack_string, items)), GGUFValueType.STRING, len(items))

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
            return struct.unpack("<" + SCALAR_FORMATS[self.type], self.raw)[0]
        if self.item_type is None or self.item_type == GGUFValueType.STRING:
            return [item.decode(errors="replace") for item in self.string_items()]
        return list(struct.unpack(f"<{self.count}{SCALAR_FORMATS[self.item_type]}", self.raw))

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
