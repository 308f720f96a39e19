"""`localrun run`: one answer to a prompt, streamed to standard output."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from localrun import config
from localrun.api import models
from localrun.api.answer import Gathered
from localrun.api.model import generate_command
from localrun.api.options import engine_options
from localrun.commands import common
from localrun.commands.output import Output
from localrun.engine.conversations.attachments import read_attachment, with_attachments
from localrun.engine.facts import ModelFacts
from localrun.engine.process.process import EngineProcess, GenerateEvent
from localrun.engine.process.protocol import Delta, Finished, Generate, Loading, PromptProgress, Ready, ToolCall
from localrun.errors import LocalrunError, UsageError, host_error

EXAMPLES = """\
examples:
  localrun run -p "Why is the sky blue?"
  localrun run "Why is the sky blue?"                      the same
  git diff | localrun run ~/models/v4-flash -p "Write a commit message for this:" --temp 0
  localrun run ~/models/v4-flash --file notes.txt -p "Summarize this" --jsonl | jq -r 'select(.event == "text").text'

The question is the files, the prompt and standard input, in that order. In a loop that reads lines from
standard input, redirect it: localrun run -p "$line" < /dev/null
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun run`."""
    parser.epilog = EXAMPLES
    common.add_model_argument(parser)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; standard input is appended to it")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--file",
        type=Path,
        action="append",
        metavar="FILE",
        help="text file to put before the prompt; - reads standard input; repeatable",
    )
    parser.add_argument(
        "--tools", type=Path, metavar="FILE", help="JSON list of functions to offer; calls are printed, not executed"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print one JSON object at the end instead of streaming text")
    shown.add_argument("--jsonl", action="store_true", help="print one JSON object per event, one per line")
    common.add_sampling_arguments(parser)
    common.add_load_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    out = Output()
    shown: _Shown = _Lines(out) if args.jsonl else _Whole(out) if args.json else _Text(out)
    try:
        settings = common.settings_of(args)
        options = engine_options(settings)
        if args.prompt is None and args.model is not None and models.is_text(args.model, settings):
            _take_as_question(args, settings, out)
        if args.prompt is None and not args.file:
            common.named_path(args, settings)  # a model that isn't here is worse than a missing question
        command = generate_command(_messages(args), settings, tools=_tools(args.tools))
        named = common.named_path(args, settings)
        out.check_open()
        with common.engine_process(args, out) as engine:
            path = named or common.demo_model(out)
            facts = common.load(engine, path, options, out, each=shown.load, max_tokens=args.max_tokens)
            _answer(engine, command, facts, shown, out)
    except BaseException as error:  # also on an interrupt: readers of the events wait for the last one
        with contextlib.suppress(OSError, LocalrunError):  # the output may be what failed
            shown.failed(error)
        raise
    return 0


def _take_as_question(args: argparse.Namespace, settings: config.Settings, out: Output) -> None:
    """`localrun run "Why is the sky blue?"`: there is no such model, so it is the question."""
    answers = settings["model"] or "the demo model"
    out.note(f"no model has that name, so it is the prompt for {answers} (use -p TEXT to avoid this note)")
    args.prompt, args.model = args.model, None


def _messages(args: argparse.Namespace) -> tuple[dict[str, Any], ...]:
    """The conversation: the system message if given, then files, prompt and standard input as one question."""
    files = [read_attachment(path, pipes=True) for path in args.file or ()]
    taken = any(str(path) == "-" for path in args.file or ())
    piped = (
        "" if taken or sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8", "replace")
    )
    prompt = "\n\n".join(text for text in (args.prompt, piped) if text)
    if not prompt.strip() and not files:
        raise UsageError("nothing to answer", hint="use -p TEXT, or pipe text in")
    system = [{"role": "system", "content": args.system}] if args.system else []
    return (*system, {"role": "user", "content": with_attachments(files, prompt).strip("\n") if files else prompt})


def _tools(path: Path | None) -> tuple[dict[str, Any], ...]:
    """The file's tools; checked before a model is loaded for them."""
    if path is None:
        return ()
    from localrun.engine.chat.messages import MessageError, tool_to_json, tools_from_json

    try:
        return tuple(tool_to_json(tool) for tool in tools_from_json(path.expanduser().read_bytes(), where=str(path)))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except MessageError as error:
        raise UsageError(str(error), hint=error.hint or "a list of functions as in the OpenAI API") from None


def _answer(engine: EngineProcess, command: Generate, facts: ModelFacts, shown: _Shown, out: Output) -> None:
    for event in engine.generate(command):
        common.show_progress(event, out)
        shown.event(event)
        if isinstance(event, Finished):
            shown.end(event, facts)


class _Shown(Protocol):
    """A way to print what happens."""

    def load(self, event: Loading | Ready) -> None: ...
    def event(self, event: GenerateEvent) -> None: ...
    def end(self, finished: Finished, facts: ModelFacts) -> None: ...
    def failed(self, error: BaseException) -> None: ...


class _Text:
    """For people and pipes: the answer as it comes, a line for each tool call."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._was_thinking = False
        self._plan: Mapping[str, Any] = {}

    def load(self, event: Loading | Ready) -> None:
        if isinstance(event, Ready):
            self._plan = event.plan

    def event(self, event: GenerateEvent) -> None:
        if isinstance(event, ToolCall):
            self._out.end_line()
            self._out.line(f"{event.name}({event.arguments})")
            if not event.usable:
                self._out.note(f"note: this call of {event.name} is incomplete: {', '.join(event.problems)}")
        elif isinstance(event, Delta) and event.kind == "thinking":
            self._out.thinking(event.text)
            self._was_thinking = True
        elif isinstance(event, Delta) and event.kind == "text":
            if self._was_thinking:
                self._out.thinking("\n\n")
                self._was_thinking = False
            self._out.answer(event.text)

    def end(self, finished: Finished, facts: ModelFacts) -> None:
        self._out.end_line()
        if self._out.err_is_terminal:
            if finished.warning:
                self._out.note(f"note: {finished.warning}")
            if finished.reason in ("length", "context"):
                why = "--max-tokens" if finished.reason == "length" else "the context is full"
                self._out.note(f"note: the answer was cut off ({why})")
            self._out.note(f"({common.speed(finished.timings, self._plan)})")

    def failed(self, error: BaseException) -> None:
        pass  # the command line prints it


class _Whole:
    """One JSON object when all is there."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._gathered = Gathered()

    def load(self, event: Loading | Ready) -> None:
        pass

    def event(self, event: GenerateEvent) -> None:
        self._gathered.take(event)

    def end(self, finished: Finished, facts: ModelFacts) -> None:
        self._out.json({"model": facts.name, **self._so_far(), **_closing(finished)})

    def failed(self, error: BaseException) -> None:
        self._out.json({"error": _problem(error), **self._so_far()})

    def _so_far(self) -> dict[str, Any]:
        got = self._gathered
        return {"text": got.text, "thinking": got.thinking, "tool_calls": [_call(call) for call in got.tool_calls]}


class _Lines:
    """Prints one JSON object per line, atomically; `event` is its kind."""

    def __init__(self, out: Output) -> None:
        self._out = out

    def load(self, event: Loading | Ready) -> None:
        if isinstance(event, Ready):
            facts = event.facts
            self._line("ready", model=facts.name, n_ctx=facts.n_ctx, file_bytes=facts.file_bytes, load_s=event.load_s)
        else:
            self._line("loading", progress=round(event.progress, 3), text=event.text)

    def event(self, event: GenerateEvent) -> None:
        if isinstance(event, PromptProgress):
            self._line("prompt", done=event.done, total=event.total, reused=event.reused, elapsed_s=event.elapsed_s)
        elif isinstance(event, Delta) and event.text:
            self._line("tool_call_part" if event.kind == "tool" else event.kind, text=event.text)
        elif isinstance(event, ToolCall):
            self._line("tool_call", **_call(event))

    def end(self, finished: Finished, facts: ModelFacts) -> None:
        self._line("end", **_closing(finished))

    def failed(self, error: BaseException) -> None:
        self._line("error", **_problem(error))

    def _line(self, event: str, /, **values: Any) -> None:
        self._out.json_line({"event": event, **values})


def _problem(error: BaseException) -> dict[str, Any]:
    """Why there is no answer, or only part of one."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return {"type": "Interrupted", "message": "interrupted", "hint": None}
    error = host_error(error) or error
    return {"type": type(error).__name__, "message": str(error), "hint": getattr(error, "hint", None)}


def _call(event: ToolCall) -> dict[str, Any]:
    return {
        "id": event.id,
        "name": event.name,
        "arguments": event.arguments,
        "usable": event.usable,
        "problems": list(event.problems),
    }


def _closing(finished: Finished) -> dict[str, Any]:
    return {
        "finish_reason": finished.reason,
        "problems": list(finished.problems),
        "warning": finished.warning,
        "seed": finished.seed,
        "timings": asdict(finished.timings),
    }
