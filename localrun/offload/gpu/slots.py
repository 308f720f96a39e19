"""Expert slots on one GPU: stacked tensors, filled one slot at a time, and calls of the graphs that use them (`graphs.py`).

A bank is the slots of one layer in one format: three stacked tensors, like llama.cpp's expert tensors, with slots in place of
experts. A call is one `mul_mat_id` chain over (token, slot) pairs, started asynchronously, so the CPU computes its share
meanwhile. `tier.py` decides which expert is in which slot. Calls of few tokens use the same graphs without going through this
module, see `device/compiled_gpu.py`.

All allocations count towards the budget: slots and the buffer for intermediate results.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from localrun.errors import BudgetError, DecodeError, GpuMemoryError, LocalrunError
from localrun.ggml import structures as ggml
from localrun.ggml.devices import GpuDevice, HostMemory
from localrun.ggml.library import library
from localrun.ggml.structures import Tensor
from localrun.offload.device.compiled_gpu import BankRecord, DeviceRecord
from localrun.offload.device.layouts import MOST_LAUNCHES, MOST_PAIRS, NOTE_BYTES
from localrun.offload.device.view import F32, I32
from localrun.offload.gpu.graphs import (
    MAX_PAIRS,
    SIZES,
    Form,
    Graph,
    build,
    is_small,
    kinds,
    n_nodes_for,
    size_for,
    stacked,
    supports,
)
from localrun.offload.kernels import FfnSpec
from localrun.units import format_size

log = logging.getLogger(__name__)

LOADED_ROWS = 512
"""Tokens of a long call whose inputs go to the device once, instead of once for each pair."""

_SPARE_BYTES = 1 << 20
_UPLOAD_BYTES = 1 << 20
"""Piece of an upload: what a graph's own copies may have to wait for, 40 us at 25 GB/s."""

BankKey = tuple[int, int]
"""(layer, variant)."""


@dataclass(slots=True)
class _Launch:
    """Pairs of one graph: `ids` filled up to the graph's size, `x` (one row if all pairs are one token's, which have `weights`) and
    `out` with the real ones only."""

    bank: Bank
    ids: I32
    x: F32 | I32
    out: F32
    weights: F32 | None
    form: Form


@dataclass(slots=True)
class Bank:
    """Slots of one layer in one format.

    Attributes:
        spec: shapes and types.
        n_slots: number of slots.
        free: empty slots.
        tensors: gate, up and down, each (n_in, n_out, n_slots).
        row_bytes: size of one expert's gate, up and down.
        record: its graphs, for compiled calls.
    """

    spec: FfnSpec
    n_slots: int
    free: list[int]
    tensors: tuple[int, int, int]
    row_bytes: tuple[int, int, int]
    record: BankRecord
    graphs: dict[tuple[int, Form], Graph] = field(default_factory=dict)  # by pairs


def scratch_bytes(spec: FfnSpec) -> int:
    """Bound for the intermediate results of `MAX_PAIRS` pairs."""
    return (2 * spec.n_embd + 3 * spec.n_ff + 1) * 4 * MAX_PAIRS + _io_bytes(spec.n_embd) + _SPARE_BYTES


def _io_bytes(n_embd: int) -> int:
    """Inputs and outputs of compiled calls, and the rows that are loaded for long ones."""
    return MOST_LAUNCHES * NOTE_BYTES + (2 * MOST_PAIRS + LOADED_ROWS) * n_embd * 4


class DeviceClosedError(GpuMemoryError):
    """A device can't be opened: it is gone, or lacks memory for its driver.

    Attributes:
        device: the device.
    """

    def __init__(self, device: GpuDevice) -> None:
        super().__init__(f"{device.name}: ggml can't open this device", hint="--gpu none")
        self.device = device


