"""Assigns precisions to experts within byte budgets, minimizing the expected error. Pure arithmetic.

Expected error: per layer, the sum over experts of (share of the layer's routed power) * (squared error of the expert's output,
relative to the layer's mean output power), then the mean over layers. 0 is exact, 1 is as wrong as omitting the experts.

It solves two problems. *Base and hot budgets*: every expert has the base's format, and each hot format has bytes for better
copies; this is an assignment problem with capacities, solved exactly by augmenting paths (there are few formats, so paths are
short). *Target*: a memory budget for the copies used; per base format a multiple-choice knapsack, solved greedily along each
expert's lower convex hull, which is optimal for every budget where it stops and at most one upgrade short in between. Ties go
to the lower layer and expert, so equal input gives equal output, and a larger budget never a larger error.

No expert is ever dropped: one without a better copy is in the base.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from localrun.errors import UsageError
from localrun.quant.model.source import MoeLayer
from localrun.quant.precision.copies import EXPERT_TYPES, BetterCopies
from localrun.units import format_size, parse_size

F64 = npt.NDArray[np.float64]
Key = tuple[int, int]
_T = GGMLQuantizationType

CPU_TYPES: tuple[GGMLQuantizationType, ...] = (_T.IQ2_XXS, _T.Q2_K, _T.Q3_K, _T.MXFP4, _T.Q4_K, _T.Q8_0)
"""Formats that a CPU multiplies at memory speed, given enough cores (docs/quantization.md, "Kernels")."""
GPU_TYPES: tuple[GGMLQuantizationType, ...] = (_T.IQ3_XXS, *CPU_TYPES)
"""Formats where nothing but a GPU computes."""


# --- what users write -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HotBudget:
    """Bytes for copies in one format: `mxfp4:12GiB`.

    Attributes:
        smaller: copies for the experts that matter least, in a format smaller than the base's; otherwise better ones for those that
            matter most.
    """

    type: GGMLQuantizationType
    n_bytes: int
    smaller: bool = False

    @classmethod
    def parse(cls, text: str, *, smaller: bool = False) -> HotBudget:
        """Raises UsageError: not TYPE:SIZE, an unknown type."""
        name, colon, size = text.partition(":")
        if not colon:
            example = "--cold q2_k:20GiB" if smaller else "--hot mxfp4:12GiB"
            raise UsageError(f"'{text}' is not TYPE:SIZE", hint=f"for example {example}")
        return cls(parse_type(name), parse_size(size), smaller)

    @property
    def option(self) -> str:
        """How the user asks for it."""
        return f"--{'cold' if self.smaller else 'hot'} {self.type.name.lower()}"


@dataclass(frozen=True, slots=True)
class Target:
    """Memory of the box that the model is for: `24GiB-vram,64GiB-ram`; 0: none of that kind."""

    vram_bytes: int = 0
    ram_bytes: int = 0

    @classmethod
    def parse(cls, text: str) -> Target:
        """Raises UsageError: not SIZE-vram and SIZE-ram, each once."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            match = re.fullmatch(r"\s*(.+?)-(vram|ram)\s*", part)
            if match is None or match[2] in sizes:
                raise UsageError(f"'{text}' is not a target", hint="for example --target 24GiB-vram,64GiB-ram")
            sizes[match[2]] = parse_size(match[1])
        if not any(sizes.values()):
            raise UsageError(f"target '{text}' has no memory", hint="for example --target 24GiB-vram,64GiB-ram")
        return cls(sizes.get("vram", 0), sizes.get("ram", 0))


def parse_type(name: str) -> GGMLQuantizationType:
    """An expert format by name. Raises UsageError naming the known ones."""
    kind = EXPERT_TYPES.get(name.strip().lower())
    if kind is None:
        raise UsageError(f"unknown expert format '{name}'", hint=f"known formats: {', '.join(EXPERT_TYPES)}")
    return kind


def bits_per_weight(kind: GGMLQuantizationType) -> float:
    """Size of a format."""
    block, n_bytes = GGML_QUANT_SIZES[kind]
    return float(8 * n_bytes / block)


