"""Machines that are described: a box, this one, and what is changed of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from localrun import cli
from localrun.api.planning import Machine, hardware_of, plan, plan_with
from localrun.config import Settings
from localrun.engine.planner import hardware
from localrun.engine.planner.boxes import BOXES
from localrun.engine.planner.planner import make_plan
from localrun.errors import BudgetError, UsageError
from localrun.offload.gpu.rates import assumed_rates

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


def test_a_gpu_s_rate_is_that_of_the_gpus_there_are() -> None:
    known = plan("flash", machine="gpu-24-ram-64").machine
    faster = plan("flash", machine=Machine(box="gpu-24-ram-64", gpu_rate="1800GB/s")).machine
    assert [gpu.vram_bytes for gpu in faster.gpus] == [gpu.vram_bytes for gpu in known.gpus]
    assert [gpu.rates for gpu in faster.gpus] == [assumed_rates(1800e9)]
    assert known.gpus[0].rates != faster.gpus[0].rates
    for machine in (Machine(box=BOX, gpu_rate="900GB/s"), Machine(ram="64GiB", vram=[0], gpu_rate="900GB/s")):
        with pytest.raises(UsageError, match="without a GPU") as refused:
            plan("flash", machine=machine, probe=False)
        assert "--machine-vram" in str(refused.value.hint)


def test_a_known_card_has_its_maker_s_figures() -> None:
    (card,) = plan("flash", machine=Machine(box=BOX, gpu=["RTX 5090"])).machine.gpus
    assert (card.name, card.vram_bytes, card.rates) == ("RTX 5090", 32 * GIB, assumed_rates(1792e9))
    assert plan("flash", machine=Machine(box=BOX, gpu=["4090"], gpu_rate="900GB/s")).machine.gpus[
        0
    ].rates == assumed_rates(900e9)
    for machine, said in (
        (Machine(box=BOX, gpu=["4060 Ti"]), "8 or 16 GB"),
        (Machine(box=BOX, gpu=["4090"], vram=["8GiB"]), "both"),
    ):
        with pytest.raises(UsageError, match=said):
            plan("flash", machine=machine)


def test_a_narrow_bus_makes_prompts_slower_and_not_answers() -> None:
    fast, slow = (plan("flash", machine=Machine(box="gpu-24-ram-128")) for _ in range(2))
    narrow = make_plan(
        slow.sizes,
        replace(slow.machine, gpus=tuple(replace(gpu, bus_bytes_per_s=3.9e9) for gpu in slow.machine.gpus)),
        suggest=False,
    )
    assert fast.prefill is not None
    assert narrow.prefill is not None
    wide_s, narrow_s = (span.likely.seconds["GPU's bus"] for span in (fast.prefill, narrow.prefill))
    assert narrow_s == pytest.approx(8 * wide_s, rel=0.02)
    assert narrow.prefill.likely.tokens_per_s < fast.prefill.likely.tokens_per_s
    assert narrow.decode == fast.decode


def test_fewer_threads_than_a_box_has_cores() -> None:
    n_cores = plan("flash", machine=BOX).machine.n_threads
    assert n_cores > 2
    assert plan("flash", machine=BOX, threads=2).machine.n_threads == 2
    assert plan("flash", machine=BOX, threads=n_cores + 1).machine.n_threads == n_cores
    assert plan("flash", machine=Machine(box=BOX, threads=3), threads=2).machine.n_threads == 2


def test_what_does_not_go_into_the_machine_is_refused() -> None:
    with pytest.raises(UsageError, match="box"):
        plan("flash", machine="a box that nobody has")
    with pytest.raises(BudgetError, match="--ram"):
        plan("flash", machine=Machine(box=BOX, ram="64GiB"), ram="65GiB")
    with pytest.raises(UsageError):
        plan("flash", machine=BOX, context=2_000_000)


@pytest.mark.parametrize("name", ["drive_rate", "memory_rate", "gpu_rate"])
@pytest.mark.parametrize(
    ("rate", "hint"),
    [
        *((impossible, "7GB/s") for impossible in (0, -1, math.nan, math.inf)),
        *((7, "'7GB/s'"), (1.5, "'1.5GB/s'"), (7000, "'7MB/s'")),
        *(("7KB/s", "'7MB/s'"), ("7", "7GB/s")),
    ],
)
def test_rates_that_nothing_has_are_refused_with_what_was_meant(name: str, rate: float | str, hint: str) -> None:
    for box in (BOX, None):
        with pytest.raises(UsageError) as refused:
            plan("flash", machine=Machine(box=box, **{name: rate}), probe=False)  # type: ignore[arg-type]  # by name
        assert refused.value.hint is not None
        assert hint in refused.value.hint


@pytest.mark.parametrize(
    "machine",
    [{"ram": -1}, {"ram": 64}, {"vram": [24]}, {"vram": [-(1 << 30)]}, {"threads": 0}, {"drives": 0}, {"drives": 3}],
)
def test_sizes_and_counts_that_no_machine_has_are_refused(machine: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        plan("flash", machine=Machine(box=BOX, **machine))


def test_tokens_that_can_not_be_are_refused() -> None:
    with pytest.raises(UsageError, match="position=-1"):
        plan("flash", machine=BOX, position=-1)
    with pytest.raises(UsageError, match="prompt_tokens=0"):
        plan("flash", machine=BOX, prompt_tokens=0)


@pytest.mark.parametrize("flag", ["--machine-drive-rate", "--machine-memory-rate", "--machine-gpu-rate"])
@pytest.mark.parametrize("rate", ["0", "-1GB/s", "7", "7B/s", "nan"])
def test_the_command_refuses_such_rates_too(flag: str, rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "flash", "--box", BOX, f"{flag}={rate}"]) == 2
    assert "7GB/s" in capsys.readouterr().err


def test_limits_reach_the_plan() -> None:
    made = plan("flash", machine=BOX, ram="8GiB", context=4096, prompt_tokens=100)
    assert made.n_ctx == 4096
    assert made.options.prompt_tokens == 100
    assert made.placement.ram_bytes is not None
    assert made.placement.ram_bytes <= 8 * GIB
    smaller = plan("flash", machine=BOX, base="q2_k")
    assert smaller.sizes.expert_file_bytes < made.sizes.expert_file_bytes
    assert callable(hardware_of)


def test_what_runs_on_this_machine_does_not_slow_down_another(monkeypatch: pytest.MonkeyPatch) -> None:
    detect = hardware.detect
    monkeypatch.setattr(hardware, "detect", lambda *a, **b: replace(detect(*a, **b), others=1.9, n_cores=2))
    here = plan_with("flash", Settings(), base="iq2_xxs", probe=False).machine
    other = plan_with("flash", Settings(), Machine(ram="256GiB", gpu=["RTX 4090"]), probe=False)
    assert here.is_busy
    assert not other.machine.is_busy
    assert not any("busy now" in line for line in other.lines())
