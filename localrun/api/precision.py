"""The parts of a conversion that choose formats: calibration, the choice of better copies, and the report.

The order: calibrate (run a text through the source, or read an imatrix), measure each format's output error, solve, write the
base, write the overlay, report. Calibration results are kept in the target until the end, so a resumed conversion makes the
same choices.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from localrun.api.following import Follower
from localrun.errors import StoreError, UsageError
from localrun.units import format_size

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from localrun.engine.measure.choose import PrecisionChoice, PrecisionRequest
    from localrun.engine.measure.choose_dense import DenseChoice
    from localrun.quant.checkpoint.directory import Checkpoint
    from localrun.quant.checkpoint.mapping import ImportanceLookup
    from localrun.quant.model.source import MoeLayer
    from localrun.quant.precision.report import Evaluation
    from localrun.quant.precision.solver import HotBudget, Target

NO_OVERLAY = "none"
OVERLAY_IMATRIX_NAME = "imatrix-overlay.gguf"
"""What an overlay was made with, where that is not what the base was."""
EVALUATION_FOLDER = ".evaluate"
"""In the target while models are compared: one that is deleted again."""
EVAL_WINDOW = 512
"""Tokens of context in which the finished model is compared with its source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A conversion request, as for `localrun convert` (docs/quantization.md). Sizes in bytes.

    Attributes:
        source: folder of an official checkpoint.
        target_folder: folder to write; an interrupted run resumes there.
        base, dense: formats by name; None: the default.
        keep_experts: experts stay in the checkpoint; only the dense part, and better copies if requested, are written.
        hot: `TYPE:SIZE`, bytes of better copies in a type, or only `none`.
        cold: `TYPE:SIZE`, bytes of smaller copies in a type.
        target: `SIZE-vram,SIZE-ram`: choose base and copies for such a machine.
        recipe: name or file of a recipe.
        jobs: threads; None: 8, or one per core.
        split: maximum file size; None: a single file.
        calibrate, calibrate_tokens: the calibration text, and how much of it to use (0: all).
        imatrix: a llama.cpp importance file to use instead.
        no_calibrate: quantize without importance data.
        ram: RAM for experts during calibration.
        evaluate, evaluate_types: a text to compare on, and comma-separated formats to compare with.
        dry_run: check and report, write nothing.
    """

    source: Path
    target_folder: Path
    dense: str | None = None
    base: str | None = None
    keep_experts: bool = False
    hot: Sequence[str] = ()
    cold: Sequence[str] = ()
    target: str | None = None
    recipe: str | None = None
    jobs: int | None = None
    split: int | None = None
    calibrate: Path | None = None
    calibrate_tokens: int = 0
    imatrix: Path | None = None
    no_calibrate: bool = False
    ram: int | None = None
    evaluate: Path | None = None
    evaluate_types: str | None = None
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """What was asked for, recipe and options together; `hot` are budgets of better and of smaller copies. `base` and `dense` as
    `ConversionOptions` has them; with `choose_dense`, a target chooses the type of every dense matrix, and `dense` is what the
    others get."""

    base: GGMLQuantizationType | None
    dense: str
    hot: tuple[HotBudget, ...]
    target: Target | None
    remove_overlay: bool = False
    choose_dense: bool = False

    @property
    def wants_better_copies(self) -> bool:
        """There is something for the solver to do."""
        return bool(self.hot) or self.target is not None


def format_options(wanted: Request, dense_default: str) -> FormatOptions:
    """Merges recipe and options; options that were typed win.

    Raises:
        UsageError, FormatError: unknown types or recipes, impossible budgets, options that exclude each other.
    """
    from localrun.quant.checkpoint.mapping import BASE_TYPES, DENSE_TYPES
    from localrun.quant.precision.recipes import Recipe, read_recipe
    from localrun.quant.precision.solver import HotBudget, Target

    for option, name, known in (("base", wanted.base, BASE_TYPES), ("dense", wanted.dense, DENSE_TYPES)):
        if name and name not in known:
            raise UsageError(f"--{option}: unknown type '{name}'", hint=f"one of {', '.join(known)}")
    recipe = read_recipe(wanted.recipe) if wanted.recipe else Recipe("")
    if wanted.keep_experts and (wanted.base or wanted.recipe or wanted.split is not None):
        raise UsageError(
            "--keep-experts leaves the experts in place: it can't be combined with --base, --recipe or --split",
            hint="it does combine with --dense TYPE, --target, --hot TYPE:SIZE and --cold TYPE:SIZE",
        )
    if wanted.target and (wanted.base or wanted.hot or wanted.cold):
        raise UsageError(
            "--target chooses base and copies itself", hint="leave out --base, --hot and --cold, or --target"
        )
    if wanted.calibrate is not None and wanted.imatrix is not None:
        raise UsageError(
            "--calibrate and --imatrix can't be combined", hint="an imatrix already is the result of a calibration"
        )
    if wanted.no_calibrate and (wanted.calibrate is not None or wanted.imatrix is not None):
        raise UsageError("--no-calibrate can't be combined with --calibrate or --imatrix")
    words = list(wanted.hot)
    remove = words == [NO_OVERLAY]
    if NO_OVERLAY in words and (not remove or wanted.cold):
        raise UsageError("--hot none can't be combined with other copies", hint="leave out none, or the others")
    typed_formats = bool(wanted.base or words or wanted.cold)
    hot = tuple(HotBudget.parse(text) for text in words) if words and not remove else ()
    hot += tuple(HotBudget.parse(text, smaller=True) for text in wanted.cold)
    target = Target.parse(wanted.target) if wanted.target else None
    if not remove and not words and not wanted.cold and target is None:
        hot = recipe.hot
    if target is None and not typed_formats:
        target = recipe.target
    if wanted.no_calibrate and (hot or target is not None):
        raise UsageError(
            "--no-calibrate leaves nothing to choose copies by: calibration measures which experts matter",
            hint="leave it out, or use --imatrix FILE instead",
        )
    base = BASE_TYPES[wanted.base] if wanted.base else (recipe.base if target is None else None)
    dense = wanted.dense or recipe.dense
    if wanted.keep_experts and target is not None and dense:
        raise UsageError(
            "--keep-experts leaves nothing to --target but the dense matrices", hint="leave out --dense or --target"
        )
    return FormatOptions(base, dense or dense_default, hot, target, remove, target is not None and dense is None)


def needs_learning(options: FormatOptions, wanted: Request) -> bool:
    """True where importance or routing decides something."""
    from localrun.quant.checkpoint.mapping import EXACT_OR_EIGHT_BIT

    if options.wants_better_copies or wanted.calibrate is not None or wanted.imatrix is not None:
        return True
    return options.base is not None and options.base not in EXACT_OR_EIGHT_BIT and not wanted.no_calibrate


def learn(
    wanted: Request,
    checkpoint: Checkpoint,
    options: FormatOptions,
    jobs: int,
    dense_bytes: int,
    out: Follower,
) -> PrecisionChoice | None:
    """Calibrates (or reads an imatrix), measures, solves; None if calibration is impossible and nothing requires it.

    Raises:
        UsageError: better copies of a checkpoint without a tokenizer, and no imatrix.
        LocalrunError: see `choose_precision`.
    """
    from localrun.engine.measure.choose import choose_precision
    from localrun.engine.options import EngineOptions
    from localrun.quant.convert.converter import LEARNED_NAME

    request = precision_request(wanted, options)
    if request.imatrix is None and not (checkpoint.path / "tokenizer.json").is_file():
        if options.wants_better_copies or wanted.calibrate is not None:
            raise UsageError(
                f"{checkpoint.path} has no tokenizer.json, so it can't be calibrated on a text",
                hint="copy the release's tokenizer.json there, or use --imatrix FILE",
            )
        out.note("warning: no tokenizer.json, so no calibration: the base is quantized without importance data")
        return None

    threads = min(jobs, 256) if wanted.jobs is not None else 0
    choice = choose_precision(
        checkpoint.path,
        request,
        EngineOptions(ram_bytes=wanted.ram, n_threads=threads, gpu="none"),
        work_folder=wanted.target_folder / LEARNED_NAME,
        dense_bytes=dense_bytes,
        report=out.step,
    )
    out.clear_status()
    return choice


def precision_request(wanted: Request, options: FormatOptions) -> PrecisionRequest:
    """For `choose_precision`; reads the calibration text.

    Raises:
        UsageError, FormatError: a text that is empty, not UTF-8, or not a conversation.
    """
    from localrun.engine.measure.calibration_text import read_calibration_text
    from localrun.engine.measure.choose import PrecisionRequest

    if wanted.calibrate_tokens < 0:
        raise UsageError(f"--calibrate-tokens {wanted.calibrate_tokens}: expected a positive number")
    return PrecisionRequest(
        base=options.base,
        hot=options.hot,
        target=options.target,
        text=read_calibration_text(wanted.calibrate) if wanted.calibrate is not None else None,
        imatrix=wanted.imatrix,
        max_tokens=wanted.calibrate_tokens,
        dense=options.choose_dense,
        keep_experts=wanted.keep_experts,
    )


def _budgets(options: FormatOptions, *, smaller: bool) -> str:
    """As the user types them."""
    chosen = [budget for budget in options.hot if budget.smaller == smaller]
    return ", ".join(f"{budget.type.name.lower()}:{format_size(budget.n_bytes)}" for budget in chosen)


def write_report(
    wanted: Request,
    options: FormatOptions,
    choice: PrecisionChoice | None,
    name: str,
    evaluations: Sequence[Evaluation],
) -> None:
    """Writes `report.md`, `report.json`, pictures and the imatrix to the target; without a choice, a report that is there only
    gets the comparison."""
    from localrun.engine.measure.choose import IMATRIX_NAME
    from localrun.quant.convert.converter import LEARNED_NAME
    from localrun.quant.model.manifest import MANIFEST_NAME, read_manifest
    from localrun.quant.precision.report import PrecisionReport, add_evaluations

    folder, text = wanted.target_folder, wanted.evaluate.name if wanted.evaluate is not None else ""
    if choice is None and add_evaluations(folder, evaluations, text):
        return
    manifest = read_manifest(folder / MANIFEST_NAME)
    sizes = {"base": sum(file.size_bytes for file in manifest.files)}
    if manifest.overlay is not None:
        sizes["overlay"] = sum(file.size_bytes for file in manifest.overlay.files)
    learned = "an imatrix file" if wanted.imatrix is not None else str(wanted.calibrate or "the built-in text")
    asked = {
        "base": str(manifest.options.get("base", "")),
        "dense": str(manifest.options.get("dense", "")),
        "hot": _budgets(options, smaller=False),
        "cold": _budgets(options, smaller=True),
        "target": wanted.target or "",
        "recipe": wanted.recipe or "",
        "learned from": learned if choice is not None else "",
    }
    PrecisionReport(
        model=name,
        sizes=sizes,
        options={key: value for key, value in asked.items() if value},
        importance=choice.importance.summary() if choice is not None else None,
        errors=choice.errors if choice is not None else None,
        solution=choice.solution if choice is not None else None,
        dense=dense_section(choice.dense) if choice is not None and choice.dense is not None else (),
        dense_types=choice.dense.mix.types if choice is not None and choice.dense is not None else {},
        dense_errors=choice.dense_errors if choice is not None else None,
        evaluations=evaluations,
        text=text,
    ).write(folder)
    kept = folder / LEARNED_NAME
    if choice is not None and (kept / IMATRIX_NAME).is_file():
        # Repairing needs both: what the base was rounded with, and what a later overlay was.
        is_base_s = manifest.options.get("imatrix", choice.importance.digest) == choice.importance.digest
        try:
            (kept / IMATRIX_NAME).replace(folder / (IMATRIX_NAME if is_base_s else OVERLAY_IMATRIX_NAME))
            if is_base_s:
                (folder / OVERLAY_IMATRIX_NAME).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{folder}: the importance matrix can't be put there: {error.strerror}") from error
    shutil.rmtree(kept, ignore_errors=True)


def dense_section(choice: DenseChoice) -> tuple[str, ...]:
    """What was chosen for the dense matrices, and what that costs and gains; also for the terminal."""
    mix = choice.mix
    counts = ", ".join(f"{n} in {name}" for name, n in mix.by_type().items())
    return (
        f"Dense matrices: {counts}: {format_size(mix.n_bytes)} ({format_size(choice.default_bytes)} by default), of which every "
        f"token reads {format_size(mix.token_bytes)} ({format_size(choice.default_token_bytes)}).",
        f"They add {mix.divergence:.4f} nats of divergence by estimate; a token takes "
        f"{choice.token_s / choice.default_token_s:.0%} of its time with the default types, on a box of the target's kind.",
    )


def remove_report(folder: Path) -> None:
    """Removes the report of an overlay that no longer exists, and leftovers of an unfinished choice of one.

    The imatrix stays: the base may have been quantized with it.
    """
    from localrun.quant.convert.converter import LEARNED_NAME
    from localrun.quant.precision.report import REPORT_NAMES

    for name in (*REPORT_NAMES, OVERLAY_IMATRIX_NAME):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / LEARNED_NAME, ignore_errors=True)


def profile_section(choice: PrecisionChoice) -> dict[str, object]:
    """How often the calibration used each expert, for the manifest: `{"tokens": n, "counts": {"0": [...]}}`."""
    layers = choice.importance.layers
    return {
        "tokens": choice.importance.n_tokens,
        "counts": {str(layer): [round(float(n)) for n in layers[layer].counts] for layer in sorted(layers)},
    }


def evaluation_types(wanted: Request, moe_layers: Mapping[int, MoeLayer]) -> list[GGMLQuantizationType]:
    """Formats to compare the finished model with.

    Raises:
        UsageError: an unknown format, one that does not fit the rows, or no text to compare on.
    """
    from localrun.quant.precision.solver import expert_bytes, parse_type

    words = [word for word in (wanted.evaluate_types or "").split(",") if word.strip()]
    if words and wanted.evaluate is None:
        raise UsageError("--evaluate-types needs a text", hint="add --evaluate FILE")
    kinds = [parse_type(word) for word in words]
    for kind in kinds:
        for moe in moe_layers.values():
            expert_bytes(moe, kind)
    return kinds


def evaluate(
    wanted: Request,
    source: Path,
    dense: GGMLQuantizationType,
    importance: ImportanceLookup | None,
    out: Follower,
) -> list[Evaluation]:
    """Compares the finished model, and uniform models in the requested formats, with the source on the held-out text.

    Uniform models are written to the target's folder one at a time and deleted once measured.
    """
    from localrun.api.texts import read_text
    from localrun.engine.measure.compare import compare_models
    from localrun.engine.options import EngineOptions
    from localrun.quant.checkpoint.mapping import ConversionOptions
    from localrun.quant.convert.converter import convert
    from localrun.quant.open import open_model
    from localrun.quant.precision.solver import expert_bytes

    if wanted.evaluate is None:
        return []
    layers = open_model(source).moe_layers
    kinds = evaluation_types(wanted, layers)
    folder = wanted.target_folder / EVALUATION_FOLDER

    def models() -> Iterator[tuple[str, Path]]:
        yield "this model", wanted.target_folder
        for kind in kinds:
            shutil.rmtree(folder, ignore_errors=True)
            out.status(f"converting to {kind.name.lower()} for comparison")
            convert(source, folder, ConversionOptions(dense, kind, importance))
            yield f"all {kind.name.lower()}", folder

    try:
        results = compare_models(
            source,
            models(),
            read_text(wanted.evaluate),
            EngineOptions(ram_bytes=wanted.ram, gpu="none"),
            window=EVAL_WINDOW,
            progress=lambda name, done, total: out.step(f"comparing {name}", done, total),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    out.clear_status()
    sizes = [None, *(sum(moe.n_experts * expert_bytes(moe, kind) for moe in layers.values()) for kind in kinds)]
    results = [replace(result, n_bytes=size) for result, size in zip(results, sizes, strict=True)]
    for result in results:
        out.note(
            f"{result.name} against the source on {wanted.evaluate.name}: KL {result.kl_mean:.6f}, same top token "
            f"{result.top1_agreement:.2%}, perplexity {result.perplexity:.4f} ({result.reference_perplexity:.4f})"
        )
    return results
