"""Writes overlays: better copies of chosen experts, in a separate file next to the base (layout: `overlay_index`).

The file's name contains the digest of its plan: a new overlay is written under a unique name, then the manifest is updated,
then the old one is deleted. So readers always find a complete overlay, wherever the writer is killed. The base is only read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import xxhash
from gguf import GGUFValueType

from localrun.alignment import align_up
from localrun.errors import StoreError, UsageError
from localrun.quant.checkpoint.directory import Checkpoint, SourceTensor, is_checkpoint
from localrun.quant.checkpoint.mapping import (
    ALIGNMENT,
    ConversionOptions,
    ConversionPlan,
    ImportanceLookup,
    PlannedTensor,
    check_type,
    shape_tensor,
)
from localrun.quant.convert.journal import PartResult
from localrun.quant.convert.report import overlay_section
from localrun.quant.convert.writing import DEFAULT_JOBS, ConversionProgress, ConversionResult, OutputFile, write_file
from localrun.quant.formats.transcode import Loss
from localrun.quant.gguf.file import GgufValue, build_header, tensor_offsets
from localrun.quant.gguf.overlay_index import ARCHITECTURE, BASE_KEY, ids_key, stack_name
from localrun.quant.model.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from localrun.quant.model.source import PROJECTIONS
from localrun.quant.precision.copies import BetterCopies

WORK_NAME = ".overlay"


def plan_overlay(
    checkpoint: Checkpoint, copies: BetterCopies, base: Manifest, importance: ImportanceLookup | None = None
) -> ConversionPlan:
    """Plans an overlay's file, for `write_overlay`; `file_size` is its size.

    Raises:
        UsageError: a missing layer or expert, rows that a type can't hold, a checkpoint other than the base's, or no experts.
    """
    identity = base.source.get("identity")
    if identity != checkpoint.identity:
        raise UsageError(
            f"{checkpoint.path} is not the checkpoint the base was made from",
            hint="use that checkpoint, or convert this one into another directory",
        )
    _check_experts(checkpoint, copies)
    if not copies.n_experts:
        raise UsageError("an overlay of no experts", hint="choose at least one, or remove the overlay")
    sources = {
        (*_layer_and_projection(tensor), tensor.spec.expert): tensor
        for tensor in checkpoint.tensors
        if tensor.spec.expert is not None
    }
    metadata = {"general.architecture": GgufValue.string(ARCHITECTURE), BASE_KEY: GgufValue.string(base.base_digest)}
    shaped = []
    for layer, by_type in copies.experts_by_type().items():
        for kind, experts in by_type.items():
            metadata[ids_key(layer, kind)] = GgufValue.array(GGUFValueType.INT32, experts)
            for projection in range(len(PROJECTIONS)):
                stack = [sources[layer, projection, expert] for expert in experts]
                check_type(stack[0].spec, stack[0].dtype, kind, "a format like")
                name = stack_name(layer, projection, kind)
                shaped.append((shape_tensor(name, kind, stack, checkpoint.config.n_routed_experts), layer, projection))
    infos = [info for (info, _), _, _ in shaped]
    header = build_header(metadata, infos, ALIGNMENT)
    tensors = {
        info.name: PlannedTensor(info, len(header) + offset, parts, layer, projection)
        for ((info, parts), layer, projection), offset in zip(shaped, tensor_offsets(infos, ALIGNMENT), strict=True)
    }
    last = tensors[infos[-1].name]
    options = ConversionOptions(importance=importance)
    file_size = align_up(last.offset + last.info.n_bytes, ALIGNMENT)
    return ConversionPlan(checkpoint, options, metadata, tensors, header, file_size, ())


def _check_experts(checkpoint: Checkpoint, copies: BetterCopies) -> None:
    config = checkpoint.config
    for layer, experts in copies.formats.items():
        if not 0 <= layer < config.num_hidden_layers:
            raise UsageError(f"better copies: layer {layer}, the model has layers 0 to {config.num_hidden_layers - 1}")
        odd = [expert for expert in experts if not 0 <= expert < config.n_routed_experts]
        if odd:
            raise UsageError(
                f"better copies: layer {layer}: expert {odd[0]}, the model has experts 0 to {config.n_routed_experts - 1}"
            )


def _layer_and_projection(tensor: SourceTensor) -> tuple[int, int]:
    """Layer and projection of an expert's matrix, from its name in the base."""
    assert tensor.spec.gguf is not None
    _, layer, name, _ = tensor.spec.gguf.split(".")
    return int(layer), PROJECTIONS.index(name.removeprefix("ffn_").removesuffix("_exps"))


