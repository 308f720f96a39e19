"""The interface for following a conversion: which events it reports, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from localrun.api.precision import FormatOptions
    from localrun.engine.measure.choose import PrecisionChoice
    from localrun.quant.checkpoint.mapping import ConversionPlan
    from localrun.quant.convert.writing import ConversionProgress, ConversionResult
    from localrun.quant.precision.solver import CopiesLimit


class Follower(Protocol):
    """Takes what a conversion tells, in the thread that converts."""

    def note(self, text: str) -> None:
        """A line worth keeping."""

    def status(self, text: str) -> None:
        """What is being done now."""

    def clear_status(self) -> None:
        """It is done."""

    def step(self, what: str, done: int, total: int) -> None:
        """Progress of something that is counted in its own units."""

    def progress(self, step: str) -> Callable[[ConversionProgress], None]:
        """What takes the progress of writing tensors."""

    def splitting(self) -> Callable[[int, int], None]:
        """What takes the bytes that are split, and all of them."""

    def planned(self, plan: ConversionPlan | None, options: FormatOptions, copies: Sequence[CopiesLimit]) -> None:
        """What will be written; nothing is yet. Without a plan, only an overlay of these copies."""

    def checked(self, plan: ConversionPlan | None, copies: Sequence[CopiesLimit]) -> None:
        """A dry run's plan, as `planned`."""

    def chosen(self, choice: PrecisionChoice | None) -> None:
        """Calibration and choice of precision; None: neither was needed."""

    def wrote(self, result: ConversionResult) -> None:
        """A base or an overlay is whole."""

    def finished(self, result: ConversionResult | Path | None) -> None:
        """Finished: what was written, or the folder that was changed; None: a dry run."""
