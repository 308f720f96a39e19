"""Random damage to bytes and to JSON: what bad drives, cut downloads, other programs and wrong conversions leave behind.

Knows nothing about what the bytes mean, except where a header ends.
"""

from __future__ import annotations

import json
import random
import struct
from typing import Any

STRANGE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 127, 65536, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63), 10**400),
    *(0.5, -0.0, 1e-300, 1e308, "", "x", "0", "../x", "/etc/passwd", "\0", "\ud800", "a" * 3000),
    *([], {}, [0], [-1], [2**62, 2**62], [[]], ["a"], {"a": 1}),
)
"""JSON values that stand where others were."""

INTEGERS = (0, 1, 2, 3, 4, 8, 13, 30, 39, 42, 127, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
"""Lengths, counts and type codes."""


def damage_bytes(rng: random.Random, data: bytes, header: int) -> tuple[bytes, str]:
    """(damaged bytes, what was done). One or two damages; three of four lie in the first `header` bytes."""
    result, names = bytearray(data), []
    for _ in range(rng.choice((1, 1, 1, 2))):
        if not result:
            break
        end = min(len(result), header) if rng.random() < 0.75 else len(result)
        at = rng.randrange(max(1, end))
        name = rng.choice(("bits", "bits", "cut", "length", "code", "zeros", "removed", "added", "repeated"))
        names.append(name)
        if name == "bits":
            for _ in range(rng.choice((1, 1, 2, 8))):
                spot = min(len(result) - 1, at + rng.randrange(16))
                result[spot] ^= 1 << rng.randrange(8)
        elif name == "cut":
            del result[at:]
        elif name == "length":
            value = rng.choice((*INTEGERS, 1 << rng.randrange(64), len(data), len(data) - at))
            result[at : at + 8] = struct.pack("<Q", value & (2**64 - 1))
        elif name == "code":
            result[at : at + 4] = struct.pack("<I", rng.choice(INTEGERS))
        elif name == "zeros":
            n = min(rng.choice((1, 8, 512, 4096)), len(result) - at)
            result[at : at + n] = bytes(n)
        elif name == "removed":
            del result[at : at + rng.choice((1, 4, 32, 4096))]
        elif name == "added":
            result[at:at] = rng.randbytes(rng.choice((1, 4, 32)))
        else:
            result[at:at] = result[at : at + rng.choice((8, 64, 1024))]
    return bytes(result), "+".join(names)


def damage_json(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """(damaged document, what was done): its bytes, a value, a missing, renamed or doubled key."""
    if rng.random() < 0.25:
        return damage_bytes(rng, data, len(data))
    document = json.loads(data)
    holder, key = _somewhere(rng, document)
    name = rng.choice(("removed key", "near value", "renamed key", "strange value", "strange value", "doubled key"))
    value = holder[key]
    if name == "removed key":
        del holder[key]
    elif name == "near value" and isinstance(value, int) and not isinstance(value, bool):
        holder[key] = rng.choice((value + 1, value - 1, value * 2, -value, float(value), str(value), value << 40))
    elif name == "renamed key" and isinstance(holder, dict):
        holder[rng.choice((f"{key}x", str(key).upper(), ""))] = holder.pop(key)
    elif name == "doubled key" and isinstance(holder, dict):
        holder["\0twin"] = rng.choice((value, rng.choice(STRANGE)))
        return json.dumps(document).replace(json.dumps("\0twin"), json.dumps(key), 1).encode(), name
    else:
        holder[key], name = rng.choice(STRANGE), "strange value"
    return json.dumps(document).encode(), name


def damage_safetensors(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """(damaged file, what was done). Layout: u64 length of the JSON header, header, data."""
    (n,) = struct.unpack("<Q", data[:8])
    how = rng.randrange(4)
    if how == 0:
        header, name = damage_json(rng, data[8 : 8 + n])
        return struct.pack("<Q", len(header)) + header + data[8 + n :], f"header: {name}"
    if how == 1:
        length = rng.choice((0, n - 1, n + 1, 2**32, 2**63, len(data), len(data) - 8))
        return struct.pack("<Q", length) + data[8:], "length"
    if how == 2:
        damaged, name = damage_bytes(rng, data[8 + n :], len(data))
        return data[: 8 + n] + damaged, f"payload: {name}"
    return damage_bytes(rng, data, 8 + n)


def _somewhere(rng: random.Random, document: Any) -> tuple[Any, Any]:
    """A place in a document: the object or list and the key in it."""
    holder: Any = None
    key: Any = None
    value = document
    while isinstance(value, dict | list) and value and (holder is None or rng.random() < 0.75):
        holder, key = value, rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = holder[key]
    return holder, key
