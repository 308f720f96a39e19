"""The agents that people use, run headless against the server: `make test-clients`, `python -m tools.test_clients [NAME...]`.

Each client is installed from npm into a scratch folder (once), gets a home and a work folder of its own, and is configured with
what `localrun serve --print-config` prints. The engine plays an agent's part: it reads a file, edits it and says that it is done; a
client passes if it did all that, and ended by itself with few requests. With `--model` a real model answers instead, in few words,
and a client passes if it ends; what it says is the model's affair.

Prints for every request how much of its prompt was there before. All traffic stays on loopback. Needs Node and npm.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from localrun.engine.options import EngineOptions
from localrun.engine.process.process import EngineProcess, GenerateEvent
from localrun.engine.process.protocol import Finished, Generate
from localrun.server import client_config
from localrun.server.client_config import Address
from localrun.server.engine import ServerEngine
from tests.server.running import Running, serving
from tests.server.scripted import ScriptedEngine, call_text, calls_text, words

PROMPT = "Read hello.txt, replace the word hello in it by goodbye, and say when you are done."
TIMEOUT_S = 240.0
"""Of one run. The demo model's tokens are short: Qwen Code's first prompt has 31,000 of them, which takes minutes on two cores."""

MOST_REQUESTS = 12
MODEL = "localrun-test"
N_CTX = 100_000
BRIEF_TOKENS = 100

READ = ("read", "read_file", "view", "exec_command", "shell_command", "shell", "bash", "run_shell_command")
EDIT = ("edit", "replace", "str_replace", "exec_command", "shell_command", "shell", "bash", "run_shell_command")


# --- the agent that the engine plays --------------------------------------------------------------------------------


def agent(folder: Path) -> Callable[[Generate], Iterable[str]]:
    """Reads, edits, and ends."""

    def play(command: Generate) -> Iterator[str]:
        thoughts = [*words("Let me think about it."), "</think>"] if command.think != "off" else []
        yield from thoughts
        n_results = sum(message["role"] == "tool" for message in command.messages)
        tool = _tool(command, (READ, EDIT)[n_results]) if n_results < 2 else None
        if tool is None:
            yield from words("I have replaced the word: hello.txt says goodbye now.")
            return
        yield from words("One moment.")
        arguments = _fill(tool.get("parameters") or {}, folder, edits=n_results == 1)
        yield from calls_text(call_text(tool["name"], **arguments))

    return play


def _tool(command: Generate, names: Iterable[str]) -> Mapping[str, Any] | None:
    by_name = {str(tool["name"]).lower(): tool for tool in command.tools}
    return next((by_name[name] for name in names if name in by_name), None)


def _fill(schema: Mapping[str, Any], folder: Path, *, edits: bool) -> dict[str, Any]:
    """Arguments that fit a tool's schema, by what its parameters are called."""
    properties: Mapping[str, Any] = schema.get("properties") or {}
    wanted = schema.get("required") or list(properties)
    return {name: _value(name, properties.get(name) or {}, folder, edits=edits) for name in wanted}


def _value(name: str, schema: Mapping[str, Any], folder: Path, *, edits: bool) -> Any:
    small = name.lower().replace("_", "")
    if small in ("cmd", "command"):
        text = f"sed -i s/hello/goodbye/ {folder / 'hello.txt'}" if edits else f"cat {folder / 'hello.txt'}"
        return ["sh", "-c", text] if schema.get("type") == "array" else text
    if schema.get("type") == "array":
        return [_fill(schema.get("items") or {}, folder, edits=edits)]
    if small.startswith("old"):
        return "hello"
    if small.startswith("new"):
        return "goodbye"
    if "path" in small or "file" in small:
        return str(folder / "hello.txt")
    return {"boolean": False, "integer": 1, "number": 1}.get(str(schema.get("type")), "a value")


