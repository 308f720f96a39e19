"""Plain HTTP for tests that look at every byte: what a client that is not an SDK sees."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.server.running import PATIENCE_S, Running


@dataclass
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[tuple[str | None, Any]]:
        """(name, data) of a stream's events; comments are left out, `[DONE]` is text."""
        found = []
        for block in self.body.decode().split("\n\n"):
            lines = [line for line in block.split("\n") if line and not line.startswith(":")]
            if not lines:
                continue
            fields = dict(line.split(": ", 1) for line in lines)
            assert set(fields) <= {"event", "data"}, fields  # `id:` lines trip openai-python
            data = fields["data"]
            found.append((fields.get("event"), data if data == "[DONE]" else json.loads(data)))
        return found


def send(running: Running, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE_S)
    try:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, dict(headers or {}))
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def post(running: Running, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Reply:
    return send(running, "POST", path, body, headers)


class Stream:
    """A request whose answer is read as it comes.

    Attributes:
        text: what has come so far, headers and chunk sizes included.
    """

    def __init__(self, running: Running, path: str, body: dict[str, Any]) -> None:
        self.sock = socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE_S)
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        self.sock.sendall(head.encode() + data)
        self.text = ""

    def until(self, *parts: str) -> None:
        while not all(part in self.text for part in parts):
            data = self.sock.recv(65536)
            assert data, f"the connection ended: {self.text[-300:]}"
            self.text += data.decode()

    def close(self) -> None:
        self.sock.close()
