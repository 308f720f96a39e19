"""Rates of this machine when nothing else runs, over recent starts, so busy moments do not distort the plan.

Other programs lower a measured rate, so rates from busy moments are not remembered, and a busy start uses the median of quiet ones.
But a machine also changes without a visible cause: on a virtual one, memory gave 31 or 53 GB/s for minutes on end. So at a quiet
start, what is measured now counts as much as the last ones together. Of what whole runs have sustained, the median of the last
ones counts.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localrun.atomic import replacing
from localrun.errors import StoreError
from localrun.paths import cache_dir

log = logging.getLogger(__name__)

KEPT = 5
MAX_AGE_S = 7 * 86400.0
"""A machine that has become slower for good is planned so after a week."""
_VERSION = 4


def usual_rates(measured: Mapping[str, float], *, quiet: bool = True, path: Path | None = None) -> dict[str, float]:
    """What these rates are when nothing else runs, by name; does without the file if it can't be read or written.

    Args:
        measured: rates, higher is better. The name includes everything they depend on.
        quiet: nothing else ran, and they are remembered.
        path: `cache_dir()/rates.json`.
    """
    path = path or cache_dir() / "rates.json"
    if quiet:
        remember_rates(measured, path=path)
    known = _fresh(path)
    result = {}
    for name, rate in measured.items():
        usual = statistics.median(known[name]) if known.get(name) else rate
        result[name] = (rate * usual) ** 0.5 if quiet else usual
    return result


def remember_rates(measured: Mapping[str, float], *, path: Path | None = None) -> None:
    """Takes in rates, by name."""
    path, now = path or cache_dir() / "rates.json", time.time()
    known = _read(path)
    for name, rate in measured.items():
        known[name] = [*known.get(name, []), (now, rate)][-KEPT:]
    _write(path, known)


def sustained_rates(prefix: str, *, path: Path | None = None) -> dict[str, float]:
    """The usual rates of whole runs whose names begin so."""
    known = _fresh(path or cache_dir() / "rates.json")
    return {name: statistics.median(rates) for name, rates in known.items() if name.startswith(prefix) and rates}


def _fresh(path: Path) -> dict[str, list[float]]:
    """Those that are not too old."""
    now = time.time()
    return {
        name: [rate for when, rate in entries if 0 <= now - when < MAX_AGE_S and 0 < rate < 1e18]
        for name, entries in _read(path).items()
    }


def _read(path: Path) -> dict[str, list[tuple[float, float]]]:
    try:
        value: Any = json.loads(path.read_text())
        if value["version"] != _VERSION:
            return {}
        return {
            str(name): [(float(when), float(rate)) for when, rate in list_] for name, list_ in value["rates"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s: ignoring saved rates: %s", path, error)
        return {}


def _write(path: Path, rates: Mapping[str, list[tuple[float, float]]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write((json.dumps({"version": _VERSION, "rates": rates}, indent=1) + "\n").encode())
    except (OSError, StoreError) as error:
        log.warning("could not save rates: %s", error)
