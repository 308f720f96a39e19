"""Resolves a path: which model in a folder, a hub cache or a folder of quantizations to open, and its name.

Used by everything that lists or opens models, so that both agree. Reads names, and headers if a folder has several GGUFs;
whether a model is valid is determined by opening it.

Hub cache: `models--OWNER--NAME/refs/BRANCH` names a commit, `snapshots/COMMIT/` holds links to the files of that commit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from localrun.errors import FormatError, LocalrunError, UnsupportedModelError, UsageError
from localrun.quant.checkpoint.directory import CONFIG_NAME, INDEX_NAME
from localrun.quant.gguf.folder import GgufModel, ggufs_in, is_companion, models_in, refuse_leftovers, several
from localrun.quant.model.manifest import MANIFEST_NAME, is_unfinished, refuse_unfinished_conversion
from localrun.quant.unfinished import refuse_unfinished

Kind = Literal["converted", "GGUF", "checkpoint"]

_HUB = "models--"


@dataclass(frozen=True, slots=True)
class Located:
    """A model's location.

    Attributes:
        path: what to open: a converted or checkpoint directory, or a GGUF file (any part of a split one).
        kind: kind of model.
        name: for people: `owner/name` in a hub's cache, else the file's or folder's name.
    """

    path: Path
    kind: Kind
    name: str


def locate(path: Path) -> Located:
    """The one model that a user means by a path.

    Raises:
        UsageError: nothing is there, or nothing that is a model.
        FormatError: an unfinished download, or several models; the message lists them with their sizes.
    """
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be entered
        raise FormatError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if path.is_symlink() and not path.exists():
        raise FormatError(f"{path}: a link to a missing file", hint="run the download again")
    if not path.exists():
        raise UsageError(
            f"{path}: no such file or directory",
            hint="pass a converted directory, a GGUF file or a checkpoint directory",
        )
    if not path.is_dir():
        refuse_unfinished(path)
        return Located(path, "GGUF", _name(path))
    folder = _snapshot(path) or path
    here = _in_folder(folder)
    if here is not None and not _is_companion(here):
        return here
    below = list(_below(folder))
    if len(below) == 1:
        (only,) = below
        return locate(only.path) if only.kind == "GGUF" and only.path.is_dir() else only  # which says what its fault is
    if below:
        raise several(path, "models", [(_label(found.path, folder), _bytes(found)) for found in below])
    if here is not None:
        return here  # opening it says what it is
    refuse_unfinished_conversion(folder)
    refuse_leftovers(folder)
    if ggufs := ggufs_in(folder):
        return _gguf(ggufs[0])
    raise UsageError(
        f"{path}: neither a converted model ({MANIFEST_NAME}), nor a checkpoint ({CONFIG_NAME}), nor a GGUF file",
        hint="pass a converted directory, a GGUF file or a checkpoint directory",
    )


def models_at(folder: Path) -> tuple[list[Located], Path | None]:
    """For lists of models: those right in a folder, and the folder whose folders may hold more; None: no need to look there.

    What has a fault that only opening tells is among them. Of a hub's repository only the snapshot is shown that opens.
    """
    try:
        place = _snapshot(folder) or folder
        here = _all_in(place)
    except LocalrunError:
        return [Located(folder, "GGUF", _name(folder))], None
    except OSError:
        return [], None  # a folder that may not be entered
    whole = any(found.kind != "GGUF" for found in here)
    return [found for found in here if not _is_companion(found)], None if whole else place


def _in_folder(folder: Path) -> Located | None:
    """The model right in a folder; None without one."""
    here = _all_in(folder)
    if len(here) > 1:
        raise several(folder, "GGUF models", [(model.path.name, model.n_bytes) for model in models_in(folder)])
    return here[0] if here else None


def _all_in(folder: Path) -> list[Located]:
    """All models right in a folder: several are possible for GGUFs only. What a conversion has not finished is none."""
    if is_unfinished(folder):
        return []
    if (folder / MANIFEST_NAME).is_file():
        return [Located(folder, "converted", _name(folder))]
    models = models_in(folder)
    if (folder / CONFIG_NAME).is_file() and (not models or _has_weights(folder)):
        return [Located(folder, "checkpoint", _name(folder))]
    return [_gguf(model) for model in models]


def _below(folder: Path) -> Iterator[Located]:
    """Models in the folders right below: one for each quantization, or whole repositories of a hub's cache."""
    for sub in sorted(folder.iterdir()):
        if not sub.is_dir() or sub.name.startswith("."):
            continue
        try:
            target = _snapshot(sub) or sub
            found = _in_folder(target)
        except LocalrunError:
            yield Located(sub, "GGUF", _name(sub))  # several models or an error: opening it reports which
            continue
        if found is None and target != sub:
            yield from _below(target)
        elif found is not None and not _is_companion(found):
            yield found


def _is_companion(found: Located) -> bool:
    return found.kind == "GGUF" and found.path.is_file() and is_companion(found.path)


def _gguf(model: GgufModel) -> Located:
    return Located(model.path, "GGUF", _name(model.path, model.name))


def _has_weights(folder: Path) -> bool:
    return (folder / INDEX_NAME).is_file() or any(folder.glob("*.safetensors"))


def _snapshot(folder: Path) -> Path | None:
    """The snapshot to use of a repository in a hub cache: that of branch `main`, else the only one."""
    if not folder.name.startswith(_HUB) or not (folder / "snapshots").is_dir():
        return None
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    try:
        commit = (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        commit = ""
    named = [path for path in snapshots if path.name == commit]
    if named or len(snapshots) == 1:
        return (named or snapshots)[0]
    if not snapshots:
        refuse_leftovers(folder)
        raise FormatError(f"{folder}: no snapshot in this cache", hint="run the download again")
    raise UnsupportedModelError(
        f"{folder}: {len(snapshots)} snapshots, and no refs/main to choose one", hint="pass one of them"
    )


def _name(path: Path, own: str = "") -> str:
    """`owner/name` for whatever lies in a hub's cache, a path inside the snapshot behind it."""
    for parent in (path, *path.absolute().parents):
        if parent.name.startswith(_HUB) and (owner_name := parent.name.removeprefix(_HUB).replace("--", "/")):
            return owner_name
    return own or path.name or str(path)


def _label(path: Path, folder: Path) -> str:
    """What tells a model below `folder` from its neighbours."""
    relative = path.relative_to(folder)
    if relative.parts[0].startswith(_HUB):
        return relative.parts[0].removeprefix(_HUB).replace("--", "/")
    return relative.parts[0]


def _bytes(found: Located) -> int:
    folder = found.path if found.path.is_dir() else found.path.parent
    total = 0
    for file in folder.iterdir():
        if file.suffix in (".gguf", ".safetensors"):
            try:
                total += file.stat().st_size
            except OSError:
                continue
    return total
