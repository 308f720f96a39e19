"""Opens a model whatever its files look like: a converted directory, a GGUF, or an official checkpoint."""

from __future__ import annotations

from pathlib import Path

from gguf import GGMLQuantizationType

from localrun.errors import FormatError
from localrun.quant.checkpoint.source import CheckpointSource
from localrun.quant.gguf.source import GgufSource
from localrun.quant.model.source import ModelSource


def open_model(path: Path, *, dense: GGMLQuantizationType = GGMLQuantizationType.Q8_0) -> ModelSource:
    """Opens any of the three kinds, fully checked, without reading weights.

    Args:
        path: a converted directory, a GGUF (any part of a split one), or an official checkpoint directory.
        dense: ggml type that FP8 dense matrices of an official checkpoint are presented in.

    Raises:
        FormatError: damaged or inconsistent files.
        UnsupportedModelError: a sound model of a kind that localrun does not run.
    """
    if not path.exists():
        raise FormatError(
            f"{path}: no such file or directory",
            hint="give a converted directory, a GGUF file or a checkpoint directory",
        )
    if path.is_dir() and (path / "config.json").is_file():
        return CheckpointSource.open(path, dense=dense)
    return GgufSource.open(path)
