"""How a matrix lies in an interleaved slot, and what the code emitters of all formats share.

A matrix is cut into groups of 16 rows. Of a group, first the *meta* parts of all units lie one after another (scales), padded to
64 bytes, then their *bodies*; a unit is one block of the ggml type (32 plain floats for the float types). Within both, item i of
row r lies at i * 16 + r, an item being what `Field` says, so that one vector load brings the same item of 16 rows. All formats
keep ggml's size per weight; only order changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from gguf import GGMLQuantizationType

from localrun.alignment import LINE_BYTES, align_up, ceil_div
from localrun.offload.kernels.panels import BLOCK32, FLOAT32, GRID32, SUPER256, Panel
from localrun.offload.kernels.simd import Simd

COPY: Final = 0
FLIP: Final = 1  # flips the top bit of every byte: signed to offset 128
SIGNS: Final = 2  # 4 x 7 sign bits below a 4-bit scale become 4 bytes of 7 sign bits below one scale bit
ODD_SIGNS: Final = 3  # SIGNS for every second item


@dataclass(frozen=True, slots=True)
class Field:
    """`count` adjacent items of `width` bytes from offset `source` of a block; they go to `target` in the meta or the body."""

    source: int
    width: int
    count: int
    target: int
    in_meta: bool = False
    change: int = COPY

    def numbers(self) -> list[int]:
        """For the compiled packer."""
        return [self.source, self.width, self.count, self.target, int(self.in_meta), self.change]


FEW: Final = 4
"""Tokens up to which reading takes longer than computing; half as many with 256-bit vectors."""

Step = Callable[[Simd, Any, Any, "Tile", list[Any]], list[Any]]
"""Emits code that adds one unit's products: (simd, meta, body, tile, totals per token) -> new totals."""


@dataclass(frozen=True, slots=True)
class Format:
    """One ggml type's interleaved layout.

    Attributes:
        unit: elements of a block.
        block_bytes: ggml's bytes of a block.
        meta_bytes, body_bytes: of one unit of 16 rows.
        in_order: up to so many tokens, at most `FEW`, `step` reads the lines of the body in order, by `Simd.load_in_order` and
            `Simd.touch`. [m] Two Zen 4 cores read Q4_K at 0.92 of plain reading so, and at 0.75 to 0.81 if all lines of a unit
            are read before it is computed with.
    """

    type: GGMLQuantizationType
    unit: int
    block_bytes: int
    meta_bytes: int
    body_bytes: int
    panel: Panel
    fields: tuple[Field, ...]
    step: Step
    in_order: int = 0

    def group_bytes(self, n_in: int) -> int:
        """Bytes of 16 rows of `n_in` elements."""
        units = ceil_div(n_in, self.unit)
        return align_up(units * self.meta_bytes, LINE_BYTES) + units * self.body_bytes

    def matrix_bytes(self, n_out: int, n_in: int) -> int:
        """Bytes of `n_out` rows of `n_in` elements, in whole groups of 16 rows."""
        return ceil_div(n_out, 16) * self.group_bytes(n_in)


class Tile:
    """Some tokens' part of a panel record (layout in `panels`), seen from the code emitter: what to broadcast for token t.

    Args:
        record: pointer to the record.
        n_tokens: tokens that the panel's records hold.
        first: which of them is token 0 here, a run-time value; None if all are in work.
    """

    def __init__(self, simd: Simd, record: Any, n_tokens: int, kind: int, first: Any = None) -> None:
        self.s, self.record, self.n_tokens, self.kind, self.first = simd, record, n_tokens, kind, first
        self.values = {BLOCK32: 32, GRID32: 32, SUPER256: 256, FLOAT32: 128}[kind]  # bytes per token
        self.record_bytes = {BLOCK32: 40, GRID32: 40, SUPER256: 296, FLOAT32: 128}[kind] * n_tokens

    def next(self, index: Any) -> Tile:
        """The record `index` further on (a run-time value)."""
        return Tile(self.s, self.s.at(self.record, index, self.record_bytes), self.n_tokens, self.kind, self.first)

    def _from(self, token_bytes: int, base: Any = None) -> Any:
        base = self.record if base is None else base
        return base if self.first is None else self.s.at(base, self.first, token_bytes)

    def quad(self, token: int, quad: int, base: Any = None) -> Any:
        """Four activations in all lanes; `base` replaces the record's start."""
        return self.s.splat_dword(self._from(self.values, base), token * self.values + quad * 4)

    def f32(self, token: int, index: int) -> Any:
        """Activation `index` of an F32 record in all lanes."""
        return self.s.splat_f32(self._from(self.values), token * self.values + index * 4)

    def scale(self, token: int) -> Any:
        """The record's activation scale, F32, in all lanes."""
        return self.s.splat_f32(self._from(4), self.n_tokens * self.values + token * 4)

    def start(self, token: int) -> Any:
        """The record's aux as the int32 that block sums begin with: it takes the weights' offset off."""
        return self.s.splat_i32(self._from(4), self.n_tokens * (self.values + 4) + token * 4)

    def sum(self, token: int) -> Any:
        """The record's aux as F32: scale times the sum of the block's activations."""
        return self.s.splat_f32(self._from(4), self.n_tokens * (self.values + 4) + token * 4)

    def sums16(self, token: int, pair: int) -> Any:
        """Two neighbouring int16 sums of 16 activations, as one dword in all lanes."""
        return self.s.splat_i32(self._from(32), self.n_tokens * 264 + token * 32 + pair * 4)


def add_block(
    s: Simd, weights: list[Any], scale: Any, tile: Tile, totals: list[Any], *, start: bool = True, small: bool = True
) -> list[Any]:
    """One block of 32 of a BLOCK32 or GRID32 panel: eight unsigned byte vectors, a scale per row.

    Args:
        start: begin with the panel's aux, which takes the weights' offset off.
        small: weights are below 128.
    """
    results = []
    for t, total in enumerate(totals):
        dot = tile.start(t) if start else s.ints(0)
        for quad, weight in enumerate(weights):
            dot = s.dot(dot, weight, tile.quad(t, quad), small=small)
        results.append(s.fma(s.to_float(dot), s.mul(scale, tile.scale(t)), total))
    return results


def nibbles(s: Simd, vectors: list[Any]) -> tuple[list[Any], list[Any]]:
    """Low and high halves of all bytes."""
    low = [s.as_bytes(s.mask(v, 0x0F0F0F0F)) for v in vectors]
    return low, [s.as_bytes(s.mask(s.shift_right(v, 4), 0x0F0F0F0F)) for v in vectors]
