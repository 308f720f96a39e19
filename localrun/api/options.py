"""Turns options by name into the engine's options; unset ones come from the user's settings, as in commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from localrun import config
from localrun.api import models
from localrun.engine import memory
from localrun.engine.options import EngineOptions, SamplingOptions
from localrun.option import Option, OptionKind
from localrun.options import BY_NAME, fields_of

Size = str | int
"""`"8GiB"`, `"500MB"`, or bytes."""

ByteRate = str | float
"""`"7GB/s"`, or bytes per second."""


class Limits(TypedDict, total=False):
    """What a load and a plan keep to (docs/options.md). Sizes as text have a unit."""

    ram: Size
    vram: Size
    context: int
    threads: int
    batch: int
    kv: str
    dense: str
    adaptive: bool


class LoadOptions(Limits, total=False):
    """How a model is loaded (docs/options.md)."""

    gpu: str
    rpc: str
    mirror: str
    keep_dense: Size


class AnswerOptions(TypedDict, total=False):
    """How an answer is written (docs/options.md)."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    max_tokens: int
    think: str
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float


def given(options: Mapping[str, Any], base: config.Settings | None = None) -> config.Settings:
    """The user's settings, or `base`, overridden by these options; None leaves an option unchanged.

    Raises:
        UsageError: an invalid or out-of-bounds value.
        TypeError: an unknown name, as for any function.
    """
    if unknown := options.keys() - BY_NAME.keys():
        raise TypeError(f"unknown option {min(unknown)!r}; known: {', '.join(BY_NAME)}")
    values = {name: _value(BY_NAME[name], value) for name, value in options.items() if value is not None}
    return (base or config.load()).changed(**values)


def _value(option: Option, value: object) -> Any:
    if option.kind is OptionKind.SIZE and isinstance(value, int) and not isinstance(value, bool):
        option.check(value)  # bytes: a number from Python needs no unit
        return value
    return option.parse(value)


def engine_options(settings: config.Settings, *, math: Literal["int8", "f32"] = "int8") -> EngineOptions:
    """How to load a model. Anything this machine can't do is rejected before reading anything.

    Raises:
        UsageError, BudgetError: more threads or memory than there are.
    """
    memory.check_threads(settings["threads"])
    memory.check_ram(settings["ram"])
    if settings["mirror"] is not None and (mirror := models.resolve(settings["mirror"], settings)) is not None:
        settings = settings.changed(mirror=str(mirror))
    return EngineOptions(**fields_of("engine", settings.values), math=math)


def sampling_options(settings: config.Settings) -> SamplingOptions:
    """How to choose tokens."""
    return SamplingOptions(**fields_of("sampling", settings.values))
