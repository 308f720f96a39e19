"""Records that Python and compiled code share."""

from __future__ import annotations

from typing import Annotated

import numba as nb
import numpy as np
import pytest

from localrun.fingerprint import fingerprint
from localrun.offload.device import layouts as device
from localrun.offload.kernels import layouts as kernels
from localrun.offload.kernels.records import Layout, Words, add, get, put


class _Timer(Layout):
    """For these tests."""

    started: int
    """When."""
    laps: Annotated[int, Words(3)]
    """Three of them."""
    count: int
    """How many."""


TIMER = _Timer()


@nb.njit
def _lap(timer: int, time: int) -> int:
    put(timer, TIMER.laps + get(timer, TIMER.count), time - get(timer, TIMER.started))
    add(timer, TIMER.count, 1)
    return TIMER.size  # type: ignore[no-any-return]


def test_python_and_compiled_code_see_the_same_fields() -> None:
    record = TIMER.make(started=100, count=0)
    assert [_lap(record.ctypes.data, time) for time in (107, 109)] == [5, 5]
    assert record.tolist() == [100, 7, 9, 0, 2]
    assert (TIMER.started, TIMER.laps, TIMER.count, TIMER.size) == (0, 1, 4, 5)


def test_a_record_has_all_fields_and_no_others() -> None:
    with pytest.raises(TypeError, match=r"_Timer: fields \['count', 'stopped'\] are unknown or missing"):
        TIMER.make(started=1, stopped=2)


@pytest.mark.parametrize("wrong", [np.zeros(4, np.int64), np.zeros(5, np.int32)])
def test_filling_something_else_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(TypeError, match="not 5 int64"):
        TIMER.fill(wrong, started=1)
    with pytest.raises(TypeError, match="no single field laps"):
        TIMER.fill(TIMER.empty(), laps=1)


def test_a_span_is_fields_that_follow_one_another() -> None:
    assert TIMER.span("laps", "count") == slice(1, 5)
    with pytest.raises(TypeError, match="don't follow one another"):
        TIMER.span("started", "count")


@pytest.mark.parametrize(
    "layout",
    [value for module in (device, kernels) for value in vars(module).values() if isinstance(value, Layout)],
    ids=lambda layout: layout.__name__.rpartition(".")[2],
)
def test_fields_of_the_layouts_fill_their_records_without_gaps(layout: Layout) -> None:
    ends = 0
    for name, width in layout._widths.items():
        assert getattr(layout, name) == ends
        ends += width
    assert layout.size == ends > 0


def test_a_moved_field_is_another_machine_code() -> None:
    before = fingerprint(_lap)
    moved = _Timer()
    moved.count, moved.started = moved.started, moved.count
    lap = nb.njit(_lap.py_func.__class__(_lap.py_func.__code__, {**_lap.py_func.__globals__, "TIMER": moved}, "_lap"))
    assert fingerprint(lap) != before
