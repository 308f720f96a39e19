"""Activations as the kernels want them, record by record, against the layout written out in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from localrun.offload.kernels.panels import BLOCK32, FLOAT32, GRID32, SUM, SUPER256, Panel, clear_token, fill_panel

F32 = npt.NDArray[np.float32]
N_TOKENS = 3


def filled(panel: Panel, x: F32) -> npt.NDArray[np.uint8]:
    """The panel of `x` (T, n); what nobody writes is 0xEE."""
    n_units = -(-x.shape[1] // panel.unit)
    memory = np.full(n_units * panel.unit_bytes * len(x), 0xEE, np.uint8)
    for token, row in enumerate(x):
        fill_panel(panel.kind, panel.offset, row.ctypes.data, row.size, memory.ctypes.data, 0, token, len(x))
    return memory.reshape(n_units, -1)


def quantized(x: F32, group: int) -> tuple[npt.NDArray[np.int8], F32]:
    """(T, n) int8 and (T, n / group) scales, as ggml's Q8_0 and Q8_K round."""
    groups = x.reshape(len(x), -1, group)
    largest = np.abs(groups).max(2)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(groups * inverse[:, :, None]).astype(np.int8).reshape(x.shape), largest / np.float32(127)


@pytest.fixture
def x() -> F32:
    values = np.random.default_rng(3).standard_normal((N_TOKENS, 512)).astype(np.float32)
    values[1, :32] = 0
    return values


@pytest.mark.parametrize("offset", [8, SUM])
def test_blocks_of_32(x: F32, offset: int) -> None:
    q, scales = quantized(x, 32)
    for unit, record in enumerate(filled(Panel(BLOCK32, offset), x)):
        own = q[:, 32 * unit : 32 * unit + 32]
        np.testing.assert_array_equal(record[: 32 * N_TOKENS].view(np.int8).reshape(N_TOKENS, 32), own)
        rest = record[32 * N_TOKENS :]
        np.testing.assert_array_equal(rest[: 4 * N_TOKENS].view(np.float32), scales[:, unit])
        sums = own.astype(np.int32).sum(1)
        if offset == SUM:
            np.testing.assert_array_equal(
                rest[4 * N_TOKENS :].view(np.float32), scales[:, unit] * sums.astype(np.float32)
            )
        else:
            np.testing.assert_array_equal(rest[4 * N_TOKENS :].view(np.int32), -offset * sums)


def test_blocks_of_32_for_grids_have_four_groups_of_eight_side_by_side(x: F32) -> None:
    plain, grids = filled(Panel(BLOCK32, 43), x), filled(Panel(GRID32, 43), x)
    values = plain[:, : 32 * N_TOKENS].reshape(-1, 4, 8)
    np.testing.assert_array_equal(grids[:, : 32 * N_TOKENS].reshape(-1, 8, 4), values.swapaxes(1, 2))
    np.testing.assert_array_equal(grids[:, 32 * N_TOKENS :], plain[:, 32 * N_TOKENS :])


def test_blocks_of_256_with_sums_of_16_in_the_order_0_2_1_3(x: F32) -> None:
    q, scales = quantized(x, 256)
    for unit, record in enumerate(filled(Panel(SUPER256, 32), x)):
        own = q[:, 256 * unit : 256 * unit + 256]
        np.testing.assert_array_equal(record[: 256 * N_TOKENS].view(np.int8).reshape(N_TOKENS, 256), own)
        scale, start, sums = np.split(record[256 * N_TOKENS :], [4 * N_TOKENS, 8 * N_TOKENS])
        np.testing.assert_array_equal(scale.view(np.float32), scales[:, unit])
        np.testing.assert_array_equal(start.view(np.int32), -32 * own.astype(np.int32).sum(1))
        expected = own.reshape(N_TOKENS, 4, 4, 16).astype(np.int32).sum(3)[:, :, [0, 2, 1, 3]]
        np.testing.assert_array_equal(sums.view(np.int16).reshape(N_TOKENS, 4, 4), expected)


def test_floats_are_copied_and_the_last_record_is_filled_up_with_zeros(x: F32) -> None:
    short = np.ascontiguousarray(x[:, :40])
    first, second = filled(Panel(FLOAT32), short).view(np.float32).reshape(2, N_TOKENS, 32)
    np.testing.assert_array_equal(first, short[:, :32])
    np.testing.assert_array_equal(second[:, :8], short[:, 32:])
    assert not second[:, 8:].any()


@pytest.mark.parametrize("panel", [Panel(BLOCK32, 8), Panel(GRID32, 43), Panel(SUPER256, 32), Panel(FLOAT32)])
def test_a_token_that_is_not_used_becomes_zeros_and_others_stay(x: F32, panel: Panel) -> None:
    before = filled(panel, x)
    after = before.copy()
    clear_token(panel.kind, after.ctypes.data, len(after), 1, N_TOKENS)
    silent = x.copy()
    silent[1] = 0
    np.testing.assert_array_equal(after, filled(panel, silent))


def test_a_value_that_is_none_poisons_its_group_only(x: F32) -> None:
    x[0, 40] = np.nan
    records = filled(Panel(BLOCK32, 8), x)
    scales = np.stack([record[32 * N_TOKENS :][: 4 * N_TOKENS].view(np.float32) for record in records])
    assert np.isnan(scales[1, 0])
    assert np.isnan(scales).sum() == 1
