"""Where numba keeps compiled code; import this in a module before it defines a function with `cache=True`.

Code is kept under `kernel_dir()/<package>-<digest>`, the digest being that of the package's sources and of the compiler's version:
numba itself notices changes of the file that holds a function, not of those whose functions and constants (offsets into C
structures among them) went into the machine code. Folders of older sources are removed after a while.

Three departures from numba's own habits:

* The cache is made of pickles, which can run anything when they are read. So a folder is only used when nobody else can write to
  it; otherwise a private folder in the temporary directory takes its place.
* A cache that can't be read or written (read-only, full, damaged) costs compiling again, never the command.
* Each piece of code has a file name of its own. numba counts (`rows.7.nbc`), and all kernels that come out of one closure share
  the count: two processes that compile different ones at the same time would take the same number, and from then on one kernel
  would be found under the other's name.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import caching, config

from localrun.paths import has_room, kernel_dir

log = logging.getLogger(__name__)

_KEEP_S = 7 * 86400.0
"""Unused compiled code of other versions stays so long: two checkouts may take turns."""

_NAME = re.compile(r"(?:[a-z]+-)?[0-9a-f]{16}")
_PACKAGE = Path(__file__).parent


def folder_of(source: Path) -> Path:
    """Where the compiled code of a source file of localrun is kept."""
    return _folder(source.relative_to(_PACKAGE).parts[0])


def is_private(folder: Path) -> bool:
    """Nobody but us (or root) can put files into `folder` or replace it: neither owned nor writable by others."""
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    others = stat.S_IWGRP | stat.S_IWOTH
    return stat.S_ISDIR(status.st_mode) and status.st_uid in (os.getuid(), 0) and not status.st_mode & others


@functools.cache
def _folder(package: str) -> Path:
    """The folder of a package's compiled code, made if possible."""
    name = f"{package}-{_digest(package)}"
    folder = kernel_dir() / name
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.touch()
        _remove_old(folder)
    is_ours = is_private(folder)
    # Code that is there can be used, even if nothing can be added.
    if is_ours and (has_room(folder) or any(folder.rglob("*.nbi"))):
        return folder
    own = Path(tempfile.gettempdir()) / f"localrun-{os.getuid()}"
    if folder.exists() and not is_ours:
        log.warning("%s: other users can write to it; compiled kernels are kept in %s", folder, own)
    with contextlib.suppress(OSError):
        own.mkdir(mode=0o700, exist_ok=True)
        if is_private(own):
            (own / name).mkdir(mode=0o700, exist_ok=True)
    if is_private(own) and is_private(own / name):
        return own / name
    return Path(os.devnull) / name  # can neither be read nor made


def _digest(package: str) -> str:
    state = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted((_PACKAGE / package).rglob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()[:16]


def _remove_old(folder: Path) -> None:
    for other in folder.parent.iterdir():
        ours = _NAME.fullmatch(other.name)  # whoever names a folder full of other things must not lose them
        if ours and other != folder and time.time() - other.stat().st_mtime > _KEEP_S:
            shutil.rmtree(other, ignore_errors=True)


class KernelCacheLocator(caching.UserProvidedCacheLocator):  # type: ignore[misc]
    """Tells numba the folder. Present even where nothing can be written: numba would go on to folders that others may write to."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        super().__init__(py_func, py_file)
        self._cache_path = str(folder_of(Path(py_file)) / self.get_suitable_cache_subpath(py_file))

    def ensure_cache_path(self) -> None:
        """Makes the folder if that is possible; saving notices if not."""
        with contextlib.suppress(OSError):
            os.makedirs(self._cache_path, mode=0o700, exist_ok=True)

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        """A locator for functions of localrun, None for other packages'."""
        return cls(py_func, py_file) if Path(py_file).is_relative_to(_PACKAGE) else None


def _forgiving(method: Any) -> Any:
    """A cache's method that fails like a cache without the entry."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any) -> Any:
        try:
            return method(self, *args)
        except Exception as error:  # reading a damaged pickle may raise anything
            log.info("%s: the compiled code can't be kept or read: %s", self.cache_path, error)
            return None

    return guarded


def _save(self: Any, key: Any, data: Any) -> None:
    """`IndexDataCacheFile.save` with names that follow from the key. Of two indices written at once one is lost: compiled again."""
    name = f"{self._index_name.removesuffix('.nbi')}.{hashlib.sha256(self._dump(key)).hexdigest()[:24]}.nbc"
    self._save_data(name, data)  # before the index that names it
    self._save_index({**self._load_index(), key: name})


def _install() -> None:
    own = f"{KernelCacheLocator.__module__}.{KernelCacheLocator.__qualname__}"
    others = [locator.__name__ for locator in caching.CacheImpl._locator_classes]
    config.CACHE_LOCATOR_CLASSES = ",".join((own, *others))
    caching.Cache.load_overload = _forgiving(caching.Cache.load_overload)
    caching.Cache.save_overload = _forgiving(caching.Cache.save_overload)
    caching.IndexDataCacheFile.save = _save


_install()
