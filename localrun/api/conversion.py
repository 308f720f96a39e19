"""Converts an official checkpoint to a directory that localrun and llama.cpp run: calibrate, choose, write, split, compare, report.

The writing is done by `localrun.quant.convert`. Each step detects whether it is already done, so an interrupted conversion resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from localrun import config
from localrun.api import demo, models, precision, splitting
from localrun.api.following import Follower
from localrun.api.options import Size
from localrun.api.precision import Request
from localrun.disk_space import check_free
from localrun.engine import memory
from localrun.errors import UsageError
from localrun.units import format_size, parse_size

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from localrun.api.precision import FormatOptions
    from localrun.engine.measure.choose import PrecisionChoice
    from localrun.quant.checkpoint.directory import Checkpoint
    from localrun.quant.checkpoint.mapping import ConversionOptions, ConversionPlan, ImportanceLookup
    from localrun.quant.convert.writing import ConversionProgress, ConversionResult
    from localrun.quant.model.manifest import Manifest
    from localrun.quant.precision.solver import CopiesLimit

DENSE_DEFAULT = "q8_0"


def convert(
    source: str | Path,
    target_folder: str | Path,
    *,
    base: str | None = None,
    dense: str | None = None,
    keep_experts: bool = False,
    hot: str | Sequence[str] = (),
    cold: str | Sequence[str] = (),
    target: str | None = None,
    recipe: str | None = None,
    calibrate: str | Path | None = None,
    imatrix: str | Path | None = None,
    ram: Size | None = None,
    split: Size | None = None,
    jobs: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Converts an official checkpoint, like `localrun convert`; repeat the same call to resume after an interruption.

    Args:
        source: folder with config.json and safetensors.
        target_folder: folder to write.
        base: format of the experts, such as `q2_k`; None: exact (`mxfp4`), `q8_0` for FP8 checkpoints.
        dense: format of the dense matrices; None: `q8_0`.
        keep_experts: write only the dense part (minutes, a few GB); experts are read from `source`, which must stay in place.
        hot: better copies of the experts that matter most, such as `mxfp4:12GiB`.
        cold: smaller copies of the experts that matter least, such as `q2_k:20GiB`, beside a larger base.
        target: instead of `base` and copies, the machine to choose them for, such as `24GiB-vram,64GiB-ram`.
        recipe: name or file of a recipe.
        calibrate: a calibration text; None: the built-in one, if a format rounds.
        imatrix: a llama.cpp importance file to use instead.
        ram: RAM for experts during calibration.
        split: maximum file size.
        jobs: threads.
        progress: called with (step, done, total).

    Returns:
        The folder: a model for `localrun.load`.

    Raises:
        UsageError: invalid options, or options that differ from those the folder was started with.
        CheckpointError, FormatError: the source is damaged or not a checkpoint.
        DiskSpaceError: the result does not fit; nothing is written.
    """
    folder = Path(target_folder).expanduser()
    run(
        Request(
            source=Path(source).expanduser(),
            target_folder=folder,
            base=base,
            dense=dense,
            keep_experts=keep_experts,
            hot=(hot,) if isinstance(hot, str) else tuple(hot),
            cold=(cold,) if isinstance(cold, str) else tuple(cold),
            target=target,
            recipe=recipe,
            calibrate=_path(calibrate),
            imatrix=_path(imatrix),
            ram=parse_size(ram) if isinstance(ram, str) else ram,
            split=parse_size(split) if isinstance(split, str) else split,
            jobs=jobs,
        ),
        _Progress(progress),
    )
    return folder


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path).expanduser()


class _Progress:
    """Follows for a program: steps and bytes, no words."""

    def __init__(self, take: Callable[[str, int, int], None] | None) -> None:
        self._take = take

    def note(self, text: str) -> None:
        pass

    def status(self, text: str) -> None:
        pass

    def clear_status(self) -> None:
        pass

    def step(self, what: str, done: int, total: int) -> None:
        if self._take is not None:
            self._take(what, done, total)

    def progress(self, step: str) -> Callable[[ConversionProgress], None]:
        return lambda progress: self.step(step, progress.done_bytes, progress.total_bytes)

    def splitting(self) -> Callable[[int, int], None]:
        return lambda done, total: self.step("splitting", done, total)

    def planned(self, plan: ConversionPlan | None, options: FormatOptions, copies: Sequence[CopiesLimit]) -> None:
        pass

    def checked(self, plan: ConversionPlan | None, copies: Sequence[CopiesLimit]) -> None:
        pass

    def chosen(self, choice: PrecisionChoice | None) -> None:
        pass

    def wrote(self, result: ConversionResult) -> None:
        pass

    def finished(self, result: ConversionResult | Path | None) -> None:
        pass


