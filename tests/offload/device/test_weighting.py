"""Sums over a token's experts: bit for bit what llama.cpp's products and additions give, whichever pairs are ours."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from localrun.offload.device.layouts import PROCESS
from localrun.offload.device.weighting import add_row, add_up

F32 = npt.NDArray[np.float32]
T, K, D = 3, 4, 33


class Sums:
    """Rows and weights of T tokens with K experts each, and which pairs somebody else adds up."""

    def __init__(self, taken: npt.NDArray[np.uint8]) -> None:
        rng = np.random.default_rng(1)
        self.rows = rng.standard_normal((T * K, D + 3), dtype=np.float32)  # rows may be apart
        self.weights, self.taken = rng.random((T, K), dtype=np.float32), taken

    def found(self) -> F32:
        out, record = np.full((T, D + 5), 7, np.float32), PROCESS.empty()
        PROCESS.fill(record, weights=self.weights.ctypes.data, taken=self.taken.ctypes.data)
        add_up(
            record.ctypes.data, T, K, D, self.rows.ctypes.data, self.rows.strides[0], out.ctypes.data, out.strides[0]
        )
        assert (out[:, D:] == 7).all(), "nothing is written beyond the row"
        return out[:, :D]

    def expected(self) -> F32:
        """Product by product, each rounded to F32, added in the order of the pairs."""
        out = np.zeros((T, D), np.float32)
        for t in range(T):
            total: F32 | None = None
            for k in range(K):
                if not self.taken[t, k]:
                    product = self.rows[t * K + k, :D] * self.weights[t, k]
                    total = product if total is None else total + product
            if total is not None:
                out[t] = total
        return out


@pytest.mark.parametrize("taken", [0, 1, 2], ids=["all ours", "some", "a token without any"])
def test_sums_have_llama_cpp_s_bits(taken: int) -> None:
    marks = np.zeros((T, K), np.uint8)
    if taken >= 1:
        marks[0, 0] = marks[1, 2] = 1
    if taken == 2:
        marks[2] = 1
    sums = Sums(marks)
    np.testing.assert_array_equal(sums.found(), sums.expected())


def test_a_row_is_added_in_place() -> None:
    rng = np.random.default_rng(2)
    total, row = rng.standard_normal(D + 1, dtype=np.float32), rng.standard_normal(D, dtype=np.float32)
    expected = np.concatenate([total[:D] + row, total[D:]])
    add_row(total.ctypes.data, row.ctypes.data, D)
    np.testing.assert_array_equal(total, expected)
