"""Precision of the dense matrices, together with the experts': the mix with the least divergence for its time on a box.

Memory that the dense model does not take is the experts', and bytes that every token reads are time. No amount of error is worth a
second by itself, so what counts is relative: a mix is better if it takes less time in proportion than it diverges more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gguf import GGMLQuantizationType

from localrun.engine.planner.token_time import TokenTime
from localrun.errors import UsageError
from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.checkpoint.exact import ExactMatrices
from localrun.quant.gguf.file import tensor_bytes
from localrun.quant.model.shape import shape_of
from localrun.quant.model.source import ModelSource
from localrun.quant.precision.dense import EMBEDDING, DenseErrors, kind_of, measure_dense
from localrun.quant.precision.dense_solver import EXPERTS_SENSITIVITY, DenseMix, dense_mixes
from localrun.quant.precision.importance import F32, Importance
from localrun.quant.precision.solver import ExpertCosts, PrecisionSolution, Target, solve_target

DIVERGENCE_FLOOR = 1e-3
"""Nats below which a difference is worth no time. [m] On the demo model the least change of any one kind of matrix costs 2e-4, by
near-ties of the router alone."""


@dataclass(frozen=True, slots=True)
class DenseChoice:
    """What was chosen for the dense matrices.

    Attributes:
        mix: their types.
        default_bytes: what they would take in the default types.
        default_token_bytes: of these, read by every token.
        token_s, default_token_s: estimates of a token's time on the target's kind of box.
    """

    mix: DenseMix
    default_bytes: int
    default_token_bytes: int
    token_s: float
    default_token_s: float


def measure(
    checkpoint: Checkpoint,
    rows: Mapping[str, F32],
    importance: Importance,
    *,
    n_threads: int,
    progress: Callable[[int, int], None],
) -> DenseErrors:
    """Errors of all matrices that have a choice."""
    matrices = ExactMatrices(checkpoint)
    names = [name for name in matrices.names if kind_of(name) is not None]
    return measure_dense(matrices, names, rows, importance, n_threads=n_threads, progress=progress)


def choose_together(
    source: ModelSource,
    errors: DenseErrors,
    target: Target,
    costs: ExpertCosts | None,
    *,
    reserve_bytes: int = 0,
) -> tuple[DenseChoice, PrecisionSolution | None]:
    """A mix for the dense matrices, and the experts' formats beside it.

    Args:
        source: the checkpoint in the default types.
        costs: of the experts; None: they stay as they are.
        reserve_bytes: of the target's memory, for the context.

    Raises:
        UsageError: not even the smallest mix leaves memory for experts.
    """
    infos = source.tensors
    time = TokenTime(shape_of(source), target)
    default = {name: infos[name].n_bytes for name in errors.relative}
    others = sum(info.n_bytes for name, info in infos.items() if "_exps." not in name and name not in default)
    kept_bytes = sum(layer.n_experts * layer.expert_bytes for layer in source.moe_layers.values())

    def size(name: str, kind: GGMLQuantizationType) -> int:
        return tensor_bytes(kind, infos[name].shape[:2])

    def seconds(n_bytes: int, token_bytes: int, solution: PrecisionSolution | None) -> float:
        return time.seconds(
            dense_bytes=others + n_bytes + reserve_bytes,
            dense_token_bytes=others + token_bytes,
            expert_bytes=kept_bytes if solution is None else solution.chosen.n_bytes,
        )

    def solved(dense_bytes: int) -> PrecisionSolution | None:
        if costs is None:
            return None
        return solve_target(costs, target, dense_bytes=others + dense_bytes, reserve_bytes=reserve_bytes)

    best: tuple[float, DenseMix, PrecisionSolution | None, float] | None = None
    problem: UsageError | None = None
    for mix in dense_mixes(errors, size):
        try:
            solution = solved(mix.n_bytes)
        except UsageError as error:
            problem = problem or error
            continue
        divergence = mix.divergence + (EXPERTS_SENSITIVITY * solution.chosen.error if solution is not None else 0.0)
        token_s = seconds(mix.n_bytes, mix.token_bytes, solution)
        value = math.log(divergence + DIVERGENCE_FLOOR) + math.log(token_s)
        if best is None or value < best[0]:
            best = value, mix, solution, token_s
    if best is None:
        assert problem is not None
        raise problem
    _, mix, solution, token_s = best
    default_bytes = sum(default.values())
    default_token_bytes = sum(n for name, n in default.items() if kind_of(name) != EMBEDDING)
    choice = DenseChoice(
        mix, default_bytes, default_token_bytes, token_s, seconds(default_bytes, default_token_bytes, solution)
    )
    return choice, solution
