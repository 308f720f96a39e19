"""Replacement policies: the rules that all share, what each is for, and the simulator that compares them."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localrun.offload.cache.profile import Key
from localrun.offload.cache.trace import TraceHeader
from tools.simulator import cache as sim
from tools.simulator.policies import POLICIES, Belady, Lfu, Lru, PinnedLru, Policy, S3Fifo
from tools.simulator.replay import Step, replay, steps_of
from tools.simulator.trace_file import Trace, TracedCall
from tools.simulator.traces import Workload, synthetic_calls

MAKERS: dict[str, Callable[[], Policy]] = {**POLICIES, "lru+pin of 5": lambda: PinnedLru((0, e) for e in range(5))}
ALWAYS = lambda key: True  # noqa: E731


def steps(*experts: int) -> list[Step]:
    return [Step(((0, expert),), 1) for expert in experts]


def zipf(n: int, seed: int, n_experts: int = 40) -> list[Step]:
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, n_experts + 1)
    return steps(*rng.choice(n_experts, n, p=weights / weights.sum()).tolist())


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=60, deadline=None)
@given(
    actions=st.lists(
        st.tuples(st.integers(0, 11), st.sampled_from(["use", "use", "use", "evict", "remove"]), st.integers(0, 11))
    )
)
def test_victims_are_resident_evictable_and_found_whenever_there_is_one(
    name: str, actions: list[tuple[int, str, int]]
) -> None:
    policy, resident = MAKERS[name](), set[Key]()
    for expert, action, excluded in actions:
        key = (0, expert)
        if action == "use":
            policy.touch(key) if key in resident else policy.insert(key)
            resident.add(key)
        elif action == "remove" and key in resident:
            policy.remove(key)
            resident.discard(key)
        elif action == "evict":
            allowed = {k for k in resident if k[1] % 3 != excluded % 3}
            victim = policy.victim(allowed.__contains__)
            assert (victim in allowed) if allowed else (victim is None)
            resident.discard(victim) if victim else None
        assert len(policy) == len(resident)
    for _ in range(len(resident)):
        victim = policy.victim(ALWAYS)
        assert victim in resident
        resident.discard(victim)
    assert policy.victim(ALWAYS) is None


def test_lru_equals_a_plain_recency_list() -> None:
    trace, order, hits = zipf(3000, 1), OrderedDict[Key, None](), 0
    for step in trace:
        (key,) = step.keys
        hits += key in order
        order[key] = None
        order.move_to_end(key)
        if len(order) > 10:
            order.popitem(last=False)
    assert replay(trace, Lru(), 10).hits == hits


@pytest.mark.parametrize("seed", range(4))
def test_nothing_beats_belady(seed: int) -> None:
    trace = zipf(2000, seed)
    bound = replay(trace, Belady((t, key) for t, step in enumerate(trace) for key in step.keys), 8).hits
    assert bound > max(replay(trace, make(), 8).hits for make in MAKERS.values())


def test_belady_on_the_textbook_sequence() -> None:
    # Silberschatz, Operating System Concepts: 20 references, 3 frames, 9 faults at the optimum, 12 for LRU.
    trace = steps(7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1)
    assert replay(trace, Belady((t, step.keys[0]) for t, step in enumerate(trace)), 3).misses == 9
    assert replay(trace, Lru(), 3).misses == 12


def test_pinned_experts_stay_through_a_scan_and_go_as_a_last_resort() -> None:
    policy = PinnedLru([(0, 1), (0, 2)])
    for expert in range(6):
        policy.insert((0, expert))
    victims = [policy.victim(ALWAYS) for _ in range(6)]
    assert victims == [(0, 0), (0, 3), (0, 4), (0, 5), (0, 1), (0, 2)]


def test_pinning_others_later_keeps_everything_resident() -> None:
    policy = PinnedLru([(0, 1)])
    for expert in range(4):
        policy.insert((0, expert))
    policy.pin([(0, 0), (0, 9)])
    assert [policy.victim(ALWAYS) for _ in range(4)] == [(0, 2), (0, 3), (0, 1), (0, 0)]


def test_s3fifo_keeps_what_is_used_again_through_a_long_scan() -> None:
    hot = list(range(5))
    trace = steps(*[e for e in hot for _ in range(3)], *range(100, 160), *hot)
    assert replay(trace, S3Fifo(), 20).hits - replay(trace, Lru(), 20).hits == 5


def test_lfu_keeps_the_frequent_and_forgets_the_formerly_frequent() -> None:
    old, new = steps(*[1, 2, 3] * 40), steps(*[4, 5, 6] * 400)
    scan = steps(*range(10, 16))
    assert replay(old + scan + steps(1, 2, 3), Lfu(), 4).misses == 3 + 6
    policy = Lfu(halve_after=2)
    replay(old + new, policy, 4)
    assert [policy.victim(ALWAYS) for _ in range(4)] == [(0, 3), (0, 4), (0, 5), (0, 6)]


def test_batch_that_does_not_fit_goes_through_in_waves() -> None:
    call = Step(tuple((0, e) for e in range(10)), 64)
    for make in MAKERS.values():
        outcome = replay([call, call], make(), 4)
        assert outcome.misses <= 20
        assert outcome.n_tokens == 128


def test_cold_newcomers_go_before_everything_that_was_used() -> None:
    for policy in (Lru(), PinnedLru([(0, 7)])):
        policy.insert((0, 1))
        policy.insert((0, 2))
        policy.insert((0, 3), cold=True)
        policy.insert((0, 7), cold=True)
        order = [policy.victim(ALWAYS) for _ in range(4)]
        assert order.index((0, 3)) < order.index((0, 1)) < order.index((0, 2))


def test_prompt_does_not_displace_what_answers_use_when_only_its_tail_counts() -> None:
    answer = [TracedCall(0, np.array([[e % 8]], np.int32)) for e in range(80)]
    prompt = TracedCall(0, np.array([[10 + e] for e in range(50)] + [[e % 8] for e in range(16)], np.int32))
    played = steps_of([*answer, prompt, *answer[:8]])
    outcomes = [replay(played, Lru(), 12, warm_up=81, tail=tail) for tail in (False, True)]
    assert [outcome.misses for outcome in outcomes] == [8, 0]


# --- the simulator's own parts ---


def test_synthetic_flash_has_the_published_hit_rates() -> None:
    calls = synthetic_calls(Workload(2, 256, 6, 900), seed=1)
    header = TraceHeader("x", {0: (256, 6), 1: (256, 6)}, 0.0)
    rows = sim.study(calls, header, [sim.LRU_PER_LAYER], [0.10, 0.15, 0.25, 0.30], warm_up=0.3)
    np.testing.assert_allclose([row.hit_rate for row in rows], [0.58, 0.68, 0.77, 0.80], atol=0.025)


def test_profile_learned_in_the_warm_up_helps_its_pinned_set() -> None:
    # Alternating between a few favourites and long scans is what a pinned set is for.
    rng = np.random.default_rng(0)
    calls = [TracedCall(0, np.array([[int(rng.integers(0, 6)), 10 + i % 50]], np.int32)) for i in range(2000)]
    header = TraceHeader("x", {0: (64, 2)}, 0.0)
    lru, pinned = sim.study(calls, header, ["lru", "lru+pin"], [0.125], warm_up=0.3, pin_share=0.75)
    assert pinned.hit_rate > lru.hit_rate + 0.1


def test_engines_own_slot_table_hits_what_the_simulated_policy_hits() -> None:
    calls = synthetic_calls(Workload(3, 32, 4, n_tokens=200, topic_tokens=100, prompt_tokens=40), seed=2)
    header = TraceHeader("x", dict.fromkeys(range(3), (32, 4)), 0.0)
    table, expected, lru = sim.study(calls, header, [sim.ENGINE, "frequencies", "lru"], [0.3], warm_up=0.2)
    assert table.hit_rate == pytest.approx(expected.hit_rate, abs=0.02)  # order within a call differs
    assert table.hit_rate > lru.hit_rate
    assert table.n_slots == lru.n_slots


def test_prompts_and_topics_make_batches_of_the_right_size() -> None:
    work = Workload(2, 16, 2, n_tokens=100, topic_tokens=50, prompt_tokens=30, chunk=20)
    calls = synthetic_calls(work, seed=0)
    assert [len(call.ids) for call in calls if call.layer == 0] == [20, 10, *[1] * 20] * 2
    assert all(len(set(row)) == 2 for call in calls for row in call.ids.tolist())


def test_command_writes_table_json_and_a_trace_that_gives_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--budgets", "0.2,0.4", "--policies", "lru,belady", "--warm-up", "0.25"]
    trace, first, second = tmp_path / "t", tmp_path / "1.json", tmp_path / "2.json"
    synthetic = ["--layers", "1", "--tokens", "80", "--save", str(trace), "--drive-rate", "1GB/s"]
    assert sim.main([*synthetic, *options, "--json", str(first)]) == 0
    assert "belady" in capsys.readouterr().out
    assert len(list(Trace(trace))) == 80
    assert sim.main([str(trace), *options, "--json", str(second)]) == 0
    rows = [json.loads(path.read_text())["rows"] for path in (first, second)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4


def test_command_reports_a_file_that_is_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_bytes(b"something else")
    assert sim.main([str(tmp_path / "x")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
