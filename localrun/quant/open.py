"""Opens any kind of model: a converted directory, with or without its experts, a GGUF, or a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gguf import GGMLQuantizationType

from localrun.errors import UsageError
from localrun.quant.checkpoint.kept import KeptSource, is_kept
from localrun.quant.checkpoint.mapping import DENSE_TYPES
from localrun.quant.checkpoint.source import CheckpointSource
from localrun.quant.gguf.source import GgufSource
from localrun.quant.locate import locate
from localrun.quant.model.source import ModelSource


def open_model(path: Path, *, dense: GGMLQuantizationType | None = None, unchecked: bool = False) -> ModelSource:
    """Opens any of the three kinds, fully checked, without reading weights.

    Args:
        path: a converted directory, a GGUF (any part of a split one), an official checkpoint directory, or a folder that
            holds one of them (see `locate`).
        dense: ggml type that FP8 dense matrices of an official checkpoint are presented in; None: Q8_0.
        unchecked: also accept a converted model that differs from its checksums or has parts that were never written.

    Raises:
        FormatError: damaged or inconsistent files.
        UnsupportedModelError: a valid model of a kind that localrun does not run.
        UsageError: `dense` for a model whose matrices are already converted.
    """
    found = locate(path)
    if found.kind == "checkpoint":
        return CheckpointSource.open(found.path, dense=dense or GGMLQuantizationType.Q8_0)
    if dense is not None:
        raise UsageError(
            f"{found.path}: --dense {dense.name.lower()}: this model's dense matrices are already converted",
            hint="leave out --dense, or pass the official checkpoint",
        )
    if found.kind == "converted" and is_kept(found.path):
        return KeptSource.open(found.path, unchecked=unchecked)
    return GgufSource.open(found.path, unchecked=unchecked)


def dense_type(name: str | None) -> GGMLQuantizationType | None:
    """`q4_k` -> Q4_K.

    Raises:
        UsageError: not a type for dense matrices.
    """
    if name is None:
        return None
    if name not in DENSE_TYPES:
        raise UsageError(f"--dense {name}: expected one of {', '.join(DENSE_TYPES)}")
    return DENSE_TYPES[name]


def own_files(source: ModelSource) -> Sequence[Path]:
    """A model's files but for those of a checkpoint that only lends its experts."""
    return source.own_files if isinstance(source, KeptSource) else source.files