def _source(wanted: Request) -> Path:
    """The checkpoint, which may be given by a model's name. Raises UsageError: there is none."""
    try:
        return models.resolve(str(wanted.source), config.load(), command="convert") or demo.checkpoint()
    except UsageError:
        if wanted.target_folder.exists():  # some things about a finished model can be changed without its checkpoint
            return wanted.source
        raise


def run(wanted: Request, out: Follower) -> None:
    """Does whatever is left to do: converts, resumes, or changes the overlay of a finished model.

    Raises:
        LocalrunError: see `convert`.
    """
    from localrun.quant.convert.converter import LEARNED_NAME, remove_leftovers
    from localrun.quant.convert.writing import DEFAULT_JOBS
    from localrun.quant.model.manifest import MANIFEST_NAME

    memory.check_ram(wanted.ram)
    wanted = replace(wanted, source=_source(wanted))
    jobs = DEFAULT_JOBS if wanted.jobs is None else wanted.jobs
    if not 1 <= jobs <= 256:
        raise UsageError(f"--jobs {jobs}: expected 1 to 256")
    options = precision.format_options(wanted, DENSE_DEFAULT)
    if not (wanted.target_folder / MANIFEST_NAME).is_file():
        return _convert(wanted, options, jobs, out)
    _check_evaluation(wanted)
    if not wanted.dry_run:
        remove_leftovers(wanted.target_folder)
    if wanted.keep_experts:
        _follow_moved_source(wanted, out)
    if options.remove_overlay:
        return _remove_overlay(wanted, options, out)
    # An overlay alone can be restarted; a target's choices must fit the existing base.
    if (wanted.target_folder / LEARNED_NAME).is_dir() and not options.hot:
        return _complete(wanted, options, jobs, out)
    if wanted.keep_experts and not options.hot:
        return _leave_kept(wanted, options, out)
    if wanted.split is not None and splitting.is_waiting(wanted.source, wanted.target_folder):
        if wanted.dry_run:
            out.note(f"dry run: nothing written; files would have at most {format_size(wanted.split)}")
        else:
            splitting.split(wanted.target_folder, wanted.split, out)
        if not options.hot:
            return _finish(wanted, options, None, wanted.target_folder, out)
    return _change_overlay(wanted, options, jobs, out)


def _convert(wanted: Request, options: FormatOptions, jobs: int, out: Follower) -> None:
    """Everything from a checkpoint."""
    from localrun.engine.measure.choose import check_precision_request
    from localrun.quant.checkpoint.mapping import make_plan
    from localrun.quant.convert.converter import check_target, open_checkpoint, write_plan
    from localrun.quant.open import open_model
    from localrun.quant.precision.solver import bytes_for_experts, copies_limits

    if options.remove_overlay:
        raise UsageError(f"{wanted.target_folder} is not a converted model, so it has no overlay")
    check_target(wanted.source, wanted.target_folder)
    out.status("checking the source")
    checkpoint = open_checkpoint(wanted.source)
    plan = make_plan(checkpoint, _conversion_options(wanted, options))
    request = precision.precision_request(wanted, options)
    copies: tuple[CopiesLimit, ...] = ()
    if precision.needs_learning(options, wanted):
        model = open_model(wanted.source)
        check_precision_request(model, request)
        copies = copies_limits(model.moe_layers, options.hot)
        if options.target is not None:
            bytes_for_experts(options.target, _least_dense_bytes(plan) if options.choose_dense else _dense_bytes(plan))
    for warning in plan.warnings:
        out.note(f"warning: {warning}")
    out.planned(plan, options, copies)
    copy_bytes = sum(limit.n_bytes for limit in copies)
    if wanted.split is not None:
        splitting.check(plan, wanted.split, out)
    _check_evaluation(wanted)
    if wanted.dry_run:
        # Show the plan first, even if the disk turns out to be too small.
        out.checked(plan, copies)
        if options.target is not None:  # whose base is no larger than this one, and often much smaller
            out.note("dry run: nothing written; what it takes on the disk is known once formats are chosen")
        else:
            needed = _check_space_for_both(plan, copy_bytes, wanted.target_folder)
            out.note(f"dry run: nothing written; the disk has room for {format_size(needed)}")
        out.finished(None)
        return
    if options.target is None:
        _check_space_for_both(plan, copy_bytes, wanted.target_folder)
    choice, plan = _choose(wanted, checkpoint, options, jobs, plan, out)
    solution = choice.solution if choice is not None else None
    _check_space_for_both(plan, solution.overlay_bytes if solution is not None else 0, wanted.target_folder)
    out.chosen(choice)
    result = write_plan(plan, wanted.target_folder, jobs=jobs, progress=out.progress("base"))
    out.wrote(result)
    return _after_base(wanted, options, checkpoint, choice, result, jobs, out)


