"""A running server as an engine, for `localrun chat --server URL`: several windows can share one loaded model.

Standard library and the protocol only. The server owns the model: it can't be loaded, replaced or restarted from here.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from localrun import errors
from localrun.engine.facts import ModelFacts, Timings
from localrun.engine.options import EngineOptions
from localrun.engine.process.process import GenerateEvent, LoadEvent
from localrun.engine.process.protocol import CountTokens, Failed, Finished, Generate, Ready, Stats
from localrun.engine.process.wire import ProtocolError, decode_event, encode
from localrun.errors import EngineDiedError, LocalrunError, UsageError

SILENCE_S = 30.0
"""A server gives a sign of life every two seconds."""


class RemoteEngine:
    """The methods of `EngineProcess` that a user interface uses, over HTTP. All of them block and may be called from any thread.

    A server that does not answer is a dead engine: `generate` raises EngineDiedError, the next one tries again.

    Args:
        url: as printed by `localrun serve`.
        key: API key, if the server requires one.
        on_death: called when an answer ends because the server is gone.
    """

    def __init__(
        self, url: str, *, key: str | None = None, on_death: Callable[[EngineDiedError], None] | None = None
    ) -> None:
        """Raises UsageError: not the address of an HTTP server."""
        parts = urlsplit(url if "//" in url else f"//{url}", scheme="http")
        try:
            port = parts.port or 80
        except ValueError:
            port = 0
        if parts.scheme != "http" or not parts.hostname or not port:
            raise UsageError(f"{url!r} is not a server address", hint="for example http://127.0.0.1:8080")
        self._host, self._port, self._url = parts.hostname, port, url
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.on_death = on_death
        self._lock = threading.Lock()  # guards the next two
        self._running: set[http.client.HTTPConnection] = set()
        self._stopped: set[http.client.HTTPConnection] = set()
        self._facts: ModelFacts | None = None

    @property
    def facts(self) -> ModelFacts | None:
        """As last reported by the server."""
        return self._facts

    @property
    def alive(self) -> bool:
        return self._facts is not None

    @property
    def pid(self) -> int | None:
        """The engine is the server's."""
        return None

    def log_tail(self) -> list[str]:
        return []

    def start(self) -> None:
        """There is nothing to start."""

    def load(self, path: Path | str = "", options: EngineOptions | None = None) -> Iterator[LoadEvent]:
        """The server's model, regardless of the arguments. Raises LocalrunError: the server is unreachable, or has no model."""
        self._facts = None
        facts = msgspec.convert(self._ask("GET", "/localrun/facts"), ModelFacts)
        self._facts = facts
        yield Ready(request=0, facts=facts, load_s=0.0)

    def reload(self) -> Iterator[LoadEvent]:
        """Looks for the server again."""
        return self.load()

    def generate(self, command: Generate) -> Iterator[GenerateEvent]:
        """One answer; the last event is Finished. Raises as `EngineProcess.generate`."""
        try:
            if self._facts is None:
                yield from self.load()
            yield from self._answer(command)
        except EngineDiedError as error:
            self._facts = None
            if self.on_death is not None:
                self.on_death(error)
            raise

    def _answer(self, command: Generate) -> Iterator[GenerateEvent]:
        connection = self._connection()
        with self._lock:
            self._running.add(connection)
        try:
            response = self._request(connection, "POST", "/localrun/generate", encode(command))
            for line in self._lines(connection, response):
                event = _event(line)
                yield event
                if isinstance(event, Finished):
                    return
            with self._lock:
                stopped = connection in self._stopped
            if not stopped:
                raise EngineDiedError(f"{self._url}: the server broke off the answer", hint="see its output")
            yield Finished(request=0, reason="stopped", timings=Timings(), seed=0)
        finally:
            with self._lock:
                self._running.discard(connection)
                self._stopped.discard(connection)
            connection.close()

    def stop(self) -> None:
        """Leaves all answers: a server stops computing for those who have left."""
        with self._lock:
            for connection in self._running:
                self._stopped.add(connection)
                if connection.sock is not None:
                    with contextlib.suppress(OSError):  # it has ended meanwhile
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def stats(self, *, expert_map: bool = False, timeout_s: float = 5.0) -> Stats:
        """The engine's counters. Raises LocalrunError."""
        body = self._ask("GET", f"/localrun/stats?expert_map={int(expert_map)}")
        stats = decode_event(json.dumps(body).encode())
        assert isinstance(stats, Stats)
        return stats

    def count_tokens(self, text: str, *, timeout_s: float = 30.0) -> int:
        """Length of `text` in tokens. Raises LocalrunError."""
        return int(self._ask("POST", "/localrun/count", encode(CountTokens(text=text)))["n_tokens"])

    def close(self) -> None:
        """Disconnects; the server keeps running."""
        self.stop()
        self._facts = None

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- inside

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._host, self._port, timeout=SILENCE_S)

    def _ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        connection = self._connection()
        try:
            return json.loads(self._request(connection, method, path, body).read())
        except ValueError:
            raise LocalrunError(f"{self._url}: not a localrun server", hint="start one with localrun serve") from None
        finally:
            connection.close()

    def _request(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
    ) -> http.client.HTTPResponse:
        """The answer's beginning. Raises LocalrunError for everything but 200."""
        try:
            connection.request(method, path, body, self._headers)
            response = connection.getresponse()
            if response.status == 200:
                return response
            text = response.read(10_000)
        except (OSError, http.client.HTTPException) as error:
            self._facts = None
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise EngineDiedError(f"{self._url}: {reason}", hint="is localrun serve running there?") from None
        try:
            message = str(json.loads(text)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = f"status {response.status}"
        hint = "set LOCALRUN_SERVER_KEY to the API key" if response.status == 401 else None
        raise LocalrunError(f"{self._url}: {message}", hint=hint)

    def _lines(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> Iterator[bytes]:
        try:
            for line in response:
                if line.strip():
                    yield line
        except (OSError, http.client.HTTPException, ValueError) as error:
            with self._lock:
                stopped = connection in self._stopped
            if not stopped:
                raise EngineDiedError(f"{self._url}: the connection broke: {error or type(error).__name__}") from None


def _event(line: bytes) -> GenerateEvent:
    """Raises what a failed answer raises."""
    try:
        event = decode_event(line)
    except ProtocolError as error:
        raise LocalrunError(f"the server runs an incompatible version: {error}", hint="update both sides") from None
    if isinstance(event, Failed):
        kind = getattr(errors, event.kind, LocalrunError)
        raise kind(event.message, hint=event.hint)
    return event  # type: ignore[return-value]  # the server sends nothing else