def open_overlay_source(path: Path, target: Path) -> Checkpoint:
    """The checkpoint to make an overlay for `target` from.

    Raises:
        UsageError: it is missing, or not a checkpoint; the message explains that an overlay needs it.
    """
    if not is_checkpoint(path):
        raise UsageError(
            f"{path}: no checkpoint found, and better copies for {target} can only be made from the source checkpoint",
            hint="pass the directory of the checkpoint the base was made from",
        )
    return Checkpoint.open(path)


def read_base(target: Path) -> Manifest:
    """The manifest of a finished conversion.

    Raises:
        UsageError: there is none.
    """
    path = target / MANIFEST_NAME
    if not path.is_file():
        raise UsageError(f"{target} is not a converted model", hint="convert the base first, then add the overlay")
    return read_manifest(path)


def write_overlay(
    checkpoint: Checkpoint,
    copies: BetterCopies,
    target: Path,
    importance: ImportanceLookup | None = None,
    *,
    jobs: int = DEFAULT_JOBS,
    progress: Callable[[ConversionProgress], None] | None = None,
    sections: Mapping[str, Mapping[str, object]] | None = None,
) -> ConversionResult:
    """Adds or replaces a converted model's overlay; resumes an interrupted run.

    Args:
        checkpoint: the base's checkpoint (`open_overlay_source`).
        copies: the experts and their formats.
        target: the converted model's directory.
        importance: for types that round.
        sections: the manifest's `profile` and `report` to write with it.

    Raises:
        UsageError: not a converted model, another checkpoint, impossible copies, or an unfinished run with other options.
        DiskSpaceError, StoreError: disk errors, or the source is gone.
        FormatError: a weight that the target type can't hold.
    """
    base = read_base(target)
    plan = plan_overlay(checkpoint, copies, base, importance)
    name = f"overlay-{plan.digest[:8]}.gguf"
    options = {"tiers": _describe(copies)}
    if importance is not None:
        options["imatrix"] = importance.digest
    added: dict[str, Mapping[str, object]] = {"better_copies": copies.to_json(), **(sections or {})}

    def publish(done: Mapping[int, PartResult], losses: Mapping[str, Loss]) -> None:
        section = overlay_section(plan, name, done, options, losses)
        _put(target, replace(base, overlay=section, **added))  # type: ignore[arg-type]

    if base.overlay is not None and base.overlay.files[0].name == name and (target / name).is_file():
        _put(target, replace(base, **added))  # type: ignore[arg-type]
        # What a run leaves that was killed after the manifest; another overlay that is half done stays.
        if not any((target / WORK_NAME).glob("*.partial")):
            shutil.rmtree(target / WORK_NAME, ignore_errors=True)
        return ConversionResult(target, plan.file_size, 0.0, 0, 0, {})
    missing = [file for file in checkpoint.files if not file.is_file()]
    if missing:
        raise StoreError(
            f"{missing[0]}: is gone, and better copies can only be made from the source checkpoint",
            hint="restore the checkpoint, then run the same command again",
        )
    return write_file(
        plan, OutputFile(target / name, target / WORK_NAME), options, publish, jobs=jobs, progress=progress
    )


def unfinished_bytes(target: Path) -> int:
    """What an overlay that was interrupted takes on the disk; the next run goes on with it, or removes it."""
    return sum(path.stat().st_blocks * 512 for path in (target / WORK_NAME).glob("*.partial"))


def remove_overlay(target: Path) -> None:
    """Removes a model's overlay; the base is unchanged.

    Raises:
        UsageError: not a converted model.
    """
    _put(target, replace(read_base(target), overlay=None, better_copies={}, report={}))


def _put(target: Path, manifest: Manifest) -> None:
    """Writes a manifest, then deletes overlays that it does not name."""
    write_manifest(manifest, target)
    named = {file.name for file in manifest.overlay.files} if manifest.overlay is not None else set()
    for path in target.glob("overlay-????????.gguf"):
        if path.name not in named:
            path.unlink()


def _describe(copies: BetterCopies) -> str:
    """For people, and different for different plans."""
    return f"{copies.n_experts} experts ({xxhash.xxh3_64_hexdigest(repr(copies.to_json()).encode())})"
