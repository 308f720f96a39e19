"""`localrun chat`: opens the terminal UI; with `--plain` chats line by line; without a terminal prints one answer, as a check.

The command line passes in the UI (`args.open_ui`): commands don't import it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from msgspec.structs import replace

from localrun import config, interrupts
from localrun.api import demo, models
from localrun.api.model import generate_command
from localrun.api.options import engine_options, sampling_options
from localrun.commands import common, typeahead
from localrun.commands.output import Output
from localrun.engine.options import EngineOptions
from localrun.engine.process.process import EngineProcess, GenerateEvent
from localrun.engine.process.protocol import Delta, Finished, Generate, Loading, Ready
from localrun.errors import LocalrunError, UsageError
from localrun.textsafe import visible_line
from localrun.units import format_size

EXAMPLES = """\
examples:
  localrun chat
  localrun chat ~/models/v4-flash --ram 48GiB --think high
"""

QUESTION = "Hello! Who are you?"
"""The question asked without a terminal."""

HELP = "Enter sends. /new starts over, /exit or Ctrl-D quits, Ctrl-C stops an answer."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun chat`."""
    parser.epilog = EXAMPLES
    common.add_model_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--server",
        metavar="URL",
        help="use the model of a running localrun serve; set LOCALRUN_SERVER_KEY to its API key",
    )
    parser.add_argument(
        "--plain", action="store_true", help="plain line-by-line mode, for simple terminals and screen readers"
    )
    common.add_sampling_arguments(parser)
    common.add_load_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    out = Output()
    interactive = sys.stdin is not None and sys.stdin.isatty() and out.out_is_terminal
    with typeahead.kept() if interactive and not args.plain else contextlib.nullcontext():
        return _run(args, out, interactive=interactive)


def _run(args: argparse.Namespace, out: Output, *, interactive: bool) -> int:
    settings = common.settings_of(args)
    if args.server is not None:
        return _run_remote(args, settings, out, interactive=interactive)
    options = engine_options(settings)
    named = common.named_path(args, settings)
    if args.model is None and settings["model"] is None and interactive:
        named = models.last()
    if interactive and not args.plain:
        return _run_ui(args, settings, options, named)
    with common.engine_process(args, out) as engine:
        plan: dict[str, Any] = {}

        def keep(event: Loading | Ready) -> None:
            if isinstance(event, Ready):
                plan.update(event.plan)

        path = named or common.demo_model(out)
        facts = common.load(engine, path, options, out, each=keep, max_tokens=args.max_tokens)
        if named is not None:
            models.remember(named)
        template = generate_command((), settings)
        chat = _Chat(engine, template, args.system, out, plan)
        if not interactive:
            out.note(f"asking {facts.name}: {QUESTION}")
            chat.ask(QUESTION)
            return 0
        out.note(
            f"{facts.name}: {format_size(facts.file_bytes)}, {facts.n_layers} layers, context {facts.n_ctx} tokens"
        )
        out.note(HELP)
        _loop(chat, out)
    return 0


def _run_remote(args: argparse.Namespace, settings: config.Settings, out: Output, *, interactive: bool) -> int:
    """The same with a server's model: there is nothing to load."""
    from localrun.server.remote import RemoteEngine

    if args.model is not None:
        raise UsageError("--server uses the server's model", hint="leave out MODEL")
    template = generate_command((), settings)
    with RemoteEngine(args.server, key=os.environ.get("LOCALRUN_SERVER_KEY")) as engine:
        (ready,) = engine.load()  # report a wrong address before opening a screen
        assert isinstance(ready, Ready)
        if interactive and not args.plain:
            return int(
                args.open_ui(
                    Path(ready.facts.path),
                    EngineOptions(n_ctx=ready.facts.n_ctx),
                    engine=engine,
                    sampling=template.sampling,
                    think=template.think,
                    system=args.system or "",
                    max_tokens=template.max_tokens,
                    fresh=False,
                    notify=settings["notify"],
                )
            )
        chat = _Chat(engine, template, args.system, out, {})
        if not interactive:
            out.note(f"asking {ready.facts.name}: {QUESTION}")
            chat.ask(QUESTION)
            return 0
        out.note(f"{ready.facts.name} at {args.server}, context {ready.facts.n_ctx} tokens")
        out.note(HELP)
        _loop(chat, out)
    return 0


class _Backend(Protocol):
    """What answers: an engine process, or a server."""

    def generate(self, command: Generate) -> Iterator[GenerateEvent]: ...


def _run_ui(args: argparse.Namespace, settings: config.Settings, options: EngineOptions, named: Path | None) -> int:
    """Opens the terminal UI; the demo model is prepared while it is up."""
    with EngineProcess() as engine:
        engine.start()  # it imports its libraries while the interface imports its own
        return int(
            args.open_ui(
                named,
                options,
                engine=engine,
                prepare=None if named is not None else demo.converted,
                sampling=sampling_options(settings),
                think=settings["think"],
                system=args.system or "",
                max_tokens=settings["max_tokens"],
                fresh=args.model is not None,
                notify=settings["notify"],
            )
        )


class _Chat:
    """The conversation so far; a failed answer leaves it as it was."""

    def __init__(
        self, engine: _Backend, template: Generate, system: str | None, out: Output, plan: dict[str, Any]
    ) -> None:
        self._engine, self._template, self._out, self._plan = engine, template, out, plan
        self._system: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._system)

    def restart(self) -> None:
        self._messages = list(self._system)

    def ask(self, text: str) -> None:
        """Prints the answer to `text` and keeps both."""
        messages = [*self._messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        try:
            for event in self._engine.generate(replace(self._template, messages=tuple(messages))):
                common.show_progress(event, self._out)
                if isinstance(event, Delta) and event.kind == "thinking":
                    self._out.thinking(event.text)
                elif isinstance(event, Delta) and event.kind == "text":
                    pieces.append(event.text)
                    self._out.answer(event.text)
                elif isinstance(event, Finished):
                    self._out.end_line()
                    self._out.note(f"({common.speed(event.timings, self._plan)})")
        finally:
            self._out.end_line()
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]


def _loop(chat: _Chat, out: Output) -> None:
    """Reads lines until the user leaves."""
    with contextlib.suppress(ImportError):  # not on every platform
        import readline  # gives input() editing and history

        readline.parse_and_bind("set enable-bracketed-paste on")
    while True:
        try:
            text = _read_message().strip()
        except (EOFError, KeyboardInterrupt):
            out.note("")
            return
        if text == "/exit":
            return
        if text == "/new":
            chat.restart()
            out.note("new conversation")
        elif text.startswith("/"):
            out.note(HELP)
        elif text:
            try:
                chat.ask(text)
            except KeyboardInterrupt:
                interrupts.again()
                out.note("(stopped)")
            except LocalrunError as error:
                out.note(f"error: {visible_line(str(error))}")
                if error.hint:
                    out.note(f"hint: {visible_line(error.hint)}")


PASTE_PAUSE_S = 0.05
"""Nobody types two lines within this time: what comes so soon after a line was pasted with it."""


def _read_message() -> str:
    """A line, and the lines that were pasted with it."""
    lines = [input("> ")]
    while select.select([sys.stdin], [], [], PASTE_PAUSE_S)[0]:
        try:
            lines.append(input())
        except EOFError:  # pasted text ends the message, not the conversation
            break
    return "\n".join(lines)
