"""Memory of ggml tensors as arrays, in place."""

from __future__ import annotations

import numpy as np
import pytest

from localrun.errors import DecodeError
from localrun.offload.device.view import View, ids_at, rows_at


def place(array: np.ndarray, ne: tuple[int, int, int], nb: tuple[int, int, int]) -> View:
    return View(array.ctypes.data, ne, nb)


def test_three_dimensions_are_rows_in_place() -> None:
    memory = np.arange(24, dtype=np.float32)
    rows = rows_at(place(memory, (4, 3, 2), (4, 16, 48)), np.float32)
    assert rows.tolist() == memory.reshape(6, 4).tolist()
    rows[5, 3] = -1
    assert memory[23] == -1


def test_rows_of_a_view_have_its_stride() -> None:
    memory = np.arange(40, dtype=np.float32)
    assert rows_at(place(memory, (4, 3, 1), (4, 40, 0)), np.float32).tolist() == [
        [0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23],
    ]  # fmt: skip
    assert rows_at(place(memory, (4, 1, 3), (4, 4, 40)), np.float32)[:, 0].tolist() == [0, 10, 20]
    assert rows_at(place(memory, (4, 1, 1), (4, 999, 999)), np.float32).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("ne", "nb"), [((4, 3, 2), (4, 16, 64)), ((4, 3, 1), (8, 16, 48))])
def test_rows_without_one_stride_are_refused(ne: tuple[int, int, int], nb: tuple[int, int, int]) -> None:
    with pytest.raises(DecodeError, match="unexpected strides"):
        rows_at(View(0, ne, nb), np.float32)


def test_ids_of_chosen_experts_are_a_part_of_longer_rows() -> None:
    memory = np.arange(16, dtype=np.int32)
    assert ids_at(place(memory, (3, 2, 1), (4, 32, 64))).tolist() == [[0, 1, 2], [8, 9, 10]]
