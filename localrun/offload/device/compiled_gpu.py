"""Experts on GPUs in compiled layer calls: `GpuTier.start` and `finish` without Python.

In decode nearly every layer call has experts on a GPU, so this path must be as fast as that of experts in RAM. Compiled code
(`compiled_experts.py`) assigns a call's pairs to launches, one for each GPU and format, and queues them all: for each GPU two
copies, one of notes (slots and weights) and one of the input, then one graph after the other, because they share the memory of
intermediate results. It computes what is in RAM meanwhile, then takes each GPU's results in one copy and waits once. For one
token, a result is one row per launch, because experts' outputs are weighted and added up there.

With the dense model on a GPU, a token's launches on that GPU go into llama.cpp's own queue (`use_near`): they read its input
where it is and write the sum where llama.cpp expects it, after adding what the CPU and other GPUs have computed (`join`), so
nothing is sent but notes and that share, and nothing is waited for.

Python handles calls of more than `MOST_PAIRS` tokens or pairs on GPUs, and those that need a graph that does not exist yet. It
builds the graph (`GpuSlots`) and registers it here, so each graph costs one such call. If a device fails, the call ends with
nothing pending; Python repeats it, fails the same way and raises.

Devices read and write host memory that is pinned if possible, because some backends copy other memory synchronously. Records
are those of `layouts`; they change only between decodes, or while Python has the call.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numba as nb
import numpy as np
import numpy.typing as npt

from localrun.ggml.devices import GpuDevice, HostMemory
from localrun.ggml.library import library
from localrun.ggml.structures import Backend, Tensor
from localrun.offload.device.layouts import (
    BANK,
    DEVICE,
    GPU_LAYER,
    GRAPH,
    JOIN,
    LAUNCH,
    MOST_LAUNCHES,
    MOST_PAIRS,
    NOTE_BYTES,
)
from localrun.offload.device.tensors import BUFFER, DATA
from localrun.offload.device.weighting import add_row
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
from localrun.offload.kernels.records import get, put

_DEVICE: Final = Backend.device.offset


@nb.njit(inline="always")
def is_on_gpu(gpu: int, expert: int) -> bool:
    """The expert is on a GPU; `gpu` is the layer's record or 0."""
    return gpu != 0 and load_i16(get(gpu, GPU_LAYER.where) + expert * 2) >= 0


@nb.njit
def assign(gpu: int, ids: int, ids_stride: int, n_tokens: int, n_used: int, n_pairs: int, weights: int) -> int:
    """Assigns the pairs of experts on GPUs to launches; their number, -1 if Python must do this call.

    Args:
        weights: of one token's pairs, `n_used` F32, for a weighted sum; 0: each pair gets its row of outputs.
    """
    if n_pairs > MOST_PAIRS or n_tokens > MOST_PAIRS:
        return -1
    put(gpu, GPU_LAYER.n_tokens, n_tokens)
    put(gpu, GPU_LAYER.n_used, n_used)
    where, slots, variants = get(gpu, GPU_LAYER.where), get(gpu, GPU_LAYER.slot), get(gpu, GPU_LAYER.variant)
    n_variants, is_sum = get(gpu, GPU_LAYER.n_variants), weights != 0
    rows, n_launches, end, device, note, row = get(gpu, GPU_LAYER.rows), 0, 0, 0, 0, 0
    for group in range(get(gpu, GPU_LAYER.n_gpus) * n_variants):
        bank, first = get(get(gpu, GPU_LAYER.banks), group), end
        if bank == 0:
            continue
        if get(bank, BANK.device) != device:
            device, note, row = get(bank, BANK.device), 0, 0
        if note >= MOST_LAUNCHES:
            return -1
        slot_ids = get(device, DEVICE.notes) + note * NOTE_BYTES
        for t in range(n_tokens):
            for k in range(n_used):
                e = load_i32(ids + t * ids_stride + k * 4)
                if load_i16(where + e * 2) * n_variants + load_i32(variants + e * 4) == group:
                    store_i32(slot_ids + (end - first) * 4, load_i32(slots + e * 4))
                    if is_sum:
                        copy(slot_ids + (MOST_PAIRS + end - first) * 4, weights + k * 4, 4)
                    store_i32(rows + end * 4, t * n_used + k)
                    end += 1
        if end == first:
            continue
        graph = bank + (BANK.graphs + ((0 if is_sum else MOST_PAIRS + 1) + end - first) * GRAPH.size) * 8
        if get(graph, GRAPH.graph) == 0:
            return -1
        for i in range(end - first, get(graph, GRAPH.pairs)):
            store_i32(slot_ids + i * 4, 0)  # padding pairs to fill the graph; their results are ignored
        launch = _launch(gpu, n_launches)
        put(launch, LAUNCH.bank, bank)
        put(launch, LAUNCH.graph, graph)
        put(launch, LAUNCH.first, first)
        put(launch, LAUNCH.n_pairs, end - first)
        put(launch, LAUNCH.n_rows, 1 if is_sum else get(graph, GRAPH.pairs))
        put(launch, LAUNCH.note, note)
        put(launch, LAUNCH.row, row)
        note, row = note + 1, row + get(launch, LAUNCH.n_rows)
        if row > MOST_PAIRS:
            return -1
        n_launches += 1
    return n_launches


