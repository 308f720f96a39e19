"""Options of a conversation: how they are stored and typed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from localrun.engine.options import SamplingOptions
from localrun.errors import UsageError
from localrun.option import Option, Where
from localrun.options import those


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Settings of one conversation.

    Attributes:
        max_tokens: limit of an answer; None: the context.
    """

    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    think: str = "off"
    system: str = ""
    max_tokens: int | None = None


_OPTIONS = those(where=Where.CHAT)
NAMES = tuple(option.name for option in _OPTIONS)
_BY_NAME = {name: option for option in _OPTIONS for name in (option.name, *option.short)}


def option_of(name: str) -> Option:
    """The declaration of a sampling value, by any of its names.

    Raises:
        UsageError: there is no such value.
    """
    name = name.replace("-", "_").lower()
    if name not in _BY_NAME:
        near = difflib.get_close_matches(name, _BY_NAME, 1)
        meant = f"did you mean {_BY_NAME[near[0]].name}? " if near else ""
        raise UsageError(f"unknown sampling value '{name}'", hint=f"{meant}known: {', '.join(NAMES)}")
    return _BY_NAME[name]


def describe(name: str) -> str:
    """What values mean, for the settings dialog."""
    option = option_of(name)
    unset = f"; {option.unset.replace('without it', 'empty')}" if option.unset else ""
    return f"{option.bounds}{unset}" if unset else f"{option.bounds}: {option.help}"


def value_of(options: ChatOptions, name: str) -> Any:
    return options.max_tokens if name == "max_tokens" else getattr(options.sampling, name)


def with_value(options: ChatOptions, name: str, text: str) -> ChatOptions:
    """`options` with a sampling value as the user typed it.

    Raises:
        UsageError: unknown name or invalid value.
    """
    option = option_of(name)
    unset = option.default is None and text.strip().lower() in ("", "none", "off")
    value: Any = None if unset else option.parse(text)
    changed: dict[str, Any] = {option.field: value}
    if option.name == "max_tokens":
        return replace(options, max_tokens=value)
    return replace(options, sampling=replace(options.sampling, **changed))


def to_json(options: ChatOptions) -> dict[str, Any]:
    """For the store: what differs from the defaults of the program."""
    return {**{name: value_of(options, name) for name in NAMES}, "think": options.think, "system": options.system}


def from_json(body: Mapping[str, Any], defaults: ChatOptions) -> ChatOptions:
    """Inverse of `to_json`; missing or invalid values are taken from `defaults`."""
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
