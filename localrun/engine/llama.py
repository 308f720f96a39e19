"""Pythonic wrappers of the llama.cpp C functions that the engine uses: vocabulary and context.

`Vocab` borrows from a model, `Context` owns a `llama_context`. Knows nothing about prompts and experts.
"""

from __future__ import annotations

import ctypes as C
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import llama_cpp as L
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.engine.company import Company, threads_at
from localrun.engine.options import EngineOptions
from localrun.errors import LocalrunError, StoreError
from localrun.ggml import log as llama_log
from localrun.offload.device.device import expert_device
from localrun.offload.kernels import attention
from localrun.options import OWN_KV_TYPES

# enum llama_token_attr (llama.h)
ATTR_UNKNOWN: int = L.LLAMA_TOKEN_ATTR_UNKNOWN
ATTR_CONTROL: int = L.LLAMA_TOKEN_ATTR_CONTROL
ATTR_USER_DEFINED: int = L.LLAMA_TOKEN_ATTR_USER_DEFINED

DECODE_NO_SLOT = 1
DECODE_ABORTED = 2
_DECODE_FAILED = -3
"""llama.cpp's code for a graph that could not be computed."""


def metadata_str(model: Any, key: str) -> str | None:
    """A metadata value as llama.cpp prints it, None if the model has no such key."""
    buffer = C.create_string_buffer(1024)
    n = L.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if n >= 0 else None


def metadata_int(model: Any, key: str) -> int:
    """An integer of the metadata under the architecture's prefix, 0 if missing or a list."""
    text = metadata_str(model, f"{metadata_str(model, 'general.architecture')}.{key}")
    return int(text) if text is not None and text.isdecimal() else 0


class Vocab:
    """A model's vocabulary, part of the model: call `close` before freeing that, when no other thread is in here. Afterwards
    every method raises LocalrunError. Otherwise immutable and thread-safe."""

    def __init__(self, model: Any) -> None:
        self._handle = L.llama_model_get_vocab(model)
        self.n_tokens: int = L.llama_vocab_n_tokens(self._vocab)
        self.has_tokenizer: bool = L.llama_vocab_type(self._vocab) != L.LLAMA_VOCAB_TYPE_NONE

    @property
    def _vocab(self) -> Any:
        if self._handle is None:
            raise LocalrunError("the model is closed")
        return self._handle

    def close(self) -> None:
        """The model is about to be freed."""
        self._handle = None

    def text(self, token: int) -> str:
        """The token's entry as the file has it (byte-level BPE: mapped bytes, not text)."""
        return str(L.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace"))

    def attributes(self, token: int) -> int:
        """Bits of enum llama_token_attr."""
        return int(L.llama_vocab_get_attr(self._vocab, token))

    def is_end(self, token: int) -> bool:
        """The token ends an answer."""
        return self.has_tokenizer and bool(L.llama_vocab_is_eog(self._vocab, token))

    @property
    def begin(self) -> int | None:
        """The token that a text begins with, if the vocabulary names one."""
        token = int(L.llama_vocab_bos(self._vocab)) if self.has_tokenizer else -1
        return token if token >= 0 else None

    def tokenize(self, text: bytes) -> list[int]:
        """Ids of UTF-8 `text`; control tokens in it are plain text, user-defined ones are matched by llama.cpp all the same."""
        if not text:
            return []
        capacity = len(text) + 8  # a token has at least one byte
        ids = (L.llama_token * capacity)()
        n = L.llama_tokenize(self._vocab, text, len(text), ids, capacity, False, False)
        if n < 0:
            raise LocalrunError(f"llama.cpp could not tokenize a text of {len(text)} bytes (code {n})")
        return list(ids[:n])

    def piece(self, token: int) -> bytes:
        """The token's text; for special tokens, the name."""
        buffer = C.create_string_buffer(64)
        n = L.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        if n < 0:
            buffer = C.create_string_buffer(-n)
            n = L.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(n, 0)]


