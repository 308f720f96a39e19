"""The web server around the application: uvicorn, its sockets, and shutdown.

A connection has a time limit for sending request headers, and the system closes one whose peer has stopped accepting data, so
neither holds a descriptor forever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from localrun.errors import LocalrunError, UsageError
from localrun.server.dispatch import Dispatcher
from localrun.server.limits import ServerLimits

log = logging.getLogger(__name__)

BACKLOG = 512


def listen(host: str, port: int, limits: ServerLimits) -> socket.socket:
    """A listening socket whose connections die when their peer is gone.

    Raises:
        LocalrunError: the address is in use or not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # accepted sockets inherit it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limits.write_s * 1000))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        raise LocalrunError(f"can't listen on {host}:{port}: {reason}", hint="choose another with --port") from None
    except OverflowError:
        raise UsageError(f"port {port} is out of range") from None
    return sock


def server_of(app: ASGIApp, dispatcher: Dispatcher, limits: ServerLimits, *, patience_s: float) -> Server:
    """A server for `app`; give it a socket of `listen`."""

    class Protocol(_Protocol):
        header_s = limits.read_s

    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=limits.header_bytes,
    )
    return Server(config, dispatcher, patience_s=patience_s)


class _Protocol(H11Protocol):
    """A connection that gets a deadline for each request's headers."""

    header_s = 60.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._idle and self._deadline is None:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    @property
    def _idle(self) -> bool:
        return self.cycle is None or bool(self.cycle.response_complete)

    def _expect_headers(self) -> None:
        self._deadline = self.loop.call_later(self.header_s, self._too_slow)

    def _too_slow(self) -> None:
        self._deadline = None
        # Between requests uvicorn has its own timer; if that is running, no request has begun.
        if self._idle and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.transport.abort()


class Server(uvicorn.Server):
    """A server that stops in two steps: after the first signal it accepts nothing new and gives the running answer `patience_s`
    to finish; after the second it stops the answer."""

    def __init__(self, config: uvicorn.Config, dispatcher: Dispatcher, *, patience_s: float) -> None:
        super().__init__(config)
        self._dispatcher, self._patience_s = dispatcher, patience_s
        self._n_signals = 0
        self.on_stop: Callable[[int], None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, without raising the signal again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM)
        earlier = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._n_signals += 1
        self.stop(at_once=self._n_signals > 1)

    def stop(self, *, at_once: bool = False) -> None:
        """Ends the server; any thread. Answers end in their API's own way before their connections are closed."""
        patience_s = 0.0 if at_once else self._patience_s
        if self.on_stop is not None:
            self.on_stop(2 if at_once else 1)

        def drain() -> None:
            self._dispatcher.close(patience_s=patience_s)
            self.should_exit = True

        threading.Thread(target=drain, name="localrun-stop", daemon=True).start()
