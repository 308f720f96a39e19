"""Describes a conversion: the plan as a table, and the manifest of the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import xxhash
from gguf import GGMLQuantizationType

import localrun
from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.checkpoint.mapping import ConversionPlan, PlannedTensor
from localrun.quant.convert.journal import PartResult
from localrun.quant.formats.transcode import Loss
from localrun.quant.model.manifest import KeptExperts, Manifest, ModelFile, Overlay, OverlayStack, checksum


@dataclass(frozen=True, slots=True)
class PlanLine:
    """A row of the plan's table: all tensors of one kind that make the same step."""

    kind: str
    source: str
    target: str
    n_tensors: int
    source_bytes: int
    target_bytes: int
    exact: bool


_EXACT = {
    ("I8", GGMLQuantizationType.MXFP4),
    ("I8", GGMLQuantizationType.BF16),
    ("BF16", GGMLQuantizationType.BF16),
    ("F8_E4M3", GGMLQuantizationType.BF16),
    ("I64", GGMLQuantizationType.I32),
    ("I32", GGMLQuantizationType.I32),
}


def summarize(plan: ConversionPlan) -> list[PlanLine]:
    """The plan by kinds, for people."""
    groups: dict[tuple[str, str, str], list[PlannedTensor]] = {}
    for tensor in plan.tensors.values():
        source = tensor.parts[0].source
        key = (source.spec.role.value, source.dtype, tensor.info.type.name)
        groups.setdefault(key, []).append(tensor)
    lines = []
    for (kind, source_dtype, target), tensors in groups.items():
        parts = [part for tensor in tensors for part in tensor.parts]
        sizes = [part.source.weight.n_bytes + (part.source.scale.n_bytes if part.source.scale else 0) for part in parts]
        lines.append(
            PlanLine(
                kind=kind,
                source=source_dtype,
                target=target,
                n_tensors=len(tensors),
                source_bytes=sum(sizes),
                target_bytes=sum(tensor.info.n_bytes for tensor in tensors),
                exact=target == "F32" or (source_dtype, parts[0].target) in _EXACT,
            )
        )
    return lines


def build_manifest(
    plan: ConversionPlan,
    file_name: str,
    done: Mapping[int, PartResult],
    options: Mapping[str, str],
    losses: Mapping[str, Loss],
) -> Manifest:
    """The manifest of a finished conversion; `done` has a result for every part."""
    tensors: dict[str, str] = {}
    experts: dict[int, tuple[list[str], list[str], list[str]]] = {}
    number = 0
    for name, tensor in plan.tensors.items():
        digests = [done[number + i].checksum for i in range(len(tensor.parts))]
        number += len(tensor.parts)
        if tensor.is_experts:
            experts.setdefault(tensor.layer, ([], [], []))[tensor.projection].extend(digests)
        else:
            (tensors[name],) = digests
    return Manifest(
        files=(ModelFile(file_name, plan.file_size, checksum(plan.header)),),
        tensors=tensors,
        experts=experts,
        source={**source_facts(plan, done), "rounding": _rounding(losses)},
        tools={"localrun": localrun.__version__},
        options=options,
        kept=kept_experts(plan.checkpoint) if plan.options.keep_experts else None,
    )


def kept_experts(checkpoint: Checkpoint) -> KeptExperts:
    """Where experts are that stay in their checkpoint."""
    sizes = {shard.path.name: shard.size for shard in checkpoint.shards}
    return KeptExperts(str(checkpoint.path.resolve()), checkpoint.identity, sizes)


def _rounding(losses: Mapping[str, Loss]) -> dict[str, object]:
    return {key: {"relative_rms": loss.relative_rms} for key, loss in sorted(losses.items())}


def overlay_section(
    plan: ConversionPlan,
    file_name: str,
    done: Mapping[int, PartResult],
    options: Mapping[str, str],
    losses: Mapping[str, Loss],
) -> Overlay:
    """The manifest entry of a finished overlay; `done` has a result for every part."""
    checksums: dict[tuple[int, str], list[list[str]]] = {}
    ids: dict[tuple[int, str], tuple[int, ...]] = {}
    number = 0
    for tensor in plan.tensors.values():
        key = (tensor.layer, tensor.info.type.name.lower())
        checksums.setdefault(key, []).append([done[number + i].checksum for i in range(len(tensor.parts))])
        ids[key] = tuple(part.expert[1] for part in tensor.parts if part.expert is not None)
        number += len(tensor.parts)
    experts: dict[int, dict[str, OverlayStack]] = {}
    for (layer, kind), (gate, up, down) in checksums.items():
        experts.setdefault(layer, {})[kind] = OverlayStack(ids[layer, kind], (gate, up, down))
    file = ModelFile(file_name, plan.file_size, checksum(plan.header))
    return Overlay((file,), experts, options, _rounding(losses))


def source_facts(plan: ConversionPlan, done: Mapping[int, PartResult]) -> dict[str, object]:
    """The manifest entry of the checkpoint: sizes and, per shard, a digest of the weights read from it."""
    checkpoint = plan.checkpoint
    lines: list[list[str]] = [[] for _ in checkpoint.shards]
    number = 0
    for tensor in plan.tensors.values():
        for part in tensor.parts:
            source, result = part.source, done[number]
            lines[source.weight.file].append(f"{source.spec.name} {result.weight}\n")
            if source.scale is not None:
                lines[source.scale.file].append(f"{source.spec.scale_name} {result.scale}\n")
            number += 1
    files = [
        {
            "name": shard.path.name,
            "size_bytes": shard.size,
            "header_xxh3": shard.header_digest,
            "weights_xxh3": xxhash.xxh3_128_hexdigest("".join(sorted(shard_lines)).encode()),
        }
        for shard, shard_lines in zip(checkpoint.shards, lines, strict=True)
    ]
    mtp = checkpoint.mtp
    left_out = {} if mtp is None else {"left_out": {"kind": mtp.kind, "tensors": mtp.n_tensors, "bytes": mtp.n_bytes}}
    return {"kind": "checkpoint", "identity": checkpoint.identity, "files": files, **left_out}
