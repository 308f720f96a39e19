"""Converts a checkpoint into a directory; `writing.py` writes its file.

DST/.convert/   work directory: model.gguf.partial, state.json, journal.jsonl
DST/model.gguf  appears once it is completely on disk (dense.gguf if the experts stay in the checkpoint)
DST/localrun.json   the manifest, last: a directory that has one is complete; one with a work directory and no manifest doesn't open
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from localrun.errors import UsageError
from localrun.quant.checkpoint.directory import CONFIG_NAME, Checkpoint
from localrun.quant.checkpoint.mapping import ConversionOptions, ConversionPlan, make_plan
from localrun.quant.convert.journal import PartResult
from localrun.quant.convert.report import build_manifest
from localrun.quant.convert.writing import DEFAULT_JOBS, ConversionProgress, ConversionResult, OutputFile, write_file
from localrun.quant.formats.transcode import Loss
from localrun.quant.model.manifest import MANIFEST_NAME, WORK_NAME, write_manifest
from localrun.quant.precision.dense_solver import DENSE_TYPES_OPTION, types_as_text

MODEL_NAME = "model.gguf"
DENSE_NAME = "dense.gguf"
"""Instead, where the experts stay in the checkpoint: no model by itself."""
LEARNED_NAME = ".tiers"
"""Folder in the target for intermediate results of the choice of formats (see `localrun.engine.measure.choose`)."""


def check_target(source: Path, target: Path) -> None:
    """Rejects unsafe targets.

    Raises:
        UsageError: it is inside the source, or already holds something else.
    """
    source, target = source.resolve(), target.resolve()
    if target == source or source in target.parents:
        raise UsageError(
            f"{target} is inside the source", hint="the source is never written to; choose another directory"
        )
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target} is a file", hint="pass a directory that does not exist yet")
    if (target / MANIFEST_NAME).exists():
        raise UsageError(f"{target} holds a finished model", hint="choose another directory, or delete this one")
    if not (target / WORK_NAME).is_dir() and any(path.name != LEARNED_NAME for path in target.iterdir()):
        raise UsageError(f"{target} is not empty", hint="pass a directory that does not exist yet")


def remove_leftovers(target: Path) -> None:
    """Removes what a run leaves that was killed after the manifest, when the model was complete."""
    if (target / MANIFEST_NAME).is_file():
        shutil.rmtree(target / WORK_NAME, ignore_errors=True)


def check_space(plan: ConversionPlan, target: Path) -> int:
    """Bytes still to allocate for the output; see `OutputFile.check_space`."""
    return output_file(plan, target).check_space(plan)


def convert(
    source: Path,
    target: Path,
    options: ConversionOptions | None = None,
    *,
    jobs: int = DEFAULT_JOBS,
    progress: Callable[[ConversionProgress], None] | None = None,
) -> ConversionResult:
    """Converts the checkpoint directory `source`; see `write_plan`."""
    remove_leftovers(target)
    check_target(source, target)
    return write_plan(make_plan(open_checkpoint(source), options), target, jobs=jobs, progress=progress)


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens the checkpoint at `path`, with a clear error if it is already converted.

    Raises:
        UsageError: not a checkpoint directory.
        FormatError, CheckpointError, UnsupportedModelError: see `Checkpoint.open`.
    """
    if not path.exists():
        raise UsageError(
            f"{path}: no such directory",
            hint="name the directory of a downloaded checkpoint; localrun downloads nothing",
        )
    if not (path / CONFIG_NAME).is_file() or (path / MANIFEST_NAME).exists():
        raise UsageError(f"{path} is not a checkpoint directory", hint="convert reads the official safetensors release")
    return Checkpoint.open(path)


def write_plan(
    plan: ConversionPlan,
    target: Path,
    *,
    jobs: int = DEFAULT_JOBS,
    progress: Callable[[ConversionProgress], None] | None = None,
) -> ConversionResult:
    """Writes the plan to a directory, or completes an earlier run.

    Args:
        plan: what to write.
        target: the directory; created if needed.
        jobs: threads.
        progress: called a few times a second from this thread.

    Raises:
        UsageError: the target is in use for something else, or an earlier run had other options.
        DiskSpaceError, StoreError: the disks.
        FormatError: a weight that the target type can't represent (NaN); finished work is kept and reused.
    """
    check_target(plan.checkpoint.path, target)
    options = described_options(plan)

    def publish(done: Mapping[int, PartResult], losses: Mapping[str, Loss]) -> None:
        for left in target.glob(f"{MANIFEST_NAME}.*.partial"):  # by a run that was killed while it wrote the manifest
            left.unlink()
        write_manifest(build_manifest(plan, output.final.name, done, options, losses), target)

    created = not target.exists()
    output = output_file(plan, target)
    try:
        return write_file(plan, output, options, publish, jobs=jobs, progress=progress)
    finally:
        if created and not any(output.work.glob("*.partial")) and not output.final.exists():
            shutil.rmtree(target, ignore_errors=True)


def output_file(plan: ConversionPlan, target: Path) -> OutputFile:
    """Where the plan's file is made in `target`."""
    return OutputFile(target / (DENSE_NAME if plan.options.keep_experts else MODEL_NAME), target / WORK_NAME)


def described_options(plan: ConversionPlan) -> dict[str, str]:
    """The user's choices by option name, as the manifest has them and as an unfinished run is compared by."""
    base, importance = plan.options.base, plan.options.importance
    options = {"dense": plan.options.dense.name.lower(), "base": "default" if base is None else base.name.lower()}
    if plan.options.dense_types:
        options[DENSE_TYPES_OPTION] = types_as_text(plan.options.dense_types)
    if plan.options.keep_experts:
        options["keep-experts"] = "given"
    return options if importance is None else options | {"imatrix": importance.digest}
