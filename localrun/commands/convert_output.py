"""Output of a running `localrun convert`: a progress bar and lines for people, or with `--json` one JSON object per line.

Events on standard output (docs/quantization.md lists their fields); the last one is `finished`, `failed` or `interrupted`:

    {"event": "note", "text": "..."}
    {"event": "plan", "output_bytes": ..., "steps": [...], ...}
    {"event": "step", "step": "calibrating", "done": 3, "total": 40}
    {"event": "progress", "step": "base", "done_bytes": ..., "total_bytes": ..., "bytes_per_s": ..., "remaining_s": ...}
    {"event": "finished", "path": "...", ...}
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localrun.commands.convert_text import (
    copies_as_json,
    describe,
    describe_choice,
    describe_copies,
    describe_result,
    plan_as_json,
    result_as_json,
)
from localrun.commands.output import Output, ProgressLine
from localrun.errors import LocalrunError

if TYPE_CHECKING:
    from localrun.api.precision import FormatOptions
    from localrun.engine.measure.choose import PrecisionChoice
    from localrun.quant.checkpoint.mapping import ConversionPlan
    from localrun.quant.convert.writing import ConversionProgress, ConversionResult
    from localrun.quant.precision.solver import CopiesLimit

_EVENT_SECONDS = 0.2
"""Programs that draw a bar need no more."""


class ConvertOutput(Output):
    """As `Output`; with `as_json` a program can follow."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json
        self._told_at = 0.0
        self._told_step = ""

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """One line for a program; nothing without `--json`."""
        if self._as_json:
            self.json_line({"event": name, **fields})

    def note(self, text: str) -> None:
        super().note(text)
        self.event("note", {"text": text})

    def step(self, what: str, done: int, total: int) -> None:
        """Progress of something that is counted in its own units."""
        self.status(f"{what}: {done / max(1, total):4.0%}")
        if self._is_due(what, is_last=done >= total):
            self.event("step", {"step": what, "done": done, "total": total})

    def progress(self, step: str) -> Callable[[ConversionProgress], None]:
        """Takes the converter's progress."""
        line = ProgressLine(self, bar=True, note=super().note)

        def take(progress: ConversionProgress) -> None:
            line(progress.done_bytes, progress.total_bytes, per_s=progress.bytes_per_s, left_s=progress.remaining_s)
            if self._is_due(step, is_last=progress.done_bytes >= progress.total_bytes):
                self.event("progress", _progress_fields(step, progress))

        return take

    def splitting(self) -> Callable[[int, int], None]:
        """Takes the bytes that are split."""
        return ProgressLine(self, "splitting")

    def planned(self, plan: ConversionPlan | None, options: FormatOptions, copies: Sequence[CopiesLimit]) -> None:
        for line in (
            *(describe(plan, options) if plan is not None else ("output: an overlay beside the finished base",)),
            *describe_copies(copies),
        ):
            self.note(line)

    def checked(self, plan: ConversionPlan | None, copies: Sequence[CopiesLimit]) -> None:
        self.event("plan", {**(plan_as_json(plan) if plan is not None else {}), "copies": copies_as_json(copies)})

    def chosen(self, choice: PrecisionChoice | None) -> None:
        for line in describe_choice(choice) if choice is not None else ():
            self.note(line)

    def wrote(self, result: ConversionResult) -> None:
        for line in describe_result(result):
            self.note(line)

    def finished(self, result: ConversionResult | Path | None) -> None:
        """The last event of a run that ends well."""
        if result is None or isinstance(result, Path):
            self.event("finished", {"path": None if result is None else str(result)})
        else:
            self.event("finished", result_as_json(result))

    def failed(self, error: LocalrunError) -> None:
        """The last event of a run that ends with an error."""
        self.event("failed", {"message": str(error), "hint": error.hint})

    def _is_due(self, step: str, *, is_last: bool) -> bool:
        now = time.monotonic()
        due = is_last or step != self._told_step or now - self._told_at >= _EVENT_SECONDS
        if due:
            self._told_at, self._told_step = now, step
        return due


def _progress_fields(step: str, progress: ConversionProgress) -> dict[str, Any]:
    return {
        "step": step,
        "done_bytes": progress.done_bytes,
        "total_bytes": progress.total_bytes,
        "bytes_per_s": round(progress.bytes_per_s),
        "remaining_s": None if progress.remaining_s is None else round(progress.remaining_s, 1),
    }
