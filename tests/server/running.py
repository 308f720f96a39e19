"""A real server on loopback around any engine: sockets, uvicorn, the whole application, in a thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn.server

from localrun.engine.options import SamplingOptions
from localrun.server import metrics
from localrun.server.app import build
from localrun.server.asks import Defaults
from localrun.server.dispatch import Dispatcher
from localrun.server.engine import ServerEngine
from localrun.server.limits import ServerLimits
from localrun.server.metrics import Metrics
from localrun.server.service import AnswerLine, Service
from localrun.server.signatures import Signer
from localrun.server.web import Server, listen, server_of

PATIENCE_S = 300.0
"""Far more than anything here takes; only a hang reaches it."""

MOST_LINES = 200
"""Under load there are thousands, and the server's memory is looked at."""


class BriskAsyncio:
    """`asyncio` for `uvicorn.server`, which looks for a stop every 0.1 s and sleeps another 0.1 s on the way out: most of what a
    server with one request takes."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds / 20)


@dataclass
class Running:
    """A server that is up.

    Attributes:
        lines: what its log says about the requests that are over, the last `MOST_LINES` of them.
    """

    url: str
    port: int
    service: Service
    server: Server
    lines: deque[AnswerLine]

    @property
    def dispatcher(self) -> Dispatcher:
        return self.service.dispatcher


@contextmanager
def serving(
    engine: ServerEngine,
    *,
    limits: ServerLimits | None = None,
    keys: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
    think: str = "off",
    keep_alive_s: float = 0.05,
    sampling: SamplingOptions | None = None,
    patience_s: float = 5.0,
) -> Iterator[Running]:
    """Runs a server; its engine must have a model."""
    limits = limits or ServerLimits()
    facts = engine.facts
    assert facts is not None
    defaults = Defaults(
        model="test-model",
        think=think,
        think_modes=facts.think_modes,
        n_ctx=facts.n_ctx,
        sampling=sampling or SamplingOptions(),
        limits=limits,
    )
    dispatcher = Dispatcher(engine, most_waiting=limits.queue)
    lines: deque[AnswerLine] = deque(maxlen=MOST_LINES)
    service = Service(
        engine=engine,
        dispatcher=dispatcher,
        defaults=defaults,
        metrics=Metrics(engine),
        signer=Signer(b"k" * 32),
        keep_alive_s=keep_alive_s,
        first_keep_alive_s=keep_alive_s,
        on_answer=lines.append,
    )
    sock = listen("127.0.0.1", 0, limits)
    port = sock.getsockname()[1]
    server = server_of(build(service, keys=keys, origins=origins), dispatcher, limits, patience_s=patience_s)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.server, "asyncio", BriskAsyncio())
        patch.setattr(metrics, "PATIENCE_S", PATIENCE_S)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield Running(f"http://127.0.0.1:{port}", port, service, server, lines)
        finally:
            server.stop(at_once=True)
            thread.join(PATIENCE_S)
            sock.close()
            assert not thread.is_alive()


def wait_until(condition: Any) -> None:
    """Waits for something that other threads bring about."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)
