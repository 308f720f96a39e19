"""The process's record for compiled code, and what Python asks of compiled code through it."""

from __future__ import annotations

import ctypes as C
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from localrun.alignment import align_up
from localrun.ggml.library import Library
from localrun.ggml.structures import STATUS_ABORTED, STATUS_FAILED
from localrun.kernel_cache import cached_jit
from localrun.offload.device import between, compressor, weighting
from localrun.offload.device.compiled_experts import settle
from localrun.offload.device.layouts import BETWEEN, COMPRESSOR, MOST_INPUTS, MOST_LEFT_OUT, MOST_POOLED, PROCESS
from localrun.offload.device.shadow import in_ram
from localrun.offload.device.view import F32
from localrun.offload.device.weight_records import MAX_VARIANTS
from localrun.offload.kernels import attention, threads
from localrun.offload.kernels.tasks import runner

MAX_EXPERTS: Final = 4096

FAILED_ANSWER: Final = -STATUS_FAILED - 2
ABORTED_ANSWER: Final = -STATUS_ABORTED - 2
"""What Python answers for ggml's statuses: `-answer - 2` is the status."""


@cached_jit()
def _in_ram(process: int, tensor: int) -> int:
    return int(in_ram(process, tensor))


@cached_jit(nogil=True)
def _settle_now(process: int) -> int:
    return int(settle(process))


@cached_jit(nogil=True)
def _take_weights(process: int, n_tokens: int, n_used: int) -> None:
    weighting.take_weights(process, n_tokens, n_used)


@cached_jit(nogil=True)
def _add_up(
    process: int, n_tokens: int, n_used: int, width: int, rows: int, row_bytes: int, out: int, out_bytes: int
) -> None:
    weighting.add_up(process, n_tokens, n_used, width, rows, row_bytes, out, out_bytes)


def _place(rows: F32) -> tuple[int, int]:
    """Address and bytes of a row."""
    return int(rows.ctypes.data), int(rows.strides[0])


