"""How an expert is read: which ranges, what lies where in the buffer, and which matrices a part of it has bytes of."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as QT

from localrun.alignment import PAGE_BYTES
from localrun.errors import StoreError
from localrun.offload.cache.expert_files import ExpertFile, plan_read
from localrun.quant.model.source import Encoding, Extent, Projection

PAGE = PAGE_BYTES


def matrix(*extents: tuple[int, int, int]) -> Projection:
    """extents: (file, offset, bytes)."""
    return Projection(QT.F32, 1, 1, Encoding.GGML, tuple(Extent(*at) for at in extents), 4)


def test_matrices_that_follow_each_other_are_one_range_and_touch_only_their_pages() -> None:
    plan = plan_read([matrix((0, PAGE, 2 * PAGE)), matrix((0, 3 * PAGE, PAGE)), matrix((0, 4 * PAGE, 100))], [True])
    assert plan.spans == [(0, PAGE, 5 * PAGE, 4 * PAGE + 100, 0)]
    assert plan.matrices == [(0, 2 * PAGE), (2 * PAGE, 3 * PAGE), (3 * PAGE, 3 * PAGE + 100)]
    assert [plan.matrices_in(at * PAGE, (at + 1) * PAGE) for at in range(5)] == [0b001, 0b001, 0b010, 0b100, 0]
    assert plan.matrices_in(PAGE, 3 * PAGE) == 0b011


def test_matrices_in_the_middle_of_pages_have_pages_of_their_own() -> None:
    plan = plan_read([matrix((0, 10, 20)), matrix((0, 30, PAGE)), matrix((1, 7, 1))], [True, True])
    assert plan.spans == [(0, 0, PAGE, 30, 0), (0, 0, 2 * PAGE, PAGE + 30, PAGE), (1, 0, PAGE, 8, 3 * PAGE)]
    assert plan.payloads == [[(10, 20)], [(PAGE + 30, PAGE)], [(3 * PAGE + 7, 1)]]
    assert [plan.matrices_in(at * PAGE, (at + 1) * PAGE) for at in range(4)] == [0b001, 0b010, 0b010, 0b100]


def test_a_file_in_the_page_cache_is_read_to_the_byte() -> None:
    plan = plan_read([matrix((0, 10, 20)), matrix((0, 90, 5)), matrix((1, 7, 1))], [False, True])
    assert plan.spans == [(0, 10, 30, 30, 0), (0, 90, 95, 95, PAGE), (1, 0, PAGE, 8, 2 * PAGE)]
    assert plan.matrices == [(0, 20), (PAGE, PAGE + 5), (2 * PAGE + 7, 2 * PAGE + 8)]


def test_weights_and_scales_of_a_matrix_count_together() -> None:
    plan = plan_read([matrix((0, 0, PAGE), (0, 9 * PAGE, 64)), matrix((0, PAGE, PAGE)), matrix((1, 0, 1))], [True] * 2)
    assert plan.matrices == [(0, PAGE + 64), (2 * PAGE, 3 * PAGE), (3 * PAGE, 3 * PAGE + 1)]
    assert plan.matrices_in(PAGE, 2 * PAGE) == 0b001


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nothing: No such file") as caught:
        ExpertFile.open(tmp_path / "nothing")
    assert caught.value.hint is not None
