"""Chooses a precision for every expert: calibrates (or reads an imatrix), measures output errors, solves.

Results are kept in a work folder (`imatrix.gguf` and `tiers.json`), so a resumed conversion makes the same choices without
rerunning the text. Both are discarded if the model, the text or the formats differ.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gguf import GGMLQuantizationType

from localrun.atomic import replacing
from localrun.engine import memory
from localrun.engine.engine import Engine
from localrun.engine.measure import choose_dense
from localrun.engine.measure.calibrate import calibrate
from localrun.engine.measure.calibration_text import CalibrationText, default_text
from localrun.engine.measure.choose_dense import DenseChoice
from localrun.engine.options import EngineOptions
from localrun.errors import FormatError, LocalrunError, StoreError, UsageError
from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.model.source import ModelSource
from localrun.quant.open import open_model
from localrun.quant.precision.dense import DenseErrors
from localrun.quant.precision.error import ErrorTable, measure_errors
from localrun.quant.precision.imatrix import read_imatrix, write_imatrix
from localrun.quant.precision.importance import F32, Importance
from localrun.quant.precision.samples import ActivationSamples, drawn_samples
from localrun.quant.precision.solver import (
    ExpertCosts,
    HotBudget,
    PrecisionSolution,
    Target,
    check_request,
    solve_hot,
    solve_target,
    target_types,
)

log = logging.getLogger(__name__)

IMATRIX_NAME, MEASURED_NAME = "imatrix.gguf", "tiers.json"
Report = Callable[[str, int, int], None]
"""Called with (step, done, total)."""


@dataclass(frozen=True, slots=True)
class PrecisionRequest:
    """The user's request.

    Attributes:
        base: format of the base; None: the source's own. Ignored with a target.
        hot, target: see `precision.solver`; without both, only importance is computed.
        text: calibration text; None: the built-in one.
        imatrix: sums from a file instead of calibration.
        max_tokens: run only the first ones of the text; 0: all.
        reserve_bytes: part of a target's memory, for the context.
        dense: the target decides about the dense matrices, too.
        keep_experts: the target decides about nothing else: the experts stay as they are.
    """

    base: GGMLQuantizationType | None = None
    hot: tuple[HotBudget, ...] = ()
    target: Target | None = None
    text: CalibrationText | None = None
    imatrix: Path | None = None
    max_tokens: int = 0
    reserve_bytes: int = 0
    dense: bool = False
    keep_experts: bool = False


@dataclass(frozen=True, slots=True)
class PrecisionChoice:
    """What was decided, and on which grounds; `errors` and `solution` are None if only importance was asked for, `dense` and
    `dense_errors` where nobody asked about dense matrices."""

    importance: Importance
    errors: ErrorTable | None = None
    solution: PrecisionSolution | None = None
    dense: DenseChoice | None = None
    dense_errors: DenseErrors | None = None


def check_precision_request(source: ModelSource, request: PrecisionRequest) -> tuple[GGMLQuantizationType, ...]:
    """Checks everything before any work; returns the formats to measure.

    Raises:
        UsageError, FormatError: see `precision.solver.check_request` and `read_imatrix`.
    """
    if request.text is not None and request.imatrix is not None:
        raise UsageError(
            "--calibrate and --imatrix can't be combined", hint="an imatrix already is the result of a calibration"
        )
    own = next(iter(source.moe_layers.values())).types[0]
    base = request.base or own
    check_request(source.moe_layers, base, request.hot, request.target)
    if request.imatrix is not None:
        if not request.imatrix.exists():
            raise UsageError(f"{request.imatrix}: no such file")
        read_imatrix(request.imatrix, source.moe_layers)
    if request.target is not None and not request.keep_experts:
        kinds = target_types(source.moe_layers, request.target, [own])
        if not kinds:
            raise UsageError("no format fits this model's experts", hint="set --base")
        return kinds
    return tuple(dict.fromkeys([base, *(budget.type for budget in request.hot)])) if request.hot else ()


def choose_precision(
    model: Path,
    request: PrecisionRequest,
    options: EngineOptions,
    *,
    work_folder: Path | None = None,
    dense_bytes: int = 0,
    report: Report | None = None,
) -> PrecisionChoice:
    """Decides which expert gets which format.

    Args:
        model: any source; preferably the official checkpoint.
        options: how to load it for calibration; context and batch are set here.
        work_folder: where results are saved and found; None: nowhere.
        dense_bytes: of the dense model in the target, where its types are not chosen.

    Raises:
        LocalrunError: any reason, with message and hint.
    """
    tell = report or (lambda what, done, total: None)
    source = open_model(model)
    kinds = check_precision_request(source, request)
    text = request.text or default_text()
    learned_from = text.digest if request.imatrix is None else read_imatrix(request.imatrix, source.moe_layers).digest
    wanted = [*(kind.name for kind in kinds), *(["dense"] if request.dense else [])]
    key = "\n".join([source.identity, learned_from, str(request.max_tokens), *wanted])
    kept = _kept(work_folder, key, source) if work_folder is not None else None
    if kept is not None:
        importance, errors, dense_errors = kept
    else:
        importance, samples, rows = _learn(model, source, request, text, options, tell)
        if work_folder is not None:
            importance = _keep_importance(work_folder, importance, source)
        errors = dense_errors = None
        n_threads = options.n_threads or memory.physical_cores()
        if kinds:
            errors = measure_errors(
                source,
                kinds,
                importance,
                samples,
                n_threads=n_threads,
                progress=lambda done, total: tell("measuring formats", done, total),
            )
        if request.dense:
            dense_errors = choose_dense.measure(
                Checkpoint.open(model),
                rows,
                importance,
                n_threads=n_threads,
                progress=lambda done, total: tell("measuring dense matrices", done, total),
            )
        if work_folder is not None:
            _keep(work_folder, key, importance, errors, dense_errors)
    costs = None
    if errors is not None:
        costs = ExpertCosts.build(source.moe_layers, kinds, importance.route_weights, errors.errors)
    if dense_errors is not None and request.target is not None:
        dense, together = choose_dense.choose_together(
            source, dense_errors, request.target, costs, reserve_bytes=request.reserve_bytes
        )
        return PrecisionChoice(importance, errors, together, dense, dense_errors)
    if costs is None:
        return PrecisionChoice(importance)
    if request.target is not None:
        solution = solve_target(costs, request.target, dense_bytes=dense_bytes, reserve_bytes=request.reserve_bytes)
    else:
        solution = solve_hot(costs, kinds[0], request.hot)
    return PrecisionChoice(importance, errors, solution)


def _learn(
    model: Path,
    source: ModelSource,
    request: PrecisionRequest,
    text: CalibrationText,
    options: EngineOptions,
    tell: Report,
) -> tuple[Importance, ActivationSamples, Mapping[str, F32]]:
    """Importance, rows of experts, and of dense matrices by name."""
    if request.imatrix is not None:
        importance = read_imatrix(request.imatrix, source.moe_layers)
        return importance, drawn_samples(importance), {}
    # 512 rows of logits of DeepSeek-V4 are 250 MiB; shorter windows would show the router less context.
    options = replace(options, n_ctx=512, n_batch=512)
    with Engine.open(model, options, lambda part, what: tell(what, round(1000 * part), 1000), learn=False) as engine:
        result = calibrate(
            engine,
            text,
            max_tokens=request.max_tokens,
            progress=lambda done, total: tell("calibrating", done, total),
        )
    return result.importance, result.samples, result.dense


# --- kept results -----------------------------------------------------------------------------------------------------


def _keep_importance(folder: Path, importance: Importance, source: ModelSource) -> Importance:
    """Writes the sums and reads them back: mapped (those of a big model are a gigabyte), and rounded as a later run sees them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MEASURED_NAME).unlink(missing_ok=True)  # it certifies the sums next to it
    except OSError as error:
        raise StoreError(f"{folder}: can't be written: {error.strerror}") from error
    write_imatrix(importance, folder / IMATRIX_NAME)
    return read_imatrix(folder / IMATRIX_NAME, source.moe_layers)


