"""Compiler settings common to all compiled code of the expert path; import this before defining a numba function.

Compiled code is kept under `kernel_dir()/<digest>`, the digest being that of all sources of `localrun.offload` and of the
compiler's version: numba itself notices changes of the file that holds a function, not of those whose functions and constants
(offsets into C structures among them) went into the machine code. Folders of older sources are removed after a while.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from pathlib import Path

import llvmlite
import numba
from numba.core import config

from localrun.paths import kernel_dir

_KEEP_S = 7 * 86400.0
"""Unused compiled code of other versions stays so long: two checkouts may take turns."""


def _digest() -> str:
    state = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()[:16]


def _choose_folder() -> Path:
    folder = kernel_dir() / _digest()
    with contextlib.suppress(OSError):  # an unwritable cache costs compiling again, nothing else
        folder.mkdir(parents=True, exist_ok=True)
        folder.touch()
        for other in folder.parent.iterdir():
            if other != folder and time.time() - other.stat().st_mtime > _KEEP_S:
                shutil.rmtree(other, ignore_errors=True)
    return folder


config.CACHE_DIR = str(_choose_folder())

FAST = {"reassoc", "contract", "nsz"}
"""Sums may be reordered and fused; infinities and NaN keep their meaning."""

ROWS = "void(intp, intp, intp, intp, intp, intp, intp, intp, intp)"
"""Signature of row kernels, the C functions that multiply some rows of a matrix with one tile of tokens:

matrix address, extra argument, first row (a multiple of 16), rows, row length, panel, tokens of the tile, out, out's bytes per
token. `out` receives rows up to the next multiple of 16. The driver in `tasks` calls them by address, so that any combination of
types works without compiling anything for it.
"""
