"""Human-readable sizes and rates: GiB = 2**30 bytes, GB = 10**9 bytes, never mixed."""

from __future__ import annotations

import math
import re

from localrun.errors import UsageError

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
    "T": 2**40,
}

_MAX_BYTES = 2**60


def parse_size(text: str) -> int:
    """Bytes of `8GiB`, `500MB`, `1.5G` (a bare letter means the binary unit), or 0.

    Raises:
        UsageError: not a size, negative, or without a unit (nobody means 24 bytes).
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None or (match[2] and match[2].upper() not in _UNITS):
        raise UsageError(f"'{text}' is not a size", hint="write for example 8GiB or 500MB")
    number = float(match[1])
    if not match[2] and number:
        raise UsageError(f"'{text}' has no unit", hint=f"did you mean {_likely(match[1])}?")
    size = number * _UNITS[match[2].upper() or "B"]
    if size > _MAX_BYTES:
        raise UsageError(f"'{text}' is larger than any machine", hint="write for example 8GiB or 500MB")
    return int(size)


def parse_rate(text: str) -> int:
    """Bytes per second of `7GB/s`, `930 GB/s`.

    Raises:
        UsageError: not a rate, zero, negative, without a unit, or below `MIN_RATE`.
    """
    try:
        rate = parse_size(text.strip().removesuffix("/s"))
    except UsageError:
        rate = 0
    if rate == 0:
        raise UsageError(f"'{text}' is not a rate", hint="write for example 7GB/s")
    check_rate(rate)
    return rate


MIN_RATE = 10**6
"""Bytes per second. Slower than any drive, and far above what somebody types who means GB/s."""


def check_rate(bytes_per_s: float) -> None:
    """Raises UsageError for a number that can't be the bytes per second of a drive or memory."""
    if not 0 < bytes_per_s < math.inf:
        raise UsageError(f"a rate of {bytes_per_s:g} bytes/s is impossible", hint="write for example '7GB/s'")
    if bytes_per_s < MIN_RATE:
        likely = f"{bytes_per_s:g}GB/s" if bytes_per_s < 1000 else f"{bytes_per_s / 1000:g}MB/s"
        raise UsageError(
            f"{bytes_per_s:g} bytes/s is slower than any drive or memory", hint=f"did you mean '{likely}'?"
        )


def check_memory_size(n_bytes: int) -> None:
    """Raises UsageError for a number that can't be the bytes of a machine's or a GPU's memory; 0: it has none."""
    if n_bytes < 0:
        raise UsageError(f"a memory of {n_bytes} bytes is impossible", hint="write for example '24GiB'")
    if 0 < n_bytes < 2**20:
        likely = f"{n_bytes}GiB" if n_bytes < 4096 else f"{n_bytes}MiB"
        raise UsageError(f"{n_bytes} bytes is less than any machine's memory", hint=f"did you mean '{likely}'?")


def _likely(number: str) -> str:
    """A bare number with the unit that was most likely meant."""
    value = float(number)
    if value < 4096:
        return f"{number}GiB"
    return f"{number}MiB" if value < 2**22 else f"{number}B ({format_size(value)})"


def format_size(n_bytes: float) -> str:
    """`13369344` -> `12.75 MiB`."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{int(n_bytes)} B"


def format_duration(seconds: float) -> str:
    """`75` -> `1m15s`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def format_rate(per_s: float) -> str:
    """Three significant digits, never an exponent: `0.0123`, `4.12`, `38.5`, `1,234`."""
    if per_s >= 999.5:
        return f"{per_s:,.0f}"
    return f"{per_s:.3g}" if per_s >= 1e-4 else "0"


def format_bytes_rate(bytes_per_s: float) -> str:
    """`1.25 GB/s`, below a tenth of that unit `1.75 MB/s` or `0.02 MB/s`."""
    if bytes_per_s >= 1e8:
        return f"{bytes_per_s / 1e9:.2f} GB/s"
    return f"{bytes_per_s / 1e6:.{1 if bytes_per_s >= 1e7 else 2}f} MB/s"
