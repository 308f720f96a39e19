"""What recorded agents cost in prompt tokens: `python -m tools.serve_reuse FOLDER`.

FOLDER holds recordings of agents' requests, one JSON file a client:

    {"client": "codex", "runs": {"base": {"requests": [{"path": ..., "headers": {...}, "body": {...}, "tools": [...]}]}}}

In a body, `"<str 512>"` stands for a text of 512 characters, which is made up from its place; a tool is given by its name, type and
size. Every request goes through HTTP, in its order, to an engine that renders prompts as the real one does, counts four characters
as a token, and answers what the recording says was answered. Then all of it again, as two later runs of the client: one on the same
day, of which only Claude Code's billing line is another, and one on another day, with all lines changed that clients change
(`CHANGED`). At last the session's last request as if it had come on another day, in the middle of the same conversation.

Prints for every request its prompt, what of it was there before, and what is new.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrun.engine.process.protocol import Generate
from localrun.server import chat_completions, messages_input, responses_input
from localrun.server.asks import Ask, Defaults
from localrun.server.responses_store import ResponseStore
from localrun.server.signatures import Signer
from tests.server.raw import post
from tests.server.running import Running, serving
from tests.server.scripted import ScriptedEngine, call_text, calls_text, words

Json = Any

RUNS = (("2026-01-05", "a1b"), ("2026-01-05", "a2c"), ("2026-01-06", "a3d"))
"""The day and the billing line's suffix of each run."""

OVERNIGHT = len(RUNS) + 1
"""The run that goes on with the last one's conversation on a day of its own, `NEXT_DAY`."""

NEXT_DAY = ("2026-01-07", "a4e")

GIT_STATUS = """
gitStatus: This is the git status at the start of the conversation.

Status:
M {day}.txt

Recent commits:
1234567 Start
"""

CHANGED: Mapping[str, Mapping[str, tuple[float, str]]] = {
    "claude": {
        "system[2].text": (0.9, GIT_STATUS),
        "messages[0].content[0].text": (0.5, "\nToday's date is {day}.\n"),
    },
    "codex": {"input[2].content[0].text": (0.8, "\n<current_date>{day}</current_date>\n")},
    "opencode": {"messages[0].content": (0.92, "\n  Today's date: {day}\n")},
    "qwen": {"messages[1].content[0].text": (0.3, "\nToday's date is {day}.\n")},
}
"""Which of a client's texts hold a line that changes: where, as a share of the text's length, and how it reads."""

_PLACEHOLDER = re.compile(r"<str (\d+)>")
_BILLING = re.compile(r"(cc_version=[\d.]+\.)\w+;")
_SESSION_HEADER = re.compile(r"x-.*session")


@dataclass(frozen=True, slots=True)
class Cost:
    """One request's prompt, in tokens."""

    client: str
    run: int
    path: str
    prompt: int
    reused: int

    @property
    def new(self) -> int:
        return self.prompt - self.reused


