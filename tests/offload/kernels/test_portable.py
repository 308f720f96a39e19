"""The generic kernels' vector code, block by block: bits, FP4 codes, grids with signs, and scales of 16."""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
import pytest

from localrun.offload.kernels.panels import BLOCK32, SUM, SUPER256, Panel, fill_panel
from localrun.offload.kernels.portable import (
    add_bits,
    add_e2m1,
    add_grid,
    add_super256,
    clear_totals,
    sum_of,
    unpack_bits,
)

NT = 3


@nb.njit
def _unpack(
    low: int, shift: int, mask: int, high: int, high_shift: int, high_mask: int, up: int, o: int, out: int
) -> None:
    unpack_bits(low, shift, mask, high, high_shift, high_mask, up, o, out)


@nb.njit
def _bits(low: int, high: int, scale: float, minimum: float, record: int, nt: int, totals: int, clear: bool) -> None:
    if clear:
        clear_totals(totals, nt)
    add_bits(low, 4, 15, high, 2, 1, 4, np.float32(scale), np.float32(minimum), record, nt, totals)


@nb.njit
def _e2m1(source: int, scale: float, record: int, nt: int, totals: int) -> None:
    clear_totals(totals, nt)
    add_e2m1(source, np.float32(scale), record, nt, totals)


@nb.njit
def _grid8(indices: int, signs: int, table: int, scale: float, record: int, nt: int, totals: int) -> None:
    clear_totals(totals, nt)
    add_grid(8, indices, signs, table, np.float32(scale), record, nt, totals)


@nb.njit
def _super(w: int, scales: int, d: float, minima: int, dmin: float, record: int, nt: int, totals: int) -> None:
    clear_totals(totals, nt)
    add_super256(w, scales, np.float32(d), minima, np.float32(dmin), record, nt, totals)


@nb.njit
def _sum(total: int) -> Any:
    return sum_of(total)


class Tile:
    """Small whole numbers as activations, so that nothing is rounded, and the totals of each token."""

    def __init__(self, kind: int, offset: int = 0) -> None:
        panel, n = Panel(kind, offset), 256 if kind == SUPER256 else 32
        self.x = np.random.default_rng(n).integers(-127, 128, (NT, n)).astype(np.float32)
        self.x[:, 0] = 127  # so the scale is one
        self.record = np.zeros(panel.unit_bytes * NT, np.uint8)
        for token, row in enumerate(self.x):
            fill_panel(kind, offset, row.ctypes.data, n, self.record.ctypes.data, 0, token, NT)
        self.totals = np.full((NT, 16), 77, np.float32)
        self.at = (self.record.ctypes.data, NT, self.totals.ctypes.data)

    @property
    def sums(self) -> npt.NDArray[np.float64]:
        return np.array([_sum(row.ctypes.data) for row in self.totals], np.float64)


@pytest.fixture
def low() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, 32).astype(np.uint8)


@pytest.fixture
def high() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(2).integers(0, 256, 32).astype(np.uint8)


def test_bits_of_two_places_less_an_offset(low: Any, high: Any) -> None:
    out = np.zeros(32, np.int8)
    _unpack(low.ctypes.data, 2, 3, high.ctypes.data, 5, 1, 2, 4, out.ctypes.data)
    np.testing.assert_array_equal(out, (((low >> 2) & 3) | ((high >> 5) & 1) << 2).astype(np.int8) - 4)


def test_weights_of_five_bits_with_a_minimum_add_up(low: Any, high: Any) -> None:
    tile = Tile(BLOCK32, SUM)
    weights = (low >> 4).astype(np.float64) + 16 * ((high >> 2) & 1)
    once = tile.x @ (0.5 * weights - 3.0)
    _bits(low.ctypes.data, high.ctypes.data, 0.5, 3.0, *tile.at, True)
    np.testing.assert_array_equal(tile.sums, once)
    _bits(low.ctypes.data, high.ctypes.data, 0.5, 3.0, *tile.at, False)
    np.testing.assert_array_equal(tile.sums, 2 * once)


def test_every_code_of_fp4() -> None:
    tile = Tile(BLOCK32, SUM)
    codes = np.random.default_rng(4).permutation(np.repeat(np.arange(16), 2))
    source = (codes[:16] | codes[16:] << 4).astype(np.uint8)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
    expected = np.where(codes > 7, -1, 1) * values[codes % 8]
    _e2m1(source.ctypes.data, 0.5, *tile.at)  # weights are twice their value
    np.testing.assert_array_equal(tile.sums, tile.x @ expected)


def test_a_grid_s_entries_with_their_signs() -> None:
    tile, rng = Tile(BLOCK32, SUM), np.random.default_rng(5)
    masks = rng.choice([0, 255], (128, 8)).astype(np.uint8)
    grid = rng.integers(0, 44, (256, 8)).astype(np.uint8)
    table = np.concatenate([masks.reshape(-1), grid.reshape(-1)])
    indices, patterns = rng.integers(0, 256, 4).astype(np.uint8), rng.integers(0, 128, 4)
    signs = int(sum(int(pattern) << 7 * i for i, pattern in enumerate(patterns)))
    _grid8(indices.ctypes.data, signs, table.ctypes.data, 0.25, *tile.at)
    expected = np.where(masks[patterns] == 255, -1.0, 1.0) * grid[indices] * 0.25
    np.testing.assert_array_equal(tile.sums, tile.x @ expected.reshape(-1))


def test_sixteen_scales_and_minima_of_a_super_block() -> None:
    tile, rng = Tile(SUPER256), np.random.default_rng(6)
    w = rng.integers(0, 4, 256).astype(np.int8)
    scales, minima = (rng.integers(0, 16, 16).astype(np.int8) for _ in range(2))
    in_order = np.arange(16).reshape(4, 4)[:, [0, 2, 1, 3]].reshape(-1)  # of the record's sums
    _super(w.ctypes.data, scales.ctypes.data, 0.5, np.ascontiguousarray(minima[in_order]).ctypes.data, 0.25, *tile.at)
    expected = 0.5 * np.repeat(scales, 16).astype(np.float64) * w - 0.25 * np.repeat(minima, 16)
    np.testing.assert_array_equal(tile.sums, tile.x @ expected)
