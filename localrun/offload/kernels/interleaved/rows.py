"""Interleaved matrix rows times a tile of tokens, as C functions.

A *row kernel* is a C function that multiplies some rows of one matrix with one tile of tokens (signature `ROWS`); the driver
in `tasks` calls it by address, so that any combination of types works without compiling anything for it.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from gguf import GGMLQuantizationType
from numba import types
from numba.extending import intrinsic

from localrun.alignment import LINE_BYTES
from localrun.kernel_cache import cached_cfunc
from localrun.offload.kernels.cpu import Level
from localrun.offload.kernels.interleaved.formats import FORMATS
from localrun.offload.kernels.interleaved.layout import FEW, Tile
from localrun.offload.kernels.lowlevel import ROWS, blocks_of, rounded_up
from localrun.offload.kernels.reading import Reading
from localrun.offload.kernels.simd import I64, Simd, simd_for

_AHEAD: Final = 4096
"""Bytes from the unit in work to the one requested (`Reading.AHEAD`)."""


def _read_in_order(s: Simd, pointer: Any, n_bytes: Any) -> None:
    """Reads all lines of `n_bytes` (a run-time value, at least 1)."""

    def line(i: Any, _carried: list[Any]) -> list[Any]:
        s.touch(s.at(pointer, i, LINE_BYTES), 0)
        return []

    s.loop(s.b.udiv(s.b.add(n_bytes, I64(LINE_BYTES - 1)), I64(LINE_BYTES)), [], line)


@intrinsic
def _group_times_tile(_typing: Any, level_name: Any, type_name: Any, reading_name: Any, n_tokens: Any, meta: Any, body: Any,
                      n_units: Any, panel: Any, out: Any, out_stride: Any) -> Any:  # fmt: skip
    """16 rows times a tile; the first four arguments are compile-time constants, n_units is at least 1."""
    if not all(isinstance(name, types.StringLiteral) for name in (level_name, type_name, reading_name)):
        return None
    if not isinstance(n_tokens, types.IntegerLiteral):
        return None
    level_, format_ = Level(level_name.literal_value), FORMATS[GGMLQuantizationType[type_name.literal_value]]
    nt, kind = n_tokens.literal_value, format_.panel.kind
    wide = level_ in (Level.AVX512, Level.AVX512_VNNI)
    at_once = nt if wide else min(nt, 4)  # what the registers hold

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        many = nt > (FEW if wide else FEW // 2)
        reading_ = Reading.AHEAD if many else Reading(reading_name.literal_value)
        prefetched = reading_ is Reading.AHEAD
        s = simd_for(level_, builder, reading_)
        meta, body, n_units, panel, out, out_stride = args[4:]
        meta, body, panel = s.pointer(meta), s.pointer(body), s.pointer(panel)
        records_per_unit = format_.unit // format_.panel.unit
        if not prefetched:
            _read_in_order(s, meta, builder.mul(n_units, I64(format_.meta_bytes)))

        def tokens(group: Any, _carried: list[Any]) -> list[Any]:
            first = None if at_once == nt else builder.mul(group, I64(at_once))

            def unit(i: Any, totals: list[Any]) -> list[Any]:
                unit_meta, unit_body = s.at(meta, i, format_.meta_bytes), s.at(body, i, format_.body_bytes)
                for line in range(0, format_.body_bytes, LINE_BYTES):
                    if prefetched:
                        s.prefetch(unit_body, _AHEAD + line)
                    elif nt > format_.in_order:
                        s.touch(unit_body, line)
                for line in range(0, format_.meta_bytes if prefetched else 0, LINE_BYTES):
                    s.prefetch(unit_meta, _AHEAD * format_.meta_bytes // format_.body_bytes + line)
                tile = Tile(s, panel, nt, kind, first).next(builder.mul(i, I64(records_per_unit)))
                return format_.step(s, unit_meta, unit_body, tile, totals)

            for t, total in enumerate(s.loop(n_units, [s.floats(0.0)] * at_once, unit)):
                token = I64(t) if first is None else builder.add(first, I64(t))
                s.store(total, s.pointer(out, builder.mul(out_stride, token)))
            return []

        s.loop(I64(nt // at_once), [], tokens)
        return context.get_dummy_value()

    return types.void(level_name, type_name, reading_name, n_tokens, *[types.intp] * 6), codegen


@functools.cache
def rows_function(type_: GGMLQuantizationType, level_: Level, reading_: Reading) -> Any:
    """The row kernel for interleaved matrices of this type, compiled on first use. All ways to read give the same bits."""
    format_ = FORMATS[type_]
    name, unit, meta_bytes, body_bytes = type_.name, format_.unit, format_.meta_bytes, format_.body_bytes
    level_name, how = level_.value, reading_.value

    def rows(
        matrix: int, extra: int, row0: int, n_rows: int, n_in: int, panel: int, nt: int, out: int, out_stride: int
    ) -> None:
        n_units = blocks_of(n_in, unit)
        metas = rounded_up(n_units * meta_bytes, 64)
        group_bytes = metas + n_units * body_bytes
        for r in range(0, n_rows, 16):
            meta = matrix + (row0 + r) // 16 * group_bytes
            body, target = meta + metas, out + r * 4
            if nt == 1:
                _group_times_tile(level_name, name, how, 1, meta, body, n_units, panel, target, out_stride)
            elif nt == 2:
                _group_times_tile(level_name, name, how, 2, meta, body, n_units, panel, target, out_stride)
            elif nt == 4:
                _group_times_tile(level_name, name, how, 4, meta, body, n_units, panel, target, out_stride)
            elif nt == 8:
                _group_times_tile(level_name, name, how, 8, meta, body, n_units, panel, target, out_stride)
            elif nt == 12:
                _group_times_tile(level_name, name, how, 12, meta, body, n_units, panel, target, out_stride)
            else:
                _group_times_tile(level_name, name, how, 16, meta, body, n_units, panel, target, out_stride)

    return cached_cfunc(ROWS)(rows)