def made_up(n_chars: int, place: str) -> str:
    """A text of that length; the same for the same place and length, and unlike any other from its start."""
    line = f"{n_chars} at {place}: read before you write, keep it short, and say what you did. "
    return (line * (n_chars // len(line) + 1))[:n_chars]


def filled(value: Json, client: str, day: str, billing: str, place: str = "") -> Json:
    """A recorded value with texts in place of their lengths, as it would be on that day."""
    if isinstance(value, dict):
        inner = {key: f"{place}.{key}" if place else key for key in value}
        return {key: filled(each, client, day, billing, inner[key]) for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, client, day, billing, f"{place}[{i}]") for i, each in enumerate(value)]
    if not isinstance(value, str):
        return value
    if (match := _PLACEHOLDER.fullmatch(value)) is None:
        return _BILLING.sub(rf"\g<1>{billing};", value)
    text = made_up(int(match[1]), place)
    if place not in (changed := CHANGED.get(client, {})):
        return text
    share, line = changed[place]
    at, line = int(share * len(text)), line.format(day=day)
    return (text[:at] + line + text[at + len(line) :])[: len(text)]


def tool_of(recorded: Mapping[str, Json]) -> dict[str, Json]:
    """A tool of the recorded name, type and size."""
    name, kind, keys = recorded["name"], recorded.get("type"), recorded["keys"]
    schema = {"type": "object", "properties": {"path": {"type": "string"}}}
    tool: dict[str, Json] = {"name": name} if kind is None else {"name": name, "type": kind}
    if kind == "namespace":
        tool["tools"] = [{"name": each, "type": "function", "parameters": schema} for each in recorded["sub"]]
        inner = tool["tools"][0]
    elif "function.name" in keys:
        inner = {"name": name, "parameters": schema}
        tool = {"type": "function", "function": inner}
    else:
        inner = tool
        if kind != "web_search":
            tool["input_schema" if "input_schema" in keys else "parameters"] = schema
    missing = recorded["bytes"] - len(json.dumps(tool))
    inner["description"] = made_up(max(0, missing), str(name))
    return tool


def body_of(request: Mapping[str, Json], client: str, run: tuple[str, str], signer: Signer) -> dict[str, Json]:
    """A recorded request's body, ready to be sent; thoughts in it are as if this server had signed them."""
    agent = client if request.get("tools") else ""  # what asks for a title, without tools, has no such lines
    body: dict[str, Json] = filled(request["body"], agent, *run)
    if request.get("tools"):
        body["tools"] = [tool_of(tool) for tool in request["tools"]]
    _sign(body, signer)
    return {**body, "stream": False}


def _sign(value: Json, signer: Signer) -> None:
    if isinstance(value, list):
        for each in value:
            _sign(each, signer)
    elif isinstance(value, dict):
        if value.get("type") == "thinking" and "signature" in value:
            value["signature"] = signer.sign(value["thinking"])
        elif value.get("type") == "reasoning" and value.get("encrypted_content"):
            value["encrypted_content"] = signer.seal("".join(part["text"] for part in value["summary"]))
        for each in value.values():
            _sign(each, signer)


def ask_of(path: str, body: Mapping[str, Json], defaults: Defaults, signer: Signer) -> Ask:
    """A request in our own terms."""
    if path.endswith("/messages"):
        return messages_input.read(body, defaults, signer)[0]
    if path.endswith("/responses"):
        return responses_input.read(body, defaults, signer, ResponseStore(1, 1)).ask
    return chat_completions.read(body, defaults)[0]


def pieces_of(message: Mapping[str, Json] | None, *, thinks: bool) -> Iterator[str]:
    """An answer as the model writes it; a short one if the recording has none."""
    message = message or {"content": "It says hello."}
    if thinks:
        yield from [*words(str(message.get("reasoning_content") or "I answer.")), "</think>"]
    yield from words(str(message.get("content") or ""))
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    if calls:
        yield from calls_text(*(call_text(call["name"], **json.loads(call["arguments"])) for call in calls))


def answer_to(ask: Ask, following: Ask | None) -> Mapping[str, Json] | None:
    """What the client was answered, from its next request; None if that is another conversation's."""
    n = len(ask.messages)
    if following is None or len(following.messages) <= n or len(following.tools) != len(ask.tools):
        return None
    return following.messages[n] if following.messages[n].get("role") == "assistant" else None


def replay(running: Running, engine: ScriptedEngine, recording: Mapping[str, Json], name: str) -> list[Cost]:
    """All requests of one recorded run, once for each of `RUNS`."""
    client = str(recording["client"])
    requests = [request for request in recording["runs"][name]["requests"] if request.get("body")]
    signer, defaults = running.service.signer, running.service.defaults
    costs = []
    for run, changing in enumerate((*RUNS, NEXT_DAY), start=1):
        bodies = [body_of(request, client, changing, signer) for request in requests]
        asks = [ask_of(request["path"], body, defaults, signer) for request, body in zip(requests, bodies, strict=True)]
        for i, (request, body) in enumerate(zip(requests, bodies, strict=True)):
            if run == OVERNIGHT and i < len(requests) - 1:
                continue
            answer = answer_to(asks[i], asks[i + 1] if i + 1 < len(asks) else None)

            def play(command: Generate, answer: Mapping[str, Json] | None = answer) -> Iterator[str]:
                return pieces_of(answer, thinks=command.think != "off")

            engine.play = play
            headers = {k: f"{v}-{run}" for k, v in request.get("headers", {}).items() if _SESSION_HEADER.match(k)}
            reply = post(running, request["path"], body, headers)
            if reply.status != 200:
                raise RuntimeError(f"{client}, request {i}: {reply.status} {reply.body[:300]!r}")
            line = running.lines[-1]
            costs.append(Cost(client, run, request["path"], line.prompt_tokens, line.cached_tokens))
    return costs


def replay_all(recordings: Sequence[Mapping[str, Json]], name: str = "base") -> list[Cost]:
    """Each client with a server and an engine of its own, so that none finds what another one left."""
    costs = []
    for recording in recordings:
        if name not in recording["runs"]:
            continue
        engine = ScriptedEngine()
        with serving(engine, think="high") as running:
            costs += replay(running, engine, recording, name)
    return costs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="recordings, one JSON file a client")
    parser.add_argument("--run", default="base", metavar="NAME", help="which of a client's runs (base)")
    args = parser.parse_args()
    costs = replay_all([json.loads(path.read_text("utf-8")) for path in sorted(args.folder.glob("*.json"))], args.run)
    if not costs:
        print(f"{args.folder}: no recording of a run {args.run!r}")
        return 1
    print(f"{'client':12}{'run':>4} {'path':24}{'prompt':>8}{'reused':>8}{'new':>8}")
    for cost in costs:
        print(f"{cost.client:12}{cost.run:>4} {cost.path:24}{cost.prompt:>8}{cost.reused:>8}{cost.new:>8}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