class Brief(EngineProcess):
    """A model's process whose answers end soon. The demo model writes until it is stopped, and a client goes on by itself after an
    answer that was cut off."""

    def generate(self, command: Generate) -> Iterator[GenerateEvent]:
        bound = min(command.max_tokens or BRIEF_TOKENS, BRIEF_TOKENS)
        for event in super().generate(msgspec.structs.replace(command, max_tokens=bound)):
            cut = isinstance(event, Finished) and event.reason == "length"
            yield msgspec.structs.replace(event, reason="eos") if cut else event


# --- the clients ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Client:
    """How a client is installed, told of the server, and run.

    Attributes:
        package: npm's name, with the version that was tried.
        prepare: writes its settings into its home, for a server's address; returns more environment.
        command: what follows the program's name.
    """

    package: str
    program: str
    prepare: Callable[[Path, str], dict[str, str]]
    command: Callable[[str], list[str]]


def _printed(name: str, url: str) -> str:
    """What `localrun serve --print-config` prints for a client of the server at `url`."""
    host, port = url.removeprefix("http://").split(":")
    return client_config.CLIENTS[name](Address(host=host, port=int(port), model=MODEL, key="any", n_ctx=N_CTX)).text


def _exported(text: str) -> dict[str, str]:
    """A shell's `export NAME=VALUE` lines as an environment."""
    return dict(line.removeprefix("export ").split("=", 1) for line in text.splitlines())


def _pi(api: str) -> Client:
    def prepare(home: Path, url: str) -> dict[str, str]:
        config = json.loads(_printed("pi", url))
        provider = config["providers"]["localrun"]
        provider["api"] = api
        if api == "anthropic-messages":
            provider["baseUrl"] = url
        _write(home / ".pi/agent/models.json", json.dumps(config))
        return {}

    return Client(
        "@mariozechner/pi-coding-agent@0.73.1",
        "pi",
        prepare,
        lambda prompt: ["-p", "--provider", "localrun", "--model", MODEL, prompt],
    )


def _claude_code(home: Path, url: str) -> dict[str, str]:
    return {**_exported(_printed("claude-code", url)), "CLAUDE_CODE_MAX_RETRIES": "1"}


def _codex(home: Path, url: str) -> dict[str, str]:
    _write(home / ".codex/config.toml", _printed("codex", url))
    return {"LOCALRUN_KEY": "any", "CODEX_HOME": str(home / ".codex")}


def _opencode(home: Path, url: str) -> dict[str, str]:
    config = {**json.loads(_printed("opencode", url)), "autoupdate": False, "share": "disabled"}
    _write(home / ".config/opencode/opencode.json", json.dumps(config))
    return {}


def _qwen(home: Path, url: str) -> dict[str, str]:
    return _exported(_printed("qwen", url))


def _continue(home: Path, url: str) -> dict[str, str]:
    _write(home / ".continue/config.yaml", _printed("continue", url))
    return {"CONTINUE_TELEMETRY_ENABLED": "0"}


CLIENTS = {
    "pi-chat": _pi("openai-completions"),
    "pi-responses": _pi("openai-responses"),
    "pi-messages": _pi("anthropic-messages"),
    "claude-code": Client(
        "@anthropic-ai/claude-code@2.1.197",
        "claude",
        _claude_code,
        lambda prompt: ["-p", prompt, "--model", MODEL, "--permission-mode", "acceptEdits"],
    ),
    "codex": Client(
        "@openai/codex@0.169.0",
        "codex",
        _codex,
        lambda prompt: ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", prompt],
    ),
    "opencode": Client("opencode-ai@1.18.33", "opencode", _opencode, lambda prompt: ["run", prompt]),
    "qwen": Client(
        "@qwen-code/qwen-code@0.15.10", "qwen", _qwen, lambda prompt: ["-p", prompt, "--auth-type", "openai", "--yolo"]
    ),
    "continue": Client(
        "@continuedev/cli@1.5.47",
        "cn",
        _continue,
        lambda prompt: ["-p", "--auto", "--config", "../home/.continue/config.yaml", prompt],
    ),
}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def install(client: Client, folder: Path) -> Path:
    """The client's program; installed if it is not there.

    Raises:
        RuntimeError: npm is not there or failed.
    """
    name = client.package.rsplit("@", 1)[0] if client.package.rfind("@") > 0 else client.package
    place = folder / name.replace("/", "_").replace("@", "_")
    program = place / "node_modules/.bin" / client.program
    if not program.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError("npm is not there: install Node")
        place.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(place), client.package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"npm install {client.package}: {done.stderr.strip()[-300:]}")
    return program


