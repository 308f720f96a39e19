"""Experts of one layer in two formats: a base that has all of them, and better copies of some."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.quant.model.source import ModelSource, Projection
from localrun.quant.open import open_model
from tests.gguf_models import deepseek4_tensors, write_deepseek4
from tests.offload.models import MODEL, floor_ram, logits, write_model
from tests.paired import median
from tests.reference import kl

CHOSEN = {(layer, expert) for layer in range(4) for expert in range(layer % 2, MODEL.n_experts, 3)}
BETTER = QT.Q8_0


class TwoCopies:
    """The first file's model with some experts of the second one as better copies; two real files, no writer needed."""

    def __init__(self, base: ModelSource, better: ModelSource) -> None:
        self._base, self._better = base, better
        self.files = [*base.files, *better.files]
        self.moe_layers = {
            layer: replace(moe, better=(better.moe_layers[layer].types,)) for layer, moe in base.moe_layers.items()
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def expert(self, layer: int, expert: int) -> tuple[Projection, Projection, Projection]:
        if (layer, expert) not in CHOSEN:
            return self._base.expert(layer, expert)
        moved = [
            replace(p, extents=tuple(replace(e, file=e.file + len(self._base.files)) for e in p.extents))
            for p in self._better.expert(layer, expert)
        ]
        return moved[0], moved[1], moved[2]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSource, ModelSource, Path]:
    """Base alone, base with better copies, and a GGUF that holds in F32 what the two together mean."""
    folder = tmp_path_factory.mktemp("variants")
    (folder / "base").mkdir()
    (folder / "better").mkdir()
    fine = replace(MODEL, expert_type=BETTER)
    base, better = (open_model(write_model(folder / name, m)) for name, m in (("base", MODEL), ("better", fine)))
    coarse_tensors, fine_tensors, exact = deepseek4_tensors(MODEL), deepseek4_tensors(fine), {}
    for name, (values, kind) in coarse_tensors.items():
        if "_exps" in name:
            layer = int(name.split(".")[1])
            stack = gguf.dequantize(values, kind)
            for expert in [e for at, e in CHOSEN if at == layer]:
                stack[expert] = gguf.dequantize(fine_tensors[name][0][expert], BETTER)
            exact[name] = (stack.astype(np.float32), QT.F32)
    path = folder / "exact.gguf"
    write_deepseek4(path, MODEL, replace_tensors=exact)
    return base, cast("ModelSource", TwoCopies(base, better)), path


def test_each_expert_is_computed_from_its_own_copy(sources: tuple[ModelSource, ModelSource, Path]) -> None:
    base, mixed, exact = sources
    with open_offloaded(open_model(exact), OffloadOptions(n_threads=2, math="f32")) as model:
        expected = logits(model)
    with open_offloaded(mixed, OffloadOptions(n_threads=2, math="f32")) as model:
        found = logits(model)
        expected_types = ["1" if (0, e) in CHOSEN else "0" for e in range(MODEL.n_experts)]
        assert model.expert_map()["layers"][0]["type_of"] == "".join(expected_types)
    with open_offloaded(base, OffloadOptions(n_threads=2, math="f32")) as model:
        base_only = logits(model)
    assert median(kl(expected, found)) < 1e-6 < 1e-3 < median(kl(expected, base_only))


def test_mixed_formats_give_identical_logits_at_any_ram_budget(
    sources: tuple[ModelSource, ModelSource, Path],
) -> None:
    _, mixed, _ = sources
    with open_offloaded(mixed, OffloadOptions(n_threads=2)) as model:
        expected, floor, everything = logits(model, batch=8), floor_ram(model), model.ram_bytes
        np.testing.assert_array_equal(logits(model, batch=8), expected)  # all resident: compiled path
        assert model.telemetry.totals().evictions == 0
    for ram in (floor, (2 * floor + everything) // 3):
        with open_offloaded(mixed, OffloadOptions(ram_bytes=ram, n_threads=2)) as model:
            np.testing.assert_array_equal(logits(model, batch=8), expected)
            model.pool.residency.check()
            assert model.telemetry.totals().evictions > 0


def test_adaptive_mode_answers_from_the_base_and_ends_with_the_better_copies(
    sources: tuple[ModelSource, ModelSource, Path],
) -> None:
    base, mixed, _ = sources
    with open_offloaded(base, OffloadOptions(n_threads=2)) as model:
        coarse = logits(model)
    with open_offloaded(mixed, OffloadOptions(n_threads=2)) as model:
        fine = logits(model)
    with open_offloaded(mixed, OffloadOptions(n_threads=2, adaptive=True)) as model:
        pool = model.pool
        np.testing.assert_array_equal(logits(model), coarse)  # nothing was there: all misses
        while pool.residency.settle():
            pass
        used = {(slot.layer, slot.expert) for slot in pool.residency.table} & CHOSEN
        for _ in range(len(used) + 1):
            with model.decoding([]):
                pool.residency.check()
            while pool.residency.settle():
                pass
        assert {(slot.layer, slot.expert) for slot in pool.residency.table if slot.variant == 1} == used
        np.testing.assert_array_equal(logits(model), fine)


def test_failed_upgrade_keeps_the_smaller_copy(
    sources: tuple[ModelSource, ModelSource, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, mixed, _ = sources
    with open_offloaded(mixed, OffloadOptions(n_threads=2, adaptive=True)) as model:
        expected = logits(model)
        fill = model.pool.residency.store._fill  # type: ignore[attr-defined]

        def fail(ticket: Any, which: int, copy: int) -> None:
            if ticket.slot.variant == 1:
                raise OSError("no such luck")
            fill(ticket, which, copy)

        monkeypatch.setattr(model.pool.residency.store, "_fill", fail)
        for _ in range(3):
            with model.decoding([]):
                pass
            while model.pool.residency.settle():
                pass
        assert all(slot.variant == 0 for slot in model.pool.residency.table)
        np.testing.assert_array_equal(logits(model), expected)
        model.pool.residency.check()
