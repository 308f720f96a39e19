"""Conversions for child processes that are to be killed in the middle, however fast or slow a machine is."""

from __future__ import annotations

import threading
from typing import Any

from localrun.quant.convert import writing
from localrun.quant.convert.journal import Journal

MOST_UNRECORDED = 4
"""Parts. Fewer than any model of the tests has, so a conversion that has recorded something is not over."""


def in_step() -> None:
    """From now on workers wait for the journal before they run away from it, and it is written as soon as there is something."""
    changed = threading.Condition()
    n_begun = n_recorded = 0
    run, append = writing._Pipeline.run, Journal.append

    def run_in_step(self: Any, work: Any, stop: threading.Event, count: Any) -> Any:
        nonlocal n_begun
        with changed:
            if n_begun == n_recorded + MOST_UNRECORDED:
                count.__self__._wake.set()  # the supervisor's, who writes the journal
                changed.wait_for(lambda: n_begun < n_recorded + MOST_UNRECORDED)
            n_begun += 1
        return run(self, work, stop, count)

    def append_and_tell(self: Journal, results: Any) -> None:
        nonlocal n_recorded
        append(self, results)
        with changed:
            n_recorded += len(results)
            changed.notify_all()

    writing._SYNC_SECONDS = 0.0
    writing._Pipeline.run = run_in_step  # type: ignore[method-assign]
    Journal.append = append_and_tell  # type: ignore[method-assign]
