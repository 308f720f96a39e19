"""`localrun serve`: a model behind the OpenAI and Anthropic APIs."""

from __future__ import annotations

import argparse
import ipaddress
import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from localrun import config
from localrun.api.options import engine_options, sampling_options
from localrun.commands import common
from localrun.commands.output import Output
from localrun.engine.facts import ModelFacts
from localrun.engine.process.process import EngineProcess
from localrun.errors import EngineDiedError, LocalrunError, UsageError
from localrun.paths import data_dir
from localrun.server.asks import Defaults
from localrun.server.client_config import CLIENTS, Address, Configuration
from localrun.server.dispatch import Dispatcher
from localrun.server.limits import ServerLimits

if TYPE_CHECKING:  # prometheus_client, which --help does not need
    from localrun.server.service import AnswerLine

EXAMPLES = """\
examples:
  localrun serve ~/models/v4-flash
  localrun serve --port 9000 --api-key-file ~/.localrun-key --host 0.0.0.0
  localrun serve --print-config claude-code

The server listens on this machine only unless --host says otherwise. See docs/serve.md for client setup.
"""

STATUS_EVERY_S = 0.5
RECENT = 20
"""Answers whose speed the status line shows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun serve`."""
    parser.epilog = EXAMPLES
    common.add_model_argument(parser)
    group = parser.add_argument_group("serving")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (127.0.0.1)")
    group.add_argument(
        "--port",
        type=common.count(0, 65535),
        default=8080,
        metavar="N",
        help="port to listen on (8080); 0 picks a free one",
    )
    group.add_argument("--api-key", action="append", metavar="KEY", help="API key that clients must send; repeatable")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with API keys, one per line")
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="additional host name under which clients reach the server",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web origin allowed to send requests; * allows all",
    )
    group.add_argument("--model-name", metavar="NAME", help="name to list the model under")
    group.add_argument(
        "--queue", type=common.count(1), default=64, metavar="N", help="maximum number of waiting requests (64)"
    )
    group.add_argument(
        "--stop-after",
        type=common.seconds,
        default=30.0,
        metavar="S",
        help="time a running answer gets to finish at shutdown (30 s)",
    )
    group.add_argument(
        "--no-reminders", action="store_true", help="leave date and git status where clients put them, before the tools"
    )
    group.add_argument("--log-prompts", action="store_true", help="also log what clients send")
    group.add_argument(
        "--print-config",
        choices=[*CLIENTS],
        metavar="CLIENT",
        help=f"print a client's configuration and exit; one of {', '.join(CLIENTS)}",
    )
    common.add_sampling_arguments(parser)
    common.add_load_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    out = Output()
    settings = common.settings_of(args)
    keys = _keys(args)
    if args.print_config is not None:
        configuration = _configuration(args, settings, keys)
        out.note(configuration.hint)
        out.line(configuration.text.rstrip("\n"))
        return 0
    if not _is_loopback(args.host) and not keys:
        raise UsageError(
            f"--host {args.host} is reachable from other machines, and no API key is set",
            hint="set --api-key-file FILE, or leave out --host",
        )
    limits = ServerLimits(queue=args.queue)
    from localrun.server.web import listen

    options = engine_options(settings)
    named = common.named_path(args, settings)
    sock = listen(args.host, args.port, limits)  # before loading the model, so a port in use is reported immediately
    with _log_lines(out), sock, common.engine_process(args, out) as engine:
        path = named or common.demo_model(out)
        facts = common.load(engine, path, options, out, max_tokens=args.max_tokens)
        _serve(args, settings, engine, facts, limits, keys, sock, out)
    return 0


def _serve(  # the pieces meet here
    args: argparse.Namespace,
    settings: config.Settings,
    engine: EngineProcess,
    facts: ModelFacts,
    limits: ServerLimits,
    keys: list[str],
    sock: object,
    out: Output,
) -> None:
    import socket

    from localrun.server.app import build
    from localrun.server.metrics import Metrics
    from localrun.server.reminders import Reminders
    from localrun.server.service import Service
    from localrun.server.signatures import Signer
    from localrun.server.web import server_of

    assert isinstance(sock, socket.socket)
    defaults = Defaults(
        model=args.model_name or model_name(facts.name),
        think=settings["think"],
        think_modes=facts.think_modes,
        n_ctx=facts.n_ctx,
        sampling=sampling_options(settings),
        max_tokens=settings["max_tokens"],
        limits=limits,
    )
    dispatcher = Dispatcher(engine, most_waiting=limits.queue)
    log = _Log(out, engine, dispatcher)
    service = Service(
        engine=engine,
        dispatcher=dispatcher,
        defaults=defaults,
        metrics=Metrics(engine),
        signer=Signer.of_folder(data_dir()),
        on_answer=log.answer,
        prompts_log=log.prompt if args.log_prompts else None,
        reminders=None if args.no_reminders else Reminders(),
    )
    app = build(service, keys=keys, hosts=[args.host, *args.allow_host], origins=args.cors_origin)
    server = server_of(app, dispatcher, limits, patience_s=args.stop_after)
    server.on_stop = log.stopping
    host, port = sock.getsockname()[:2]
    at = Address(host, port, defaults.model, "any", facts.n_ctx)
    out.note(f"serving {defaults.model} on {at.url} (context {facts.n_ctx:,}); Ctrl-C stops")
    try:
        with log:
            server.run(sockets=[sock])
    finally:
        dispatcher.close(patience_s=0)


