"""Experts on GPUs in compiled layer calls: `GpuTier.start` and `finish` without Python.

In decode nearly every layer call has experts on a GPU, so this path must be as fast as that of experts in RAM. Compiled code
(`compiled.py`) plans a call's parts, one for each GPU and format, starts the first part of each GPU, computes experts in RAM
meanwhile, collects the results, and starts a GPU's next part when the previous one is done, because they share the memory for
intermediate results.

Python handles calls of more than `MOST_PAIRS` tokens or pairs on GPUs, and those that need a graph that does not exist yet. It
builds the graph (`GpuSlots`) and registers it here, so each graph costs one such call. If a device fails, the call ends with
nothing pending; Python repeats it, fails the same way and raises.

Devices read and write host memory that is pinned if possible, because some backends copy other memory synchronously. Records
are those of `layouts`; they change only between decodes, or while Python has the call.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Sequence
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from localrun.ggml.devices import GpuDevice, HostMemory
from localrun.ggml.library import library
from localrun.offload.device.layouts import BANK, DEVICE, GPU_LAYER, GRAPH, MOST_PAIRS, PART
from localrun.offload.kernels.lowlevel import (
    call_1,
    call_5,
    call_i32,
    copy,
    load_i16,
    load_i32,
    store_i32,
)
from localrun.offload.kernels.records import get, put


@nb.njit(inline="always")
def is_on_gpu(gpu: int, expert: int) -> bool:
    """The expert is on a GPU; `gpu` is the layer's record or 0."""
    return gpu != 0 and load_i16(get(gpu, GPU_LAYER.where) + expert * 2) >= 0


@nb.njit
def plan(gpu: int, ids: int, ids_stride: int, n_tokens: int, n_used: int, n_pairs: int) -> int:
    """Puts the pairs of experts on GPUs into parts; the number of parts, -1 if Python must do this call."""
    if n_pairs > MOST_PAIRS or n_tokens > MOST_PAIRS:
        return -1
    put(gpu, GPU_LAYER.n_tokens, n_tokens)
    put(gpu, GPU_LAYER.n_used, n_used)
    where, slots, variants = get(gpu, GPU_LAYER.where), get(gpu, GPU_LAYER.slot), get(gpu, GPU_LAYER.variant)
    n_variants = get(gpu, GPU_LAYER.n_variants)
    rows, n_parts, end = get(gpu, GPU_LAYER.rows), 0, 0
    for group in range(get(gpu, GPU_LAYER.n_gpus) * n_variants):
        bank, first = get(get(gpu, GPU_LAYER.banks), group), end
        if bank == 0:
            continue
        slot_ids = get(get(bank, BANK.device), DEVICE.ids) + n_parts * MOST_PAIRS * 4
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
        graph = bank + (BANK.graphs + (form + end - first) * GRAPH.size) * 8
        if get(graph, GRAPH.graph) == 0:
            return -1
        for i in range(end - first, get(graph, GRAPH.pairs)):
            store_i32(slot_ids + i * 4, 0)  # padding pairs to fill the graph; their results are ignored
        part = get(gpu, GPU_LAYER.parts) + n_parts * PART.size * 8
        put(part, PART.bank, bank)
        put(part, PART.graph, graph)
        put(part, PART.first, first)
        put(part, PART.n_pairs, end - first)
        put(part, PART.runs, 0)
        n_parts += 1
    return n_parts


@nb.njit(inline="always")
def _part(gpu: int, index: int) -> int:
    return int(get(gpu, GPU_LAYER.parts) + index * PART.size * 8)


