"""The application: routes, and handling of unexpected errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from localrun import __version__
from localrun.server import chat_completions, completions, messages_input, responses_input
from localrun.server.asks import text_of
from localrun.server.faults import ApiError, from_engine, invalid
from localrun.server.guard import Guard
from localrun.server.http import Dialect, answer, client_of, error_response, json_response, read_json
from localrun.server.messages import Anthropic, MessagesWriter
from localrun.server.metrics import CONTENT_TYPE
from localrun.server.models import anthropic_models, openai_models
from localrun.server.native import Native
from localrun.server.openai_common import OpenAi
from localrun.server.responses import ResponsesWriter
from localrun.server.responses_store import ResponseStore
from localrun.server.service import Service

Json = Any
Handler = Callable[[Request], Awaitable[Response]]


def dialect_of(scope: Scope) -> Dialect:
    """The API dialect in which a request expects its errors."""
    path = scope["path"]
    names = {name for name, _ in scope["headers"]}
    if "/messages" in path or b"anthropic-version" in names:
        return Anthropic()
    api = (
        "responses"
        if "/responses" in path
        else "chat"
        if "/chat" in path
        else "completions"
        if "/completions" in path
        else "other"
    )
    return OpenAi(api)


class Endpoints:
    """One method per endpoint. `service` is where they meet the engine."""

    def __init__(self, service: Service) -> None:
        self._service = service
        limits = service.defaults.limits
        self._store = ResponseStore(limits.stored_responses, limits.stored_bytes)

    def routes(self) -> list[Route]:
        """With and without `/v1`, because clients are configured with either base address, or guess."""
        served: list[tuple[str, str, Handler]] = [
            ("POST", "/chat/completions", self.chat),
            ("POST", "/completions", self.completions),
            ("POST", "/responses", self.responses),
            ("GET", "/responses/{id}", self.get_response),
            ("DELETE", "/responses/{id}", self.delete_response),
            ("POST", "/messages", self.messages),
            ("POST", "/messages/count_tokens", self.count_tokens),
            ("GET", "/models", self.models),
            ("GET", "/models/{id:path}", self.model),
            ("POST", "/tokenize", self.tokenize),
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.metrics),
        ]
        routes = [Route("/", self.root, methods=["GET", "HEAD"])]
        for method, path, handler in served:
            routes += [Route(prefix + path, self._guarded(handler), methods=[method]) for prefix in ("/v1", "")]
        return [*routes, *Native(self._service).routes(self._guarded)]

    def _guarded(self, handler: Handler) -> Handler:
        """Turns what a handler raises into an answer."""

        async def guarded(request: Request) -> Response:
            dialect = dialect_of(request.scope)
            try:
                return await handler(request)
            except ApiError as error:
                fault = error
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                fault = from_engine(error)
            self._service.metrics.refused(dialect.name, fault.kind)
            return error_response(dialect, fault)

        return guarded

    async def _body(self, request: Request) -> dict[str, Json]:
        body = await read_json(request, self._service.defaults.limits)
        if self._service.prompts_log is not None:
            self._service.prompts_log(request.url.path, body)
        return body

    # --- answers

    async def chat(self, request: Request) -> Response:
        body = await self._body(request)
        ask, session = chat_completions.read(body, self._service.defaults)
        ask = self._service.arranged(ask)
        writer = chat_completions.writer(body, ask)
        return await answer(self._service, request, OpenAi("chat"), ask, writer, client_of(request, session))

    async def completions(self, request: Request) -> Response:
        body = await self._body(request)
        ask = completions.read(body, self._service.defaults)
        writer = completions.writer(body, ask)
        return await answer(self._service, request, OpenAi("completions"), ask, writer, client_of(request))

    async def responses(self, request: Request) -> Response:
        body = await self._body(request)
        service = self._service
        question = responses_input.read(body, service.defaults, service.signer, self._store)
        question = replace(question, ask=service.arranged(question.ask))
        writer = ResponsesWriter(question, service.signer, self._store)
        client = client_of(request, question.session)
        return await answer(service, request, OpenAi("responses"), question.ask, writer, client)

    async def messages(self, request: Request) -> Response:
        body = await self._body(request)
        service = self._service
        ask, session = messages_input.read(body, service.defaults, service.signer)
        ask = service.arranged(ask)
        writer = MessagesWriter(ask, service.signer)
        return await answer(service, request, Anthropic(), ask, writer, client_of(request, session))

    # --- kept responses

    async def get_response(self, request: Request) -> Response:
        kept = self._store.get(request.path_params["id"])
        if kept is None:
            raise ApiError("not_found", "no such response is stored here", param="response_id")
        return json_response(kept.body)

    async def delete_response(self, request: Request) -> Response:
        response_id = request.path_params["id"]
        if not self._store.drop(response_id):
            raise ApiError("not_found", "no such response is stored here", param="response_id")
        return json_response({"id": response_id, "object": "response", "deleted": True})

    # --- tokens

    async def count_tokens(self, request: Request) -> Response:
        body = await self._body(request)
        service = self._service
        ask, _ = messages_input.read({"max_tokens": 1, **body}, service.defaults, service.signer)
        command = service.arranged(ask, learn=False).count_command()
        assert command is not None  # only a prompt of ids has none
        n_tokens = await asyncio.to_thread(service.engine.count, command)
        return json_response({"input_tokens": n_tokens})

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request)
        service = self._service
        if body.get("messages") is not None:
            ask, _ = chat_completions.read(body, service.defaults)
            command = service.arranged(ask, learn=False).count_command()
            assert command is not None  # only a prompt of ids has none
            n_tokens = await asyncio.to_thread(service.engine.count, command)
            return json_response({"count": n_tokens, "max_model_len": service.defaults.n_ctx})
        text = next((body[name] for name in ("content", "prompt", "text", "input") if name in body), None)
        if text is None:
            raise invalid("content", "no text to tokenize was given", code="missing_required_parameter")
        ids = await asyncio.to_thread(service.engine.tokenize, text_of(text, "content"))
        return json_response({"tokens": ids, "count": len(ids), "max_model_len": service.defaults.n_ctx})

    # --- about the server

    async def models(self, request: Request) -> Response:
        show = anthropic_models if isinstance(dialect_of(request.scope), Anthropic) else openai_models
        return json_response(show(self._service))

    async def model(self, request: Request) -> Response:
        """Any name refers to the one model."""
        show = anthropic_models if isinstance(dialect_of(request.scope), Anthropic) else openai_models
        shown: dict[str, Json] = show(self._service)["data"][0]
        return json_response({**shown, "id": request.path_params["id"]})

    async def root(self, request: Request) -> Response:
        return PlainTextResponse(f"localrun {__version__}: {self._service.defaults.model}\n")

    async def health(self, request: Request) -> Response:
        loaded = self._service.engine.facts is not None
        waiting = self._service.dispatcher.n_waiting
        status = "ok" if loaded else "engine not running: the next request starts it"
        return json_response({"status": status, "waiting": waiting, "busy": self._service.dispatcher.busy})

    async def metrics(self, request: Request) -> Response:
        dispatcher = self._service.dispatcher
        text = await asyncio.to_thread(self._service.metrics.text, n_waiting=dispatcher.n_waiting, busy=dispatcher.busy)
        return Response(text, media_type=CONTENT_TYPE)


def build(
    service: Service, *, keys: Collection[str] = (), hosts: Collection[str] = (), origins: Collection[str] = ()
) -> ASGIApp:
    """The whole application, guard included."""
    endpoints = Endpoints(service)
    app = Starlette(routes=endpoints.routes(), exception_handlers={HTTPException: _not_served})

    def refuse(scope: Scope, error: ApiError) -> Response:
        dialect = dialect_of(scope)
        service.metrics.refused(dialect.name, error.kind)
        return error_response(dialect, error)

    return Guard(app, keys=keys, hosts=hosts, origins=origins, refuse=refuse)


async def _not_served(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = f"{request.method} {request.url.path}"
    fault = ApiError("not_found", f"{what} is not served here: see docs/serve.md")
    response = error_response(dialect_of(request.scope), fault)
    response.status_code = status
    return response