def _check_evaluation(wanted: Request) -> None:
    """Before hours of work. Raises UsageError: no text, unknown formats, or nothing to compare with."""
    from localrun.api.texts import read_text
    from localrun.quant.open import open_model

    if wanted.evaluate is not None:
        read_text(wanted.evaluate)
    layers = open_model(wanted.source).moe_layers if wanted.evaluate is not None else {}
    precision.evaluation_types(wanted, layers)


def _choose(
    wanted: Request,
    checkpoint: Checkpoint,
    options: FormatOptions,
    jobs: int,
    plan: ConversionPlan,
    out: Follower,
) -> tuple[PrecisionChoice | None, ConversionPlan]:
    """What is learned where something must be, and the plan of the base that follows from it."""
    from localrun.quant.checkpoint.mapping import make_plan

    if not precision.needs_learning(options, wanted):
        return None, plan
    choice = precision.learn(wanted, checkpoint, options, jobs, _dense_bytes(plan), out)
    if choice is None:
        return None, plan
    if choice.solution is not None and not wanted.keep_experts:
        options = replace(options, base=choice.solution.base)
    dense_types = choice.dense.mix.types if choice.dense is not None else {}
    return choice, make_plan(checkpoint, _conversion_options(wanted, options, choice.importance, dense_types))


def _conversion_options(
    wanted: Request,
    options: FormatOptions,
    importance: ImportanceLookup | None = None,
    dense_types: Mapping[str, GGMLQuantizationType] | None = None,
) -> ConversionOptions:
    from localrun.quant.checkpoint.mapping import DENSE_TYPES, ConversionOptions

    if wanted.keep_experts and not dense_types:
        importance = None  # the weights it would apply to are not written
    return ConversionOptions(
        DENSE_TYPES[options.dense], options.base, importance, wanted.keep_experts, dict(dense_types or {})
    )


def _least_dense_bytes(plan: ConversionPlan) -> int:
    """With every matrix that has a choice in its smallest type."""
    from localrun.quant.gguf.file import tensor_bytes
    from localrun.quant.precision.dense import kind_of, possible_types

    infos = [tensor.info for tensor in plan.tensors.values() if not tensor.is_experts]
    return sum(
        info.n_bytes
        if kind_of(info.name) is None
        else min(tensor_bytes(kind, info.shape[:2]) for kind in possible_types(info.shape[0]))
        for info in infos
    )


def _dense_bytes(plan: ConversionPlan) -> int:
    return sum(tensor.info.n_bytes for tensor in plan.tensors.values() if not tensor.is_experts)


def _after_base(
    wanted: Request,
    options: FormatOptions,
    checkpoint: Checkpoint,
    choice: PrecisionChoice | None,
    result: ConversionResult,
    jobs: int,
    out: Follower,
) -> None:
    """Everything that follows once the base is finished; each step finds out whether it is done already."""
    from localrun.quant.convert.overlay import write_overlay

    if wanted.split is not None and splitting.is_waiting(wanted.source, wanted.target_folder):
        splitting.split(wanted.target_folder, wanted.split, out)  # before the overlay, which names the base's files
    if choice is not None:
        sections = {"profile": precision.profile_section(choice)}
        _add_to_manifest(wanted.target_folder, sections)
        if choice.solution is not None and choice.solution.plan.n_experts:
            overlay = write_overlay(
                checkpoint,
                choice.solution.plan,
                wanted.target_folder,
                choice.importance,
                jobs=jobs,
                progress=out.progress("overlay"),
                sections=sections,
            )
            out.wrote(overlay)
    return _finish(wanted, options, choice, result, out)