@nb.njit
def use_near(gpu: int, n_launches: int, near: int) -> int:
    """Chooses each device's queue for this call: llama.cpp's backend `near` on its device (0: there is none), else our own.

    Returns:
        Launches on `near`.
    """
    n_near = 0
    for i in range(n_launches):
        device = get(get(_launch(gpu, i), LAUNCH.bank), BANK.device)
        is_near = near != 0 and load_i64(near + _DEVICE) == get(device, DEVICE.handle)
        put(device, DEVICE.current, near if is_near else get(device, DEVICE.backend))
        n_near += 1 if is_near else 0
    return n_near


@nb.njit(inline="always")
def _is_near(device: int) -> bool:
    return bool(get(device, DEVICE.current) != get(device, DEVICE.backend))


@nb.njit(inline="always")
def _launch(gpu: int, index: int) -> int:
    return int(get(gpu, GPU_LAYER.launches) + index * LAUNCH.size * 8)


@nb.njit
def _end_of_device(gpu: int, first: int, n_launches: int) -> int:
    """The launch after those of launch `first`'s device, which are neighbours."""
    end, device = first + 1, get(get(_launch(gpu, first), LAUNCH.bank), BANK.device)
    while end < n_launches and get(get(_launch(gpu, end), LAUNCH.bank), BANK.device) == device:
        end += 1
    return end


@nb.njit
def _send(gpu: int, first: int, end: int, x: int, x_stride: int) -> None:
    """Notes and inputs of one device's launches, in two copies; where llama.cpp's input is on the device, notes only."""
    launch, last = _launch(gpu, first), _launch(gpu, end - 1)
    device, graph = get(get(launch, LAUNCH.bank), BANK.device), get(last, LAUNCH.graph)
    backend, row_bytes, n_rows = get(device, DEVICE.current), get(device, DEVICE.n_embd) * 4, 1
    note_bytes = (MOST_PAIRS if get(graph, GRAPH.weights) else 0) * 4 + get(graph, GRAPH.pairs) * 4
    note_bytes += get(last, LAUNCH.note) * NOTE_BYTES
    call_5(get(device, DEVICE.set), backend, get(device, DEVICE.notes_tensor), get(device, DEVICE.notes), 0, note_bytes)
    if _is_near(device):
        return
    staged, rows = get(device, DEVICE.x), get(gpu, GPU_LAYER.rows)
    if get(gpu, GPU_LAYER.n_tokens) == 1 and get(graph, GRAPH.weights):
        copy(staged, x, row_bytes)
    else:
        for i in range(first, end):
            at = _launch(gpu, i)
            for p in range(get(at, LAUNCH.n_pairs)):
                token = load_i32(rows + (get(at, LAUNCH.first) + p) * 4) // get(gpu, GPU_LAYER.n_used)
                copy(staged + (get(at, LAUNCH.row) + p) * row_bytes, x + token * x_stride, row_bytes)
        n_rows = get(last, LAUNCH.row) + get(last, LAUNCH.n_pairs)
    call_5(get(device, DEVICE.set), backend, get(device, DEVICE.x_tensor), staged, 0, n_rows * row_bytes)


@nb.njit
def _place(tensor: int, other: int, data: int) -> None:
    """Puts a graph's tensor to an address in the buffer of another one."""
    store_i64(tensor + DATA, data)
    store_i64(tensor + BUFFER, load_i64(other + BUFFER))