class _Log:
    """What people see: a line for each answer, and on a terminal a status line below."""

    def __init__(self, out: Output, engine: EngineProcess, dispatcher: Dispatcher) -> None:
        self._out, self._engine, self._dispatcher = out, engine, dispatcher
        self._lock = threading.Lock()
        self._speeds: deque[float] = deque(maxlen=RECENT)
        self._n_answers = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="localrun-status", daemon=True)

    def __enter__(self) -> _Log:
        if self._out.err_is_terminal:
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(2.0)
        self._out.clear_status()

    def answer(self, line: AnswerLine) -> None:
        """Called when a request is over."""
        speed = f", {line.decode_tokens_per_s:.1f} tokens/s" if line.decode_tokens_per_s is not None else ""
        waited = f", waited {line.waited_s:.1f} s" if line.waited_s >= 0.1 else ""
        cached = f" ({line.cached_tokens} cached)" if line.cached_tokens else ""
        with self._lock:
            self._n_answers += 1
            if line.decode_tokens_per_s is not None:
                self._speeds.append(line.decode_tokens_per_s)
            self._out.note(
                f"{time.strftime('%H:%M:%S')} {line.api} {line.outcome}: prompt {line.prompt_tokens}{cached}, "
                f"answer {line.new_tokens}{speed}{waited}, {line.total_s:.1f} s"
            )

    def prompt(self, path: str, body: object) -> None:
        """With `--log-prompts`."""
        with self._lock:
            self._out.note(f"{time.strftime('%H:%M:%S')} {path} {json.dumps(body, ensure_ascii=False)}")

    def stopping(self, n_signals: int) -> None:
        answering = "stopping after the running answer; press Ctrl-C again to stop now"
        busy = self._dispatcher.busy or self._dispatcher.n_waiting > 0
        text = "stopping now" if n_signals > 1 else answering if busy else "stopping"
        with self._lock:
            self._out.note(text)

    def _watch(self) -> None:
        while not self._over.wait(STATUS_EVERY_S):
            text = self._status()
            with self._lock:
                if not self._over.is_set():
                    self._out.status(text)

    def _status(self) -> str:
        waiting, busy = self._dispatcher.n_waiting, self._dispatcher.busy
        parts = [f"{'answering' if busy else 'idle'}", f"{waiting} waiting", f"{self._n_answers} answered"]
        if self._speeds:
            parts.append(f"{sum(self._speeds) / len(self._speeds):.1f} tokens/s")
        try:
            stats = self._engine.stats(timeout_s=1.0)
        except (EngineDiedError, TimeoutError, LocalrunError):
            return " | ".join([*parts, "engine not running: the next request starts it"])
        rate = stats.telemetry.get("hit_rate")
        if isinstance(rate, float):
            parts.append(f"hits {rate:.0%}")
        parts.append(f"context {stats.context_used:,} of {stats.n_ctx:,}")
        return " | ".join(parts)


@contextmanager
def _log_lines(out: Output) -> Iterator[None]:
    """Log records are printed as notes while the server runs; afterwards logging is as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = [_Notes(out)]
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


class _Notes(logging.Handler):
    """The libraries' and our own log lines, between the others."""

    def __init__(self, out: Output) -> None:
        super().__init__(logging.INFO)
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or record.name.startswith("localrun"):
            text = record.getMessage()
            if record.exc_info and record.exc_info[1] is not None:
                error = record.exc_info[1]
                text += f": {type(error).__name__}: {error}"
            self._out.note(f"{time.strftime('%H:%M:%S')} {text}")


def model_name(name: str) -> str:
    """A model's name as one word, as clients write it in settings and addresses."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "model"


def _keys(args: argparse.Namespace) -> list[str]:
    keys = list(args.api_key or ())
    if args.api_key_file is not None:
        path = args.api_key_file.expanduser()
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise UsageError(f"{path}: contains no key", hint="put one key on each line")
        keys += found
    if any(not key.strip() for key in keys):
        raise UsageError("an API key must not be empty")
    return keys


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _configuration(args: argparse.Namespace, settings: config.Settings, keys: list[str]) -> Configuration:
    """For the client that was named; without loading the model, whose name is its folder's unless one is given."""
    name = args.model_name or (model_name(Path(settings["model"]).name) if settings["model"] else "demo")
    at = Address(args.host, args.port, name, keys[0] if keys else "any", settings["context"] or 32768)
    return CLIENTS[args.print_config](at)
