"""All paths that localrun writes to, by the XDG base directory specification (freedesktop.org, version 0.8).

`LOCALRUN_CACHE_DIR` and `LOCALRUN_DATA_DIR` override; nothing else in the package composes such a path.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PROBE_BYTES = 1 << 20
"""A full drive still makes empty files; the compiled kernels of one type are some hundred kilobytes."""


def _xdg(override: str, variable: str, default: str) -> Path:
    if own := os.environ.get(override):
        return Path(own)
    base = os.environ.get(variable, "")
    # The specification says to ignore relative values.
    root = Path(base) if base and os.path.isabs(base) else Path.home() / default
    return root / "localrun"


def cache_dir() -> Path:
    """Rebuildable things: compiled kernels, disk probes, routing profiles, the converted demo model, KV snapshots."""
    return _xdg("LOCALRUN_CACHE_DIR", "XDG_CACHE_HOME", ".cache")


def use_cache_dir(folder: Path) -> None:
    """Makes `folder` the cache of this process and of those that it starts."""
    os.environ["LOCALRUN_CACHE_DIR"] = str(folder.expanduser().absolute())


def cache_problem() -> str | None:
    """Why nothing can be kept in the cache folder (it can't be made, is read-only, or full); None if it works."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _try_writing(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A folder for large temporary files, removed at the end."""
    # The system's temporary folder, where the cache can't be written, is often in memory: second choice.
    parent = cache_dir() if cache_problem() is None else None
    with tempfile.TemporaryDirectory(prefix=prefix if parent else f"localrun-{prefix}", dir=parent) as folder:
        yield Path(folder)


def has_room(folder: Path) -> bool:
    """Something can be kept in an existing folder."""
    try:
        _try_writing(folder)
    except OSError:
        return False
    return True


def _try_writing(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(_PROBE_BYTES))


def kernel_dir() -> Path:
    """Compiled kernels. `LOCALRUN_KERNEL_DIR` moves them alone: what was compiled once may serve several caches."""
    own = os.environ.get("LOCALRUN_KERNEL_DIR")
    return Path(own) if own else cache_dir() / "kernels"


def data_dir() -> Path:
    """Things that belong to the user: conversations."""
    return _xdg("LOCALRUN_DATA_DIR", "XDG_DATA_HOME", ".local/share")


def config_dir() -> Path:
    """The user's settings file."""
    return _xdg("LOCALRUN_CONFIG_DIR", "XDG_CONFIG_HOME", ".config")


def how_to_reinstall() -> str:
    """What mends this installation: it came from a bundle for machines without a network, or from a checkout."""
    # Written by the bundle's installer (tools/bundle/install.py).
    from_bundle = Path(sys.prefix, "share", "localrun", "bundle.json").is_file()
    return f"run the bundle's install.sh again: sh install.sh {sys.prefix}" if from_bundle else "make clean setup"