def _keep(folder: Path, key: str, importance: Importance, errors: ErrorTable | None, dense: DenseErrors | None) -> None:
    """Written last: certifies that the sums are complete, and holds the measurements made with them."""
    path = folder / MEASURED_NAME
    value = {
        "key": key,
        "importance": importance.digest,
        "errors": errors.to_json() if errors is not None else None,
        "dense": dense.to_json() if dense is not None else None,
    }
    with replacing(path) as file:
        file.write(json.dumps(value).encode())


def _kept(
    folder: Path, key: str, source: ModelSource
) -> tuple[Importance, ErrorTable | None, DenseErrors | None] | None:
    """What an earlier run kept; None if there is nothing that fits."""
    path = folder / MEASURED_NAME
    try:
        value = json.loads(path.read_text("utf-8"))
        if not isinstance(value, dict) or value.get("key") != key:
            return None
        importance = read_imatrix(folder / IMATRIX_NAME, source.moe_layers)
        if importance.digest != value.get("importance"):
            raise FormatError(f"{folder / IMATRIX_NAME}: not the one {MEASURED_NAME} was made with")
        errors = ErrorTable.from_json(value["errors"]) if value.get("errors") is not None else None
        if errors is not None and set(errors.layers) != set(source.moe_layers):
            raise FormatError(f"{path}: errors of other layers")
        dense = DenseErrors.from_json(value["dense"]) if value.get("dense") is not None else None
        if dense is not None and not dense.relative.keys() <= source.tensors.keys():
            raise FormatError(f"{path}: errors of other matrices")
        return importance, errors, dense
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LocalrunError) as error:
        log.warning("ignoring saved results: %s", error)
        return None
