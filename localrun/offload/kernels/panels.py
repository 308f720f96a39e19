"""Activations in the kernels' layout: tiles of up to 16 tokens, quantized to 8 bits in groups of 32 or 256 values.

A tile of `nt` tokens over `n` inputs is a sequence of records, one per `unit` inputs, each holding all tokens:

    BLOCK32  (unit 32)   nt x 32 int8 | nt x f32 scale | nt x 4 bytes aux
                         aux: int32 -offset * sum(q), the dot product's start when weights are stored as w + offset,
                         or, with offset SUM, f32 scale * sum(q), the factor of a block's minimum
    GRID32   (unit 32)   as BLOCK32, with values 0, 8, 16, 24, 1, 9, ... of each token: four groups of eight side by side
    SUPER256 (unit 256)  nt x 256 int8 | nt x f32 scale | nt x int32 -offset * sum(q) | nt x 16 int16 sums of 16 values,
                         within each four in the order 0, 2, 1, 3
    FLOAT32  (unit 32)   nt x 32 f32, the last record filled up with zeros

Values are rounded to nearest with scale max|x| / 127 per group, which is what ggml's Q8_0 (32) and Q8_K (256) do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numba as nb
import numpy as np

from localrun.offload.kernels.activations import four_groups_aside, largest_of, quantize16
from localrun.offload.kernels.lowlevel import copy, store_f32, store_i16, store_i32

BLOCK32: Final = 0
SUPER256: Final = 1
FLOAT32: Final = 2
GRID32: Final = 3

SUM: Final = -1
"""Offset of BLOCK32 panels whose aux is scale * sum."""

_TINY = np.float32(1e-30)  # groups below count as zero: 127 / max would overflow


@dataclass(frozen=True, slots=True)
class Panel:
    """What a weight format needs of its activations."""

    kind: int
    offset: int = 0

    @property
    def unit(self) -> int:
        """Elements of a record per token."""
        return 256 if self.kind == SUPER256 else 32

    @property
    def unit_bytes(self) -> int:
        """Bytes of a record per token."""
        return (40, 296, 128, 40)[self.kind]


@nb.njit(inline="always")
def _inverse(largest: Any) -> Any:
    """127 / largest; 0 for a group of zeros and for one with NaN, whose scale is NaN then."""
    return np.float32(127) / largest if largest > _TINY else np.float32(0)


@nb.njit
def _fill_block32(source: int, record: int, token: int, nt: int, offset: int) -> None:
    largest = largest_of(source, 2)
    inverse, scale, target = _inverse(largest), largest / np.float32(127), record + token * 32
    total = quantize16(source, inverse, target) + quantize16(source + 64, inverse, target + 16)
    store_f32(record + nt * 32 + token * 4, scale)
    if offset == SUM:
        store_f32(record + nt * 36 + token * 4, scale * np.float32(total))
    else:
        store_i32(record + nt * 36 + token * 4, np.int32(-offset * total))


@nb.njit
def _fill_super256(source: int, record: int, token: int, nt: int, offset: int) -> None:
    largest = largest_of(source, 16)
    inverse, total = _inverse(largest), np.int32(0)
    for part in range(16):
        part_sum = quantize16(source + part * 64, inverse, record + token * 256 + part * 16)
        place = (part & ~3) | (part & 1) << 1 | (part & 2) >> 1
        store_i16(record + nt * 264 + token * 32 + place * 2, np.int16(part_sum))
        total += part_sum
    store_f32(record + nt * 256 + token * 4, largest / np.float32(127))
    store_i32(record + nt * 260 + token * 4, np.int32(-offset * total))


@nb.njit
def fill_panel(kind: int, offset: int, source: int, n: int, panel: int, first: int, token: int, nt: int) -> None:
    """Writes inputs `first` to `first + n` of one token, f32 at `source`, into its tile's panel.

    `first` is a multiple of the unit and n too, except at the end of a FLOAT32 row.
    """
    if kind in (BLOCK32, GRID32):
        for block in range(n // 32):
            record = panel + (first // 32 + block) * nt * 40
            _fill_block32(source + block * 128, record, token, nt, offset)
            if kind == GRID32:
                four_groups_aside(record + token * 32)
    elif kind == SUPER256:
        for block in range(n // 256):
            _fill_super256(source + block * 1024, panel + (first // 256 + block) * nt * 296, token, nt, offset)
    else:
        for i in range(0, n, 32):
            target = panel + (first + i) // 32 * nt * 128 + token * 128
            copy(target, source + i * 4, min(32, n - i) * 4)
            for j in range(n - i, 32):
                store_f32(target + j * 4, np.float32(0))


@nb.njit
def clear_token(kind: int, panel: int, n_units: int, token: int, nt: int) -> None:
    """Makes a tile's unused token all zeros."""
    n_values, record_bytes = 32, 40
    if kind == SUPER256:
        n_values, record_bytes = 256, 296
    elif kind == FLOAT32:
        n_values, record_bytes = 128, 128
    for unit in range(n_units):
        record = panel + unit * nt * record_bytes
        for i in range(0, n_values, 4):
            store_i32(record + token * n_values + i, 0)
        if kind != FLOAT32:
            store_i32(record + nt * n_values + token * 4, 0)
            store_i32(record + nt * (n_values + 4) + token * 4, 0)
        if kind == SUPER256:
            for i in range(8):
                store_i32(record + nt * 264 + token * 32 + i * 4, 0)
