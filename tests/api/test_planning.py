"""Machines that are described: a box, this one, and what is changed of them."""

from __future__ import annotations

import pytest

from localrun.api.planning import Machine, hardware_of, plan
from localrun.engine.planner.boxes import BOXES
from localrun.errors import BudgetError, UsageError

GIB = 1 << 30
BOX = BOXES[0].slug


def test_a_box_s_values_give_way_to_those_that_are_named() -> None:
    plain = plan("flash", machine=BOX).machine
    changed = plan("flash", machine=Machine(box=BOX, ram="100GiB", drive_rate="7GB/s", drives=2, threads=3)).machine
    assert (changed.total_ram_bytes, changed.ram_bytes) == (100 * GIB, 98 * GIB)
    assert (changed.disk_bytes_per_s, changed.n_drives, changed.n_threads) == (7e9, 2, 3)
    assert changed.memory_bytes_per_s == plain.memory_bytes_per_s


def test_memory_of_gpus_makes_gpus_and_none_takes_them_away() -> None:
    two = plan("flash", machine=Machine(box=BOX, vram=["24GiB", 12 * GIB])).machine
    assert [gpu.vram_bytes for gpu in two.gpus] == [24 * GIB, 12 * GIB]
    assert plan("flash", machine=Machine(box=BOX, vram=[0])).machine.gpus == ()


def test_what_does_not_go_into_the_machine_is_refused() -> None:
    with pytest.raises(UsageError, match="box"):
        plan("flash", machine="a box that nobody has")
    with pytest.raises(BudgetError, match="--ram"):
        plan("flash", machine=Machine(box=BOX, ram="64GiB"), ram="65GiB")
    with pytest.raises(UsageError):
        plan("flash", machine=BOX, context=2_000_000)


def test_limits_reach_the_plan() -> None:
    made = plan("flash", machine=BOX, ram="8GiB", context=4096, prompt_tokens=100)
    assert made.n_ctx == 4096
    assert made.options.prompt_tokens == 100
    assert made.placement.ram_bytes is not None
    assert made.placement.ram_bytes <= 8 * GIB
    smaller = plan("flash", machine=BOX, base="q2_k")
    assert smaller.sizes.expert_file_bytes < made.sizes.expert_file_bytes
    assert callable(hardware_of)
