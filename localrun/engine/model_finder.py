"""Models on this machine: what lies in a few folders, how large it is and whether it fits. Reads headers only.

Knows the three kinds that the engine loads. Runs in a thread; the libraries that parse headers are imported there, so that
the interface starts without them.
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
from localrun.errors import LocalrunError
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
        n_bytes: of all its files.
        dense_bytes, expert_bytes: of its tensors; 0 where the header does not say (an official checkpoint).
        problem: why it can't be run; empty: nothing seen so far.
    """

    path: Path
    kind: Kind
    name: str
    n_bytes: int
    dense_bytes: int = 0
    expert_bytes: int = 0
    n_experts: int = 0
    problem: str = ""


def default_folders() -> list[Path]:
    """Where models are looked for: the working folder, `~/models`, localrun's own, and `LOCALRUN_MODELS`."""
    named = [Path(part).expanduser() for part in os.environ.get("LOCALRUN_MODELS", "").split(os.pathsep) if part]
    return [*named, Path.cwd(), Path.home() / "models", paths.data_dir() / "models", paths.cache_dir()]


def find_models(folders: Iterable[Path]) -> Iterator[FoundModel]:
    """Models below the folders, each once, as they are found. Unreadable folders are passed over."""
    seen: set[Path] = set()
    for folder in folders:
        for path, kind in _candidates(folder.expanduser()):
            real = path.resolve()
            if real not in seen:
                seen.add(real)
                yield look_at(path, kind)


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


def look_at(path: Path, kind: Kind) -> FoundModel:
    """Size and fit of one model; a damaged one is listed with its problem."""
    try:
        if kind == "checkpoint":
            return _look_at_checkpoint(path)
        return _look_at_gguf(path, kind)
    except (LocalrunError, OSError) as error:
        return FoundModel(path, kind, path.name, 0, problem=str(error))


def _look_at_gguf(path: Path, kind: Kind) -> FoundModel:
    from localrun.quant.gguf.file import read_gguf

    files = sorted(path.glob("*.gguf")) if path.is_dir() else _parts(path)
    if not files:
        return FoundModel(path, kind, path.name, 0, problem="no GGUF file in it")
    dense = experts = n_experts = 0
    name = path.name
    for number, file in enumerate(files):
        header = read_gguf(file)
        if number == 0:
            arch = header.metadata.get("general.architecture")
            n = header.metadata.get(f"{arch.value}.expert_count") if arch else None
            n_experts = int(n.value) if n is not None and isinstance(n.value, int) else 0
            given = header.metadata.get("general.name")
            name = str(given.value) if given is not None and given.value else path.name
        for tensor in header.tensors.values():
            if "_exps." in tensor.info.name:
                experts += tensor.info.n_bytes
            else:
                dense += tensor.info.n_bytes
    problem = "" if n_experts else "no experts: llama.cpp itself runs it"
    return FoundModel(path, kind, name, sum(f.stat().st_size for f in files), dense, experts, n_experts, problem)


def _parts(path: Path) -> list[Path]:
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    return sorted(path.parent.glob(f"{_escape(part[1])}-?????-of-{part[3]}.gguf"))


def _escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _look_at_checkpoint(path: Path) -> FoundModel:
    from localrun.quant.checkpoint.safetensors import parse_json_object

    config_path = path / "config.json"
    config = parse_json_object(config_path, config_path.read_bytes())
    n_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    experts = config.get("n_routed_experts")
    n_experts = experts if isinstance(experts, int) else 0
    kind = str(config.get("model_type", "unknown"))
    problem = "" if kind.startswith("deepseek") and n_experts else f"a model of type {kind}"
    return FoundModel(path, "checkpoint", path.name, n_bytes, n_experts=n_experts, problem=problem)


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
