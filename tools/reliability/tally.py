"""What a part of the campaign has done so far, kept in a file so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localrun.atomic import replacing
from localrun.errors import UsageError

MAX_PROBLEMS = 200
"""Kept with their text; all are counted."""


@dataclass
class Tally:
    """Counts of one run of one part.

    Attributes:
        part: `mutate`, `kill`, ...
        seed: of all random numbers.
        done: cases that are over; the next one's number.
        outcomes: how they ended.
        problems: what must not happen, one line each.
        n_problems: all of them.
        elapsed_s: time spent, in all runs together.
        figures: what else was measured.
        path: the file, if there is one.
    """

    part: str
    seed: int
    done: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    n_problems: int = 0
    elapsed_s: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    _since: float = field(default_factory=time.monotonic)

    @classmethod
    def resume(cls, path: Path | None, part: str, seed: int) -> Tally:
        """The one in the file, or a new one. Raises UsageError: the file is of another part or seed."""
        if path is None or not path.exists():
            return cls(part, seed, path=path)
        values = json.loads(path.read_bytes())
        if (values["part"], values["seed"]) != (part, seed):
            raise UsageError(
                f"{path}: holds a run of {values['part']} with seed {values['seed']}",
                hint="give --state another file, or --seed the same number",
            )
        values["outcomes"] = Counter(values["outcomes"])
        return cls(**values, path=path)

    def problem(self, text: str) -> None:
        """Something that must not happen."""
        self.n_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(" ".join(text.split())[:600])

    def to_json(self) -> dict[str, Any]:
        now = time.monotonic()
        self.elapsed_s += now - self._since
        self._since = now
        return {
            "part": self.part,
            "seed": self.seed,
            "done": self.done,
            "outcomes": dict(sorted(self.outcomes.items())),
            "figures": self.figures,
            "elapsed_s": round(self.elapsed_s, 1),
            "n_problems": self.n_problems,
            "problems": self.problems,
        }

    def save(self) -> None:
        """Writes the file, if there is one."""
        if self.path is not None:
            with replacing(self.path) as file:
                file.write(json.dumps(self.to_json(), indent=1).encode())
