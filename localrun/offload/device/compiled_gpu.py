"""Experts on GPUs in compiled layer calls: what `GpuTier.start` and `finish` do, without Python.

In decode nearly every layer call has experts on a GPU, so its way must be as short as that of experts in RAM. Compiled code
(`native.py`) plans a call's parts, one for each GPU and format, starts the first part of each GPU, computes what is in RAM
meanwhile, takes the results, and starts a GPU's next part when the one before it is done: they share the memory of intermediate
results.

What stays in Python: calls of more than `MOST_PAIRS` tokens or pairs on GPUs, and those that need a graph which nobody has made
yet. Python makes it (`GpuSlots`) and registers it here, so each graph costs one such call. A device that fails is Python's to
report: the call ends there with nothing under way, Python does it again, fails the same way and raises.

What a device reads and writes lies in host memory that it has pinned where it can do so: from and to other memory some backends
copy synchronously. Structures are arrays of int64 as in `native.py`: `D_` fields are a device's, `B_` a bank's, `T_` a graph's,
`G_` a layer's, `A_` a part's of the running call. They change between two decodes only, or while Python has the call.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Sequence
from typing import Any, Final

import numba as nb
import numpy as np
import numpy.typing as npt

from localrun.ggml.devices import GpuDevice, HostMemory
from localrun.ggml.library import library
from localrun.offload.kernels.lowlevel import (
    call_1,
    call_5,
    call_i32,
    copy,
    load_i16,
    load_i32,
    load_i64,
    store_i32,
    store_i64,
)

MOST_PAIRS: Final = 64
"""(token, expert) pairs on GPUs of a compiled call, and its tokens: enough for decode. Longer calls take so long that the way
through Python does not matter."""

# A device: its backend, pinned host memory for ids, inputs and outputs (MOST_PAIRS of each; a part has its range), row length,
# addresses of ggml's functions
D_BACKEND, D_IDS, D_X, D_OUT, D_N_EMBD, D_SET, D_COMPUTE, D_GET, D_SYNCHRONIZE, D_FIELDS = range(10)
# A bank: its device, then MOST_PAIRS + 1 graphs for 0, 1, ... pairs of one token, and as many for pairs of several tokens (a
# single pair is one token's)
B_DEVICE, B_GRAPHS = 0, 1
# A graph: ggml_cgraph (0: not made), its inputs and output, how many pairs it computes
T_GRAPH, T_X, T_IDS, T_OUT, T_SIZE, T_FIELDS = range(6)
# A layer: by expert GPU (int16, -1: none), slot and variant (int32); GPUs and variants; bank by GPU and variant (0: none); shape
# and parts of the running call with their pairs' output rows (token * n_used + choice)
G_WHERE, G_SLOT, G_VARIANT, G_N_GPUS, G_N_VARIANTS, G_BANKS, G_N_TOKENS, G_N_USED, G_PARTS, G_ROWS, G_FIELDS = range(11)
# A part: bank and graph, its first pair and how many, whether the device is at work
A_BANK, A_GRAPH, A_FIRST, A_N_PAIRS, A_RUNS, A_FIELDS = range(6)


@nb.njit(inline="always")
def _get(structure: int, field: int) -> int:
    return load_i64(structure + field * 8)


@nb.njit(inline="always")
def _set(structure: int, field: int, value: int) -> None:
    store_i64(structure + field * 8, value)


@nb.njit(inline="always")
def is_on_gpu(gpu: int, expert: int) -> bool:
    """The expert is on a GPU; `gpu` is the layer's record or 0."""
    return gpu != 0 and load_i16(_get(gpu, G_WHERE) + expert * 2) >= 0


