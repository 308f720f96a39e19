"""Metadata values keep type and width as a file has them."""

from __future__ import annotations

import pytest
from gguf import GGUFValueType as T

from localrun.quant.gguf.value import SCALAR_BYTES, GgufValue, pack_string


@pytest.mark.parametrize(
    ("value", "raw", "python"),
    [
        (GgufValue.uint32(43), b"\x2b\0\0\0", 43),
        (GgufValue.float32(0.5), b"\0\0\0\x3f", 0.5),
        (GgufValue.boolean(True), b"\x01", True),
        (GgufValue.scalar(T.INT8, -2), b"\xfe", -2),
        (GgufValue.scalar(T.UINT64, 2**63), b"\0\0\0\0\0\0\0\x80", 2**63),
        (GgufValue.string("é"), b"\x02\0\0\0\0\0\0\0\xc3\xa9", "é"),
        (GgufValue.array(T.UINT16, [1, 258]), b"\x01\0\x02\x01", [1, 258]),
        (GgufValue.array(T.BOOL, [True, False]), b"\x01\0", [True, False]),
        (GgufValue.strings(["a", ""]), pack_string("a") + pack_string(""), ["a", ""]),
        (GgufValue.array(T.INT32, []), b"", []),
    ],
)
def test_bytes_and_values_belong_together(value: GgufValue, raw: bytes, python: object) -> None:
    assert value.raw == raw
    assert value.value == python
    again = GgufValue(value.type, raw, value.item_type, value.count)
    assert again == value
    assert hash(again) == hash(value)
    assert again.value == python


def test_values_of_other_types_and_widths_differ() -> None:
    assert GgufValue.uint32(1) != GgufValue.scalar(T.INT32, 1)
    assert GgufValue.array(T.UINT8, [1, 0]) != GgufValue.array(T.UINT16, [1])
    assert GgufValue.uint32(1) != 1


def test_bytes_that_are_no_text_are_kept() -> None:
    value = GgufValue(T.ARRAY, b"\x02\0\0\0\0\0\0\0\xff!" + pack_string("b"), T.STRING, 2)
    assert value.value == ["\N{REPLACEMENT CHARACTER}!", "b"]
    assert value.string_items() == [b"\xff!", b"b"]


def test_widths_are_those_of_the_format() -> None:
    assert {kind.name: SCALAR_BYTES[kind] for kind in map(T, SCALAR_BYTES)} == {
        "UINT8": 1, "INT8": 1, "UINT16": 2, "INT16": 2, "UINT32": 4, "INT32": 4, "FLOAT32": 4, "BOOL": 1,
        "UINT64": 8, "INT64": 8, "FLOAT64": 8,
    }  # fmt: skip


def test_what_it_is_can_be_seen() -> None:
    assert repr(GgufValue.uint32(7)) == "GgufValue(UINT32 7)"
    assert repr(GgufValue.strings(["a"] * 3)) == "GgufValue(STRING[3])"