@dataclass
class Result:
    """What a run came to."""

    exit_code: int | None
    seconds: float
    output: str
    text: str


def run_client(client: Client, program: Path, url: str, scratch: Path, limit_s: float) -> Result:
    """One headless run; ended after `limit_s`."""
    home, work = scratch / "home", scratch / "work"
    home.mkdir(parents=True)
    work.mkdir()
    (work / "hello.txt").write_text("hello world\n")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "NO_PROXY": "127.0.0.1,localhost",
        **client.prepare(home, url),
    }
    start = time.monotonic()
    process = subprocess.Popen(
        [str(program), *client.command(PROMPT)],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    code: int | None
    try:
        output, _ = process.communicate(timeout=limit_s)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        code = None
    return Result(code, time.monotonic() - start, output, (work / "hello.txt").read_text())


def try_client(
    name: str, folder: Path, engine: ServerEngine, scripted: ScriptedEngine | None, limit_s: float = TIMEOUT_S
) -> list[str]:
    """What is wrong with a client's run; prints its requests."""
    client = CLIENTS[name]
    program = install(client, folder)
    with (
        tempfile.TemporaryDirectory(prefix="localrun-client-") as scratch,
        serving(engine, keep_alive_s=0.5) as running,
    ):
        if scripted is not None:
            scripted.play = agent(Path(scratch) / "work")
        result = run_client(client, program, running.url, Path(scratch), limit_s)
        print(f"{name}: exit {result.exit_code}, {result.seconds:.1f} s, {len(running.lines)} requests")
        for line in running.lines:
            share = line.cached_tokens / max(1, line.prompt_tokens)
            print(
                f"  {line.api} {line.outcome}: prompt {line.prompt_tokens}, {share:.0%} there before, answer {line.new_tokens}"
            )
        return _faults(result, running, scripted is not None)


def _faults(result: Result, running: Running, scripted: bool) -> list[str]:
    faults = []
    if result.exit_code is None:
        faults.append("did not end in time")
    elif scripted and result.exit_code != 0:
        faults.append(f"exit code {result.exit_code}")
    if not running.lines:
        faults.append("asked nothing")
    if len(running.lines) > MOST_REQUESTS:
        faults.append(f"{len(running.lines)} requests")
    if scripted and result.text != "goodbye world\n":
        faults.append(f"the file says {result.text!r}")
    if scripted and "goodbye" not in result.output:
        faults.append("the last answer was not shown")
    if faults:
        print(f"  {result.output[-1500:]}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLIENTS)} (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("build/clients"), help="where clients are installed")
    parser.add_argument("--model", type=Path, help="a model that answers instead of the scripted agent")
    parser.add_argument("--limit", type=float, default=TIMEOUT_S, metavar="SECONDS", help="of one run (%(default)g)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(CLIENTS):
        parser.error(f"unknown client {min(unknown)}")
    failed = {}
    for name in args.names or CLIENTS:
        try:
            if args.model is None:
                scripted = ScriptedEngine(n_ctx=N_CTX)
                faults = try_client(name, args.folder.resolve(), scripted, scripted, args.limit)
            else:
                with Brief() as engine:
                    list(engine.load(args.model, EngineOptions(n_ctx=65536)))
                    faults = try_client(name, args.folder.resolve(), engine, None, args.limit)
        except RuntimeError as error:
            faults = [str(error)]
        if faults:
            failed[name] = faults
    for name, faults in failed.items():
        print(f"FAILED {name}: {'; '.join(faults)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
