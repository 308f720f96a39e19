"""The solver against brute force, and what must hold for any input."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from localrun.errors import UsageError
from localrun.quant.model.source import MoeLayer
from localrun.quant.precision.solver import (
    ExpertCosts,
    HotBudget,
    Target,
    assign,
    check_request,
    copies_limits,
    expert_bytes,
    parse_type,
    solve_hot,
    solve_target,
    target_types,
)

TYPES = (QT.Q2_K, QT.Q3_K, QT.MXFP4)


def layer(n_experts: int, number: int = 0, n_embd: int = 256) -> MoeLayer:
    return MoeLayer(number, n_experts, n_embd, 256, (QT.MXFP4,) * 3, 0)


def costs(rng: np.random.Generator, n_experts: int, n_layers: int = 1) -> ExpertCosts:
    layers = {i: layer(n_experts, i) for i in range(n_layers)}
    weights = {i: rng.dirichlet(np.full(n_experts, 0.5)) for i in layers}
    errors = {QT.Q2_K: rng.uniform(0.05, 0.2, n_experts), QT.Q3_K: rng.uniform(0.01, 0.06, n_experts)}
    errors[QT.MXFP4] = np.zeros(n_experts)
    return ExpertCosts.build(layers, TYPES, weights.__getitem__, lambda _, kind: errors[kind])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 3))
def test_assignment_is_as_good_as_the_best_of_all(seed: int, n: int, n_types: int) -> None:
    rng = np.random.default_rng(seed)
    gains = np.round(rng.normal(0.3, 1, (n, n_types)), 1)
    capacities = rng.integers(0, 3, n_types).tolist()
    chosen = assign(gains, capacities)
    best = max(
        sum(gains[e, t] for e, t in enumerate(each) if t >= 0)
        for each in itertools.product(range(-1, n_types), repeat=n)
        if all(each.count(t) <= capacities[t] for t in range(n_types))
    )
    assert sum(gains[e, t] for e, t in enumerate(chosen) if t >= 0) == pytest.approx(best)
    assert all((chosen == t).sum() <= capacities[t] for t in range(n_types))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
@example(2547796)  # five experts in Q3_K, where a mixture with Q2_K as its base would be better
def test_target_is_optimal_for_its_base_where_it_stops_and_never_over_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = costs(rng, 5)
    least, most = int(table.n_bytes[:, 0].sum()), int(table.n_bytes[:, 2].sum())
    budget = int(rng.integers(least, most + 1))
    solution = solve_target(table, Target(ram_bytes=budget))
    assert solution.chosen.n_bytes <= budget
    assert solution.streamed_bytes == 0
    rows = np.arange(5)
    best = min(
        table.error[rows, list(each)].sum()
        for each in itertools.product(range(table.column(solution.base), 3), repeat=5)
        if table.n_bytes[rows, list(each)].sum() <= solution.chosen.n_bytes
    )
    assert solution.chosen.error == pytest.approx(best)
    assert all(
        solution.chosen.error <= uniform.error + 1e-12 for uniform in solution.uniform if uniform.n_bytes <= budget
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 1))
def test_more_budget_is_never_worse(seed: int, one: float, other: float) -> None:
    table = costs(np.random.default_rng(seed), 7, n_layers=2)
    least, most = int(table.n_bytes[:, 0].sum()), int(table.n_bytes[:, 2].sum())
    errors = []
    for share in sorted((one, other)):
        budget = int(least + share * (most - least))
        errors.append((
            solve_target(table, Target(ram_bytes=budget)).chosen.error,
            solve_hot(table, QT.Q2_K, [HotBudget(QT.MXFP4, int(share * most)), HotBudget(QT.Q3_K, 300_000)]).chosen.error,
        ))  # fmt: skip
    for small, large in zip(*errors, strict=True):
        assert large <= small + 1e-12


def test_hot_copies_go_where_use_times_error_is_largest() -> None:
    moe = {0: layer(4), 5: layer(4, 5)}
    weights = {0: np.array([0.7, 0.1, 0.1, 0.1]), 5: np.array([0.3, 0.3, 0.2, 0.2])}
    error = {QT.Q2_K: np.array([0.1, 0.1, 0.5, 0.1]), QT.MXFP4: np.zeros(4)}
    table = ExpertCosts.build(moe, (QT.Q2_K, QT.MXFP4), weights.__getitem__, lambda _, kind: error[kind])
    one = expert_bytes(moe[0], QT.MXFP4)
    solution = solve_hot(table, QT.Q2_K, [HotBudget(QT.MXFP4, 3 * one + one // 2)])
    assert solution.plan.formats == {0: {0: QT.MXFP4, 2: QT.MXFP4}, 5: {2: QT.MXFP4}}
    assert solution.overlay_bytes == 3 * one
    assert solution.chosen.error == pytest.approx((0.1 * 0.2 + 0.1 * 0.8) / 2)
    assert [p.label for p in solution.uniform] == ["q2_k", "mxfp4"]
    assert [p.error for p in solution.curve] == sorted((p.error for p in solution.curve), reverse=True)


def test_target_streams_what_does_not_fit_and_takes_the_exact_format_where_all_fits() -> None:
    table = costs(np.random.default_rng(1), 6)
    q2, exact = (int(table.n_bytes[:, table.column(kind)].sum()) for kind in (QT.Q2_K, QT.MXFP4))
    small = solve_target(table, Target(ram_bytes=q2 // 2))
    assert (small.base, small.plan.n_experts, small.streamed_bytes) == (QT.Q2_K, 0, q2 - q2 // 2)
    large = solve_target(table, Target(vram_bytes=exact, ram_bytes=1))
    assert (large.base, large.plan.n_experts, large.chosen.error) == (QT.MXFP4, 0, 0)
    with pytest.raises(UsageError, match="less than the dense model"):
        solve_target(table, Target(ram_bytes=q2), dense_bytes=q2)


def test_formats_follow_the_device() -> None:
    moe = {0: layer(4)}
    assert QT.IQ3_XXS in target_types(moe, Target(vram_bytes=1))
    grids = [kind for kind in target_types(moe, Target(vram_bytes=1, ram_bytes=1)) if kind.name.startswith("IQ")]
    assert grids == [QT.IQ2_XXS]  # what a CPU multiplies fast enough
    assert QT.Q8_0 not in target_types(moe, Target(ram_bytes=1), [QT.MXFP4])
    assert target_types({0: layer(4, n_embd=96)}, Target(ram_bytes=1)) == (QT.MXFP4, QT.Q8_0)


@pytest.mark.parametrize(
    ("base", "hot", "message"),
    [
        ("q9_k", [], "unknown expert format 'q9_k'"),
        ("q2_k", ["mxfp4"], "is not TYPE:SIZE"),
        ("q2_k", ["mxfp4:12parsec"], "is not a size"),
        ("q2_k", ["mxfp4:1KiB"], "too little: one expert takes"),
        ("q4_k", ["mxfp4:1GiB"], "no better"),
        ("q2_k", ["mxfp4:1GiB", "mxfp4:2GiB"], "given twice"),
    ],
)
def test_impossible_requests_are_refused(base: str, hot: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_request({0: layer(4)}, parse_type(base), [HotBudget.parse(text) for text in hot])


def test_rows_that_a_format_cannot_hold_are_refused() -> None:
    with pytest.raises(UsageError, match="rows of 96 values: its blocks have 256"):
        check_request({0: layer(4, n_embd=96)}, QT.Q2_K, [])


@pytest.mark.parametrize("text", ["", "24GiB", "24GiB-disk", "1GiB-ram,2GiB-ram", "0-ram"])
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        Target.parse(text)
    assert Target.parse("24GiB-vram, 64GiB-ram") == Target(24 << 30, 64 << 30)


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from([256, 512, 1024])), min_size=1, max_size=3), st.data())
def test_no_choice_of_copies_is_beyond_their_limits(shapes: list[tuple[int, int]], data: st.DataObject) -> None:
    layers = {i: layer(count, i, n_embd) for i, (count, n_embd) in enumerate(shapes)}
    sizes = [expert_bytes(layers[i], QT.Q2_K) for i, (count, _) in enumerate(shapes) for _ in range(count)]
    n_bytes = data.draw(st.integers(0, sum(sizes) + 1000))
    (limit,) = copies_limits(layers, [HotBudget(QT.Q2_K, n_bytes)])
    chosen = [c for n in range(len(sizes) + 1) for c in itertools.combinations(sizes, n) if sum(c) <= n_bytes]
    assert limit.n_copies == max(map(len, chosen))
    assert limit.n_bytes >= max(map(sum, chosen))
    assert limit.n_bytes <= n_bytes
    if len(set(sizes)) == 1:
        assert limit.n_bytes == max(map(sum, chosen))
