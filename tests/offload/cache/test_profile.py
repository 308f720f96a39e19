"""The routing profile: what it ranks, how it forgets, and that no file can hurt it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from localrun.offload.cache.profile import RoutingProfile, profile_path

SHAPES = {3: 8, 4: 8, 7: 16}


def use(profile: RoutingProfile, layer: int, *experts: int, n_tokens: int = 1) -> None:
    distinct, counts = np.unique(np.array(experts, np.int32), return_counts=True)
    profile.record(layer, distinct, np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), n_tokens)


def learned() -> RoutingProfile:
    profile = RoutingProfile("id", SHAPES)
    for _ in range(3):
        use(profile, 3, 1, 2)
        use(profile, 7, 15, 0)
    use(profile, 3, 1, 5)
    use(profile, 4, 0, 1)
    return profile


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALRUN_CACHE_DIR", str(tmp_path))


def test_ranking_is_by_use_and_then_by_recency() -> None:
    profile = learned()
    assert profile.hottest(4)[0] == (3, 1)
    assert set(profile.hottest(4)) == {(3, 1), (3, 2), (7, 15), (7, 0)}
    assert profile.ranking()[4:] == [(3, 5), (4, 0), (4, 1)]  # never used experts are not listed
    use(profile, 4, 1)
    assert profile.ranking()[4] == (4, 1)


def test_pairs_of_a_batch_all_count() -> None:
    profile = RoutingProfile("id", SHAPES)
    use(profile, 3, *[1] * 5, *[2] * 9, n_tokens=7)
    np.testing.assert_array_equal(np.rint(profile.counts(3)), [0, 5, 9, 0, 0, 0, 0, 0])
    assert profile.clock == 7
    assert profile.share([(3, 2)]) == pytest.approx(9 / 14)


def test_a_use_counts_half_after_the_half_life() -> None:
    profile = RoutingProfile("id", SHAPES, half_life=100)
    use(profile, 3, 1)
    before = profile.counts(3)[1]
    use(profile, 3, 2, n_tokens=100)
    assert profile.counts(3)[1] == pytest.approx(before / 2)


def test_ratios_survive_a_million_tokens_of_growing_weights() -> None:
    profile = RoutingProfile("id", SHAPES, half_life=100)
    for _ in range(500):
        use(profile, 3, 1, 1, 2, n_tokens=2000)
    counts = profile.counts(3)
    assert np.isfinite(counts).all()
    assert counts[1] == pytest.approx(2 * counts[2])


def test_second_start_knows_what_the_first_one_learned() -> None:
    first = learned()
    first.save()
    second = RoutingProfile.load("id", SHAPES)
    assert second.ranking() == first.ranking()
    assert second.clock == first.clock
    np.testing.assert_allclose(second.counts(7), first.counts(7), rtol=1e-6)
    use(second, 4, 3, 3, 3, 3, 3, 3)
    assert second.hottest(1) == [(4, 3)]


def test_nothing_saved_is_an_empty_profile_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    profile = RoutingProfile.load("id", SHAPES)
    assert profile.is_empty
    assert profile.ranking() == []
    assert profile.share([(3, 1)]) == 0.0
    assert not caplog.records


def test_profile_of_other_weights_or_shapes_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    learned().save(profile_path("other"))
    learned().save()
    assert RoutingProfile.load("other", SHAPES).is_empty
    assert RoutingProfile.load("id", {**SHAPES, 4: 9}).is_empty
    assert caplog.text.count("another model") == 2


def test_every_damaged_byte_and_every_cut_gives_an_empty_profile(caplog: pytest.LogCaptureFixture) -> None:
    learned().save()
    path = profile_path("id")
    good = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        for at in range(0, len(good), 3):
            path.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
            assert RoutingProfile.load("id", SHAPES).is_empty
            path.write_bytes(good[:at])
            assert RoutingProfile.load("id", SHAPES).is_empty
    assert str(path) in caplog.text


def test_unwritable_cache_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOCALRUN_CACHE_DIR", str(tmp_path / "file"))
    learned().save()
    assert "could not save" in caplog.text
    assert RoutingProfile.load("id", SHAPES).is_empty


def test_saving_leaves_one_file() -> None:
    for _ in range(3):
        learned().save()
    assert [path.name for path in profile_path("id").parent.iterdir()] == ["id.profile"]


def test_model_without_experts_has_an_empty_profile() -> None:
    profile = RoutingProfile("id", {})
    assert profile.ranking() == []
    profile.save()
    assert RoutingProfile.load("id", {}).ranking() == []


def test_counts_of_a_calibration_start_an_empty_profile_and_one_s_own_use_outweighs_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counts = {"3": [0, 9, 0, 0, 0, 0, 0, 1], "4": [0] * 8, "7": [2] * 16}
    profile = RoutingProfile("id", SHAPES)
    profile.seed(counts, 5000)
    assert profile.hottest(1) == [(3, 1)]
    assert len(profile.ranking()) == 18
    assert not profile.is_empty
    use(profile, 4, *[5] * 20)
    assert profile.hottest(2) == [(4, 5), (3, 1)]
    assert not caplog.records
    for damaged in (
        {**counts, "3": [1]},
        {"3": counts["3"]},
        {**counts, "4": ["many"] * 8},
        {**counts, "7": [-1] * 16},
    ):
        other = RoutingProfile("id", SHAPES)
        other.seed(damaged, 5000)
        assert other.is_empty
        assert other.ranking() == []
    other.seed(counts, "5000")
    assert other.is_empty
    assert caplog.text.count("ignoring the routing counts in the model's manifest") == 5
