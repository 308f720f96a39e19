"""Finds models on this machine: searches a few folders; reports sizes and whether they fit.

Runs in a thread. Knows where to search; the code that loads models inspects them (`model_look`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from localrun import paths
from localrun.engine import memory
from localrun.engine.model_look import Look, Looker, Place
from localrun.units import format_size

MAX_DEPTH = 3
MAX_FOLDERS = 2000
"""A home folder on a network must not be walked for minutes."""


@dataclass(frozen=True, slots=True)
class FoundModel:
    """One model.

    Attributes:
        kind: `converted`, `GGUF` or `checkpoint`.
        format: number format of most experts.
        n_bytes: of all its files.
        dense_bytes, expert_bytes: of its tensors.
        problem: why it can't be run; empty if it can.
    """

    path: Path
    kind: str
    name: str
    n_bytes: int
    format: str = ""
    dense_bytes: int = 0
    expert_bytes: int = 0
    n_experts: int = 0
    problem: str = ""

    @property
    def location(self) -> str:
        """File or folder: what tells apart two models of one name."""
        return self.path.name or str(self.path)


def default_folders() -> list[Path]:
    """Where models are looked for: the working folder, `~/models`, localrun's own, and `LOCALRUN_MODELS`."""
    named = [Path(part).expanduser() for part in os.environ.get("LOCALRUN_MODELS", "").split(os.pathsep) if part]
    return [*named, Path.cwd(), Path.home() / "models", paths.data_dir() / "models", paths.cache_dir()]


def find_models(folders: Iterable[Path]) -> Iterator[FoundModel]:
    """Models below the folders, each once, as they are found. Unreadable folders are passed over."""
    seen: set[Path] = set()
    with Looker() as looker:
        for folder in folders:
            for place in _places(looker, folder.expanduser()):
                real = place.path.resolve()
                if real not in seen:
                    seen.add(real)
                    yield _found(place, looker.look(place.path))


def _found(place: Place, look: Look) -> FoundModel:
    return FoundModel(
        place.path,
        place.kind,
        place.name
        if "/" in place.name
        else look.name or place.path.name,  # a hub's name says more than the model's own
        look.n_bytes,
        look.format,
        look.dense_bytes,
        look.expert_bytes,
        look.n_experts,
        look.problem,
    )


def _places(looker: Looker, root: Path) -> Iterator[Place]:
    todo, n_seen = [(root, 0)], 0
    while todo and n_seen < MAX_FOLDERS:
        folder, depth = todo.pop(0)
        n_seen += 1
        if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
            continue
        here, below = looker.folder(folder)
        yield from here
        if below is None or depth >= MAX_DEPTH:
            continue
        with contextlib.suppress(OSError):
            entries = sorted(os.scandir(below), key=lambda entry: entry.name)
            inside = [Path(entry.path) for entry in entries if not entry.name.startswith(".") and _is_folder(entry)]
            todo += [(path, depth + 1) for path in inside]


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
