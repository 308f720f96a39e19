"""`localrun run`: one answer to a prompt, streamed to standard output."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from localrun.commands import common
from localrun.commands.output import Output
from localrun.engine.process import EngineProcess
from localrun.engine.protocol import Delta, Finished, Generate, ModelFacts, ToolCall
from localrun.errors import UsageError

EXAMPLES = """\
examples:
  localrun run -p "Why is the sky blue?"
  git diff | localrun run ~/models/v4-flash -p "Write a commit message for this:" --temp 0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun run`."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a converted directory, a GGUF or an official checkpoint"
    )
    parser.add_argument(
        "-p", "--prompt", metavar="TEXT", help="the question; what comes from standard input follows it"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end instead of streamed text")
    common.add_sampling_arguments(parser)
    common.add_load_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    out = Output()
    settings = common.settings_of(args)
    command = Generate(
        messages=_messages(args),
        think=settings.sampling.think,
        sampling=common.sampling_options(settings, args.seed),
        max_tokens=args.max_tokens,
    )
    with common.engine_process(args, out) as engine:
        facts = common.load(engine, common.model_path(settings, out), common.engine_options(settings), out)
        _answer(engine, command, facts, out, as_json=args.json)
    return 0


def _messages(args: argparse.Namespace) -> tuple[dict[str, Any], ...]:
    """The conversation: the system message if given, the prompt joined with standard input."""
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8", "replace")
    prompt = "\n\n".join(text for text in (args.prompt, piped) if text)
    if not prompt.strip():
        raise UsageError("nothing to answer", hint="give -p TEXT, or pipe a text in")
    system = [{"role": "system", "content": args.system}] if args.system else []
    return (*system, {"role": "user", "content": prompt})


def _answer(engine: EngineProcess, command: Generate, facts: ModelFacts, out: Output, *, as_json: bool) -> None:
    texts: dict[str, list[str]] = {"thinking": [], "text": [], "tool": []}
    calls: list[dict[str, str]] = []
    was_thinking = False
    for event in engine.generate(command):
        common.show_progress(event, out)
        if isinstance(event, Delta):
            texts[event.kind].append(event.text)
            if not as_json and event.kind == "thinking":
                out.thinking(event.text)
            elif not as_json and event.kind == "text":
                if was_thinking:
                    out.thinking("\n\n")
                out.answer(event.text)
            was_thinking = event.kind == "thinking"
        elif isinstance(event, ToolCall):
            calls.append({"id": event.id, "name": event.name, "arguments": event.arguments})
        elif isinstance(event, Finished):
            finished = event
    if as_json:
        out.json(
            {
                "model": facts.name,
                "text": "".join(texts["text"]),
                "thinking": "".join(texts["thinking"]),
                "tool_calls": calls,
                "finish_reason": finished.reason,
                "problems": list(finished.problems),
                "seed": finished.seed,
                "timings": asdict(finished.timings),
            }
        )
        return
    out.end_line()
    for call in calls:
        out.line(f"{call['name']}({call['arguments']})")
    if finished.warning and out.err_is_terminal:
        out.note(f"note: {finished.warning}")
    if out.err_is_terminal:
        out.note(f"({common.speed(finished.timings)})")
