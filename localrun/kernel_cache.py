"""The cache of compiled kernels: `@cached_jit` and `@cached_cfunc` are numba's `njit` and `cfunc` with our own cache.

A kernel's file is named by what was compiled: the function's fingerprint (see `fingerprint`), the types of its arguments, the
processor, and the versions of compiler and interpreter. So cached code is used exactly when compiling would produce the same:
changing a docstring or an unrelated module recompiles nothing; changing a constant, helper or offset into a C structure
recompiles everything that depends on it. numba itself is not modified: other users of numba in the process keep their own
caches.

There is one folder per version of the tools, `kernel_dir()/<digest>`; files unused for a month are deleted. They are pickles,
which can execute code when loaded, so the folder is only used if no other user can write to it; otherwise a private folder in
the temporary directory is used instead. If the cache is read-only, full or damaged, kernels are recompiled; the command never
fails because of it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numba
from numba.core import sigutils
from numba.core.caching import _Cache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

from localrun.atomic import replacing
from localrun.fingerprint import fingerprint
from localrun.paths import has_room, kernel_dir

log = logging.getLogger(__name__)

_KEEP_S: Final = 30 * 86400.0
_TOUCH_S: Final = 86400.0
"""How often a used file's timestamp is refreshed."""

TELL: Final = "LOCALRUN_TELL_COMPILED"
"""Environment variable: report compilation on standard error. Set for the engine process, whose parent shows the progress."""

n_compiled = 0
"""Functions that this process had to compile, including the current one."""

_FOLDER = re.compile(r"(?:[a-z]+-)?[0-9a-f]{16}")
_SUFFIX: Final = ".kernel"


def cached_jit(**options: Any) -> Callable[[Any], Any]:
    """`numba.njit(**options)` for a function whose machine code is kept."""

    def decorate(function: Any) -> Any:
        dispatcher = numba.njit(**options)(function)
        dispatcher._cache = KernelCache(dispatcher)
        return dispatcher

    return decorate


def cached_cfunc(signature: str, **options: Any) -> Callable[[Any], Any]:
    """`numba.cfunc(signature, **options)` for a function whose machine code is kept, and made when its address is asked for."""

    def decorate(function: Any) -> Any:
        return KeptCFunc(function, sigutils.normalize_signature(signature), locals={}, options=options)

    return decorate


class KeptCFunc(CFunc):
    """A C function that is compiled, or found compiled, at first use: importing a module of kernels costs nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cache = KernelCache(self)

    @property
    def address(self) -> int:
        """Of the C function; valid for the life of the process."""
        known: int | None = vars(self)["_wrapper_address"]
        if known is None:
            self.compile()
        return int(vars(self)["_wrapper_address"])


class KernelCache(_Cache):  # type: ignore[misc]
    """The machine code of one function by its signatures; numba's interface of a cache. Any process, any thread."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._enabled = True

    @property
    def cache_path(self) -> str:
        """The folder."""
        return str(folder())

    @functools.cached_property
    def _name(self) -> tuple[str, str]:
        """For people, and for the key; at first use, when the module's globals are all there."""
        function = self._function.__wrapped__ if isinstance(self._function, CFunc) else self._function.py_func
        people = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}".replace(".<locals>", "")
        return re.sub(r"[^\w.]", "", people), fingerprint(self._function)

    def _file(self, signature: Any, codegen: Any) -> Path:
        people, ours = self._name
        key = hashlib.sha256("\0".join((ours, str(signature), *map(str, codegen.magic_tuple()))).encode())
        return folder() / f"{people}-{key.hexdigest()[:32]}{_SUFFIX}"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function, None if it has to be compiled.

        `target_context.refresh()`, which numba's own cache calls here, would import and register what only compiling needs (a
        fifth of a second, half of what loading an engine's kernels takes); numba's compiler calls it itself.
        """
        rtsys.initialize(target_context)  # compiled code may refer to the runtime's functions
        if not self._enabled:
            return None
        file = self._file(sig, target_context.codegen())
        try:
            found = CompileResult._rebuild(target_context, *pickle.loads(file.read_bytes()))
            if time.time() - file.stat().st_mtime > _TOUCH_S:
                os.utime(file)
        except FileNotFoundError:
            _tell(self._name[0])
            return None
        except Exception as error:  # reading a damaged pickle may raise anything
            log.info("%s: can't be used: %s", file, error)
            return None
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keeps what was compiled, if that is possible."""
        if not self._enabled:
            return
        if data.lifted or data.library.has_dynamic_globals:
            log.warning("%s: its code can't be cached: it contains addresses of this process", self._name[0])
            return
        file = self._file(sig, data.codegen)
        try:
            with replacing(file) as out:
                out.write(dumps(data._reduce()))
        except Exception as error:
            log.info("%s: can't be cached: %s", file, error)

    def enable(self) -> None:
        """From now on the cache is used."""
        self._enabled = True

    def disable(self) -> None:
        """From now on it is not."""
        self._enabled = False

    def flush(self) -> None:
        """Forgets the function's code, whatever its signature was."""
        for file in folder().glob(f"{self._name[0]}-*{_SUFFIX}"):
            file.unlink(missing_ok=True)


def _tell(name: str) -> None:
    """A function is about to be compiled."""
    global n_compiled
    n_compiled += 1
    if os.environ.get(TELL):
        print(f"compiling {name}", file=sys.stderr, flush=True)


@functools.cache
def folder() -> Path:
    """Where this process keeps compiled code, made if possible."""
    versions = [f"{name} {version(name)}" for name in ("numba", "llvmlite", "numpy", "gguf")]
    name = hashlib.sha256(" ".join((*versions, sys.version)).encode()).hexdigest()[:16]
    path = kernel_dir() / name
    with contextlib.suppress(OSError):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch()
        _remove_old(path)
    is_ours = is_private(path)
    # Code that is there can be used, even if nothing can be added.
    if is_ours and (has_room(path) or any(path.glob(f"*{_SUFFIX}"))):
        return path
    own = Path(tempfile.gettempdir()) / f"localrun-{os.getuid()}"
    if path.exists() and not is_ours:
        log.warning("%s: other users can write to it; caching compiled kernels in %s instead", path, own)
    with contextlib.suppress(OSError):
        own.mkdir(mode=0o700, exist_ok=True)
        if is_private(own):
            (own / name).mkdir(mode=0o700, exist_ok=True)
    if is_private(own) and is_private(own / name):
        return own / name
    return Path(os.devnull) / name  # can neither be read nor made


def n_kept() -> int:
    """How many functions' code this version of the tools has in the cache."""
    return sum(1 for _ in folder().glob(f"*{_SUFFIX}"))


def is_private(path: Path) -> bool:
    """Nobody but us (or root) can put files into the folder or replace it: neither owned nor writable by others."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    others = stat.S_IWGRP | stat.S_IWOTH
    return stat.S_ISDIR(status.st_mode) and status.st_uid in (os.getuid(), 0) and not status.st_mode & others


def _remove_old(path: Path) -> None:
    """Deletes unused code of this version of the tools, and folders of other versions."""
    before = time.time() - _KEEP_S
    for file in path.iterdir():
        if file.stat().st_mtime < before:
            file.unlink(missing_ok=True)
    for other in path.parent.iterdir():
        ours = _FOLDER.fullmatch(other.name)  # the user may have pointed us at a folder with other contents
        if ours and other != path and other.stat().st_mtime < before:
            shutil.rmtree(other, ignore_errors=True)
