"""Access control: API keys, allowed host names, allowed origins.

A web page can send requests to this machine, and with DNS rebinding it can even read the responses. So the `Host` header must
be an IP address or a known name, and a request with an `Origin` is rejected unless that origin is allowed.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from localrun.server.faults import ApiError

OPEN_PATHS = ("/health", "/")
"""Paths for monitoring, served without a key."""


class Guard:
    """ASGI middleware.

    Args:
        keys: accepted API keys; if empty, no key is required.
        hosts: accepted host names, in addition to IP addresses and `localhost`.
        origins: accepted web origins; `*`: all.
        refuse: makes the response for a rejected request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Collection[str],
        hosts: Iterable[str] = (),
        origins: Collection[str] = (),
        refuse: Callable[[Scope, ApiError], Response],
    ) -> None:
        self._app, self._refuse = app, refuse
        self._keys = [key.encode() for key in keys]
        self._hosts = {"localhost", socket.gethostname().lower(), *(host.lower() for host in hosts)}
        self._origins = set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        try:
            self._check_host(headers.get("host"))
            self._check_origin(origin)
            if scope["method"] == "OPTIONS" and origin is not None:
                await self._preflight(origin)(scope, receive, send)
                return
            if scope["path"] not in OPEN_PATHS:
                self._check_key(headers)
        except ApiError as error:
            await self._refuse(scope, error)(scope, receive, send)
            return
        await self._app(scope, receive, self._with_origin(send, origin))

    def _check_host(self, host: str | None) -> None:
        name = _host_name(host)
        if name is None or (name not in self._hosts and not _is_address(name)):
            raise ApiError("forbidden", f"unknown host {host!r:.100}; allow it with --allow-host")

    def _check_origin(self, origin: str | None) -> None:
        if origin is None or not origin.startswith(("http://", "https://", "null")):
            return  # no browser's page: programs, and editors built on a browser
        if "*" not in self._origins and origin not in self._origins:
            raise ApiError("forbidden", f"requests from {origin!r:.100} are not allowed; allow them with --cors-origin")

    def _check_key(self, headers: Headers) -> None:
        if not self._keys:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", ""), token.strip() if scheme.lower() == "bearer" else ""]
        # All keys are compared in constant time, so timing reveals nothing about partial matches.
        fits = [hmac.compare_digest(key, text.encode("utf-8", "replace")) for key in self._keys for text in given]
        if not any(fits):
            raise ApiError("unauthorized", "the API key is missing or wrong", code="invalid_api_key")

    def _preflight(self, origin: str) -> Response:
        headers = {
            "access-control-allow-origin": origin,
            "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
            "access-control-allow-headers": "*, authorization, content-type, x-api-key, anthropic-version, anthropic-beta",
            "access-control-max-age": "600",
            "vary": "origin",
        }
        return Response(status_code=204, headers=headers)

    def _with_origin(self, send: Send, origin: str | None) -> Callable[[Message], Awaitable[None]]:
        if origin is None or not self._origins:
            return send

        async def with_origin(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["access-control-allow-origin"] = origin
                headers.add_vary_header("origin")
            await send(message)

        return with_origin


def _host_name(host: str | None) -> str | None:
    if not host:
        return None
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True
