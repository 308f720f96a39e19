"""What an option is: its type, bounds and unit, how its value is read from text, TOML or JSON, checked and shown.

Knows no option by name: they are declared in `options.py`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from localrun.errors import UsageError
from localrun.units import format_size, parse_size


class OptionKind(Enum):
    """What a value is."""

    SIZE = "size"  # bytes, with a unit where it is text
    COUNT = "whole number"
    NUMBER = "number"
    TEXT = "text"
    PATH = "path"
    SWITCH = "true or false"
    CHOICE = "one of"


class Where(Enum):
    """Places where an option can be set."""

    FILE = "config.toml"  # and the environment
    FLAG = "flag"
    CHAT = "/set"  # of one conversation, or of a request to a server
    DIALOG = "dialog"  # the settings dialog, for what a load decides
    REQUEST = "request"  # to a server only


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option. Immutable.

    Attributes:
        name: in `config.toml`, as `LOCALRUN_<NAME>`, in `/set` and in JSON.
        field: the field of `EngineOptions` or `SamplingOptions`; empty if neither has it.
        help: what it does, one phrase.
        default: None: see `unset`.
        unset: what happens without a value.
        low, high: inclusive bounds of a number or count.
        choices: the allowed values of a CHOICE; the usual values of a TEXT.
        flag: `--name` if empty.
        short: aliases in `/set`.
        metavar: the value's placeholder in `--help`.
    """

    name: str
    table: str
    kind: OptionKind
    help: str
    field: str = ""
    default: Any = None
    unset: str = ""
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""
    choices: tuple[str, ...] = ()
    flag: str = ""
    short: tuple[str, ...] = ()
    metavar: str = ""
    where: frozenset[Where] = frozenset({Where.FILE, Where.FLAG})

    @property
    def variable(self) -> str:
        """Of the environment."""
        return f"LOCALRUN_{self.name.upper()}"

    @property
    def flag_name(self) -> str:
        return self.flag or f"--{self.name.replace('_', '-')}"

    @property
    def bounds(self) -> str:
        """`0 to 1`, `auto, none`, `SIZE`: what a value may be, for people."""
        if self.kind is OptionKind.SIZE:
            return "a size, such as 16GiB"
        if self.choices:
            return ", ".join(self.choices)
        if self.low > -math.inf and self.high < math.inf:
            return f"{_plain(self.low)} to {_plain(self.high)}"
        return str(self.kind.value)

    def parse(self, value: object) -> Any:
        """Parses user input: text, or a TOML or JSON value.

        Raises:
            UsageError: it is invalid; the message says what is expected, but not where the option was set.
        """
        result = self._converted(value)
        self.check(result)
        return result

    def check(self, value: Any) -> None:
        """Raises UsageError for a value that is invalid or out of bounds. None is valid for an option without a default."""
        if value is None and self.default is None:
            return
        if self.kind in (OptionKind.COUNT, OptionKind.NUMBER, OptionKind.SIZE):
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise self._refusal(value)
            low = max(self.low, 0) if self.kind is OptionKind.SIZE else self.low
            if not low <= value <= self.high:  # also false for NaN
                raise self._refusal(value)
        elif self.kind is OptionKind.CHOICE and value not in self.choices:
            raise self._refusal(value)

    def show(self, value: Any) -> str:
        """The value as `parse` reads it; empty for None."""
        if value is None:
            return ""
        if self.kind is OptionKind.SIZE:
            return format_size(value).replace(" ", "")
        if self.kind is OptionKind.NUMBER:
            return _plain(value)
        return str(value).lower() if self.kind is OptionKind.SWITCH else str(value)

    def _converted(self, value: object) -> Any:
        text = value.strip() if isinstance(value, str) else value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        try:
            if self.kind is OptionKind.SIZE and (isinstance(text, str) or is_number):
                return parse_size(str(text))
            if self.kind is OptionKind.NUMBER and (isinstance(text, str) or is_number):
                return float(text)  # type: ignore[arg-type]  # str, int or float
            if self.kind is OptionKind.COUNT and (isinstance(text, str) or is_number):
                return _whole(text)
        except UsageError as error:
            raise UsageError(f"{self.name}: {error}", hint=error.hint) from None
        except (ValueError, OverflowError):
            if self.kind is OptionKind.COUNT and (thousands := re.fullmatch(r"([0-9]+)[kK]", str(text))):
                likely = int(thousands[1]) * 1024
                raise UsageError(
                    f"{self.name} {text!r}: a number has no unit", hint=f"did you mean {likely}?"
                ) from None
            raise self._refusal(value) from None
        if self.kind is OptionKind.SWITCH and str(text).lower() in _SWITCHES:
            return _SWITCHES[str(text).lower()]
        if self.kind in (OptionKind.TEXT, OptionKind.PATH, OptionKind.CHOICE) and isinstance(value, str):
            return value
        raise self._refusal(value)

    def _refusal(self, value: object) -> UsageError:
        shown = self.show(value) if isinstance(value, int | float) else repr(value)
        expected = self.bounds if self.low > -math.inf or self.choices else f"a {self.kind.value}"
        unit = f" {self.unit}" if self.unit else ""
        return UsageError(f"{self.name} {shown}: expected {expected}{unit}", hint=self.unset or None)


_SWITCHES = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _whole(value: object) -> int:
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError
        return int(value)
    return int(str(value))


def _plain(value: float) -> str:
    """Without an exponent."""
    return str(int(value)) if float(value).is_integer() else f"{value:.10f}".rstrip("0").rstrip(".")
