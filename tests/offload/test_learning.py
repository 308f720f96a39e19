"""What is learned from uses: counted once, saved, and used to keep the hottest experts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from localrun.alignment import PAGE_BYTES, align_up
from localrun.offload.cache.telemetry import Counter, Telemetry
from localrun.offload.learning import PINNED_SHARE, PROFILE_MIN_TOKENS, Learner
from localrun.offload.residency import Residency
from tests.offload.stores import EXPERT_BYTES, KERNELS, LAYERS, N_EXPERTS, MemoryStore

SOURCE = cast("Any", SimpleNamespace(identity="0" * 32, moe_layers=LAYERS))


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry(len(LAYERS))


@pytest.fixture
def residency(telemetry: Telemetry) -> Iterator[Residency]:
    """Room for 20 of 36 experts."""
    wanted = {layer: np.zeros(N_EXPERTS, np.int32) for layer in LAYERS}
    budget = 20 * align_up(EXPERT_BYTES, PAGE_BYTES)
    made = Residency(LAYERS, KERNELS, wanted, MemoryStore(), budget, 3, telemetry)
    yield made
    made.close()


def use(residency: Residency, telemetry: Telemetry, layer: int, expert: int, n: int) -> None:
    """So many tokens use an expert, and nobody another one."""
    residency.table.uses[layer, expert] += n
    telemetry.values[:, Counter.TOKENS] += n


def test_uses_are_hot_before_and_after_they_are_learned(residency: Residency, telemetry: Telemetry) -> None:
    learner = Learner(SOURCE, residency, telemetry, None)
    use(residency, telemetry, 1, 4, 10)
    assert learner.heat(1)[4] == 10
    learner.learn()
    assert learner.fresh(1).sum() == 0
    assert 0 < learner.heat(1)[4] <= 10
    assert learner.profile.ranking()[0] == (1, 4)
    known = learner.heat(1)[4]
    learner.learn()
    assert learner.heat(1)[4] == known


def test_uses_from_before_are_not_the_learners(residency: Residency, telemetry: Telemetry) -> None:
    use(residency, telemetry, 0, 2, 5)
    assert Learner(SOURCE, residency, telemetry, None).heat(0)[2] == 0


def test_what_was_learned_is_saved_and_found_again(residency: Residency, telemetry: Telemetry, tmp_path: Path) -> None:
    learner = Learner(SOURCE, residency, telemetry, tmp_path)
    use(residency, telemetry, 2, 7, 20)
    learner.close()
    again = Learner(SOURCE, residency, telemetry, tmp_path)
    assert again.profile.ranking()[0] == (2, 7)
    assert again.heat(2)[7] == pytest.approx(learner.heat(2)[7])


def test_nothing_is_saved_where_nothing_was_used(residency: Residency, telemetry: Telemetry, tmp_path: Path) -> None:
    Learner(SOURCE, residency, telemetry, tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_the_hottest_are_kept_once_enough_tokens_were_seen(residency: Residency, telemetry: Telemetry) -> None:
    learner = Learner(SOURCE, residency, telemetry, None)
    use(residency, telemetry, 0, 3, PROFILE_MIN_TOKENS // 2)
    learner.learn()
    assert learner.keep_hottest() == 0
    use(residency, telemetry, 0, 3, PROFILE_MIN_TOKENS)
    learner.learn()
    assert learner.keep_hottest() == int(residency.n_slots * PINNED_SHARE) == 1
    everyone = [(layer, expert) for layer in LAYERS for expert in range(N_EXPERTS) if (layer, expert) != (0, 3)]
    with residency.lock:
        for layer, expert in [(0, 3), *everyone[:20]]:  # one more than there is room for
            slot = residency.reserve(layer, expert)
            assert slot is not None
            residency.read(slot)
            residency.settle()
    assert residency.is_here(0, 3), "though it was used longest ago"
    assert not residency.is_here(*everyone[0])