class StopFlag:
    """A flag that llama.cpp polls between graph nodes without entering Python.

    The abort callback must be a C function `bool (void *)`, and `strlen` works as one: the empty string means "continue"; a
    string of one character has length 1, whose low byte C callers read as `true`.
    """

    def __init__(self) -> None:
        self._text = C.create_string_buffer(2)
        function = C.cast(C.CDLL(None).strlen, C.c_void_p).value
        self.callback = L.ggml_abort_callback(function)
        self.data = C.cast(self._text, C.c_void_p)

    def set(self, stop: bool) -> None:
        self._text[0] = b"x" if stop else b"\0"

    def __bool__(self) -> bool:
        return self._text.raw[0] != 0


class Context:
    """A `llama_context` with one sequence: KV cache, compute buffers, last logits.

    One sequence only, because llama.cpp clears the compressed caches of all others when it restores one (its issue 26777).
    Not thread-safe; `stop` may be set from any thread. Freed by `close`, before the model is.

    Attributes:
        small_operations: our device handles the large matrices and attention, so few threads are enough for the rest
            (`company.threads_at`).
    """

    def __init__(self, model: Any, options: EngineOptions, *, n_ctx: int, n_threads: int, all_logits: bool) -> None:
        """
        Args:
            n_ctx: tokens; llama.cpp rounds this up, see the attribute.
            all_logits: room for the logits of a whole batch instead of one token.
        Raises:
            LocalrunError: llama.cpp can't create the context (memory, KV type).
        """
        self.stop = StopFlag()
        params = L.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = min(options.n_batch, n_ctx)
        params.n_seq_max = 1
        # The output head's buffer has one row of n_vocab floats per output: 250 MiB for 512 rows of DeepSeek-V4.
        params.n_outputs_max = params.n_batch if all_logits else 1
        # A full-size window cache would hold all n_ctx rows of every layer, of which attention sees the last 128.
        params.swa_full = False
        params.offload_kqv = not options.cache_in_ram
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k = params.type_v = int(GGMLQuantizationType[options.kv_type.upper()])
        params.abort_callback = self.stop.callback
        params.abort_callback_data = self.stop.data
        llama_log.clear()
        self._ctx = L.llama_init_from_model(model, params)
        if not self._ctx:
            cause = expert_device().take_error()
            raise LocalrunError(
                f"llama.cpp can't make a context of {n_ctx} tokens: {cause or llama_log.recent_errors()}",
                hint="lower --context, use a smaller --kv type, or lower --vram if experts fill a GPU",
            ) from cause
        self._n_threads, self._n_threads_now, self._company = n_threads, n_threads, Company()
        self._follows_company = False
        self.small_operations = False
        is_deepseek4 = metadata_str(model, "general.architecture") == "deepseek4"  # other models' keys are no values
        self._attention_is_ours = is_deepseek4 and options.kv_type in OWN_KV_TYPES and attention.is_supported()
        self.n_ctx: int = L.llama_n_ctx(self._ctx)
        self.n_batch: int = L.llama_n_batch(self._ctx)
        self.n_vocab: int = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
        self._batch = L.llama_batch_init(self.n_batch, 0, 1)
        for i in range(self.n_batch):
            self._batch.n_seq_id[i] = 1
            self._batch.seq_id[i][0] = 0

    @property
    def handle(self) -> Any:
        """The `llama_context *`, for the sampler. Raises LocalrunError after `close`."""
        self.require_open()
        return self._ctx

    def require_open(self) -> None:
        """Raises LocalrunError after `close`."""
        if self._ctx is None:
            raise LocalrunError("the session is closed")

    @property
    def follows_company(self) -> bool:
        """Use no more threads than there are free cores (`company`).

        Not for reproducible answers: where attention is llama.cpp's (a cache that is neither F16 nor Q8_0), it sums in as many
        parts as there are threads from 512 rows of context on (ggml-cpu/ops.cpp, `use_split_kv_path`), which rounds differently.
        """
        return self._follows_company

    @follows_company.setter
    def follows_company(self, follows: bool) -> None:
        self._follows_company = follows

    def decode(self, tokens: Sequence[int], position: int, *, all_logits: bool) -> int:
        """Runs one batch. Returns llama_decode's code: 0 is success, DECODE_NO_SLOT, DECODE_ABORTED, negative: failed.

        Args:
            tokens: at most n_batch ids, the first one at `position`.
            all_logits: for every token, else for the last one.
        """
        ctx, batch, n = self.handle, self._batch, len(tokens)
        batch.n_tokens = n
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position + i
            batch.logits[i] = all_logits or i == n - 1
        n_threads = self._n_threads
        if self.small_operations:
            n_threads = threads_at(position, n_threads, attention_is_ours=self._attention_is_ours)
        self._use_threads(self._company.threads(n_threads) if self.follows_company else n_threads)
        with expert_device().attention() if self.small_operations else nullcontext():
            try:
                code = int(L.llama_decode(ctx, batch))
            finally:
                is_complete = expert_device().process.settle()
            return code or (0 if is_complete else _DECODE_FAILED)

    def _use_threads(self, n_threads: int) -> None:
        """For operations on one token; prompts have work enough to share unevenly."""
        if n_threads != self._n_threads_now:
            L.llama_set_n_threads(self._ctx, n_threads, self._n_threads)
            self._n_threads_now = n_threads

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """Logits (n_vocab,) of the last batch's token `row`, -1: its last one. llama.cpp's memory, valid until the next decode.

        Raises:
            LocalrunError: there are none for that token.
        """
        pointer = L.llama_get_logits_ith(self.handle, row)
        if not pointer:
            raise LocalrunError(f"llama.cpp has no logits for token {row} of the last batch")
        return np.ctypeslib.as_array(pointer, (self.n_vocab,))

    def clear(self) -> None:
        """Empties the KV cache."""
        L.llama_memory_clear(L.llama_get_memory(self.handle), True)

    def state_size(self) -> int:
        """Most bytes that `save_state` writes now."""
        return int(L.llama_state_seq_get_size(self.handle, 0))

    def save_state(self, place: memoryview) -> int:
        """Writes the sequence's KV state, for `load_state` of a context of the same model and options; returns its size.

        Args:
            place: writable, at least `state_size()` bytes. States of long conversations are large, so they are written in place.

        Raises:
            LocalrunError: llama.cpp failed to save it.
        """
        buffer = (C.c_uint8 * len(place)).from_buffer(place)
        n = int(L.llama_state_seq_get_data(self.handle, buffer, len(place), 0))
        if n == 0:
            raise LocalrunError(f"llama.cpp could not save the state: {llama_log.recent_errors()}")
        return n

    def load_state(self, state: memoryview) -> bool:
        """Replaces the sequence's KV state; False: llama.cpp refused it and the context must be cleared."""
        bytes_in_place = np.frombuffer(state, np.uint8)  # llama.cpp only reads
        llama_log.clear()
        n = L.llama_state_seq_set_data(self.handle, bytes_in_place.ctypes.data_as(C.POINTER(C.c_uint8)), len(state), 0)
        return int(n) == len(state)

    def save_file(self, path: Path, tokens: Sequence[int]) -> None:
        """Writes ids and state to a file in llama.cpp's format, holding one tensor in memory at a time.

        Raises:
            StoreError: llama.cpp can't write it.
        """
        ids = np.asarray(tokens, np.int32)
        llama_log.clear()
        pointer = ids.ctypes.data_as(C.POINTER(C.c_int32))
        if not L.llama_state_seq_save_file(self.handle, os.fsencode(path), 0, pointer, len(ids)):
            raise StoreError(f"{path}: llama.cpp could not write the state: {llama_log.recent_errors()}")

    def load_file(self, path: Path, n_tokens: int) -> list[int] | None:
        """Replaces the KV state by a file's; the ids. None: llama.cpp refused it and the context must be cleared."""
        ids, n_found = np.empty(n_tokens, np.int32), C.c_size_t(0)
        llama_log.clear()
        pointer = ids.ctypes.data_as(C.POINTER(C.c_int32))
        n = L.llama_state_seq_load_file(self.handle, os.fsencode(path), 0, pointer, n_tokens, C.byref(n_found))
        return ids.tolist() if n and n_found.value == n_tokens else None

    def close(self) -> None:
        if self._ctx:
            L.llama_batch_free(self._batch)
            L.llama_free(self._ctx)
            self._ctx = None
