"""Finds models on this machine: searches a few folders; reports sizes and whether they fit.

Runs in a thread. Knows where to search; the code that loads models inspects them (`model_look`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from localrun import paths
from localrun.engine import memory
from localrun.engine.model_look import Look, Looker
from localrun.units import format_size

Kind = Literal["converted", "GGUF", "checkpoint"]

MAX_DEPTH = 3
MAX_FOLDERS = 2000
"""A home folder on a network must not be walked for minutes."""

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class FoundModel:
    """One model.

    Attributes:
        format: number format of most experts.
        n_bytes: of all its files.
        dense_bytes, expert_bytes: of its tensors.
        problem: why it can't be run; empty if it can.
    """

    path: Path
    kind: Kind
    name: str
    n_bytes: int
    format: str = ""
    dense_bytes: int = 0
    expert_bytes: int = 0
    n_experts: int = 0
    problem: str = ""

    @property
    def place(self) -> str:
        """File or folder: what tells apart two models of one name."""
        return self.path.name or str(self.path)


def default_folders() -> list[Path]:
    """Where models are looked for: the working folder, `~/models`, localrun's own, and `LOCALRUN_MODELS`."""
    named = [Path(part).expanduser() for part in os.environ.get("LOCALRUN_MODELS", "").split(os.pathsep) if part]
    return [*named, Path.cwd(), Path.home() / "models", paths.data_dir() / "models", paths.cache_dir()]


def find_models(folders: Iterable[Path]) -> Iterator[FoundModel]:
    """Models below the folders, each once, as they are found. Unreadable folders are skipped."""
    seen: set[Path] = set()
    with Looker() as looker:
        for folder in folders:
            for path, kind in _candidates(folder.expanduser()):
                real = path.resolve()
                if real not in seen:
                    seen.add(real)
                    yield _found(path, kind, looker.look(path))


def _found(path: Path, kind: Kind, look: Look) -> FoundModel:
    return FoundModel(
        path,
        kind,
        look.name or path.name,
        look.n_bytes,
        look.format,
        look.dense_bytes,
        look.expert_bytes,
        look.n_experts,
        look.problem,
    )


def _candidates(root: Path) -> Iterator[tuple[Path, Kind]]:
    todo, n_seen = [(root, 0)], 0
    while todo and n_seen < MAX_FOLDERS:
        folder, depth = todo.pop(0)
        n_seen += 1
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue
        names = {entry.name for entry in entries}
        if "localrun.json" in names:
            yield folder, "converted"
            continue
        if "config.json" in names and any(name.endswith(".safetensors") for name in names):
            yield folder, "checkpoint"
            continue
        for entry in entries:
            part = _PART.fullmatch(entry.name)
            if entry.name.endswith(".gguf") and (part is None or int(part[2]) == 1):
                yield Path(entry.path), "GGUF"
            elif depth < MAX_DEPTH and not entry.name.startswith(".") and _is_folder(entry):
                todo.append((Path(entry.path), depth + 1))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def fit(model: FoundModel, available: int | None = None) -> str:
    """One phrase: does it fit into this machine's memory."""
    if model.problem:
        return model.problem
    available = memory.available_memory() if available is None else available
    if available is None:
        return "unknown memory"
    if not model.expert_bytes:
        return "all in RAM" if model.n_bytes < 0.85 * available else "streams from disk"
    room = available - model.dense_bytes - memory.CONTEXT_BYTES
    if room <= 0:
        return f"too large: {format_size(model.dense_bytes)} must fit"
    share = room / model.expert_bytes
    return "all in RAM" if share >= 1 else f"streams: {100 * share:.0f}% of experts in RAM"
