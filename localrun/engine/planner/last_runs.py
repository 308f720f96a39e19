"""What the last runs on this machine showed that no rate expresses: hits by model, and what company costs.

Hits are those of the model's own routing at the size of memory that the run had; `hit_rates.py` scales them to another size. What
company costs is one number for the machine: how much longer a token takes for each share of the cores that others use.

Kept in `cache_dir()/runs.json`. Losing it costs a less exact plan, so a file that can't be read or written is a warning.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from localrun.atomic import replacing
from localrun.errors import StoreError
from localrun.paths import cache_dir

log = logging.getLogger(__name__)

Kind = Literal["answers", "measurements"]
"""Answers have a topic; the tokens of a measurement may be drawn at random."""

MAX_MODELS = 50
"""Models whose hits are kept, the latest ones."""

MEMORY_TOKENS = 300.0
"""Tokens that earlier runs at the same size count for at most."""

SAME_SIZE = 0.1
"""Resident shares that differ less than this, relatively, are the same size."""

KEPT_RUNS = 5
MAX_AGE_S = 30 * 86400.0
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LastHits:
    """Hits of a model.

    Attributes:
        share: of the experts that were in memory.
        hits: share of requests that needed no read.
        tokens: that this comes from.
        when: seconds since the epoch.
    """

    share: float
    hits: float
    tokens: float
    when: float

    @property
    def is_sound(self) -> bool:
        """Values that can have been measured."""
        return 0 < self.share < 1 and 0 <= self.hits <= 1 and self.tokens > 0 and self.when >= 0


def last_hits(identity: str, kind: Kind, *, path: Path | None = None) -> LastHits | None:
    """The model's hits in its last runs of this kind; None if there were none."""
    return _hits_of(_read(path or runs_path()), identity, kind)


def remember_hits(
    identity: str, kind: Kind, *, share: float, hits: float, tokens: int, path: Path | None = None
) -> None:
    """Takes in what a run showed; of runs at the same size, the latest tokens count."""
    path = path or runs_path()
    known = _read(path)
    now = LastHits(share=share, hits=hits, tokens=float(tokens), when=time.time())
    before = _hits_of(known, identity, kind)
    if before is not None and abs(before.share - share) <= SAME_SIZE * share:
        weight = min(before.tokens, MEMORY_TOKENS)
        n = weight + now.tokens
        now = LastHits(
            share=(weight * before.share + now.tokens * share) / n,
            hits=(weight * before.hits + now.tokens * hits) / n,
            tokens=n,
            when=now.when,
        )
    if not now.is_sound:
        return
    models = known["hits"]
    models[identity] = {**models.pop(identity, {}), kind: asdict(now)}
    for old in list(models)[: max(0, len(models) - MAX_MODELS)]:
        del models[old]
    _write(path, known)


def company_cost(*, path: Path | None = None) -> float | None:
    """How much longer a token's matrices take while others use all cores, 1.0: twice as long; None if no run of a month had
    company."""
    now = time.time()
    costs = [cost for when, cost in _read(path or runs_path())["company"] if 0 <= now - when < MAX_AGE_S]
    return statistics.median(costs) if costs else None


def remember_company(cost: float, *, path: Path | None = None) -> None:
    """Takes in what a run in company showed, see `company_cost`."""
    path = path or runs_path()
    known = _read(path)
    known["company"] = [*known["company"], [time.time(), cost]][-KEPT_RUNS:]
    _write(path, known)


def runs_path() -> Path:
    """Where all of this is kept."""
    return cache_dir() / "runs.json"


def _hits_of(known: dict[str, Any], identity: str, kind: Kind) -> LastHits | None:
    try:
        entry = LastHits(**known["hits"][identity][kind])
        return entry if entry.is_sound else None
    except (KeyError, TypeError):
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        value: Any = json.loads(path.read_text())
        if value["version"] == _VERSION:
            company = [(float(when), float(cost)) for when, cost in value["company"]]
            return {"version": _VERSION, "hits": dict(value["hits"]), "company": company}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s: ignoring what the last runs showed: %s", path, error)
    return {"version": _VERSION, "hits": {}, "company": []}


def _write(path: Path, known: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write((json.dumps(known, indent=1) + "\n").encode())
    except (OSError, StoreError) as error:
        log.warning("could not save what this run showed: %s", error)
