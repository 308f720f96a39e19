"""Compiled modules that are imported when something of them is first used.

Opening, listing and checking a model convert nothing, and importing the compiler takes longer than they do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localrun.quant.formats import grid_quantize, k_quantize, kernels
else:

    class _Later:
        """Stands for a module of this package."""

        def __init__(self, name: str) -> None:
            self._name = f"{__package__}.{name}"

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module(self._name), name)

    grid_quantize, k_quantize, kernels = map(_Later, ("grid_quantize", "k_quantize", "kernels"))

__all__ = ["grid_quantize", "k_quantize", "kernels"]
