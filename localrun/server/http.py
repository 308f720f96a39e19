"""HTTP input and output: bounded request bodies, complete answers, event streams with keep-alives, disconnecting clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from localrun.engine.process.process import GenerateEvent
from localrun.server.asks import Ask, new_id
from localrun.server.choices import Choice
from localrun.server.dispatch import Item, Job
from localrun.server.faults import ApiError, invalid
from localrun.server.limits import ServerLimits, depth_of
from localrun.server.service import Service

log = logging.getLogger(__name__)

Json = Any

STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy that collects a stream would make it useless
}


class Dialect(Protocol):
    """How an API reports errors."""

    name: str

    def error(self, error: ApiError) -> tuple[int, dict[str, Json]]:
        """Status and body."""


class Writer:
    """How an API writes one answer, streamed or complete. One per request.

    Methods that return bytes return what to send now, which may be empty. `answers` are complete when `closing` and `whole` are
    called.
    """

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.choices = [Choice() for _ in range(ask.n)]

    def opening(self) -> bytes:
        """Sent right after the headers."""
        return b""

    def event(self, choice: int, event: GenerateEvent) -> bytes:
        """What the engine did. Overridden by writers; `answers` have the event already."""
        raise NotImplementedError

    def keep_alive(self, waiting: Mapping[str, Json]) -> bytes:
        """A keep-alive that this API's clients accept."""
        raise NotImplementedError

    def error(self, error: ApiError) -> bytes:
        """The stream ends here, with an error."""
        raise NotImplementedError

    def closing(self) -> bytes:
        """The stream ends well."""
        raise NotImplementedError

    def whole(self) -> dict[str, Json]:
        """The answer as one object."""
        raise NotImplementedError


def sse(data: Json, *, event: str | None = None) -> bytes:
    """One server-sent event. No `id:` lines: openai-python can't parse comments after them."""
    body = b"data: " + encode_json(data) + b"\n\n"
    return b"event: " + event.encode() + b"\n" + body if event else body


def encode_json(data: Json) -> bytes:
    try:
        return msgspec.json.encode(data)
    except UnicodeEncodeError:  # half a surrogate pair, from a client's own text
        return json.dumps(data).encode()


def json_response(data: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode_json(data), status, headers, media_type="application/json")


def error_response(dialect: Dialect, error: ApiError) -> Response:
    """An error in an API's own form."""
    status, body = dialect.error(error)
    headers = {"request-id": new_id("req_")}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.kind == "unauthorized":
        headers["www-authenticate"] = "Bearer"
    return json_response(body, status, headers)


# --- bodies ---------------------------------------------------------------------------------------------------------


async def read_json(request: Request, limits: ServerLimits) -> dict[str, Json]:
    """The body as a JSON object.

    Raises:
        ApiError: too large, too slow, too deep, not JSON, not an object.
    """
    body = await _read_body(request, limits)
    value = parse_json(body)
    if not isinstance(value, dict):
        raise invalid(None, "the body must be a JSON object", code="invalid_json")
    if depth_of(value, limits.depth) > limits.depth:
        raise invalid(None, f"JSON nested deeper than {limits.depth}", code="invalid_json")
    return value


