"""One matrix after the other into a slot: packed, or as rows, in any order; damage is named before anything is written."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localrun.errors import ChecksumError
from localrun.offload.cache.matrices import MatrixWriter
from localrun.offload.cache.slots import Slot
from tests.offload.stores import EXPERT_BYTES, KERNELS, MATRIX_BYTES, ExpertsInAFile, packed, rows_of

AT = 1, 2
"""Layer and expert."""


class Desk:
    """A writer on real experts, and memory for one."""

    def __init__(self, folder: Path, **options: Any) -> None:
        source: Any = ExpertsInAFile(folder)
        self.projections = source.base_expert(*AT)
        self.rows = rows_of(*AT)
        self.memory = np.zeros(EXPERT_BYTES, np.uint8)
        self._writer = MatrixWriter([source], KERNELS, **options)

    def write(self, which: int, **options: Any) -> None:
        slot = Slot(*AT, self.memory.ctypes.data, EXPERT_BYTES)
        rows = self.rows[which * MATRIX_BYTES : (which + 1) * MATRIX_BYTES]
        self._writer.write(slot, self.projections, which, [rows], **options)


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("as_rows", [False, True])
def test_each_matrix_goes_to_its_place(tmp_path: Path, order: tuple[int, ...], as_rows: bool) -> None:
    desk = Desk(tmp_path)
    expected = desk.rows if as_rows else packed(desk.rows)
    done = np.zeros(EXPERT_BYTES, bool)
    for which in order:
        desk.write(which, as_rows=as_rows)
        done[which * MATRIX_BYTES : (which + 1) * MATRIX_BYTES] = True
        np.testing.assert_array_equal(desk.memory, np.where(done, expected, 0))


def test_damage_is_named_and_not_written_unless_nobody_looks(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.rows[MATRIX_BYTES + 5] ^= 1
    with pytest.raises(ChecksumError, match=r"experts: blk\.1\.ffn_up_exps\.weight: expert 2 does not match") as caught:
        desk.write(1)
    assert caught.value.hint is not None
    assert not desk.memory.any()
    careless = Desk(tmp_path, verify=False)
    careless.rows[MATRIX_BYTES + 5] ^= 1
    careless.write(1)
    assert careless.memory.any()
