"""What a saved session state consists of, as bytes in memory and as a file.

In memory: header, token ids, llama.cpp's state, checksum of all before. A state takes as many bytes as the used part of the cache:
0.9 GiB after 128K tokens of Flash. So large ones become files without being in memory as a whole: llama.cpp writes its own format
(ids, then the state, tensor by tensor), and the header and checksum follow. Knows contexts, not stores.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import xxhash

from localrun.engine.llama import Context
from localrun.errors import ChecksumError, FormatError, StoreError

_MAGIC: Final = b"LRSNAP01"
_FILE_MAGIC: Final = b"LRSNAP02"
_HEADER: Final = struct.Struct("<8s32sII")  # magic, xxh3_128 hex of model and KV type, n_tokens, 0
_DIGEST_BYTES: Final = 8  # xxh3_64 of all before it
_TRAILER_BYTES: Final = _HEADER.size + _DIGEST_BYTES
_CHUNK_BYTES: Final = 4 << 20
"""Of a file, in memory at a time."""


def size_bytes(context: Context, n_tokens: int) -> int:
    """Most bytes that `pack` or `write` need now."""
    return _HEADER.size + 4 * n_tokens + (context.state_size() if n_tokens else 0) + _DIGEST_BYTES


def pack(context: Context, key: str, tokens: Sequence[int]) -> bytearray:
    """The context's state. The only copy; the caller owns it.

    Args:
        key: 32 hex digits, see `Engine.state_key`.
        tokens: in the context.
    """
    start = _HEADER.size + 4 * len(tokens)
    result = bytearray(size_bytes(context, len(tokens)))
    _HEADER.pack_into(result, 0, _MAGIC, key.encode(), len(tokens), 0)
    result[_HEADER.size : start] = np.asarray(tokens, np.int32).tobytes()
    end = start
    if tokens:
        with memoryview(result)[start:-_DIGEST_BYTES] as place:
            end += context.save_state(place)
    with memoryview(result)[:end] as body:
        digest = xxhash.xxh3_64_digest(body)
    result[end:] = digest
    return result


def unpack(state: bytes | bytearray, key: str, n_ctx: int) -> tuple[list[int], memoryview]:
    """The ids and llama.cpp's part of what `pack` returned.

    Raises:
        ChecksumError: the bytes are damaged.
        FormatError: not a state, or one of another model, KV type or context length.
    """
    body, digest = memoryview(state)[:-_DIGEST_BYTES], bytes(state[-_DIGEST_BYTES:])
    if len(body) < _HEADER.size or bytes(body[:8]) != _MAGIC:
        raise FormatError("not a session snapshot of this version")
    if xxhash.xxh3_64_digest(body) != digest:
        raise _damaged()
    n_tokens = _check(bytes(body[: _HEADER.size]), key, n_ctx)
    start = _HEADER.size + 4 * n_tokens
    return np.frombuffer(body[_HEADER.size : start], np.int32).tolist(), body[start:]


def write(context: Context, path: Path, key: str, tokens: Sequence[int]) -> None:
    """The same as a file, one tensor at a time.

    Raises:
        StoreError: it can't be written.
    """
    context.save_file(path, tokens)
    try:
        with path.open("r+b") as file:
            hasher = _hash_of(file, path.stat().st_size)
            header = _HEADER.pack(_FILE_MAGIC, key.encode(), len(tokens), 0)
            hasher.update(header)
            file.write(header + hasher.digest())
    except OSError as error:
        raise StoreError(f"{path}: can't be written: {error.strerror}") from error


def is_packed(path: Path) -> bool:
    """The file holds what `pack` returned."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise StoreError(f"{path}: can't be read: {error.strerror}") from error


def read_packed(path: Path) -> bytes:
    """All of such a file. Raises StoreError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: can't be read: {error.strerror}") from error


def check(path: Path, key: str, n_ctx: int) -> int:
    """Reads a file of `write` once; its number of tokens.

    Raises:
        ChecksumError, FormatError: as `unpack`.
        StoreError: it can't be read.
    """
    try:
        with path.open("rb") as file:
            n_bytes = path.stat().st_size - _TRAILER_BYTES
            if n_bytes < 0:
                raise FormatError(f"{path}: not a session snapshot of this version")
            file.seek(n_bytes)
            trailer = file.read()
            header, digest = trailer[: _HEADER.size], trailer[_HEADER.size :]
            if header[:8] != _FILE_MAGIC:
                raise FormatError(f"{path}: not a session snapshot of this version")
            file.seek(0)
            hasher = _hash_of(file, n_bytes)
    except OSError as error:
        raise StoreError(f"{path}: can't be read: {error.strerror}") from error
    hasher.update(header)
    if hasher.digest() != digest:
        raise _damaged()
    return _check(header, key, n_ctx)


def _hash_of(file: BinaryIO, n_bytes: int) -> xxhash.xxh3_64:
    """Of the next bytes; the file is behind them afterwards."""
    hasher = xxhash.xxh3_64()
    while n_bytes > 0 and (chunk := file.read(min(n_bytes, _CHUNK_BYTES))):
        hasher.update(chunk)
        n_bytes -= len(chunk)
    return hasher


def _check(header: bytes, key: str, n_ctx: int) -> int:
    """The number of tokens."""
    _, found, n_tokens, _ = _HEADER.unpack(header)
    if found != key.encode():
        raise FormatError("the session snapshot belongs to another model or KV cache type")
    if n_tokens > n_ctx:
        raise FormatError(f"the session snapshot has {n_tokens} tokens, the context only {n_ctx}")
    return int(n_tokens)


def _damaged() -> ChecksumError:
    return ChecksumError("the session snapshot is damaged", hint="delete it; the conversation itself is not in it")