def parse_json(body: bytes) -> Json:
    """JSON as clients send it: unpaired surrogates, left by truncation inside an emoji, become `?`."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error)
    with contextlib.suppress(ValueError, RecursionError):
        loose = json.loads(body.decode("utf-8-sig", "replace"))
        return msgspec.json.decode(json.dumps(loose, ensure_ascii=False).encode("utf-8", "replace"))
    raise invalid(None, f"the body is not JSON: {reason}", code="invalid_json")


async def _read_body(request: Request, limits: ServerLimits) -> bytes:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding not in ("", "identity"):
        raise invalid(None, f"unsupported content-encoding {encoding!r:.40}")
    too_large = ApiError("too_large", f"the body is larger than {limits.body_bytes} bytes", code="request_too_large")
    length = request.headers.get("content-length", "")
    refused = length.isdecimal() and int(length) > limits.body_bytes
    if refused and "100-continue" in request.headers.get("expect", "").lower():
        raise too_large
    chunks: list[bytes] = []
    n_bytes = 0
    try:
        async with asyncio.timeout(limits.read_s):
            async for chunk in request.stream():
                n_bytes += len(chunk)
                if n_bytes > limits.body_bytes:
                    # Keep reading for a while: a client that is still sending would not see the response.
                    refused = True
                    chunks.clear()
                    if n_bytes > 4 * limits.body_bytes:
                        break
                else:
                    chunks.append(chunk)
    except TimeoutError:
        raise ApiError("invalid", "the body did not arrive in time", code="request_timeout") from None
    if refused:
        raise too_large
    return b"".join(chunks)


# --- answers --------------------------------------------------------------------------------------------------------


def client_of(request: Request, hint: str | None = None) -> str:
    """Whose request this is, for the queue: its session if it names one, else its connection."""
    for name in ("x-claude-code-session-id", "x-session-id", "x-session-affinity", "session-id"):
        if value := request.headers.get(name):
            return value[:100]
    if hint:
        return hint[:100]
    return f"{request.client.host}:{request.client.port}" if request.client else "unknown"


async def answer(
    service: Service, request: Request, dialect: Dialect, ask: Ask, writer: Writer, client: str
) -> Response:
    """Queues a request and answers it, streamed or complete. Raises ApiError only before anything was sent."""
    n_prompt = await service.count(ask)
    job = service.submit(ask, n_prompt, client)
    if ask.stream:
        return EventStream(service, job, writer, dialect)
    return await _whole(service, request, dialect, job, writer)


class _Watch:
    """Collects a job's events into the writer's answers, for the log and for whole answers."""

    def __init__(self, job: Job, writer: Writer) -> None:
        self.job, self.writer = job, writer
        self.last: GenerateEvent | None = None
        self.error: ApiError | None = None

    def add(self, item: Item) -> None:
        if item.event is None:
            self.error = item.error
            return
        self.last = item.event
        self.writer.choices[item.choice].add(item.event)


async def _whole(service: Service, request: Request, dialect: Dialect, job: Job, writer: Writer) -> Response:
    """Sends a complete answer. A disconnect must be watched for explicitly, because nothing is sent meanwhile."""
    watch = _Watch(job, writer)
    over = False

    async def collect() -> None:
        nonlocal over
        while not over:
            item = await job.items.get()
            over = item.is_end
            watch.add(item)

    gone = asyncio.create_task(_gone(request.receive))
    collecting = asyncio.create_task(collect())
    try:
        await asyncio.wait({gone, collecting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (gone, collecting):
            task.cancel()
        if not over:
            service.dispatcher.cancel(job)
        service.over(dialect.name, job, writer.choices, watch.error, left=not over)
    if not over:
        return Response(status_code=499)  # nobody reads it
    if watch.error is not None:
        return error_response(dialect, watch.error)
    return json_response(writer.whole(), headers={"request-id": new_id("req_")})


async def _gone(receive: Receive) -> None:
    """Ends when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Streams an answer as server-sent events: headers immediately, then events, with periodic keep-alives."""

    def __init__(self, service: Service, job: Job, writer: Writer, dialect: Dialect) -> None:
        super().__init__(headers={**STREAM_HEADERS, "request-id": new_id("req_")})
        del self.headers["content-length"]
        self._service, self._job, self._writer, self._dialect = service, job, writer, dialect
        self._watch = _Watch(job, writer)
        self._over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_gone(receive))
        writing = asyncio.create_task(self._write(send))
        try:
            done, _ = await asyncio.wait({gone, writing}, return_when=asyncio.FIRST_COMPLETED)
            error = writing.exception() if writing in done else None
            if error is not None and not isinstance(error, TimeoutError | OSError):
                log.error("an answer could not be written", exc_info=error)
        finally:
            for task in (gone, writing):
                task.cancel()
            if not self._over:
                self._service.dispatcher.cancel(self._job)
            self._service.over(
                self._dialect.name, self._job, self._writer.choices, self._watch.error, left=not self._over
            )

    async def _write(self, send: Send) -> None:
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self.headers.items()]
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
        await self._body(send, self._writer.opening())
        clock = asyncio.get_running_loop().time
        next_sign = clock() + self._service.first_keep_alive_s
        while not self._over:
            items = await self._items(next_sign - clock())
            data = b"".join([self._take(item) for item in items])
            if not data and clock() >= next_sign:
                data = self._writer.keep_alive(self._service.waiting(self._job, self._watch.last))
            if data:
                await self._body(send, data)
                next_sign = clock() + self._service.keep_alive_s
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _items(self, patience_s: float) -> list[Item]:
        """What has happened; none if nothing has for `patience_s`."""
        queue = self._job.items
        if queue.empty():
            try:
                async with asyncio.timeout(patience_s):
                    items = [await queue.get()]
            except TimeoutError:
                return []
        else:
            items = []
        while not queue.empty():
            items.append(queue.get_nowait())
        return items

    def _take(self, item: Item) -> bytes:
        self._watch.add(item)
        if item.event is not None:
            return self._writer.event(item.choice, item.event)
        self._over = True
        return self._writer.closing() if item.error is None else self._writer.error(item.error)

    async def _body(self, send: Send, data: bytes) -> None:
        if data:
            await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        """A client that stops reading is treated as disconnected."""
        async with asyncio.timeout(self._service.defaults.limits.write_s):
            await send(message)