@nb.njit
def _launch(gpu: int, index: int, x: int, x_stride: int) -> bool:
    """Starts a part on its idle device; False if the device refuses."""
    part = _part(gpu, index)
    graph, device, n_pairs = get(part, PART.graph), get(get(part, PART.bank), BANK.device), get(part, PART.n_pairs)
    backend, row_bytes, n_rows = get(device, DEVICE.backend), get(device, DEVICE.n_embd) * 4, 1
    rows, staged = (
        get(gpu, GPU_LAYER.rows) + get(part, PART.first) * 4,
        get(device, DEVICE.x) + get(part, PART.first) * row_bytes,
    )
    if get(gpu, GPU_LAYER.n_tokens) == 1:
        copy(staged, x, row_bytes)
    else:
        n_rows = n_pairs
        for i in range(n_pairs):
            copy(staged + i * row_bytes, x + load_i32(rows + i * 4) // get(gpu, GPU_LAYER.n_used) * x_stride, row_bytes)
    ids = get(device, DEVICE.ids) + index * MOST_PAIRS * 4
    call_5(get(device, DEVICE.set), backend, get(graph, GRAPH.ids), ids, 0, get(graph, GRAPH.pairs) * 4)
    call_5(get(device, DEVICE.set), backend, get(graph, GRAPH.x), staged, 0, n_rows * row_bytes)
    put(part, PART.runs, 1)
    return bool(call_i32(get(device, DEVICE.compute), backend, get(graph, GRAPH.graph)) == 0)


@nb.njit
def _abandon(gpu: int, n_parts: int) -> None:
    """Waits until no device reads or writes our memory."""
    for i in range(n_parts):
        if get(_part(gpu, i), PART.runs):
            device = get(get(_part(gpu, i), PART.bank), BANK.device)
            call_1(get(device, DEVICE.synchronize), get(device, DEVICE.backend))


@nb.njit
def start(gpu: int, n_parts: int, x: int, x_stride: int) -> bool:
    """Starts the first part of each GPU; False if a device failed, with nothing pending."""
    for i in range(n_parts):
        # Parts of one GPU are neighbours.
        if i > 0 and get(get(_part(gpu, i), PART.bank), BANK.device) == get(
            get(_part(gpu, i - 1), PART.bank), BANK.device
        ):
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
        if not get(part, PART.runs) and not _launch(gpu, i, x, x_stride):
            _abandon(gpu, n_parts)
            return False
        device, first, n_pairs = get(get(part, PART.bank), BANK.device), get(part, PART.first), get(part, PART.n_pairs)
        backend, row_bytes = get(device, DEVICE.backend), get(device, DEVICE.n_embd) * 4
        result, rows = get(device, DEVICE.out) + first * row_bytes, get(gpu, GPU_LAYER.rows) + first * 4
        call_5(get(device, DEVICE.get), backend, get(get(part, PART.graph), GRAPH.out), result, 0, n_pairs * row_bytes)
        call_1(get(device, DEVICE.synchronize), backend)
        put(part, PART.runs, 0)
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
        set_tensor, compute, get_tensor, synchronize = addresses
        self.fields = DEVICE.make(
            backend=backend,
            ids=ids,
            x=ids + sizes[0],
            out=ids + sizes[0] + sizes[1],
            n_embd=n_embd,
            set=set_tensor,
            compute=compute,
            get=get_tensor,
            synchronize=synchronize,
        )

    def close(self) -> None:
        """Frees the host memory."""
        self._memory.close()


class BankRecord:
    """A bank's fields: its graphs by number of pairs."""

    def __init__(self, device: DeviceRecord) -> None:
        self._device = device
        self.fields = BANK.make(device=device.fields.ctypes.data)

    def add(self, sizes: range, *, one_token: bool, graph: int, x: int, ids: int, out: int) -> None:
        """From now on calls of so many pairs use this graph, which computes the most of `sizes`."""
        if sizes[-1] <= MOST_PAIRS:
            for n_pairs in sizes:
                at = BANK.graphs + ((0 if one_token else MOST_PAIRS + 1) + n_pairs) * GRAPH.size
                self.fields[at : at + GRAPH.size] = GRAPH.make(graph=graph, x=x, ids=ids, out=out, pairs=sizes[-1])


class LayerOnGpu:
    """A layer's fields; keeps their targets alive.

    Args:
        where, slots, variants: (n_experts,) GPU or -1, slot and variant of each expert; changed in place between decodes.
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
        self._parts, self._rows = np.zeros((MOST_PAIRS, PART.size), np.int64), np.zeros(MOST_PAIRS, np.int32)
        self._keep: tuple[Any, ...] = (where, slots, variants, banks)
        assert where.dtype == np.int16
        assert slots.dtype == variants.dtype == np.int32
        assert where.strides == (2,)
        assert slots.strides == variants.strides == (4,)
        self.fields = GPU_LAYER.make(
            where=where.ctypes.data,
            slot=slots.ctypes.data,
            variant=variants.ctypes.data,
            n_gpus=len(banks),
            n_variants=len(banks[0]),
            banks=self._banks.ctypes.data,
            n_tokens=0,
            n_used=0,
            parts=self._parts.ctypes.data,
            rows=self._rows.ctypes.data,
        )

    @property
    def address(self) -> int:
        """For the layer's record."""
        return int(self.fields.ctypes.data)
