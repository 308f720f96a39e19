"""Routing traces: the experts of every layer call, recorded while a model runs and replayed by `tools/simulator`.

A trace holds only expert ids and routers' scores, no tokens or text. All it reveals about a conversation is how similar its parts
are.

File, little-endian, append-only:

    8   magic "LRTRACE2"
    4   length of the header
    n   header, JSON: {"identity", "layers": {"3": [n_experts, n_used], ...}, "created_at"}
    blocks, each one write:
        4   number of payload bytes
        8   xxh3_64 of the payload
        m   records: u16 layer, u16 n_used, u32 n_tokens, u32 n_scored; then n_tokens * n_used expert ids as u16; then
            n_scored * n_experts f16: by what the router chose for each of the last n_scored tokens (0 where it is unknown)

An incomplete block at the end of the file (the process was killed) is ignored by the reader and removed before appending; a
wrong checksum is an error.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
import xxhash

from localrun.errors import FormatError, StoreError
from localrun.quant.model.source import MoeLayer
from localrun.units import format_size

log = logging.getLogger(__name__)

Ids = npt.NDArray[np.int32]

MAGIC: Final = b"LRTRACE2"
_BLOCK = struct.Struct("<I8s")
RECORD = struct.Struct("<HHII")
MAX_HEADER_BYTES: Final = 1 << 20
MAX_BLOCK_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """The model a trace belongs to.

    Attributes:
        identity: `ModelSource.identity`.
        layers: block number -> (experts, experts per token).
        created_at: seconds since the epoch.
    """

    identity: str
    layers: Mapping[int, tuple[int, int]]
    created_at: float

    @classmethod
    def of(cls, identity: str, moe_layers: Mapping[int, MoeLayer], n_used: int) -> TraceHeader:
        """Header of a new trace of a loaded model."""
        return cls(identity, {layer: (moe.n_experts, n_used) for layer, moe in moe_layers.items()}, time.time())

    def _encode(self) -> bytes:
        layers = {str(layer): list(shape) for layer, shape in sorted(self.layers.items())}
        text = json.dumps({"identity": self.identity, "layers": layers, "created_at": self.created_at}).encode()
        return MAGIC + struct.pack("<I", len(text)) + text


class TraceRecorder:
    """Writes a trace; the device calls `record` once per layer call.

    Owns the file from construction to `close`. Not thread-safe: only the decoding thread records. A full disk or reaching
    `max_bytes` ends the recording with a log message, but never the answer.

    Args:
        path: created, or appended to if it is a trace of the same model.
        header: see `TraceHeader.of`.
        buffer_bytes: size of a block, collected in memory; a crash loses at most this much.
        max_bytes: maximum size of the file.

    Raises:
        StoreError: the file can't be opened.
        FormatError: it exists but is not a trace, or a trace of another model.
    """

    def __init__(
        self, path: Path, header: TraceHeader, *, buffer_bytes: int = 256 << 10, max_bytes: int = 1 << 30
    ) -> None:
        self.path = path
        self._buffer_bytes, self._max_bytes = buffer_bytes, max_bytes
        self._pieces: list[bytes] = []
        self._pending = 0
        self._file: BinaryIO | None
        self._file, self._size = _open_for_append(path, header)

    @property
    def recording(self) -> bool:
        """False after the end, planned or not."""
        return self._file is not None

    def record(self, layer: int, ids: npt.NDArray[Any], scores: npt.NDArray[Any] | None = None) -> None:
        """Notes one call.

        Args:
            ids: (T, K) expert of each token's k-th choice.
            scores: (t, E) of the last t tokens, where they are known.
        """
        if self._file is None:
            return
        body = ids.astype("<u2").tobytes()
        n_scored = 0 if scores is None else len(scores)
        if scores is not None:
            body += scores.astype("<f2").tobytes()
        self._pieces.append(RECORD.pack(layer, ids.shape[1], ids.shape[0], n_scored))
        self._pieces.append(body)
        self._pending += RECORD.size + len(body)
        if self._pending >= self._buffer_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes the buffered records as a block."""
        if self._file is None or not self._pieces:
            return
        payload = b"".join(self._pieces)
        self._pieces, self._pending = [], 0
        if self._size + _BLOCK.size + len(payload) > self._max_bytes:
            log.warning("%s: the routing trace ends here: limit of %s reached", self.path, format_size(self._max_bytes))
            self._end()
            return
        block = _BLOCK.pack(len(payload), xxhash.xxh3_64_digest(payload)) + payload
        try:
            n_written = self._file.write(block)
        except OSError as error:
            n_written, reason = 0, error.strerror
        else:
            reason = "the disk is full"  # the only cause of a short write to a file
        if n_written < len(block):
            log.warning("%s: the routing trace ends here: %s", self.path, reason)
            self._end()
        self._size += n_written

    def close(self) -> None:
        """Writes the rest and closes the file; more calls do nothing."""
        self.flush()
        self._end()

    def _end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> TraceRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_header(file: BinaryIO, path: Path) -> TraceHeader:
    """Reads the header; leaves the file at the first block.

    Raises:
        FormatError: not a trace, or a damaged header.
    """
    start = file.read(len(MAGIC) + 4)
    if len(start) < len(MAGIC) + 4 or start[: len(MAGIC)] != MAGIC:
        raise FormatError(f"{path}: not a routing trace", hint="record one with `localrun bench MODEL --record FILE`")
    n_bytes = int.from_bytes(start[len(MAGIC) :], "little")
    text = file.read(min(n_bytes, MAX_HEADER_BYTES))
    try:
        values = json.loads(text)
        layers = {int(layer): (int(shape[0]), int(shape[1])) for layer, shape in values["layers"].items()}
        header = TraceHeader(str(values["identity"]), layers, float(values["created_at"]))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise FormatError(f"{path}: the routing trace's header is damaged") from error
    if not all(0 <= layer < 1 << 16 and 0 < used <= n <= 1 << 16 for layer, (n, used) in layers.items()):
        raise FormatError(f"{path}: the routing trace's header names impossible layers")
    return header


