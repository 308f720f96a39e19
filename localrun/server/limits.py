"""Limits on requests: rejecting a cheap request must be cheap, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localrun.server.faults import ApiError, invalid

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """The server's limits.

    Attributes:
        body_bytes: maximum request body; larger ones get 413.
        depth: maximum JSON nesting in a body.
        header_bytes: request line and headers together.
        messages, tools: maximum number per request.
        schema_bytes, schema_depth: limits of one JSON schema, including tools' parameters.
        choices: maximum `n`.
        stop_strings: maximum number and length of stop strings.
        read_s: time limit for receiving headers and body.
        write_s: time limit for a client to accept data.
        queue: maximum number of waiting requests; more get 429.
        stored_responses, stored_bytes: what `previous_response_id` can refer to.
    """

    body_bytes: int = 64 * MIB
    depth: int = 200
    header_bytes: int = 64 << 10
    messages: int = 10_000
    tools: int = 1024
    schema_bytes: int = MIB
    schema_depth: int = 64
    choices: int = 8
    stop_strings: int = 16
    stop_string_chars: int = 1000
    read_s: float = 60.0
    write_s: float = 120.0
    queue: int = 64
    stored_responses: int = 256
    stored_bytes: int = 64 * MIB


def depth_of(value: Any, most: int) -> int:
    """Nesting of a JSON value, counted no further than `most + 1`. Iterative: the value comes from a stranger."""
    depth, level = 0, [value]
    while depth <= most:
        below: list[Any] = []
        nested = False
        for item in level:
            if isinstance(item, Mapping):
                nested = True
                below.extend(item.values())
            elif isinstance(item, Sequence) and not isinstance(item, str | bytes):
                nested = True
                below.extend(item)
        if not nested:
            return depth
        depth, level = depth + 1, below
    return depth


def check_schema(schema: object, param: str, limits: ServerLimits, size_bytes: int) -> Mapping[str, Any]:
    """`schema` as a JSON schema of bearable size. Raises ApiError."""
    if not isinstance(schema, Mapping):
        raise invalid(param, "must be a JSON schema (an object)")
    if size_bytes > limits.schema_bytes:
        raise ApiError(
            "invalid", f"{param}: a schema of {size_bytes} bytes > {limits.schema_bytes} maximum", param=param
        )
    if depth_of(schema, limits.schema_depth) > limits.schema_depth:
        raise invalid(param, f"a schema nested deeper than {limits.schema_depth}")
    return schema
