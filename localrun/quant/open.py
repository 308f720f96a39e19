"""Opens a model whatever its files look like: a converted directory, a GGUF, or an official checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType

from localrun.errors import LocalrunError
from localrun.quant.checkpoint.source import CheckpointSource
from localrun.quant.gguf.source import GgufSource
from localrun.quant.locate import Located, locate
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
    return GgufSource.open(found.path, with_holes=with_holes)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a path is.

    Attributes:
        located: the model that is opened for it; None if that can't be told.
        source: the opened model; None if it can't be run.
        problem: why not, with what to do.
    """

    located: Located | None
    source: ModelSource | None
    problem: LocalrunError | None

    @property
    def name(self) -> str:
        """For people: the model's own name, `owner/name` in a hub's cache, else that of the file or folder."""
        if self.located is not None and "/" in self.located.name:
            return self.located.name
        own = self.source.metadata.get("general.name") if self.source is not None else None
        return str(own or (self.located.name if self.located is not None else ""))


def identify(path: Path) -> Identity:
    """What a path is, or why it can't be opened: exactly what `open_model` does with it, without raising.

    For whatever shows models (a chooser, a list, `doctor`). Reads headers only; a large one takes a second.
    """
    located = None
    try:
        located = locate(path)
        return Identity(located, open_model(path), None)
    except LocalrunError as problem:
        return Identity(located, None, problem)
