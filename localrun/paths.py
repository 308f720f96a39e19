"""All paths that localrun writes to: on Linux as in the XDG base directory specification, elsewhere the system's usual folders
(platformdirs).

`LOCALRUN_CACHE_DIR`, `LOCALRUN_DATA_DIR` and `LOCALRUN_CONFIG_DIR` override them; no other module builds such paths.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from localrun.errors import HostError

_PROBE_BYTES = 1 << 20
"""A full drive can still create empty files; the compiled kernels of one type take a few hundred kilobytes."""


def home() -> Path:
    """The user's home folder.

    Raises:
        HostError: HOME is empty, and no entry of the passwd database has another.
    """
    own = os.environ.get("HOME", "")
    if not own and os.name == "posix":
        import pwd

        try:
            own = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            own = ""
    elif not own:
        own = os.path.expanduser("~")
    if not own:
        raise HostError(
            f"no home folder: HOME is empty, and user {os.getuid()} has none in the passwd database",
            hint="set HOME, or LOCALRUN_CACHE_DIR, LOCALRUN_DATA_DIR and LOCALRUN_CONFIG_DIR to writable folders",
        )
    return Path(own).absolute()


def _folder(override: str, kind: str, variable: str, default: str) -> Path:
    """One of localrun's folders.

    Args:
        kind: its name in platformdirs.
        variable, default: as in the XDG specification.
    """
    if own := os.environ.get(override):
        return Path(own)
    if sys.platform != "linux":
        import platformdirs

        return Path(getattr(platformdirs, f"user_{kind}_path")("localrun", appauthor=False))
    # platformdirs takes relative values, which the specification says to ignore, and "~" for a home folder that isn't there.
    base = os.environ.get(variable, "")
    return (Path(base) if os.path.isabs(base) else home() / default) / "localrun"


def cache_dir() -> Path:
    """Rebuildable things: compiled kernels, disk probes, routing profiles, the converted demo model, KV snapshots."""
    return _folder("LOCALRUN_CACHE_DIR", "cache", "XDG_CACHE_HOME", ".cache")


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
    """Compiled kernels. `LOCALRUN_KERNEL_DIR` moves only these, so several caches can share them."""
    own = os.environ.get("LOCALRUN_KERNEL_DIR")
    return Path(own) if own else cache_dir() / "kernels"


def data_dir() -> Path:
    """Things that belong to the user: conversations."""
    return _folder("LOCALRUN_DATA_DIR", "data", "XDG_DATA_HOME", ".local/share")


def config_dir() -> Path:
    """The user's settings file."""
    return _folder("LOCALRUN_CONFIG_DIR", "config", "XDG_CONFIG_HOME", ".config")


MAX_NAME_BYTES = 255
"""Of a file's name, on all file systems that matter; with a longer one even asking whether it exists is an error (ENAMETOOLONG)."""


def is_plain_name(name: str) -> bool:
    """Can be the name of a file inside a given folder, and of nothing outside of it."""
    try:
        n_bytes = len(name.encode())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON may hold
        return False
    return 0 < n_bytes <= MAX_NAME_BYTES and name not in (".", "..") and not any(c in name for c in "/\\\0")


def how_to_reinstall() -> str:
    """What mends this installation: it came from a bundle for machines without a network, or from a checkout."""
    # Written by the bundle's installer (tools/bundle/install.py).
    from_bundle = Path(sys.prefix, "share", "localrun", "bundle.json").is_file()
    return f"run the bundle's install.sh again: sh install.sh {sys.prefix}" if from_bundle else "make clean setup"
