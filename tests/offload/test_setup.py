"""How RAM for experts is shared out, and what is refused with which numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import BudgetError
from localrun.offload.setup import ExpertSetup, OffloadOptions, choose_setup, make_tier, slot_budget
from localrun.quant.model.source import ModelSource
from localrun.quant.open import open_model
from tests.offload.models import MODEL, write_model

READING = 1 << 20


@pytest.fixture(scope="module")
def source(model_path: Path) -> ModelSource:
    return open_model(model_path)


@pytest.fixture(scope="module")
def setup(source: ModelSource) -> ExpertSetup:
    return choose_setup(source, OffloadOptions())


def slot_of(setup: ExpertSetup) -> int:
    return align_up(setup.kernels[0][0].slot_bytes, PAGE_BYTES)


def test_layers_of_one_shape_share_a_kernel(setup: ExpertSetup) -> None:
    assert len({id(kernel) for variants in setup.kernels.values() for kernel in variants}) == 1
    assert setup.n_used == MODEL.n_used
    assert all((variants == 0).all() for variants in setup.wanted.values())


def test_without_a_limit_every_expert_has_a_slot(setup: ExpertSetup) -> None:
    everything = len(MODEL.ratios) * MODEL.n_experts * slot_of(setup)
    assert setup.slots_bytes == everything
    assert slot_budget(setup, OffloadOptions(), READING) == everything
    assert slot_budget(setup, OffloadOptions(adaptive=True), READING) == 2 * everything


def test_buffers_come_off_what_is_given_and_no_more_is_taken_than_is_needed(setup: ExpertSetup) -> None:
    given = READING + 10 * slot_of(setup)
    assert slot_budget(setup, OffloadOptions(ram_bytes=given), READING) == 10 * slot_of(setup)
    assert slot_budget(setup, OffloadOptions(ram_bytes=1 << 40), READING) == setup.slots_bytes


@pytest.mark.parametrize(("adaptive", "n_slots"), [(False, MODEL.n_used), (True, MODEL.n_used + 2)])
def test_less_than_a_token_needs_is_refused_unless_it_is_only_advice(
    setup: ExpertSetup, adaptive: bool, n_slots: int
) -> None:
    floor = n_slots * slot_of(setup)
    options = OffloadOptions(ram_bytes=READING + floor - 1, adaptive=adaptive)
    with pytest.raises(BudgetError, match="is too little: one layer's 3 experts need"):
        slot_budget(setup, options, READING)
    assert slot_budget(setup, replace(options, ram_is_advice=True), READING) == floor
    assert slot_budget(setup, replace(options, ram_bytes=READING + floor), READING) == floor


def test_without_gpus_there_is_no_tier_and_no_buffer_for_it(source: ModelSource, setup: ExpertSetup) -> None:
    assert make_tier(source, setup, []) is None
    assert (setup.rings, setup.gpu_staging_bytes) == (None, 0)


def test_another_format_gives_another_kernel_and_other_slots(tmp_path: Path, setup: ExpertSetup) -> None:
    wider = choose_setup(open_model(write_model(tmp_path, replace(MODEL, expert_type=QT.Q8_0))), OffloadOptions())
    assert wider.kernels[0][0].spec.types == (QT.Q8_0,) * 3
    assert wider.slots_bytes > setup.slots_bytes
    assert wider.scratch_bytes > 0


def test_better_copies_are_wanted_where_there_are_some(source: ModelSource) -> None:
    class WithCopies:
        """Expert 2 of every layer has a copy in F32."""

        def __init__(self) -> None:
            better = ((QT.F32,) * 3,)
            self.moe_layers = {n: replace(moe, better=better) for n, moe in source.moe_layers.items()}  # type: ignore[arg-type]

        def __getattr__(self, name: str) -> object:
            return getattr(source, name)

        def expert(self, layer: int, expert: int) -> tuple[object, ...]:
            recipe = source.expert(layer, expert)
            return tuple(replace(p, type=QT.F32) for p in recipe) if expert == 2 else recipe

    placed = choose_setup(WithCopies(), OffloadOptions())  # type: ignore[arg-type]
    assert [len(variants) for variants in placed.kernels.values()] == [2] * len(MODEL.ratios)
    for wanted in placed.wanted.values():
        np.testing.assert_array_equal(wanted, np.arange(MODEL.n_experts) == 2)