class Process:
    """The process's field array and its targets; created once by the device.

    `python` is `int64 f(graph, index)`: nodes done, or one of the `*_ANSWER`s. `weights_type` is our weights' buffer type.
    """

    def __init__(self, lib: Library, python: int, weights_type: int) -> None:
        self.fields = PROCESS.empty()
        self.address = int(self.fields.ctypes.data)
        """For the backend's context."""
        self._arrays: dict[int, npt.NDArray[Any]] = {}
        self._lib = lib  # keeps the functions' library
        libc = C.CDLL(None)
        functions: tuple[tuple[int, Any], ...] = (
            (PROCESS.n_nodes, lib.ggml_graph_n_nodes),
            (PROCESS.node_at, lib.ggml_graph_node),
            (PROCESS.is_host, lib.ggml_backend_buft_is_host),
            (PROCESS.clock, libc.clock_gettime),
            (PROCESS.n_bytes, lib.ggml_nbytes),
            (PROCESS.get_tensor, lib.ggml_backend_tensor_get_async),
            (PROCESS.synchronize, lib.ggml_backend_synchronize),
            (PROCESS.buffer_type, lib.ggml_backend_buffer_get_type),
            (PROCESS.get_base, lib.ggml_backend_buffer_get_base),
            (PROCESS.set_tensor, lib.ggml_backend_tensor_set_async),
            (PROCESS.set_now, lib.ggml_backend_tensor_set),
        )
        for field, function in functions:
            self.fields[field] = C.cast(function, C.c_void_p).value or 0
        self.fields[PROCESS.python] = python
        self.fields[PROCESS.weights_type] = weights_type
        self.fields[PROCESS.run] = runner().run_address
        self._point(PROCESS.attention, attention.ATTENTION.empty())
        self._point(PROCESS.indexer, attention.INDEXER.empty())
        self._point(PROCESS.between, BETWEEN.empty())
        self._rows = np.zeros((2, MOST_POOLED), np.int64)
        self._made = np.repeat(np.array([[0], [-np.inf]], np.float32), 2 * MOST_POOLED, axis=1)
        self._left_out = np.zeros(MOST_LEFT_OUT, np.int64)
        self._compressors = COMPRESSOR.empty()
        COMPRESSOR.fill(
            self._compressors,
            values=self._rows[0].ctypes.data,
            scores=self._rows[1].ctypes.data,
            left_out=self._left_out.ctypes.data,
            zeros=self._made[0].ctypes.data,
            lowest=self._made[1].ctypes.data,
        )
        self._point(PROCESS.compressor, self._compressors)
        self._point(PROCESS.timespec, np.zeros(2, np.int64))
        self._point(PROCESS.inputs, np.zeros(2 * MOST_INPUTS, np.int64))
        self._point(PROCESS.counts, np.zeros(MAX_EXPERTS, np.int32))
        self._point(PROCESS.places, np.zeros(MAX_EXPERTS, np.int32))
        self._point(PROCESS.bounds, np.zeros(MAX_VARIANTS + 1, np.int32))
        self._point(PROCESS.slots, np.zeros(MAX_EXPERTS, np.uint64))
        self._point(PROCESS.starts, np.zeros(MAX_EXPERTS + 1, np.int32))
        self.grow(0, 64, 64)

    def in_ram(self, tensor: int) -> int | None:
        """Address of a tensor's bytes in RAM, if that is not its own: those of its shadow."""
        return int(_in_ram(self.address, tensor)) if self.fields[PROCESS.read_back] else None

    def settle(self) -> bool:
        """Waits until no device computes for us, or reads our memory, and no thread fetches for us: after each decode, while its
        context exists.

        Returns:
            False: the decode has failed, even if llama.cpp doesn't know it; the cause is kept as usual.
        """
        behind = int(self.fields[PROCESS.behind])
        self.fields[PROCESS.behind] = 0
        if behind:
            self._lib.ggml_backend_synchronize(behind)
        return not self.fields[PROCESS.unsettled] or _settle_now(self.address) == 0

    def tail(self) -> tuple[int, int]:
        """The node after the weighting and the sum that follow the present expert chain, 0 if they don't; and the sum's tensor."""
        return int(self.fields[PROCESS.tail_end]), int(self.fields[PROCESS.tail_sum])

    def take_weights(self, n_tokens: int, n_used: int) -> F32:
        """(T * K,) the router's weights of the present chain's pairs; a copy."""
        _take_weights(self.address, n_tokens, n_used)
        result: F32 = self._arrays[PROCESS.weights][: n_tokens * n_used].copy()
        return result

    def add_up(self, n_tokens: int, n_used: int, rows: F32, out: F32, summed: Sequence[int]) -> None:
        """After `take_weights`: weights and adds up the present chain's outputs.

        Args:
            rows: (T * K, D) outputs of its pairs.
            out: (T, D) the sums.
            summed: pairs that are no part of them.
        """
        self._arrays[PROCESS.taken][list(summed)] = 1
        _add_up(self.address, n_tokens, n_used, rows.shape[1], *_place(rows), *_place(out))

    def prepare_attention(self, n_threads: int) -> None:
        """Attention, and what comes between matrices, come with so many threads from now on; while nothing is decoded."""
        if not attention.is_supported():
            return
        self.fields[PROCESS.between_task] = between.task_address()
        self.fields[PROCESS.compressor_task] = compressor.task_address()
        self.fields[PROCESS.shared_bytes] = between.SHARED_BYTES
        self.fields[PROCESS.attend], self.fields[PROCESS.index] = attention.attend_address(), attention.index_address()
        self.fields[PROCESS.pool], self.fields[PROCESS.threads] = threads.pool_for(n_threads), n_threads

    def take_unread_joins(self) -> int:
        """CONCATs left to our attention, but not read by it, since the previous call of this method; resets the count."""
        count = int(self.fields[PROCESS.unread_joins])
        self.fields[PROCESS.unread_joins] = 0
        return max(count, 0)

    @property
    def n_entered(self) -> int:
        """How often compiled code entered Python, of all models."""
        return int(self.fields[PROCESS.n_entered])

    @property
    def n_parts(self) -> int:
        """Parts of llama.cpp's graphs that were ours, of all models; between two of them llama.cpp computes."""
        return int(self.fields[PROCESS.n_parts])

    @property
    def n_compressed(self) -> int:
        """Compressors that were computed as one operation, of all models."""
        return int(self._compressors[COMPRESSOR.n_done])

    @property
    def settle_ns(self) -> int:
        """Time that the decoding thread waited for Python halves of calls that were computed, of all models."""
        return int(self.fields[PROCESS.settle_ns])

    @property
    def dense_ns(self) -> int:
        """Time spent in dense matrices."""
        return int(self.fields[PROCESS.dense_ns])

    @property
    def attention_ns(self) -> int:
        """Time spent in attention and the indexer."""
        return int(self.fields[PROCESS.attention_ns])

    def grow(self, scratch_bytes: int, n_pairs: int, n_rows: int) -> None:
        """Makes room for calls of that size; while nothing is decoded."""
        if scratch_bytes > self._size(PROCESS.scratch):
            self._point(PROCESS.scratch, np.zeros(scratch_bytes + 64, np.uint8), align=64)
        if n_pairs > self.fields[PROCESS.capacity]:
            self.fields[PROCESS.capacity] = n_pairs
            self._point(PROCESS.x_rows, np.zeros(n_pairs, np.int32))
            self._point(PROCESS.out_rows, np.zeros(n_pairs, np.int32))
            self._point(PROCESS.weights, np.zeros(n_pairs, np.float32))
            self._point(PROCESS.taken, np.zeros(n_pairs, np.uint8))
        if n_rows > self.fields[PROCESS.iota_size]:
            self.fields[PROCESS.iota_size] = n_rows
            self._point(PROCESS.iota, np.arange(n_rows, dtype=np.int32))

    def _size(self, field: int) -> int:
        array = self._arrays.get(field)
        return 0 if array is None else array.nbytes - 64

    def _point(self, field: int, array: npt.NDArray[Any], align: int = 1) -> None:
        self._arrays[field] = array
        self.fields[field] = align_up(array.ctypes.data, align)
