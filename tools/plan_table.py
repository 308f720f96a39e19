"""Predictions for Flash and Pro on boxes that people have, as the table of docs/planner.md.

    python -m tools.plan_table > table.md
    python -m tools.plan_table --context 131072 --kv q8_0
    python -m tools.plan_table --short                          # README.md's
    python -m tools.plan_table --no-gpu                         # docs/quantization.md's

These are predictions from the published hit rates and the bandwidths in the table, not measurements; nothing about GPUs has been
measured at all. Bandwidths are what such machines give in practice, not what is printed on the box.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from localrun.engine.planner.boxes import BOXES, BY_SLUG, Box
from localrun.engine.planner.hit_rates import Curve
from localrun.engine.planner.plan import Plan, PlanOptions
from localrun.engine.planner.planner import make_plan
from localrun.engine.planner.sizes import ModelSizes, format_of, sizes_of
from localrun.engine.planner.speed import Range
from localrun.errors import BudgetError
from localrun.quant.checkpoint.mapping import DENSE_TYPES
from localrun.quant.precision.recipes import read_recipe


def cell(plan: Plan) -> tuple[str, str, str, str]:
    """Resident share, answers, prompts, limit."""
    assert plan.decode is not None
    assert plan.prefill is not None
    limit = plan.decode.likely.limit
    return (
        f"{plan.resident_share:.0%}",
        _span(plan.decode),
        _span(plan.prefill),
        limit + (" (dense on GPU)" if plan.placement.dense_on_gpu and "GPU" not in limit else ""),
    )


def rows(models: Sequence[ModelSizes], boxes: Sequence[Box], options: PlanOptions) -> list[tuple[str, ...]]:
    """One row per box and model."""
    result: list[tuple[str, ...]] = []
    for box in boxes:
        rates = f"{box.memory_gb_per_s:g} / {box.disk_gb_per_s:g}" + (f" x {box.n_drives}" if box.n_drives > 1 else "")
        rates += f" / {box.gpu_gb_per_s:g}" if box.vram_gib else " / -"
        for model in models:
            name = f"{model.name.removeprefix('DeepSeek-V4-')} {model.experts[0].name}"
            try:
                plan = make_plan(model, box.hardware, options, suggest=False, rates=Curve())
            except BudgetError as error:
                result.append((box.name, rates, name, "does not fit", "-", "-", str(error.hint)))
                continue
            result.append((box.name, rates, name, *cell(plan)))
    return result


SHORT = ("ram-32", "ram-64", "ram-128", "gpu-12-ram-32", "gpu-16-ram-64", "gpu-24-ram-64", "gpu-24-ram-128")
"""Boxes of README.md's table."""


def short_table() -> str:
    """Answers of Flash on seven boxes: as released, and with 2-bit experts."""
    models = [sizes_of("flash", base=format_of(kind)) for kind in ("mxfp4", "q2_k")]
    sizes = [round((model.dense_bytes + model.expert_file_bytes) / 1e9) for model in models]
    head = ("machine", "drive", f"Flash, experts as released ({sizes[0]} GB)", f"Flash, 2-bit experts ({sizes[1]} GB)")
    lines: list[tuple[str, ...]] = [head, ("---",) * len(head)]
    for slug in SHORT:
        box = BY_SLUG[slug]
        plans = [make_plan(model, box.hardware, suggest=False, rates=Curve()) for model in models]
        lines.append((box.name, f"{box.disk_gb_per_s:g} GB/s", *(_prediction(plan) for plan in plans)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _prediction(plan: Plan) -> str:
    assert plan.decode is not None
    low, high = _ends(plan.decode)
    return f"{low:.1f} to {high:.1f}" if high < 10 else f"{low:.0f} to {high:.0f}"


def no_gpu_table() -> str:
    """Flash on 64 GB without a GPU, dense matrices in Q4_K, and what the recipe makes: docs/quantization.md's."""
    box = BY_SLUG["ram-64"]
    head = ("experts", "model on the drive", "experts in RAM", "tokens/s", "with a drive of 2 GB/s")
    lines: list[tuple[str, ...]] = [head, ("---", "---:", "---:", "---:", "---:")]
    models = {
        f"`{kind}`" + (", exact" if kind == "mxfp4" else ""): sizes_of(
            "flash", base=format_of(kind), dense=DENSE_TYPES["q4_k"]
        )
        for kind in ("iq2_xxs", "q2_k", "q3_k", "mxfp4")
    }
    models["`--recipe ram-64`"] = of_recipe("ram-64")
    for name, model in models.items():
        plans = [
            make_plan(model, machine.hardware, suggest=False, rates=Curve())
            for machine in (box, replace(box, disk_gb_per_s=2.0))
        ]
        size = f"{_on_the_drive(model) / 2**30:.0f} GiB"
        lines.append((name, size, f"{plans[0].resident_share:.0%}", *(_prediction(plan) for plan in plans)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _on_the_drive(model: ModelSizes) -> int:
    """All files together: the base holds every expert, an overlay's as well."""
    overlay_bytes = sum(group.count * group.file_bytes for group in model.experts[1:]) if model.base_bytes else 0
    return model.dense_bytes + (model.base_bytes + overlay_bytes or model.expert_file_bytes)


def of_recipe(name: str) -> ModelSizes:
    """Flash as a recipe with a base makes it."""
    recipe = read_recipe(name)
    assert recipe.base is not None
    model = sizes_of("flash", base=recipe.base, dense=DENSE_TYPES[recipe.dense or "q8_0"])
    (base,) = model.experts
    copies = []
    for budget in recipe.hot:
        (better,) = sizes_of("flash", base=budget.type).experts
        copies.append(replace(better, count=budget.n_bytes // better.file_bytes))
    n_left = base.count - sum(group.count for group in copies)
    return replace(model, experts=(replace(base, count=n_left), *copies), base_bytes=base.count * base.file_bytes)


def table(lines: Sequence[tuple[str, ...]]) -> str:
    """Markdown."""
    head = ("box", "RAM / drive / GPU, GB/s", "model", "in memory", "answers, tokens/s", "prompts, tokens/s", "limit")
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *lines))


def _span(span: Range) -> str:
    return " - ".join(f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in _ends(span))


def _ends(span: Range) -> tuple[float, float]:
    return span.low.tokens_per_s, span.high.tokens_per_s


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="flash:mxfp4,flash:q2_k,pro:mxfp4,pro:q2_k", help="NAME:TYPE,...")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--kv", default="f16")
    parser.add_argument("--short", action="store_true", help="README.md's table")
    parser.add_argument("--no-gpu", action="store_true", help="docs/quantization.md's table")
    args = parser.parse_args(argv)
    if args.short or args.no_gpu:
        print(short_table() if args.short else no_gpu_table())
        return 0
    models = [
        sizes_of(name, base=format_of(kind))
        for name, _, kind in (part.partition(":") for part in args.models.split(","))
    ]
    print(table(rows(models, BOXES, PlanOptions(n_ctx=args.context, kv_type=args.kv))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
