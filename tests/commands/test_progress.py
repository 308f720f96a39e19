"""What the status line says while a prompt is read."""

from __future__ import annotations

from typing import cast

import pytest

from localrun.commands.common import show_progress
from localrun.commands.output import Output
from localrun.engine.process.protocol import PromptProgress


class Line:
    """Keeps what is put on the status line."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def status(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize(
    ("done", "reused", "elapsed_s", "says"),
    [
        (1000, 1000, 0.0, "reading the prompt: 1000 of 4000 tokens"),  # nothing is known of the speed yet
        (2000, 1000, 10.0, "reading the prompt: 2000 of 4000 tokens, 20.0s left"),  # 100 a second, not 200
        (2000, 0, 10.0, "reading the prompt: 2000 of 4000 tokens, 10.0s left"),
    ],
)
def test_time_left_counts_what_was_computed(done: int, reused: int, elapsed_s: float, says: str) -> None:
    line = Line()
    show_progress(
        PromptProgress(request=1, done=done, total=4000, reused=reused, elapsed_s=elapsed_s), cast(Output, line)
    )
    assert line.said == [says]


def test_prompt_that_is_there_already_needs_no_line() -> None:
    line = Line()
    show_progress(PromptProgress(request=1, done=4000, total=4000, reused=3999, elapsed_s=0.0), cast(Output, line))
    assert line.said == []