@nb.njit
def plan(gpu: int, ids: int, ids_stride: int, n_tokens: int, n_used: int, n_pairs: int) -> int:
    """Puts the pairs of experts on GPUs into parts; the number of parts, -1 if Python must do this call."""
    if n_pairs > MOST_PAIRS or n_tokens > MOST_PAIRS:
        return -1
    _set(gpu, G_N_TOKENS, n_tokens)
    _set(gpu, G_N_USED, n_used)
    where, slots, variants = _get(gpu, G_WHERE), _get(gpu, G_SLOT), _get(gpu, G_VARIANT)
    n_variants = _get(gpu, G_N_VARIANTS)
    rows, n_parts, end = _get(gpu, G_ROWS), 0, 0
    for group in range(_get(gpu, G_N_GPUS) * n_variants):
        bank, first = _get(_get(gpu, G_BANKS), group), end
        if bank == 0:
            continue
        slot_ids = _get(_get(bank, B_DEVICE), D_IDS) + n_parts * MOST_PAIRS * 4
        for t in range(n_tokens):
            for k in range(n_used):
                e = load_i32(ids + t * ids_stride + k * 4)
                if load_i16(where + e * 2) * n_variants + load_i32(variants + e * 4) == group:
                    store_i32(slot_ids + (end - first) * 4, load_i32(slots + e * 4))
                    store_i32(rows + end * 4, t * n_used + k)
                    end += 1
        if end == first:
            continue
        form = 0 if n_tokens == 1 or end - first == 1 else MOST_PAIRS + 1
        graph = bank + (B_GRAPHS + (form + end - first) * T_FIELDS) * 8
        if _get(graph, T_GRAPH) == 0:
            return -1
        for i in range(end - first, _get(graph, T_SIZE)):
            store_i32(slot_ids + i * 4, 0)  # pairs that fill up the graph; nobody reads their results
        part = _get(gpu, G_PARTS) + n_parts * A_FIELDS * 8
        _set(part, A_BANK, bank)
        _set(part, A_GRAPH, graph)
        _set(part, A_FIRST, first)
        _set(part, A_N_PAIRS, end - first)
        _set(part, A_RUNS, 0)
        n_parts += 1
    return n_parts


@nb.njit(inline="always")
def _part(gpu: int, index: int) -> int:
    return int(_get(gpu, G_PARTS) + index * A_FIELDS * 8)