def _complete(wanted: Request, options: FormatOptions, jobs: int, out: Follower) -> None:
    """Completes a conversion that was interrupted after its base was finished; the calibration is still there."""
    from localrun.quant.checkpoint.mapping import make_plan
    from localrun.quant.convert.converter import described_options
    from localrun.quant.convert.journal import describe_changes
    from localrun.quant.convert.overlay import open_overlay_source, read_base
    from localrun.quant.convert.writing import ConversionResult

    folder, manifest = wanted.target_folder, read_base(wanted.target_folder)
    checkpoint = open_overlay_source(wanted.source, folder)
    plan = make_plan(checkpoint, _conversion_options(wanted, options))
    if wanted.dry_run:
        out.note("dry run: nothing written; the base is finished, and the conversion would continue from there")
        out.finished(None)
        return
    choice, plan = _choose(wanted, checkpoint, options, jobs, plan, out)
    changes = describe_changes(
        {"options": manifest.options, "identity": manifest.source.get("identity"), "source": str(checkpoint.path)},
        {"options": described_options(plan), "identity": checkpoint.identity, "source": str(checkpoint.path)},
    )
    if changes:
        raise UsageError(
            f"{folder}: an unfinished conversion can't be resumed: {'; '.join(changes)}",
            hint=f"use the same options; delete {folder} to start again; or add better copies to its base with --hot",
        )
    out.note("the base is finished; continuing from there")
    out.chosen(choice)
    size = sum(file.size_bytes for file in manifest.files)
    return _after_base(wanted, options, checkpoint, choice, ConversionResult(folder, size, 0.0, 0, 0, {}), jobs, out)


def _follow_moved_source(wanted: Request, out: Follower) -> None:
    """Records the new location of a finished model's experts.

    Raises:
        UsageError: the model includes its experts, has another dense type, or was made from another checkpoint.
    """
    from localrun.quant.convert.converter import open_checkpoint
    from localrun.quant.convert.overlay import read_base
    from localrun.quant.convert.repair import check_source
    from localrun.quant.convert.report import kept_experts
    from localrun.quant.model.manifest import write_manifest

    folder, manifest = wanted.target_folder, read_base(wanted.target_folder)
    if manifest.kept is None:
        raise UsageError(f"{folder} holds a model that includes its experts", hint="choose another directory")
    _check_formats(wanted, None, manifest)
    checkpoint = open_checkpoint(wanted.source)
    check_source(manifest, checkpoint)
    kept = kept_experts(checkpoint)
    if kept == manifest.kept:
        out.note(f"{folder}: finished; its experts are in {kept.path}")
    elif wanted.dry_run:
        out.note(f"dry run: nothing written; experts would be read from {kept.path}")
    else:
        write_manifest(replace(manifest, kept=kept), folder)
        out.note(f"{folder}: experts are now read from {kept.path}")


def _check_formats(wanted: Request, options: FormatOptions | None, manifest: Manifest) -> None:
    """Raises UsageError: the finished model has other formats than these options name."""
    from localrun.quant.open import open_model

    folder = wanted.target_folder
    if options is not None and options.base is not None:
        has = next(iter(open_model(folder).moe_layers.values())).types[0]
        if options.base != has:
            raise UsageError(
                f"{folder} has a base in {has.name.lower()}, not {options.base.name.lower()}",
                hint="leave out --base, or choose another directory",
            )
    if wanted.dense is not None and wanted.dense != manifest.options.get("dense"):
        raise UsageError(
            f"{folder} has dense matrices in {manifest.options.get('dense')}, not {wanted.dense}",
            hint="leave out --dense, or choose another directory",
        )


def _remove_overlay(wanted: Request, options: FormatOptions, out: Follower) -> None:
    """Removes the overlay of a finished model and its report; the base is unchanged."""
    from localrun.quant.convert.overlay import read_base, remove_overlay

    folder = wanted.target_folder
    if wanted.split is not None:
        raise UsageError("--hot none can't be combined with --split", hint="remove the overlay first, then split")
    _check_formats(wanted, options, read_base(folder))
    if wanted.dry_run:
        out.note(f"dry run: nothing written; the overlay of {folder} and its report would be removed")
    else:
        remove_overlay(folder)
        precision.remove_report(folder)
        out.note(f"{folder}: removed the overlay and its report")
    return _finish(wanted, options, None, folder, out)