class GpuSlots:
    """All banks of one device. Owns a backend, its buffers and contexts until `close`.

    For the decoding thread; `upload` may run concurrently on another one (ggml's devices order their work).

    If a device has less memory than reported, it gets only the first banks that fit, possibly none, with a warning.

    Args:
        device: the device to use.
        counts: slots by (layer, variant); none may be 0.
        specs: shape and types by (layer, variant).
        budget_bytes: maximum memory to use.

    Raises:
        BudgetError: more than the budget.
        DeviceClosedError: the device can't be opened.
        LocalrunError: it can't multiply one of the formats.
    """

    def __init__(
        self, device: GpuDevice, counts: Mapping[BankKey, int], specs: Mapping[BankKey, FfnSpec], budget_bytes: int
    ) -> None:
        self.device = device
        self.banks: dict[BankKey, Bank] = {}
        self._lib = library()
        self._contexts: list[int] = []
        self._buffers: list[int] = []
        self._gallocr = 0
        self._waiting: deque[_Launch] = deque()
        self._running: tuple[_Launch, Graph] | None = None  # its memory is read by the device
        self.used_bytes = 0
        """What is allocated on the device; it does not change."""
        self._backend = self._lib.ggml_backend_dev_init(device.address, None)
        if not self._backend:
            raise DeviceClosedError(device)
        self._buffer_type = self._lib.ggml_backend_dev_buffer_type(device.address)
        self._record: DeviceRecord | None = None
        self._loaded = 0  # tensor for the rows of a long call
        self._pinned: HostMemory | None = None  # their way there, and the results' way back
        try:
            self._make_banks(counts, specs)
            self.used_bytes = self._allocated()
            if self.used_bytes > budget_bytes:
                raise BudgetError(
                    f"{device.name}: {format_size(self.used_bytes)} allocated, the budget is {format_size(budget_bytes)}"
                )
        except BaseException:
            self.close()
            raise

    def _allocated(self) -> int:
        slots = sum(self._lib.ggml_backend_buffer_get_size(buffer) for buffer in self._buffers)
        return int(slots + (self._lib.ggml_gallocr_get_buffer_size(self._gallocr, 0) if self._gallocr else 0))

    def upload(self, key: BankKey, slot: int, rows: Sequence[npt.NDArray[np.uint8]]) -> None:
        """Copies an expert's gate, up and down (ggml rows) into a slot; any thread, but not the same slot concurrently."""
        bank = self.banks[key]
        for tensor, size, data in zip(bank.tensors, bank.row_bytes, rows, strict=True):
            assert data.nbytes == size
            for at in range(0, size, _UPLOAD_BYTES):
                n = min(_UPLOAD_BYTES, size - at)
                self._lib.ggml_backend_tensor_set(tensor, data.ctypes.data + at, slot * size + at, n)

    def start(self, key: BankKey, slots: I32, x: F32, weights: F32 | None = None) -> F32:
        """Starts multiplying pair i, row `x[i]` (or the only one), with the expert in `slots[i]`; waits for nothing.

        Anything that does not fit in one graph, or is started while another graph runs, is done in `finish`.

        Args:
            slots: (N,) int32.
            x: (N, D) or, with `weights`, (1, D) f32, contiguous.
            weights: (N,) f32: the pairs, at most `MOST_PAIRS`, are one token's, and their weighted sum is wanted.

        Returns:
            (N, D) array, or (1, D) with weights, that is filled when `finish` returns.

        Raises:
            DecodeError: the device reports a failure.
        """
        out = np.empty(x.shape, np.float32)
        if weights is not None:
            self._waiting.append(_Launch(self.banks[key], slots, x, out, np.ascontiguousarray(weights), Form.SUM))
            slots = slots[:0]
        for at in range(0, slots.size, MAX_PAIRS):
            end = min(at + MAX_PAIRS, slots.size)
            ids = np.zeros(size_for(end - at), np.int32)
            ids[: end - at] = slots[at:end]
            self._waiting.append(_Launch(self.banks[key], ids, x[at:end], out[at:end], None, Form.ROWS))
        if self._running is None:
            self._launch()
        return out

    def load(self, x: F32) -> bool:
        """Sends a long call's inputs, (T, D), for `start_gathered`; nothing is under way. False: they are too many."""
        if len(x) > LOADED_ROWS:
            return False
        if self._pinned is None:
            self._pinned = HostMemory(self.device, (LOADED_ROWS + MAX_PAIRS) * x.shape[1] * 4)
        rows = self._pinned.array[: x.nbytes].view(np.float32).reshape(x.shape)
        rows[:] = x
        self._lib.ggml_backend_tensor_set_async(self._backend, self._loaded, rows.ctypes.data, 0, rows.nbytes)
        return True

    def start_gathered(self, key: BankKey, slots: I32, x_rows: I32, n_embd: int) -> F32:
        """As `start` for at most `MAX_PAIRS` pairs of loaded rows, while nothing else is under way.

        Args:
            x_rows: (N,) int32, the loaded row of each pair.

        Returns:
            (N, D) array that is filled when `finish` returns, and written over by the next call.
        """
        assert self._pinned is not None
        assert self._running is None
        n_pairs, first = slots.size, LOADED_ROWS * n_embd * 4
        out = self._pinned.array[first : first + n_pairs * n_embd * 4].view(np.float32).reshape(n_pairs, n_embd)
        ids, rows = (np.zeros(size_for(n_pairs), np.int32) for _ in range(2))
        ids[:n_pairs], rows[:n_pairs] = slots, x_rows
        self._waiting.append(_Launch(self.banks[key], ids, rows, out, None, Form.GATHERED))
        self._launch()
        return out

    def finish(self) -> None:
        """Waits for everything that was started.

        Raises:
            DecodeError: the device reports a failure; nothing is pending then.
        """
        while self._running is not None:
            launch, graph = self._running
            if launch.form is Form.GATHERED:  # its memory is pinned
                data, size = launch.out.ctypes.data, launch.out.nbytes
                self._lib.ggml_backend_tensor_get_async(self._backend, graph.out, data, 0, size)
            # Asking for the result earlier would wait for it: into memory that is not pinned, most backends copy synchronously.
            self._lib.ggml_backend_synchronize(self._backend)
            if launch.form is not Form.GATHERED:
                self._lib.ggml_backend_tensor_get(graph.out, launch.out.ctypes.data, 0, launch.out.nbytes)
            self._running = None
            if self._waiting:
                self._launch()

    def _launch(self) -> None:
        """The next launch; the memory of intermediate results is free."""
        lib, launch = self._lib, self._waiting.popleft()
        try:
            graph = self._graph(launch.bank, launch.ids.size, launch.form)
            self._to_front(graph, launch.ids.size, launch.form)
            if launch.weights is not None:
                lib.ggml_backend_tensor_set_async(
                    self._backend, graph.weights, launch.weights.ctypes.data, 0, launch.weights.nbytes
                )
            lib.ggml_backend_tensor_set_async(self._backend, graph.ids, launch.ids.ctypes.data, 0, launch.ids.nbytes)
            lib.ggml_backend_tensor_set_async(self._backend, graph.x, launch.x.ctypes.data, 0, launch.x.nbytes)
            if lib.ggml_backend_graph_compute_async(self._backend, graph.graph) != 0:
                raise DecodeError(f"{self.device.name}: computing experts failed")
        except BaseException:
            self._waiting.clear()
            lib.ggml_backend_synchronize(self._backend)  # it may still read the launch's memory
            raise
        self._running = launch, graph

    def close(self) -> None:
        """Frees the device's memory."""
        lib = self._lib
        if self._backend:
            lib.ggml_backend_synchronize(self._backend)
        pinned, self._pinned = self._pinned, None
        if pinned is not None:
            pinned.close()
        record, self._record = self._record, None
        if record is not None:
            record.close()
        buffers, self._buffers = self._buffers, []
        contexts, self._contexts = self._contexts, []
        gallocr, self._gallocr = self._gallocr, 0
        if gallocr:
            lib.ggml_gallocr_free(gallocr)
        for buffer in buffers:
            lib.ggml_backend_buffer_free(buffer)
        for context in contexts:
            lib.ggml_free(context)
        if self._backend:
            lib.ggml_backend_free(self._backend)
        self._backend, self._running = 0, None
        self._waiting.clear()
        self.banks.clear()

    def _context(self, n_tensors: int, *, n_nodes: int = 0) -> int:
        lib = self._lib
        size = n_tensors * lib.ggml_tensor_overhead()
        if n_nodes:
            size += lib.ggml_graph_overhead_custom(n_nodes, False)
        context = int(lib.ggml_init(ggml.InitParams(size + 1024, None, True)))
        self._contexts.append(context)
        return context

    def _make_banks(self, counts: Mapping[BankKey, int], specs: Mapping[BankKey, FfnSpec]) -> None:
        """Banks, and memory for the largest call, once: it never grows afterwards. It comes before all banks but its own."""
        has_io = not counts or self._make_io(max(spec.n_embd for spec in specs.values()))
        largest = max(counts, key=lambda key: scratch_bytes(specs[key]), default=None)
        for key in [] if largest is None else [largest, *(key for key in counts if key != largest)]:
            bank = self._make_bank(specs[key], counts[key]) if has_io else None
            if bank is not None:
                self.banks[key] = bank
            if bank is None or (key == largest and not self._reserve(bank)):
                self._give_back()
                log.warning(
                    "%s: out of memory: room for %d experts instead of %d; the others stay in RAM and on the drive",
                    self.device.name,
                    sum(bank.n_slots for bank in self.banks.values()),
                    sum(counts.values()),
                )
                return

    def _make_io(self, n_embd: int) -> bool:
        """Inputs and outputs of compiled calls; False: no memory."""
        lib, context = self._lib, self._context(4)
        loaded = lib.ggml_new_tensor_2d(context, ggml.TYPE_F32, n_embd, LOADED_ROWS)
        tensors = (
            lib.ggml_new_tensor_1d(context, ggml.TYPE_I32, MOST_LAUNCHES * NOTE_BYTES // 4),
            lib.ggml_new_tensor_2d(context, ggml.TYPE_F32, n_embd, MOST_PAIRS),
            lib.ggml_new_tensor_2d(context, ggml.TYPE_F32, n_embd, MOST_PAIRS),
        )
        buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context, self._buffer_type)
        if not buffer:
            return False
        lib.ggml_backend_buffer_clear(buffer, 0)  # pairs that fill up a graph read rows that nobody wrote
        self._buffers.append(buffer)
        self._loaded = loaded
        joins = {n_rows: self._make_join(tensors[2], n_rows) for n_rows in range(2, MOST_LAUNCHES + 2)}
        self._record = DeviceRecord(self.device, self._backend, n_embd, tensors, joins)
        return True

    def _make_join(self, rows: int, n_rows: int) -> tuple[int, list[int]]:
        """A graph that adds up the first rows of a tensor, and its nodes, which are all written to the same place."""
        lib, context = self._lib, self._context(2 * n_rows, n_nodes=2 * n_rows)
        shape = Tensor.from_address(rows)
        n_embd, row_bytes = shape.ne[0], shape.nb[1]
        views = [lib.ggml_view_2d(context, rows, n_embd, 1, row_bytes, i * row_bytes) for i in range(n_rows)]
        for view in views:
            Tensor.from_address(view).buffer = shape.buffer
        nodes, total = [], views[0]
        for view in views[1:]:
            total = int(lib.ggml_add(context, total, view))
            nodes.append(total)
        graph = int(lib.ggml_new_graph_custom(context, 2 * n_rows, False))
        lib.ggml_build_forward_expand(graph, total)
        return graph, nodes

    def _give_back(self) -> None:
        """Memory to give back when the device is completely full, because its driver needs some to compute: at least a
        sixteenth of ours."""
        full = self._allocated()
        while self.banks and (self._allocated() > full * 15 // 16 or not self._gallocr):
            self.banks.popitem()
            self._lib.ggml_backend_buffer_free(self._buffers.pop())
        if not self.banks and self._gallocr:
            self._lib.ggml_gallocr_free(self._gallocr)
            self._gallocr = 0

    def _make_bank(self, spec: FfnSpec, n_slots: int) -> Bank | None:
        """None: no memory."""
        lib, context = self._lib, self._context(3)
        gate, up, down = stacked(context, spec, n_slots)
        sizes = [int(lib.ggml_nbytes(tensor)) // n_slots for tensor in (gate, up, down)]
        buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context, self._buffer_type)
        if not buffer:
            return None
        # Kernels read rows in steps of 256 values, beyond the end of a slot, and multiply that by zero: it must be finite.
        lib.ggml_backend_buffer_clear(buffer, 0)
        self._buffers.append(buffer)
        row_bytes = (sizes[0], sizes[1], sizes[2])
        assert self._record is not None
        bank = Bank(spec, n_slots, list(range(n_slots)), (gate, up, down), row_bytes, BankRecord(self._record))
        self._check_support(bank)
        return bank

    def _check_support(self, bank: Bank) -> None:
        if not all(supports(self.device, self._make_graph(bank, 2, form).graph) for form in Form):
            raise LocalrunError(f"{self.device.name} can't multiply experts in {kinds(bank.spec)}", hint="--gpu none")

    def _graph(self, bank: Bank, n_pairs: int, form: Form) -> Graph:
        """The graph for so many pairs, made on first use; compiled calls find it from then on."""
        made = bank.graphs.get((n_pairs, form))
        if made is None:
            made = self._make_graph(bank, n_pairs, form)
            self._to_front(made, n_pairs, form)
            # Once is enough: the memory of intermediate results stays where it is.
            if not self._lib.ggml_gallocr_alloc_graph(self._gallocr, made.graph):
                raise DecodeError(f"{self.device.name}: out of memory")
            bank.graphs[n_pairs, form] = made
            fewest = n_pairs if form is Form.SUM else max((size for size in SIZES if size < n_pairs), default=0) + 1
            if is_small(n_pairs, form):
                bank.record.add(
                    range(fewest, n_pairs + 1),
                    graph=made.graph,
                    x=made.x,
                    ids=made.ids,
                    weights=made.weights,
                    out=made.out,
                )
        return made

    def _make_graph(self, bank: Bank, n_pairs: int, form: Form) -> Graph:
        n_nodes = n_nodes_for(n_pairs, form)
        context = self._context(n_nodes + 3, n_nodes=n_nodes)
        return build(context, bank.spec, bank.tensors, n_pairs, form, self._loaded)

    def _to_front(self, graph: Graph, n_pairs: int, form: Form) -> None:
        """Has a small graph read and write where calls have their inputs and outputs; compiled calls move them."""
        if not is_small(n_pairs, form):
            return
        assert self._record is not None
        notes, x, out = (Tensor.from_address(tensor) for tensor in self._record.tensors)
        for tensor, io, offset in (
            (graph.ids, notes, 0),
            (graph.weights, notes, MOST_PAIRS * 4),
            (graph.x, x, 0),
            (graph.out, out, 0),
        ):
            if tensor:
                target = Tensor.from_address(tensor)
                target.buffer, target.data = io.buffer, (io.data or 0) + offset

    def _reserve(self, bank: Bank) -> bool:
        """False: no memory."""
        graphs = [self._make_graph(bank, MAX_PAIRS, form).graph for form in (Form.GATHERED, Form.ROWS)]
        gallocr = self._lib.ggml_gallocr_new(self._buffer_type)
        if all(self._lib.ggml_gallocr_reserve(gallocr, graph) for graph in graphs):
            self._gallocr = gallocr
            return True
        self._lib.ggml_gallocr_free(gallocr)
        return False