def expert_bytes(moe: MoeLayer, kind: GGMLQuantizationType) -> int:
    """Bytes of one expert of a layer in a format.

    Raises:
        UsageError: the format can't hold the layer's rows.
    """
    block, n_bytes = GGML_QUANT_SIZES[kind]
    for row in (moe.n_embd, moe.n_ff):
        if row % block:
            raise UsageError(
                f"{kind.name.lower()} can't hold layer {moe.layer}'s expert rows of {row} values: its blocks have {block}",
                hint="choose mxfp4 or q8_0, which have blocks of 32",
            )
    return int(3 * moe.n_embd * moe.n_ff // block * n_bytes)


def check_request(
    moe_layers: Mapping[int, MoeLayer],
    base: GGMLQuantizationType,
    hot: Sequence[HotBudget],
    target: Target | None = None,
) -> None:
    """Checks a request before any error is measured.

    Raises:
        UsageError: a format that does not fit the rows, is repeated, or is no better (or no smaller) than the base; a budget too
            small for one expert.
    """
    if target is not None and hot:
        raise UsageError("--target and --hot can't be combined", hint="set budgets with --hot, or let --target choose")
    for moe in moe_layers.values():
        expert_bytes(moe, base)
    seen: set[GGMLQuantizationType] = set()
    for budget in hot:
        option = budget.option
        if budget.type in seen:
            raise UsageError(f"{option} is given twice", hint="add up the sizes")
        seen.add(budget.type)
        bits, base_bits = bits_per_weight(budget.type), bits_per_weight(base)
        has = f"{option} has {bits:g} bits per weight, the base {base.name.lower()} {base_bits:g}"
        if budget.smaller and bits >= base_bits:
            raise UsageError(f"{has}: copies would be no smaller", hint="use a cold format with fewer bits")
        if not budget.smaller and bits <= base_bits:
            raise UsageError(
                f"{has}: copies would be no better",
                hint="use a hot format with more bits, or a smaller base; --cold makes smaller copies",
            )
        least = min(expert_bytes(moe, budget.type) for moe in moe_layers.values())
        if budget.n_bytes < least:
            raise UsageError(
                f"{option}:{format_size(budget.n_bytes)} is too little: one expert takes {format_size(least)}",
                hint=f"increase it, or leave out {option.partition(' ')[0]}",
            )


@dataclass(frozen=True, slots=True)
class CopiesLimit:
    """What a budget allows: fewer copies are made only where more would gain nothing.

    Attributes:
        n_copies: at most, of one expert each: those of the smallest, where layers differ.
        n_experts: that the model has.
        copy_bytes: of the largest copy.
        n_bytes: of all copies at most, however they are chosen.
    """

    budget: HotBudget
    n_copies: int
    n_experts: int
    copy_bytes: int
    n_bytes: int


def copies_limits(moe_layers: Mapping[int, MoeLayer], hot: Sequence[HotBudget]) -> tuple[CopiesLimit, ...]:
    """What an overlay holds and takes on the drive at most: each budget, or a copy of every expert if that is less."""
    limits = []
    n_experts = sum(moe.n_experts for moe in moe_layers.values())
    for budget in hot:
        sizes = sorted((expert_bytes(moe, budget.type), moe.n_experts) for moe in moe_layers.values())
        n_copies, left = 0, budget.n_bytes
        for size, count in sizes:
            n_copies += (n := min(left // size, count))
            left -= n * size
        largest, of_all = sizes[-1][0], sum(size * count for size, count in sizes)
        n_bytes = min(budget.n_bytes, n_copies * largest, of_all)
        limits.append(CopiesLimit(budget, n_copies, n_experts, largest, n_bytes))
    return tuple(limits)


# --- costs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExpertCosts:
    """Error and size of every expert in every format. Rows in ascending order of (layer, expert).

    Attributes:
        keys: (N,) layer and expert.
        types: (T,) formats, columns of the arrays.
        error: (N, T) share of the expected error that the expert in the format has: weight * relative error.
        n_bytes: (N, T) sizes.
    """

    keys: tuple[Key, ...]
    types: tuple[GGMLQuantizationType, ...]
    error: F64
    n_bytes: npt.NDArray[np.int64]

    @classmethod
    def build(
        cls,
        moe_layers: Mapping[int, MoeLayer],
        types: Iterable[GGMLQuantizationType],
        route_weights: Callable[[int], F64],
        errors: Callable[[int, GGMLQuantizationType], F64],
        layer_weights: Mapping[int, float] | None = None,
    ) -> ExpertCosts:
        """From a layer's route weights (E,), summing to 1, and its relative errors (E,) in a format.

        Args:
            layer_weights: weight of an error in each layer, 1 on average; None: uniform.
        """
        kinds = tuple(types)
        keys: list[Key] = []
        error, sizes = [], []
        for layer, moe in sorted(moe_layers.items()):
            keys += [(layer, expert) for expert in range(moe.n_experts)]
            weights = route_weights(layer) * ((layer_weights or {}).get(layer, 1.0) / len(moe_layers))
            error.append(np.stack([weights * errors(layer, kind) for kind in kinds], 1))
            sizes.append(np.tile([expert_bytes(moe, kind) for kind in kinds], (moe.n_experts, 1)))
        return cls(tuple(keys), kinds, np.concatenate(error), np.concatenate(sizes).astype(np.int64))

    def column(self, kind: GGMLQuantizationType) -> int:
        """Index of a format in `types`."""
        return self.types.index(kind)

    def uniform(self, kind: GGMLQuantizationType) -> CurvePoint:
        """All experts in one format."""
        t = self.column(kind)
        return CurvePoint(int(self.n_bytes[:, t].sum()), float(self.error[:, t].sum()), kind.name.lower())


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Size of the copies that are used, and the expected error. `label` names a uniform format."""

    n_bytes: int
    error: float
    label: str = ""


@dataclass(frozen=True, slots=True)
class PrecisionSolution:
    """The solver's result.

    Attributes:
        base: format of the base.
        plan: better copies.
        chosen: size and error of the copies used.
        base_bytes, overlay_bytes: sizes on the drive.
        streamed_bytes: copies that don't fit in a target's memory and are read on demand; 0 without a target.
        curve: best mix over this base by size, in ascending order of size.
        uniform: all experts in one format, for comparison.
    """

    base: GGMLQuantizationType
    plan: BetterCopies
    chosen: CurvePoint
    base_bytes: int
    overlay_bytes: int
    streamed_bytes: int
    curve: tuple[CurvePoint, ...]
    uniform: tuple[CurvePoint, ...]


# --- base and hot budgets ---------------------------------------------------------------------------------------------


def solve_hot(costs: ExpertCosts, base: GGMLQuantizationType, hot: Sequence[HotBudget]) -> PrecisionSolution:
    """Copies within a budget per format: better ones where they gain most, and as many smaller ones as their budget allows, where
    they lose least.

    If layers differ in shape, a budget is counted in experts of its largest layer, so it is never exceeded.
    """
    columns = [costs.column(budget.type) for budget in hot]
    b = costs.column(base)
    gains = costs.error[:, [b]] - costs.error[:, columns]
    # A smaller copy is worth its error in any case: more than all others could gain or lose.
    gains[:, [budget.smaller for budget in hot]] += 1 + np.abs(gains).max()
    capacities = [int(budget.n_bytes // costs.n_bytes[:, t].max()) for budget, t in zip(hot, columns, strict=True)]
    chosen = assign(gains, capacities)
    column_of = np.array([*columns, b])  # -1 is the base
    return _solution(costs, base, column_of[chosen])


def assign(gains: F64, capacities: Sequence[int]) -> npt.NDArray[np.int64]:
    """Gives each expert at most one of T formats, at most `capacities[t]` each, maximizing the sum of gains.

    Min-cost flow by successive paths: an expert enters a format; a full format passes one of its experts to the next. With T
    formats a path has at most T steps, and heaps hold the best candidate for every step.

    Args:
        gains: (N, T); gains that are not positive are ignored.

    Returns:
        (N,) format of each expert, -1 for none.
    """
    n, n_types = gains.shape
    chosen = np.full(n, -1, np.int64)
    free = list(capacities)
    # source[t]: unassigned experts; moves[t, u]: experts in t that could go to u. Outdated entries are dropped when met.
    source = [[(-gains[e, t], e) for e in range(n)] for t in range(n_types)]
    moves: dict[tuple[int, int], list[tuple[float, int]]] = {p: [] for p in itertools.permutations(range(n_types), 2)}
    for heap in source:
        heapq.heapify(heap)
    paths = [path for k in range(1, n_types + 1) for path in itertools.permutations(range(n_types), k)]

    def top(heap: list[tuple[float, int]], at: int) -> tuple[float, int] | None:
        while heap and chosen[heap[0][1]] != at:
            heapq.heappop(heap)
        return heap[0] if heap else None

    while any(free):
        best: tuple[float, tuple[int, ...]] | None = None
        for path in paths:
            if not free[path[-1]]:
                continue
            steps = [top(source[path[0]], -1), *(top(moves[a, c], a) for a, c in itertools.pairwise(path))]
            cost = sum((step[0] for step in steps if step is not None), 0.0)
            if None not in steps and cost < -1e-300 and (best is None or cost < best[0]):
                best = cost, path
        if best is None:
            break
        path = best[1]
        moved = [heap[0][1] for heap in (source[path[0]], *(moves[pair] for pair in itertools.pairwise(path)))]
        for expert, t in zip(moved, path, strict=True):
            chosen[expert] = t
            for u in range(n_types):
                if u != t:
                    heapq.heappush(moves[t, u], (float(gains[expert, t] - gains[expert, u]), expert))
        free[path[-1]] -= 1
    return chosen


# --- targets ----------------------------------------------------------------------------------------------------------


def solve_target(
    costs: ExpertCosts, target: Target, *, dense_bytes: int = 0, reserve_bytes: int = 0
) -> PrecisionSolution:
    """Chooses base and better copies for a machine, so that the copies used fit in its memory if possible.

    Experts that a CPU may have to compute must be in `CPU_TYPES`: with any RAM in the target that is every expert, because the
    GPU's experts change with use. If not even the smallest format fits, all experts get that and the rest is streamed.

    Args:
        costs: with the allowed formats; see `target_types`.
        dense_bytes, reserve_bytes: of the dense model and the context, which have priority.

    Raises:
        UsageError: nothing is left for experts.
    """
    budget = bytes_for_experts(target, dense_bytes + reserve_bytes)
    smallest = min(costs.types, key=bits_per_weight)
    best: PrecisionSolution | None = None
    for base in sorted(costs.types, key=bits_per_weight):
        b = costs.column(base)
        total = int(costs.n_bytes[:, b].sum())
        if total > budget and base is not smallest:
            continue
        solution = _solution(costs, base, _fill(costs, base, budget), streamed_bytes=max(0, total - budget))
        # Of equally good ones the one that takes the least room on the drive.
        rank = (solution.chosen.error, solution.base_bytes + solution.overlay_bytes)
        if best is None or rank < (best.chosen.error, best.base_bytes + best.overlay_bytes):
            best = solution
    assert best is not None
    return best


def bytes_for_experts(target: Target, others_bytes: int) -> int:
    """Memory that a target has left for experts.

    Raises:
        UsageError: nothing.
    """
    budget = target.vram_bytes + target.ram_bytes - others_bytes
    if budget <= 0:
        raise UsageError(
            f"the target's {format_size(target.vram_bytes + target.ram_bytes)} are less than the dense model and its context "
            f"take ({format_size(others_bytes)})",
            hint="use a larger target",
        )
    return budget


def target_types(
    moe_layers: Mapping[int, MoeLayer], target: Target, source_types: Iterable[GGMLQuantizationType] = ()
) -> tuple[GGMLQuantizationType, ...]:
    """Formats that a target may use: those of its devices that hold the model's rows, none larger than the source's own."""
    kinds = GPU_TYPES if target.ram_bytes == 0 else CPU_TYPES
    largest = max(map(bits_per_weight, source_types), default=np.inf)
    result = []
    for kind in kinds:
        block = GGML_QUANT_SIZES[kind][0]
        fits = all(moe.n_embd % block == 0 and moe.n_ff % block == 0 for moe in moe_layers.values())
        if fits and bits_per_weight(kind) <= largest:
            result.append(kind)
    return tuple(result)


def _upgrades(costs: ExpertCosts, base: GGMLQuantizationType) -> Iterator[tuple[float, int, int, int, float]]:
    """Steps up every expert's convex hull, best first: (change of error per byte, row, column, more bytes, less error)."""
    b = costs.column(base)
    steps = []
    for row in range(len(costs.keys)):
        at, error, size = b, costs.error[row], costs.n_bytes[row]
        while True:
            better = [t for t in range(len(costs.types)) if size[t] > size[at] and error[t] < error[at]]
            if not better:
                break
            slopes = [(error[t] - error[at]) / (size[t] - size[at]) for t in better]
            slope, _, t = min(zip(slopes, (-size[t] for t in better), better, strict=True))
            steps.append((float(slope), row, t, int(size[t] - size[at]), float(error[at] - error[t])))
            at = t
    yield from sorted(steps, key=lambda step: (step[0], step[1], step[3]))


def _fill(costs: ExpertCosts, base: GGMLQuantizationType, budget: int) -> npt.NDArray[np.int64]:
    """Columns of all experts: the base's, upgraded in order of gain per byte until the budget is used up."""
    chosen = np.full(len(costs.keys), costs.column(base), np.int64)
    used = int(costs.n_bytes[:, costs.column(base)].sum())
    for _, row, t, more, _ in _upgrades(costs, base):
        if used + more > budget:
            break  # skipping to smaller ones could make a larger budget worse
        used += more
        chosen[row] = t
    return chosen


# --- results ----------------------------------------------------------------------------------------------------------

_CURVE_POINTS = 48


def _solution(
    costs: ExpertCosts, base: GGMLQuantizationType, chosen: npt.NDArray[np.int64], *, streamed_bytes: int = 0
) -> PrecisionSolution:
    b, rows = costs.column(base), np.arange(len(costs.keys))
    formats: dict[int, dict[int, GGMLQuantizationType]] = {}
    for row in np.flatnonzero(chosen != b):
        layer, expert = costs.keys[row]
        formats.setdefault(layer, {})[expert] = costs.types[chosen[row]]
    used = costs.n_bytes[rows, chosen]
    point = CurvePoint(int(used.sum()), float(costs.error[rows, chosen].sum()), "chosen")
    return PrecisionSolution(
        base=base,
        plan=BetterCopies(formats),
        chosen=point,
        base_bytes=int(costs.n_bytes[:, b].sum()),
        overlay_bytes=int(used[chosen != b].sum()),
        streamed_bytes=streamed_bytes,
        curve=tuple(_curve(costs, base)),
        uniform=tuple(sorted((costs.uniform(kind) for kind in costs.types), key=lambda p: p.n_bytes)),
    )


def _curve(costs: ExpertCosts, base: GGMLQuantizationType) -> Iterator[CurvePoint]:
    start = costs.uniform(base)
    n_bytes, error = start.n_bytes, start.error
    steps = list(_upgrades(costs, base))
    kept = {round(i) for i in np.linspace(0, len(steps) - 1, min(_CURVE_POINTS, len(steps)))} if steps else set()
    yield CurvePoint(n_bytes, error)
    for i, (_, _, _, more, less) in enumerate(steps):
        n_bytes, error = n_bytes + more, error - less
        if i in kept:
            yield CurvePoint(n_bytes, max(0.0, error))
