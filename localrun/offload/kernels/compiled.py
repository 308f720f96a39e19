"""Compiler settings common to all kernels; import this before defining a numba function.

Compiled code is kept under `cache_dir()/kernels/<digest>`, the digest being that of this package's sources and of the
compiler's version: numba itself notices changes of the file that holds a function, not of those that it calls.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import llvmlite
import numba
from numba.core import config

from localrun.paths import cache_dir


def _digest() -> str:
    state = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()[:16]


config.CACHE_DIR = str(cache_dir() / "kernels" / _digest())

FAST = {"reassoc", "contract", "nsz"}
"""Sums may be reordered and fused; infinities and NaN keep their meaning."""

ROWS = "void(intp, intp, intp, intp, intp, intp, intp, intp, intp)"
"""Signature of row kernels, the C functions that multiply some rows of a matrix with one tile of tokens:

matrix address, extra argument, first row (a multiple of 16), rows, row length, panel, tokens of the tile, out, out's bytes per
token. `out` receives rows up to the next multiple of 16. The driver in `tasks` calls them by address, so that any combination of
types works without compiling anything for it.
"""
