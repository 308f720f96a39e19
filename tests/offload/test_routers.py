"""Routers for looking ahead: an int8 copy ranks as the exact matrix does, whatever the numbers are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from localrun.offload.routers import Router

SOFTMAX, SIGMOID, SQRT_SOFTPLUS = 1, 2, 4
N_EXPERTS, N_EMBD, N_USED = 64, 320, 6

F32 = npt.NDArray[np.float32]


def router(matrix: F32, bias: F32 | None = None, gating: int = SQRT_SOFTPLUS, *, bf16: bool = False) -> Router:
    words = np.ascontiguousarray(matrix, np.float32).view(np.uint32)
    words = (words >> np.uint32(16)).astype(np.uint16) if bf16 else words
    return Router(words, np.zeros(len(matrix), np.float32) if bias is None else bias, gating)


def exact(of: Router, x: F32, n: int = N_USED) -> list[int]:
    return [int(e) for e in np.argsort(-of.scores(x), kind="stable")[:n]]


def guessed(of: Router, x: F32, n: int = N_USED) -> list[int]:
    return [int(e) for e in of.largest(x, n)]


def random(seed: int, *shape: int) -> F32:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("gating", [SOFTMAX, SIGMOID, SQRT_SOFTPLUS])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_copy_finds_nearly_the_experts_of_the_exact_matrix(gating: int, bf16: bool) -> None:
    of = router(0.05 * random(1, N_EXPERTS, N_EMBD), 0.02 * random(2, N_EXPERTS), gating, bf16=bf16)
    found = sum(len({*exact(of, x)} & {*guessed(of, x)}) for x in random(3, 200, N_EMBD))
    assert found >= 0.98 * 200 * N_USED


def test_a_large_value_of_an_input_leaves_the_others_their_weight() -> None:
    of, inputs = router(random(1, N_EXPERTS, N_EMBD)), random(3, 200, N_EMBD)
    inputs[:, 7] *= 200
    found = sum(len({*exact(of, x)} & {*guessed(of, x)}) for x in inputs)
    assert found >= 0.98 * 200 * N_USED


def test_experts_far_enough_apart_are_ranked_exactly() -> None:
    x, order = random(4, N_EMBD), np.random.default_rng(5).permutation(N_EXPERTS)
    rows = np.outer(1 + order, x) * np.float32(1e-4)
    for gating in (SOFTMAX, SIGMOID, SQRT_SOFTPLUS):
        of = router(rows, gating=gating)
        assert guessed(of, x) == exact(of, x) == np.argsort(-order)[:N_USED].tolist()


def test_the_bias_counts_in_full() -> None:
    bias = np.zeros(N_EXPERTS, np.float32)
    bias[[9, 3, 30]] = 50, 40, 30
    of = router(0.01 * random(1, N_EXPERTS, N_EMBD), bias)
    assert guessed(of, random(2, N_EMBD), 3) == [9, 3, 30]


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-3, 1e3, 1e30])
@pytest.mark.parametrize("of_input", [False, True])
def test_the_size_of_all_numbers_changes_no_order(size: float, of_input: bool) -> None:
    rows, x = random(1, N_EXPERTS, N_EMBD), random(2, N_EMBD)
    scaled = np.float32(size)
    of = router(rows if of_input else rows * scaled, gating=SQRT_SOFTPLUS)
    best = guessed(of, x * scaled if of_input else x)
    assert len(set(best)) == N_USED
    if size >= 1e-3:  # below, softplus(x) is ln 2 for all of them as F32
        assert best[0] == int(np.argmax(rows @ x))


def test_sums_of_the_largest_products_do_not_overflow() -> None:
    width = 16384
    rows = np.ones((4, width), np.float32) * np.array([[1], [-1], [0.5], [-0.5]], np.float32)
    of = router(rows)
    assert guessed(of, np.full(width, 3, np.float32), 4)[:2] == [0, 2]
    assert guessed(of, np.full(width, -3, np.float32), 4)[:2] == [1, 3]


def test_zero_rows_and_zero_inputs_are_ranked_by_their_bias() -> None:
    bias = np.linspace(0, 1, N_EXPERTS, dtype=np.float32)
    best = np.arange(N_EXPERTS)[::-1][:N_USED].tolist()
    assert guessed(router(np.zeros((N_EXPERTS, N_EMBD), np.float32), bias), random(1, N_EMBD)) == best
    assert guessed(router(random(1, N_EXPERTS, N_EMBD), bias), np.zeros(N_EMBD, np.float32)) == best
    rows = -np.ones((N_EXPERTS, N_EMBD), np.float32)
    rows[5] = 0
    assert guessed(router(rows), np.ones(N_EMBD, np.float32))[0] == 5


@pytest.mark.parametrize("gating", [SOFTMAX, SIGMOID, SQRT_SOFTPLUS])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_never_guessed(value: float, gating: int) -> None:
    rows, x = random(1, N_EXPERTS, N_EMBD), random(2, N_EMBD)
    rows[[3, 8], [0, 5]] = value
    of = router(rows, gating=gating)
    all_others = guessed(of, x, N_EXPERTS)
    assert sorted(all_others) == [e for e in range(N_EXPERTS) if e not in (3, 8)]
    x[4] = value
    assert guessed(of, x) == []


def test_as_many_as_there_are_at_most() -> None:
    of = router(random(1, 4, N_EMBD))
    assert sorted(guessed(of, random(2, N_EMBD), 9)) == [0, 1, 2, 3]
