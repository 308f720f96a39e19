"""Opens a model whatever its files look like: a converted directory, with its experts or without, a GGUF, or a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gguf import GGMLQuantizationType

from localrun.quant.checkpoint.kept import KeptSource, is_kept
from localrun.quant.checkpoint.source import CheckpointSource
from localrun.quant.gguf.source import GgufSource
from localrun.quant.locate import locate
from localrun.quant.model.source import ModelSource


def open_model(
    path: Path, *, dense: GGMLQuantizationType = GGMLQuantizationType.Q8_0, with_holes: bool = False
) -> ModelSource:
    """Opens any of the three kinds, fully checked, without reading weights.

    Args:
        path: a converted directory, a GGUF (any part of a split one), an official checkpoint directory, or a folder that
            holds one of them (see `locate`).
        dense: ggml type that FP8 dense matrices of an official checkpoint are presented in.
        with_holes: also a converted model of which parts were never written: for those who check it against its checksums.

    Raises:
        FormatError: damaged or inconsistent files.
        UnsupportedModelError: a sound model of a kind that localrun does not run.
    """
    found = locate(path)
    if found.kind == "checkpoint":
        return CheckpointSource.open(found.path, dense=dense)
    if found.kind == "converted" and is_kept(found.path):
        return KeptSource.open(found.path, with_holes=with_holes)
    return GgufSource.open(found.path, with_holes=with_holes)


def own_files(source: ModelSource) -> Sequence[Path]:
    """A model's files but for those of a checkpoint that only lends its experts."""
    return source.own_files if isinstance(source, KeptSource) else source.files