def blocks(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Complete blocks; leaves the file after the last one."""
    while True:
        start = file.tell()
        head = file.read(_BLOCK.size)
        if len(head) < _BLOCK.size:
            break
        n_bytes, digest = _BLOCK.unpack(head)
        if n_bytes > MAX_BLOCK_BYTES:
            raise FormatError(f"{path}: damaged routing trace: a block of {n_bytes} bytes at {start}")
        payload = file.read(n_bytes)
        if len(payload) < n_bytes:
            break
        if xxhash.xxh3_64_digest(payload) != digest:
            raise FormatError(
                f"{path}: damaged routing trace: checksum of the block at {start}",
                hint="delete it and record a new one",
            )
        yield payload
    if head:
        log.warning("%s: the last block of the routing trace is incomplete and ignored", path)
    file.seek(start)


def _open_for_append(path: Path, header: TraceHeader) -> tuple[BinaryIO, int]:
    """The file, unbuffered and standing at its end, and its size."""
    try:
        file = open(path, "r+b" if path.exists() and path.stat().st_size else "w+b", buffering=0)  # noqa: SIM115 (owned by the recorder)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}", hint="choose another file for the routing trace") from error
    try:
        if file.seek(0, os.SEEK_END) == 0:
            file.write(header._encode())
        else:
            file.seek(0)
            old = read_header(file, path)
            if (old.identity, dict(old.layers)) != (header.identity, dict(header.layers)):
                raise FormatError(
                    f"{path}: a routing trace of another model", hint="choose another file for the routing trace"
                )
            for _ in blocks(file, path):
                pass
            file.truncate()
        return file, file.tell()
    except OSError as error:
        file.close()
        raise StoreError(f"{path}: {error.strerror}", hint="choose another file for the routing trace") from error
    except BaseException:
        file.close()
        raise