@nb.njit
def _launch(gpu: int, index: int, x: int, x_stride: int) -> bool:
    """Starts a part on its idle device; False if the device refuses."""
    part = _part(gpu, index)
    graph, device, n_pairs = _get(part, A_GRAPH), _get(_get(part, A_BANK), B_DEVICE), _get(part, A_N_PAIRS)
    backend, row_bytes, n_rows = _get(device, D_BACKEND), _get(device, D_N_EMBD) * 4, 1
    rows, staged = _get(gpu, G_ROWS) + _get(part, A_FIRST) * 4, _get(device, D_X) + _get(part, A_FIRST) * row_bytes
    if _get(gpu, G_N_TOKENS) == 1:
        copy(staged, x, row_bytes)
    else:
        n_rows = n_pairs
        for i in range(n_pairs):
            copy(staged + i * row_bytes, x + load_i32(rows + i * 4) // _get(gpu, G_N_USED) * x_stride, row_bytes)
    ids = _get(device, D_IDS) + index * MOST_PAIRS * 4
    call_5(_get(device, D_SET), backend, _get(graph, T_IDS), ids, 0, _get(graph, T_SIZE) * 4)
    call_5(_get(device, D_SET), backend, _get(graph, T_X), staged, 0, n_rows * row_bytes)
    _set(part, A_RUNS, 1)
    return bool(call_i32(_get(device, D_COMPUTE), backend, _get(graph, T_GRAPH)) == 0)


@nb.njit
def _abandon(gpu: int, n_parts: int) -> None:
    """Waits until no device reads or writes our memory."""
    for i in range(n_parts):
        if _get(_part(gpu, i), A_RUNS):
            device = _get(_get(_part(gpu, i), A_BANK), B_DEVICE)
            call_1(_get(device, D_SYNCHRONIZE), _get(device, D_BACKEND))


@nb.njit
def start(gpu: int, n_parts: int, x: int, x_stride: int) -> bool:
    """Starts the first part of each GPU; False if a device failed, then nothing is under way."""
    for i in range(n_parts):
        # Parts of one GPU are neighbours.
        if i > 0 and _get(_get(_part(gpu, i), A_BANK), B_DEVICE) == _get(_get(_part(gpu, i - 1), A_BANK), B_DEVICE):
            continue
        if not _launch(gpu, i, x, x_stride):
            _abandon(gpu, n_parts)
            return False
    return True


@nb.njit
def finish(gpu: int, n_parts: int, x: int, x_stride: int, out: int, out_stride: int) -> bool:
    """Computes the parts that wait and puts all results into their rows of `out`; False as `start`."""
    for i in range(n_parts):
        part = _part(gpu, i)
        if not _get(part, A_RUNS) and not _launch(gpu, i, x, x_stride):
            _abandon(gpu, n_parts)
            return False
        device, first, n_pairs = _get(_get(part, A_BANK), B_DEVICE), _get(part, A_FIRST), _get(part, A_N_PAIRS)
        backend, row_bytes = _get(device, D_BACKEND), _get(device, D_N_EMBD) * 4
        result, rows = _get(device, D_OUT) + first * row_bytes, _get(gpu, G_ROWS) + first * 4
        call_5(_get(device, D_GET), backend, _get(_get(part, A_GRAPH), T_OUT), result, 0, n_pairs * row_bytes)
        call_1(_get(device, D_SYNCHRONIZE), backend)
        _set(part, A_RUNS, 0)
        for p in range(n_pairs):
            copy(out + load_i32(rows + p * 4) * out_stride, result + p * row_bytes, row_bytes)
    return True


class DeviceRecord:
    """A device's fields and host memory; `close` when nothing is under way."""

    def __init__(self, device: GpuDevice, backend: int, n_embd: int) -> None:
        lib = library()
        sizes = MOST_PAIRS * MOST_PAIRS * 4, MOST_PAIRS * n_embd * 4, MOST_PAIRS * n_embd * 4
        self._memory = HostMemory(device, sum(sizes))
        ids = int(self._memory.array.ctypes.data)
        functions = (
            lib.ggml_backend_tensor_set_async,
            lib.ggml_backend_graph_compute_async,
            lib.ggml_backend_tensor_get_async,
            lib.ggml_backend_synchronize,
        )
        addresses = [C.cast(function, C.c_void_p).value or 0 for function in functions]  # type: ignore[arg-type]
        self.fields = np.array([backend, ids, ids + sizes[0], ids + sizes[0] + sizes[1], n_embd, *addresses], np.int64)
        assert self.fields.size == D_FIELDS

    def close(self) -> None:
        """Frees the host memory."""
        self._memory.close()


class BankRecord:
    """A bank's fields: its graphs by number of pairs."""

    def __init__(self, device: DeviceRecord) -> None:
        self._device = device
        self.fields = np.zeros(B_GRAPHS + 2 * (MOST_PAIRS + 1) * T_FIELDS, np.int64)
        self.fields[B_DEVICE] = device.fields.ctypes.data

    def add(self, sizes: range, *, one_token: bool, graph: int, x: int, ids: int, out: int) -> None:
        """From now on calls of so many pairs use this graph, which computes the most of `sizes`."""
        if sizes[-1] <= MOST_PAIRS:
            for n_pairs in sizes:
                at = B_GRAPHS + ((0 if one_token else MOST_PAIRS + 1) + n_pairs) * T_FIELDS
                self.fields[at : at + T_FIELDS] = graph, x, ids, out, sizes[-1]


class LayerOnGpu:
    """A layer's fields; keeps what they point to alive.

    Args:
        where, slots, variants: (n_experts,) GPU or -1, slot and variant of each expert; changed in place between two decodes.
        banks: (GPU, variant) -> bank or None.
    """

    def __init__(
        self,
        where: npt.NDArray[np.int16],
        slots: npt.NDArray[np.int32],
        variants: npt.NDArray[np.int32],
        banks: Sequence[Sequence[BankRecord | None]],
    ) -> None:
        addresses = [bank.fields.ctypes.data if bank else 0 for row in banks for bank in row]
        self._banks = np.array(addresses, np.int64)
        self._parts, self._rows = np.zeros((MOST_PAIRS, A_FIELDS), np.int64), np.zeros(MOST_PAIRS, np.int32)
        self._keep: tuple[Any, ...] = (where, slots, variants, banks)
        assert where.dtype == np.int16
        assert slots.dtype == variants.dtype == np.int32
        assert where.strides == (2,)
        assert slots.strides == variants.strides == (4,)
        self.fields = np.zeros(G_FIELDS, np.int64)
        self.fields[[G_WHERE, G_SLOT, G_VARIANT]] = [array.ctypes.data for array in (where, slots, variants)]
        self.fields[[G_N_GPUS, G_N_VARIANTS]] = len(banks), len(banks[0])
        self.fields[[G_BANKS, G_PARTS, G_ROWS]] = [a.ctypes.data for a in (self._banks, self._parts, self._rows)]

    @property
    def address(self) -> int:
        """For the layer's record."""
        return int(self.fields.ctypes.data)
