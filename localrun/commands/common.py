"""Shared by commands that load a model: options, model selection, loading with progress."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from localrun import config
from localrun.api import demo, models
from localrun.commands import compiling
from localrun.commands.output import Output, folded
from localrun.engine.facts import ModelFacts, Timings
from localrun.engine.options import EngineOptions, check_answer
from localrun.engine.process.process import EngineProcess
from localrun.engine.process.protocol import Event, Loading, PromptProgress, Ready
from localrun.errors import UsageError
from localrun.option import Where
from localrun.options import add_flags, those
from localrun.units import format_duration, format_rate, parse_rate, parse_size


def size(text: str) -> int:
    """argparse type of a size option."""
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{error} ({error.hint})") from None


def rate(text: str) -> int:
    """argparse type of bytes per second."""
    try:
        return parse_rate(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{error} ({error.hint})") from None


def seconds(text: str) -> float:
    """argparse type of a length of time."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of seconds")
    return number


def count(low: int, high: int = 2**24) -> Callable[[str], int]:
    """argparse type of a whole number within bounds."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text}: expected {low} to {high}")
        return number

    return parse


def add_model_argument(parser: argparse.ArgumentParser, *, optional: bool = True) -> None:
    """MODEL, as all commands take it."""
    parser.add_argument(
        "model",
        nargs="?" if optional else None,
        metavar="MODEL",
        help="a converted directory, a GGUF, an official checkpoint, a name from `localrun list`, or demo",
    )


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every command that loads a model; the user's settings are the defaults."""
    add_flags(parser, "loading", those("engine", Where.FLAG))


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every command that generates text."""
    add_flags(parser, "answers", those("sampling", Where.FLAG))


def settings_of(args: argparse.Namespace) -> config.Settings:
    """The user's settings, overridden by what was typed.

    Raises:
        UsageError: a setting is invalid, or an answer is asked for that the context can't hold.
    """
    settings = config.load().overridden(args, getattr(args, "option_names", ()))
    if settings["context"]:
        check_answer(getattr(args, "max_tokens", None), settings["context"])
    return settings


def model_path(args: argparse.Namespace, settings: config.Settings, out: Output) -> Path:
    """The model that was named or configured, else the demo model, converted on first use.

    Raises:
        UsageError: there is no such model, or none was named and this installation has no demo model.
    """
    return named_path(args, settings) or demo_model(out)


def named_path(args: argparse.Namespace, settings: config.Settings) -> Path | None:
    """The model that was named or configured; None for the demo model. Raises LocalrunError: there is no such model."""
    named = args.model if args.model is not None else settings["model"]
    return models.resolve(named, settings, command=getattr(args, "command", "run")) if named is not None else None


def named_model(text: str, out: Output, *, command: str = "run") -> Path:
    """The path of a model that an option names. Raises LocalrunError: there is none."""
    return models.resolve(text, config.load(), command=command) or demo_model(out)


def named_checkpoint(text: str, *, command: str) -> Path:
    """The folder of an official checkpoint that an option names. Raises LocalrunError: there is none."""
    return models.resolve(text, config.load(), command=command) or demo.checkpoint()


def demo_model(out: Output) -> Path:
    """The converted demo model. Raises UsageError: this installation has none."""
    out.status("preparing the demo model")
    with compiling.Notice(out):
        path = demo.converted()
    out.clear_status()
    if out.err_is_terminal:
        out.note("this is the demo, a toy with 33 million parameters; localrun plan flash: what a real model needs")
    return path


@contextmanager
def engine_process(args: argparse.Namespace, out: Output) -> Iterator[EngineProcess]:
    """An engine process for the command's time; with `--debug` its log is shown at the end."""
    with EngineProcess() as engine:
        engine.start()  # it imports its libraries while we look for the model
        try:
            yield engine
        finally:
            out.end_line()
            if args.debug:
                for line in engine.log_tail():
                    out.note(line)


def load(
    engine: EngineProcess,
    path: Path,
    options: EngineOptions,
    out: Output,
    *,
    each: Callable[[Loading | Ready], None] | None = None,
    max_tokens: int | None = None,
) -> ModelFacts:
    """Loads a model and shows progress.

    Args:
        each: is also called with every event.
        max_tokens: of an answer, where the user typed it.

    Raises:
        UsageError: the context can't hold such an answer.
        LocalrunError: whatever the engine says.
    """
    with compiling.Notice(out, compiling.compiled_by(engine)) as notice:
        for event in engine.load(path, options):
            notice.something_else()
            if isinstance(event, Loading) and out.err_is_terminal:
                for line in event.plan:
                    for part in folded(line, shutil.get_terminal_size().columns):
                        out.note(part)
            show_progress(event, out)
            if each is not None:
                each(event)
    facts = engine.facts
    assert facts is not None
    check_answer(max_tokens, facts.n_ctx)
    return facts


def show_progress(event: Event, out: Output) -> None:
    """Puts loading and prefill on the status line."""
    if isinstance(event, Loading):
        out.status(f"loading {event.progress:4.0%}  {event.text}")
    elif isinstance(event, PromptProgress) and event.total - event.reused > 1:
        n_read = event.done - event.reused
        left = f", {format_duration(event.elapsed_s / n_read * (event.total - event.done))} left" if n_read else ""
        out.status(f"reading the prompt: {event.done} of {event.total} tokens{left}")
    elif isinstance(event, Ready):
        out.clear_status()


def speed(timings: Timings, plan: Mapping[str, Any] | None = None) -> str:
    """One line about an answer's speed, next to the plan's."""
    parts = [f"{timings.new_tokens} tokens"]
    if (rate := timings.decode_tokens_per_s) is not None:
        said = (plan or {}).get("decode")
        expected = f" (planned: {_tokens_per_s(said['low'])} to {_tokens_per_s(said['high'])})" if said else ""
        parts.append(f"{rate:.1f} tokens/s{expected}")
    if (rate := timings.prompt_tokens_per_s) is not None:
        parts.append(f"prompt {timings.prompt_tokens - timings.reused_tokens} tokens at {rate:.1f} tokens/s")
    return ", ".join(parts)


def _tokens_per_s(estimate: Mapping[str, Any]) -> str:
    return format_rate(estimate["tokens_per_s"])
