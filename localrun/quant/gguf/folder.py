"""Finds the GGUF model in a folder: groups the parts of split models and skips companion files.

Knows nothing about converted directories and checkpoints; headers are read only if names are not enough.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localrun.errors import FormatError, LocalrunError
from localrun.quant.gguf.file import read_gguf
from localrun.quant.gguf.relatives import relative_of
from localrun.quant.unfinished import refuse_unfinished
from localrun.units import format_size

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
_MAX_PARTS = 9999
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF in a folder, all its parts together.

    Attributes:
        path: the file; for a split model the first existing part.
        name: the file's, without number and extension.
        n_bytes: of all parts.
    """

    path: Path
    name: str
    n_bytes: int


def ggufs_in(folder: Path) -> list[GgufModel]:
    """All GGUFs right in a folder, in the order of their names, companions included."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.gguf")):
        match = _SPLIT_NAME.fullmatch(path.name)
        groups.setdefault(match["stem"] if match else path.name.removesuffix(".gguf"), []).append(path)
    return [GgufModel(paths[0], name, sum(map(_size, paths))) for name, paths in groups.items()]


def models_in(folder: Path) -> list[GgufModel]:
    """GGUFs right in a folder that may be models to chat with: a single one, or all but drafters, encoders and the like."""
    ggufs = ggufs_in(folder)
    return ggufs if len(ggufs) < 2 else [gguf for gguf in ggufs if not is_companion(gguf.path)]


def is_companion(path: Path) -> bool:
    """Whether a GGUF is a companion rather than a model; an unreadable file counts as a model, so that opening it reports why."""
    try:
        header = read_gguf(path)
    except LocalrunError:
        return False
    relative = relative_of(header.metadata, header.tensors)
    return relative is not None and relative.kind != "other"


def only_model(folder: Path) -> Path:
    """The only GGUF model directly in a folder; for a split model its first part.

    Raises:
        FormatError: none, or several.
    """
    models = models_in(folder)
    if len(models) == 1:
        return models[0].path
    if not models:
        refuse_leftovers(folder)
        raise FormatError(
            f"{folder}: contains no GGUF model",
            hint="pass a converted directory, a GGUF file or a checkpoint directory",
        )
    raise several(folder, "GGUF models", [(model.path.name, model.n_bytes) for model in models])


def several(folder: Path, noun: str, models: Sequence[tuple[str, int]]) -> FormatError:
    """The error for a folder that leaves a choice: each with its size."""
    listed = ", ".join(f"{name} ({format_size(n_bytes)})" for name, n_bytes in models[:_SHOWN])
    more = f" and {len(models) - _SHOWN} more" if len(models) > _SHOWN else ""
    return FormatError(f"{folder}: {len(models)} {noun}: {listed}{more}", hint="pass one of them")


def refuse_leftovers(folder: Path) -> None:
    """Raises FormatError if a folder holds pieces or unfinished downloads of a model."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and ".gguf" in path.name:
            refuse_unfinished(path)
    for cache in (folder / ".cache" / "huggingface" / "download", folder / "blobs"):
        if (left := next(iter(sorted(cache.glob("**/*.incomplete"))), None)) is not None:
            raise FormatError(f"{folder}: an unfinished download ({left.name})", hint="run the download again")


def split_files(path: Path) -> list[Path]:
    """All parts of the model that `path` belongs to.

    Raises:
        FormatError: parts are missing.
    """
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= _MAX_PARTS:
        raise FormatError(f"{path}: invalid part number {match['number']} of {match['count']}")
    paths = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise FormatError(
            f"{path}: {len(missing)} of {count} parts are missing, first {missing[0]}",
            hint="put all parts in one folder",
        )
    return paths


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
