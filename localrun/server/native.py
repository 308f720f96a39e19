"""The engine's own messages over HTTP, for `localrun chat --server`: one JSON line per event, through the same queue.

`POST /localrun/generate` takes a `Generate` and streams its events; `GET /localrun/facts` and `/localrun/stats` return what a
user interface shows; `POST /localrun/count` takes a `CountTokens`. Empty lines are keep-alives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from localrun.engine.process.process import GenerateEvent
from localrun.engine.process.protocol import Command, CountTokens, Failed, Finished, Generate
from localrun.engine.process.wire import ProtocolError, decode_command, encode
from localrun.server.asks import Ask
from localrun.server.dispatch import Job
from localrun.server.faults import ApiError, invalid
from localrun.server.http import EventStream, Writer, client_of, read_json
from localrun.server.openai_common import OpenAi
from localrun.server.service import Service

Json = Any

PREFIX = "/localrun"


class Native:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self, guarded: Callable[[Callable[[Request], Awaitable[Response]]], Any]) -> list[Route]:
        return [
            Route(f"{PREFIX}/generate", guarded(self.generate), methods=["POST"]),
            Route(f"{PREFIX}/count", guarded(self.count), methods=["POST"]),
            Route(f"{PREFIX}/facts", guarded(self.facts), methods=["GET"]),
            Route(f"{PREFIX}/stats", guarded(self.stats), methods=["GET"]),
        ]

    async def generate(self, request: Request) -> Response:
        command = await self._command(request, Generate)
        service = self._service
        job = Job((command,), client_of(request), asyncio.get_running_loop())
        service.dispatcher.submit(job)
        stream = EventStream(service, job, NativeWriter(), OpenAi("native"))
        stream.headers["content-type"] = "application/x-ndjson"
        return stream

    async def count(self, request: Request) -> Response:
        command = await self._command(request, CountTokens)
        n_tokens = await asyncio.to_thread(self._service.engine.count, command)
        return Response(msgspec.json.encode({"n_tokens": n_tokens}), media_type="application/json")

    async def facts(self, request: Request) -> Response:
        facts = self._service.engine.facts
        if facts is None:
            raise ApiError("unavailable", "the engine is starting", retry_after_s=1)
        return Response(msgspec.json.encode(facts), media_type="application/json")

    async def stats(self, request: Request) -> Response:
        expert_map = request.query_params.get("expert_map") == "1"
        stats = await asyncio.to_thread(self._service.engine.stats, expert_map=expert_map)
        return Response(encode(stats), media_type="application/json")

    async def _command(self, request: Request, kind: type[Any]) -> Any:
        body = await read_json(request, self._service.defaults.limits)
        try:
            command: Command = decode_command(msgspec.json.encode({**body, "type": kind.__name__}))
        except ProtocolError as error:
            raise invalid(None, str(error)) from None
        return command


class NativeWriter(Writer):
    """Writes events unchanged."""

    def __init__(self) -> None:
        super().__init__(Ask(model=""))

    def event(self, choice: int, event: GenerateEvent) -> bytes:
        return encode(event)

    def keep_alive(self, waiting: Mapping[str, Json]) -> bytes:
        return b"\n"

    def error(self, error: ApiError) -> bytes:
        if isinstance(self.choices[0].finished, Finished):
            return b""  # a stopped answer has its end
        return encode(Failed(request=0, kind=error.engine_kind, message=error.message))

    def closing(self) -> bytes:
        return b""
