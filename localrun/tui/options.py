"""What the user can set for a conversation, and how it is kept and typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from localrun.engine.options import SamplingOptions
from localrun.errors import UsageError


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Settings of one conversation.

    Attributes:
        max_tokens: bound of an answer; None: the context.
    """

    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    think: str = "off"
    system: str = ""
    max_tokens: int | None = None


_RANGES: Mapping[str, tuple[type, float, float, str]] = {
    "temperature": (float, 0, 5, "0 takes the most likely token"),
    "top_p": (float, 0, 1, "1 keeps all"),
    "top_k": (int, 0, 1_000_000, "0 keeps all"),
    "min_p": (float, 0, 1, "0 keeps all"),
    "seed": (int, 0, 2**32 - 1, "empty: another one each time"),
    "max_tokens": (int, 1, 10_000_000, "empty: until the context is full"),
}
OPTIONAL = ("seed", "max_tokens")
NAMES = tuple(_RANGES)
_SHORT = {"temp": "temperature", "p": "top_p", "k": "top_k", "max": "max_tokens"}


def describe(name: str) -> str:
    """What values mean, for the settings dialog."""
    return _RANGES[name][3]


def value_of(options: ChatOptions, name: str) -> Any:
    return options.max_tokens if name == "max_tokens" else getattr(options.sampling, name)


def with_value(options: ChatOptions, name: str, text: str) -> ChatOptions:
    """`options` with a sampling value as the user typed it.

    Raises:
        UsageError: no such name or not a value of it.
    """
    name = name.replace("-", "_").lower()
    name = _SHORT.get(name, name)
    if name not in _RANGES:
        raise UsageError(f"there is no sampling value '{name}'", hint="known: " + ", ".join(NAMES))
    kind, low, high, meaning = _RANGES[name]
    value: Any
    if name in OPTIONAL and text.strip().lower() in ("", "none", "off"):
        value = None
    else:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not low <= value <= high:
            raise UsageError(f"{name} {text.strip()!r}: expected {low:g} to {high:g}", hint=meaning)
    if name == "max_tokens":
        return replace(options, max_tokens=value)
    return replace(options, sampling=replace(options.sampling, **{name: value}))


def to_json(options: ChatOptions) -> dict[str, Any]:
    """For the store: what differs from the defaults of the program."""
    return {**{name: value_of(options, name) for name in NAMES}, "think": options.think, "system": options.system}


def from_json(body: Mapping[str, Any], defaults: ChatOptions) -> ChatOptions:
    """Inverse of `to_json`; what is missing or senseless is taken from `defaults`."""
    options = defaults
    for name in NAMES:
        if name in body:
            value = body[name]
            try:
                options = with_value(options, name, "" if value is None else str(value))
            except UsageError:
                continue
    think, system = body.get("think"), body.get("system")
    return replace(
        options,
        think=think if isinstance(think, str) and think else options.think,
        system=system if isinstance(system, str) else options.system,
    )
