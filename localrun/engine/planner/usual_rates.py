"""Rates of this machine when nothing else runs, over recent starts, so busy moments do not distort the plan.

Other programs can only lower a measured rate, and a busy day may have many starts. So the best measurements of a week are kept
rather than the latest. Of probes, which take fractions of a second, the plan uses the best of two, and of more the second best, to
ignore a lucky outlier. What whole runs have sustained is proof, however often others have been in the way since: the best counts.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localrun.atomic import replacing
from localrun.errors import StoreError
from localrun.paths import cache_dir

log = logging.getLogger(__name__)

KEPT = 3
MAX_AGE_S = 7 * 86400.0
"""A machine that has become slower for good is planned so after a week."""
_VERSION = 2


def usual_rates(measured: Mapping[str, float], *, path: Path | None = None) -> dict[str, float]:
    """Stores rates and returns the undisturbed ones, by name; does without the file if it can't be read or written.

    Args:
        measured: rates, higher is better. The name includes everything they depend on.
        path: `cache_dir()/rates.json`.
    """
    path, now = path or cache_dir() / "rates.json", time.time()
    known = _read(path)
    result = {}
    for name, rate in measured.items():
        fresh = [entry for entry in known.get(name, []) if 0 <= now - entry[0] < MAX_AGE_S and 0 < entry[1] < 1e18]
        known[name] = sorted([*fresh, (now, rate)], key=lambda entry: -entry[1])[:KEPT]
        result[name] = _usual([rate for _, rate in known[name]], sustained=False)
    _write(path, known)
    return result


def sustained_rates(prefix: str, *, path: Path | None = None) -> dict[str, float]:
    """The undisturbed rates of whole runs whose names begin so."""
    now = time.time()
    fresh = {
        name: sorted((rate for when, rate in entries if 0 <= now - when < MAX_AGE_S and 0 < rate < 1e18), reverse=True)
        for name, entries in _read(path or cache_dir() / "rates.json").items()
        if name.startswith(prefix)
    }
    return {name: _usual(rates, sustained=True) for name, rates in fresh.items() if rates}


def _usual(rates: Sequence[float], *, sustained: bool) -> float:
    """Of falling rates, the undisturbed one."""
    return rates[1] if len(rates) >= KEPT and not sustained else rates[0]


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