@nb.njit
def _queue(gpu: int, index: int, x_there: int, out_there: int) -> bool:
    """Queues a launch whose notes and inputs are on their way; False if the device refuses.

    Args:
        x_there, out_there: tensors of llama.cpp on the same device, see `start`.
    """
    launch = _launch(gpu, index)
    graph, device = get(launch, LAUNCH.graph), get(get(launch, LAUNCH.bank), BANK.device)
    row_bytes, notes = (
        get(device, DEVICE.n_embd) * 4,
        get(device, DEVICE.notes_data) + get(launch, LAUNCH.note) * NOTE_BYTES,
    )
    x_row = 0 if get(graph, GRAPH.weights) else get(launch, LAUNCH.row)
    is_near = _is_near(device)
    store_i64(get(graph, GRAPH.ids) + DATA, notes)
    if is_near:
        _place(get(graph, GRAPH.x), x_there, load_i64(x_there + DATA))
    else:
        _place(get(graph, GRAPH.x), get(device, DEVICE.x_tensor), get(device, DEVICE.x_data) + x_row * row_bytes)
    if is_near and out_there != 0:
        _place(get(graph, GRAPH.out), out_there, load_i64(out_there + DATA))
    else:
        out = get(device, DEVICE.out_data) + get(launch, LAUNCH.row) * row_bytes
        _place(get(graph, GRAPH.out), get(device, DEVICE.out_tensor), out)
    if get(graph, GRAPH.weights):
        store_i64(get(graph, GRAPH.weights) + DATA, notes + MOST_PAIRS * 4)
    return bool(call_i32(get(device, DEVICE.compute), get(device, DEVICE.current), get(graph, GRAPH.graph)) == 0)


@nb.njit
def settle(gpu: int, n_launches: int) -> None:
    """Waits until no device reads or writes our memory for the first launches."""
    for i in range(n_launches):
        device = get(get(_launch(gpu, i), LAUNCH.bank), BANK.device)
        call_1(get(device, DEVICE.synchronize), get(device, DEVICE.current))


@nb.njit
def start(gpu: int, n_launches: int, x: int, x_stride: int, x_there: int, out_there: int) -> bool:
    """Queues all launches, each on its GPU after those before it; False if a device failed, with nothing pending.

    Args:
        x_there: the input as llama.cpp has it on its device, for the launches in its queue.
        out_there: where llama.cpp expects the sum there, if the only launch computes all of it; else 0.
    """
    first = 0
    while first < n_launches:
        end = _end_of_device(gpu, first, n_launches)
        _send(gpu, first, end, x, x_stride)
        for i in range(first, end):
            if not _queue(gpu, i, x_there, out_there):
                settle(gpu, end)
                return False
        first = end
    return True


@nb.njit
def join(gpu: int, n_launches: int, n_near: int, share: int, out_there: int) -> bool:
    """Queues the sum of the rows of llama.cpp's device, and of the others' share (0: they have none), into `out_there`; False if
    the device refuses."""
    device = 0
    for i in range(n_launches):
        candidate = get(get(_launch(gpu, i), LAUNCH.bank), BANK.device)
        if _is_near(candidate):
            device = candidate
    backend, row_bytes, n_rows = get(device, DEVICE.current), get(device, DEVICE.n_embd) * 4, n_near
    if share != 0:
        call_5(get(device, DEVICE.set), backend, get(device, DEVICE.out_tensor), share, n_rows * row_bytes, row_bytes)
        n_rows += 1
    joining = get(device, DEVICE.joins) + n_rows * JOIN.size * 8
    for i in range(get(joining, JOIN.n_nodes)):
        _place(load_i64(get(joining, JOIN.nodes) + i * 8), out_there, load_i64(out_there + DATA))
    if call_i32(get(device, DEVICE.compute), backend, get(joining, JOIN.graph)) == 0:
        return True
    call_1(get(device, DEVICE.synchronize), backend)
    return False


