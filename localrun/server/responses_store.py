"""Responses for `previous_response_id`: in memory, bounded, oldest dropped first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

Json = Any


@dataclass(frozen=True, slots=True)
class Kept:
    """A response and its input.

    Attributes:
        items: the conversation before it.
        output: its own items.
        body: the response as sent.
    """

    items: Sequence[Mapping[str, Json]]
    output: Sequence[Mapping[str, Json]]
    body: Mapping[str, Json]
    n_bytes: int


class ResponseStore:
    """Used on the event loop's thread only."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._n_bytes = 0

    def put(
        self,
        response_id: str,
        items: Sequence[Mapping[str, Json]],
        output: Sequence[Mapping[str, Json]],
        body: Mapping[str, Json],
    ) -> None:
        """Keeps a response, unless it alone is too large."""
        n_bytes = len(msgspec.json.encode(items)) + len(msgspec.json.encode(body))
        if n_bytes > self._most_bytes:
            return
        self.drop(response_id)
        self._kept[response_id] = Kept(items, output, body, n_bytes)
        self._n_bytes += n_bytes
        while len(self._kept) > self._most or self._n_bytes > self._most_bytes:
            self.drop(next(iter(self._kept)))

    def get(self, response_id: str) -> Kept | None:
        kept = self._kept.get(response_id)
        if kept is not None:
            self._kept.move_to_end(response_id)
        return kept

    def drop(self, response_id: str) -> bool:
        """Forgets a response; whether it was there."""
        kept = self._kept.pop(response_id, None)
        if kept is None:
            return False
        self._n_bytes -= kept.n_bytes
        return True
