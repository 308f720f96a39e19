"""Reads recorded routing traces; the format is described at the recorder, `localrun/offload/cache/trace.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from localrun.errors import FormatError, StoreError
from localrun.offload.cache.trace import RECORD, blocks, read_header

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TracedCall:
    """One layer call.

    Attributes:
        ids: (T, K) expert of each token's k-th choice.
        scores: (t, E) by what the router chose for each of the last t tokens; None where that is unknown.
    """

    layer: int
    ids: Ids
    scores: npt.NDArray[np.float32] | None = None


class Trace:
    """A trace that lies on disk. Immutable; iterating reads it block by block.

    Attributes:
        path: the file.
        header: whose it is.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            StoreError: the file can't be read.
            FormatError: it is no trace.
        """
        self.path = path
        with _reading(path) as file:
            self.header = read_header(file, path)

    def __iter__(self) -> Iterator[TracedCall]:
        """The calls in order.

        Raises:
            FormatError: a damaged block, or ids that do not fit the header.
        """
        with _reading(self.path) as file:
            read_header(file, self.path)
            for payload in blocks(file, self.path):
                yield from self._calls(payload)

    def _calls(self, payload: bytes) -> Iterator[TracedCall]:
        at = 0
        while at < len(payload):
            if at + RECORD.size > len(payload):
                raise self._damaged("a record ends in the middle")
            layer, n_used, n_tokens, n_scored = RECORD.unpack_from(payload, at)
            at += RECORD.size
            n_experts, expected = self.header.layers.get(layer, (0, 0))
            n_bytes = 2 * (n_used * n_tokens + n_experts * n_scored)
            if n_used != expected or n_scored > n_tokens or at + n_bytes > len(payload):
                raise self._damaged(f"a record of layer {layer} with {n_tokens} x {n_used} ids")
            ids = np.frombuffer(payload, "<u2", n_used * n_tokens, at).reshape(n_tokens, n_used).astype(np.int32)
            if ids.size and int(ids.max()) >= n_experts:
                raise self._damaged(f"expert {int(ids.max())} of layer {layer}, which has {n_experts}")
            scores = None
            if n_scored:
                scores = np.frombuffer(payload, "<f2", n_scored * n_experts, at + 2 * ids.size).astype(np.float32)
                scores = scores.reshape(n_scored, n_experts)
            at += n_bytes
            yield TracedCall(layer, ids, scores)

    def _damaged(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: damaged routing trace: {what}", hint="delete it and record a new one")


def _reading(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}", hint="check the path and its permissions") from error