@nb.njit
def finish(gpu: int, n_launches: int, out: int, out_stride: int) -> None:
    """Takes all results but those that stay on llama.cpp's device: rows of pairs go to theirs of `out`, weighted sums are added to
    its first."""
    first = 0
    while first < n_launches:
        end = _end_of_device(gpu, first, n_launches)
        last = _launch(gpu, end - 1)
        device = get(get(last, LAUNCH.bank), BANK.device)
        if _is_near(device):
            first = end
            continue
        backend, row_bytes = get(device, DEVICE.backend), get(device, DEVICE.n_embd) * 4
        result = get(device, DEVICE.out)
        is_sum = get(get(last, LAUNCH.graph), GRAPH.weights) != 0
        n_rows = get(last, LAUNCH.row) + (1 if is_sum else get(last, LAUNCH.n_pairs))
        call_5(get(device, DEVICE.get), backend, get(device, DEVICE.out_tensor), result, 0, n_rows * row_bytes)
        call_1(get(device, DEVICE.synchronize), backend)
        for i in range(first, end):
            launch = _launch(gpu, i)
            source, rows = (
                result + get(launch, LAUNCH.row) * row_bytes,
                get(gpu, GPU_LAYER.rows) + get(launch, LAUNCH.first) * 4,
            )
            if is_sum:
                add_row(out, source, get(device, DEVICE.n_embd))
            else:
                for p in range(get(launch, LAUNCH.n_pairs)):
                    copy(out + load_i32(rows + p * 4) * out_stride, source + p * row_bytes, row_bytes)
        first = end


class DeviceRecord:
    """A device's fields and host memory; `close` when nothing is under way.

    Args:
        tensors: on the device, for notes, inputs and outputs.
        joins: graphs by how many of the first rows of outputs they add up, and their nodes.
    """

    def __init__(
        self,
        device: GpuDevice,
        backend: int,
        n_embd: int,
        tensors: tuple[int, int, int],
        joins: Mapping[int, tuple[int, Sequence[int]]],
    ) -> None:
        lib = library()
        assert set(joins) == set(range(2, MOST_LAUNCHES + 2))
        self._nodes = {n_rows: np.array(nodes, np.int64) for n_rows, (_, nodes) in joins.items()}
        self._joins = np.zeros((MOST_LAUNCHES + 2, JOIN.size), np.int64)
        for n_rows, (graph, nodes) in joins.items():
            self._joins[n_rows] = JOIN.make(graph=graph, nodes=self._nodes[n_rows].ctypes.data, n_nodes=len(nodes))
        self.tensors = tensors
        sizes = MOST_LAUNCHES * NOTE_BYTES, MOST_PAIRS * n_embd * 4, MOST_PAIRS * n_embd * 4
        self._memory = HostMemory(device, sum(sizes))
        notes = int(self._memory.array.ctypes.data)
        functions = (
            lib.ggml_backend_tensor_set_async,
            lib.ggml_backend_graph_compute_async,
            lib.ggml_backend_tensor_get_async,
            lib.ggml_backend_synchronize,
        )
        addresses = [C.cast(function, C.c_void_p).value or 0 for function in functions]  # type: ignore[arg-type]
        set_tensor, compute, get_tensor, synchronize = addresses
        notes_data, x_data, out_data = (Tensor.from_address(tensor).data or 0 for tensor in tensors)
        self.fields = DEVICE.make(
            backend=backend,
            notes=notes,
            x=notes + sizes[0],
            out=notes + sizes[0] + sizes[1],
            notes_tensor=tensors[0],
            x_tensor=tensors[1],
            out_tensor=tensors[2],
            notes_data=notes_data,
            x_data=x_data,
            out_data=out_data,
            n_embd=n_embd,
            set=set_tensor,
            compute=compute,
            get=get_tensor,
            synchronize=synchronize,
            handle=device.address,
            joins=self._joins.ctypes.data,
            current=backend,
        )

    def close(self) -> None:
        """Frees the host memory."""
        self._memory.close()


class BankRecord:
    """A bank's fields: its graphs by number of pairs."""

    def __init__(self, device: DeviceRecord) -> None:
        self._device = device
        self.fields = BANK.make(device=device.fields.ctypes.data)

    def add(self, sizes: range, *, graph: int, x: int, ids: int, weights: int, out: int) -> None:
        """From now on calls of so many pairs use this graph, which computes the most of `sizes`; with weights, one token's."""
        for n_pairs in sizes:
            at = BANK.graphs + ((0 if weights else MOST_PAIRS + 1) + n_pairs) * GRAPH.size
            self.fields[at : at + GRAPH.size] = GRAPH.make(
                graph=graph, x=x, ids=ids, weights=weights, out=out, pairs=sizes[-1]
            )


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
        self._launches, self._rows = np.zeros((MOST_PAIRS, LAUNCH.size), np.int64), np.zeros(MOST_PAIRS, np.int32)
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
            launches=self._launches.ctypes.data,
            rows=self._rows.ctypes.data,
        )

    @property
    def address(self) -> int:
        """For the layer's record."""
        return int(self.fields.ctypes.data)
