"""Compiler settings common to all compiled code of the expert path; import this before defining a numba function."""

from __future__ import annotations

FAST = {"reassoc", "contract", "nsz"}
"""Sums may be reordered and fused; infinities and NaN keep their meaning."""

ROWS = "void(intp, intp, intp, intp, intp, intp, intp, intp, intp)"
"""Signature of row kernels, the C functions that multiply some rows of a matrix with one tile of tokens:

matrix address, extra argument, first row (a multiple of 16), rows, row length, panel, tokens of the tile, out, out's bytes per
token. `out` receives rows up to the next multiple of 16. The driver in `tasks` calls them by address, so that any combination of
types works without compiling anything for it.
"""