def _leave_kept(wanted: Request, options: FormatOptions, out: Follower) -> None:
    """A finished model beside its checkpoint, and no copies were asked for: compares it, if that was.

    Raises:
        UsageError: an option that only matters while the model is made.
    """
    from localrun.quant.convert.overlay import read_base

    folder = wanted.target_folder
    learned = bool(read_base(folder).profile)
    for option, is_given in (
        ("--target", options.target is not None),
        ("--calibrate", wanted.calibrate is not None and not learned),
        ("--imatrix", wanted.imatrix is not None and not learned),
    ):
        if is_given:
            raise UsageError(
                f"{folder} holds a finished model, for which {option} comes too late",
                hint=f"choose another directory, or leave out {option}",
            )
    return _finish(wanted, options, None, folder, out)


def _change_overlay(wanted: Request, options: FormatOptions, jobs: int, out: Follower) -> None:
    """Replaces the overlay of a finished model; the base is unchanged."""
    from localrun.engine.measure.choose import check_precision_request
    from localrun.quant.checkpoint.mapping import BASE_TYPES
    from localrun.quant.convert.overlay import open_overlay_source, read_base, unfinished_bytes, write_overlay
    from localrun.quant.open import open_model
    from localrun.quant.precision.solver import copies_limits

    folder = wanted.target_folder
    manifest = read_base(folder)
    has = next(iter(open_model(folder).moe_layers.values())).types[0]
    if not options.hot or options.target is not None:
        raise UsageError(
            f"{folder} holds a finished model with a base in {has.name.lower()}",
            hint="use --hot TYPE:SIZE to give it another overlay; for anything else choose another directory",
        )
    _check_formats(wanted, options, manifest)
    checkpoint = open_overlay_source(wanted.source, folder)
    options = replace(options, base=BASE_TYPES[has.name.lower()])
    model = open_model(wanted.source)
    check_precision_request(model, precision.precision_request(wanted, options))
    copies = copies_limits(model.moe_layers, options.hot)
    out.planned(None, options, copies)
    needed = max(0, sum(limit.n_bytes for limit in copies) - unfinished_bytes(folder))
    check_free(folder, needed, what="the overlay", otherwise="ask for less")
    if wanted.dry_run:
        out.checked(None, copies)
        out.note(f"dry run: nothing written; the disk has room for {format_size(needed)} of copies")
        out.finished(None)
        return
    choice = precision.learn(wanted, checkpoint, options, jobs, 0, out)
    assert choice is not None
    assert choice.solution is not None
    out.chosen(choice)
    result = write_overlay(
        checkpoint,
        choice.solution.plan,
        folder,
        choice.importance,
        jobs=jobs,
        progress=out.progress("overlay"),
        sections={"profile": precision.profile_section(choice)},
    )
    out.wrote(result)
    return _finish(wanted, options, choice, result, out)


def _finish(
    wanted: Request,
    options: FormatOptions,
    choice: PrecisionChoice | None,
    result: ConversionResult | Path,
    out: Follower,
) -> None:
    """Comparison with the source, report, JSON. `result`: what was written, or a model that was there."""
    from localrun.quant.checkpoint.mapping import DENSE_TYPES
    from localrun.quant.model.manifest import MANIFEST_NAME, read_manifest

    if wanted.dry_run:
        out.finished(None)
        return
    dense = DENSE_TYPES[str(read_manifest(wanted.target_folder / MANIFEST_NAME).options.get("dense", DENSE_DEFAULT))]
    importance = choice.importance if choice is not None else None
    evaluations = precision.evaluate(wanted, wanted.source, dense, importance, out)
    if choice is not None or evaluations:
        precision.write_report(wanted, options, choice, wanted.source.resolve().name, evaluations)
        out.note(f"report: {wanted.target_folder / 'report.md'}")
    out.finished(result)


def _add_to_manifest(folder: Path, sections: Mapping[str, Mapping[str, object]]) -> None:
    from localrun.quant.model.manifest import MANIFEST_NAME, read_manifest, write_manifest

    write_manifest(replace(read_manifest(folder / MANIFEST_NAME), **sections), folder)  # type: ignore[arg-type]


def _check_space_for_both(plan: ConversionPlan, copy_bytes: int, folder: Path) -> int:
    """Room for the base and its overlay; bytes that they still need. Raises DiskSpaceError: less is free."""
    from localrun.quant.convert.converter import check_space

    needed = check_space(plan, folder) + copy_bytes
    check_free(folder, needed, what="a base with its overlay", otherwise="ask for less")
    return needed
