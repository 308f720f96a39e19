"""The experts on GPUs: placed by the routing profile at load, exchanged by use while running.

An expert on a GPU has no RAM slot. Its ggml rows (GPUs don't know our layouts) are unpacked from its copy in RAM or read by the
store at low priority, and uploaded by a thread of this module, so decoding never waits for an upload. Uploaded experts come
into use between decodes. An expert evicted from a GPU is only on the drive, and returns through RAM when it is needed.

Threads: the filling thread owns the staging buffer and uploads; each GPU's own thread drives calls of many tokens
(`stream.py`); everything else runs on the decoding thread, under residency's lock where it touches RAM.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import BudgetError
from localrun.ggml.devices import GpuDevice, HostMemory
from localrun.offload.cache.slots import Slot
from localrun.offload.cache.tickets import Receiver, Store, Ticket
from localrun.offload.device.compiled_gpu import LayerOnGpu
from localrun.offload.device.routing import Routing
from localrun.offload.device.view import F32, I32
from localrun.offload.device.weight_records import MAX_VARIANTS
from localrun.offload.gpu.graphs import most_slots, slot_bytes
from localrun.offload.gpu.slots import BankKey, GpuSlots, scratch_bytes
from localrun.offload.gpu.stream import RING_SLOTS, GpuThread, Pairs, Passing, Rings, StreamJob, choose
from localrun.offload.kernels import FfnSpec
from localrun.units import format_size

log = logging.getLogger(__name__)

EXCHANGE_EVERY = 16
"""Decodes between two looks at whether an expert in RAM has become hotter than one on a GPU; at most one is exchanged each time."""
EXCHANGE_GAIN = 1.5
"""How much hotter a replacement must be, to keep experts with similar use from swapping forever."""
LEAST_HEAT = 4.0
"""What an expert must have been used at least to come to a GPU while running."""

_STOP_POLL_S = 0.05
"""A stop request ends a long call so soon."""

Heat = Callable[[int], npt.NDArray[np.floating[Any]]]
"""(n_experts,) how much each expert of a layer was used, recent uses counting more."""


@dataclass(frozen=True, slots=True)
class _GpuSlot:
    gpu: int
    key: BankKey
    slot: int


@dataclass(frozen=True, slots=True)
class _Upload:
    layer: int
    expert: int
    slot: _GpuSlot
    is_exchange: bool = False


class RamCopies(Protocol):
    """What the tier needs of residency in RAM."""

    @property
    def store(self) -> Store:
        """Reads experts."""
        ...

    def drop_copies(self, elsewhere: npt.NDArray[np.bool_]) -> None:
        """Frees the copies of experts that live elsewhere now, (n_layers, n_experts); the caller holds residency's lock."""
        ...

    def read_rows(self, slot: Slot, receiver: Receiver) -> None:
        """Starts reading ggml rows into memory outside the slot table; any thread."""
        ...

    def copy_rows(self, layer: int, expert: int, variant: int, rows: npt.NDArray[np.uint8]) -> bool:
        """Unpacks an expert's ggml rows from its copy in RAM; False if there is none in this variant. Any thread."""
        ...


class GpuTier:
    """Experts on one or more GPUs.

    Args:
        gpus: (device, maximum bytes to use) of each.
        specs: shape and types by (layer, variant).
        wanted: by layer, the variant of each expert.
        ranking: (layer, expert) of all experts, likeliest first.
        rings: what long prompts stream through which GPU; None: nothing.
    """

    def __init__(
        self,
        gpus: Sequence[tuple[GpuDevice, int]],
        specs: Mapping[BankKey, FfnSpec],
        wanted: Mapping[int, I32],
        ranking: Sequence[tuple[int, int]],
        rings: Rings | None = None,
    ) -> None:
        n_layers, n_experts = max(wanted) + 1, max(variants.size for variants in wanted.values())
        self._wanted = wanted
        self.where: npt.NDArray[np.int16] = np.full((n_layers, n_experts), -1, np.int16)
        """GPU by (layer, expert), -1: none."""
        self._slot: I32 = np.zeros((n_layers, n_experts), np.int32)  # on that GPU, in the bank of the expert's variant
        self._refused: npt.NDArray[np.bool_] = np.zeros((n_layers, n_experts), bool)  # can't be read
        self._uploads: queue.SimpleQueue[_Upload | None] = queue.SimpleQueue()
        self._under_way: set[tuple[int, int]] = set()
        self._uploaded: queue.SimpleQueue[tuple[_Upload, BaseException | None]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._staging: HostMemory | None = None
        self._n_decodes = 0
        self.n_exchanged = 0
        self.slots: list[GpuSlots] = []
        self.threads: list[GpuThread] = []
        self.rings = rings
        self._ring_of: dict[BankKey, int] = {}
        if rings is not None:
            number = {kernel.spec: i for i, kernel in enumerate(rings.kernels)}
            self._ring_of = {key: number[spec] for key, spec in specs.items() if spec in number}
        try:
            ring_bytes = [
                rings.bytes_on(device) if rings is not None and i == rings.gpu else 0
                for i, (device, _) in enumerate(gpus)
            ]
            left = [(device, budget - ring) for (device, budget), ring in zip(gpus, ring_bytes, strict=True)]
            for i, counts in enumerate(share_out(left, specs, wanted, ranking)):
                passing = rings.specs if rings is not None and i == rings.gpu else {}
                device, budget = gpus[i]
                # Rings first: what comes last is left out by a device with less memory than it said.
                counts = {**dict.fromkeys(passing, RING_SLOTS), **counts}
                self.slots.append(GpuSlots(device, counts, {**specs, **passing}, budget))
                if any(key not in self.slots[i].banks for key in passing):
                    self.rings, self._ring_of = None, {}
        except BaseException:
            self.close()
            raise
        self.layers = {layer: self._record(layer) for layer in wanted}
        """For compiled layer calls."""
        for layer, expert in ranking:
            slot = self._free_slot(layer, int(wanted[layer][expert]))
            if slot is not None:
                self._queue(layer, expert, slot)

    @property
    def staging_bytes(self) -> int:
        """RAM that stages experts on their way to a GPU."""
        sizes = [sum(bank.row_bytes) for slots in self.slots for bank in slots.banks.values()]
        return align_up(max(sizes, default=0), PAGE_BYTES)

    @property
    def used_bytes(self) -> int:
        """Memory taken on all GPUs."""
        return sum(slots.used_bytes for slots in self.slots)

    @property
    def n_resident(self) -> int:
        """Experts that are computed on a GPU now."""
        return int((self.where >= 0).sum())

    @property
    def n_under_way(self) -> int:
        """Experts that wait for their upload, or for the next decode to begin."""
        return len(self._under_way)

    def has_slot(self, layer: int, expert: int) -> bool:
        """The expert is on a GPU, or on its way to one; any thread."""
        return bool(self.where[layer, expert] >= 0) or (layer, expert) in self._under_way

    def _record(self, layer: int) -> LayerOnGpu:
        variants = self._wanted[layer]
        banks = [
            [
                slots.banks[at].record if (at := (layer, variant)) in slots.banks else None
                for variant in range(int(variants.max()) + 1)
            ]
            for slots in self.slots
        ]
        return LayerOnGpu(self.where[layer], self._slot[layer], variants, banks)

    # -- computing -----------------------------------------------------------------------------------------------------

    def call(self, layer: int, x: F32, out: F32, weights: F32 | None = None) -> GpuCall:
        """For one layer call; see `GpuCall`."""
        return GpuCall(self, layer, x, out, weights)

    def pairs(self, layer: int, routing: Routing) -> list[tuple[int, Pairs]]:
        """(GPU, pairs) by bank, of experts that are all on GPUs."""
        counts = np.diff(routing.starts)
        gpus, variants = self.where[layer, routing.experts], self._wanted[layer][routing.experts]
        slots = np.repeat(self._slot[layer, routing.experts], counts)
        groups = gpus.astype(np.int32) * MAX_VARIANTS + variants
        result = []
        for group in [groups[0]] if (groups == groups[0]).all() else np.unique(groups):
            gpu, variant = divmod(int(group), MAX_VARIANTS)
            rows = np.flatnonzero(np.repeat(groups == group, counts))
            result.append((gpu, Pairs((layer, variant), slots[rows], routing.x_rows[rows], routing.out_rows[rows])))
        return result

    def ring_of(self, layer: int, variant: int) -> int | None:
        """Ring through which this layer's experts of a variant pass, if any does."""
        return self._ring_of.get((layer, variant))

    # -- residency -----------------------------------------------------------------------------------------------------

    def begin(self, in_ram: RamCopies, *, n_unpackers: int = 1) -> None:
        """Starts the threads."""
        for i, slots in enumerate(self.slots):
            kernels = self.rings.kernels if self.rings is not None and i == self.rings.gpu else ()
            self.threads.append(GpuThread(slots, kernels, in_ram.store, n_unpackers=n_unpackers))
        self._staging = HostMemory(self.slots[0].device, max(self.staging_bytes, PAGE_BYTES))
        self._thread = threading.Thread(target=self._fill, args=(in_ram,), name="localrun-gpu", daemon=True)
        self._thread.start()

    def step(self, in_ram: RamCopies, heat: Heat) -> None:
        """Call between decodes, on the decoding thread, which holds residency's lock: activates uploaded experts, and
        occasionally replaces a rarely used expert with a more used one."""
        while not self._uploaded.empty():
            upload, error = self._uploaded.get()
            self._settle(upload, error)
        in_ram.drop_copies(self.where >= 0)  # also those that were being read when their upload was settled
        self._n_decodes += 1
        if self._n_decodes % EXCHANGE_EVERY == 0 and not self._under_way:
            self._exchange(heat)

    def _settle(self, upload: _Upload, error: BaseException | None) -> None:
        at = (upload.layer, upload.expert)
        self._under_way.discard(at)
        if error is not None:
            log.warning("blk.%d: could not copy expert %d to the GPU: %s", *at, error)
            self._bank(upload.slot).free.append(upload.slot.slot)
            self._refused[at] = True
            return
        self._slot[at] = upload.slot.slot
        self.where[at] = upload.slot.gpu
        self.n_exchanged += upload.is_exchange

    def _exchange(self, heat: Heat) -> None:
        best: tuple[float, int, int, int] | None = None  # gain, layer, who comes, who goes or -1
        for layer, variants in self._wanted.items():
            here = self.where[layer, : variants.size] >= 0
            if not here.any() or here.all():
                continue
            values = heat(layer)
            for variant in np.unique(variants[here]):
                same = variants == variant
                others = same & ~here & ~self._refused[layer, : variants.size]
                if not others.any():
                    continue
                hot = int(np.where(others, values, -1.0).argmax())
                cold = int(np.where(same & here, values, np.inf).argmin())
                gain = float(values[hot]) - EXCHANGE_GAIN * float(values[cold])
                if self._free_slot(layer, int(variant), take=False) is not None:
                    gain, cold = float(values[hot]), -1
                if gain >= LEAST_HEAT and (best is None or gain > best[0]):
                    best = (gain, layer, hot, cold)
        if best is None:
            return
        _, layer, hot, cold = best
        variant = int(self._wanted[layer][hot])
        slot = self._free_slot(layer, variant)
        if cold >= 0:
            slot = _GpuSlot(int(self.where[layer, cold]), (layer, variant), int(self._slot[layer, cold]))
            self.where[layer, cold] = -1
        assert slot is not None
        self._queue(layer, hot, slot, is_exchange=cold >= 0)

    def _queue(self, layer: int, expert: int, slot: _GpuSlot, *, is_exchange: bool = False) -> None:
        self._under_way.add((layer, expert))
        self._uploads.put(_Upload(layer, expert, slot, is_exchange))

    def _free_slot(self, layer: int, variant: int, *, take: bool = True) -> _GpuSlot | None:
        for gpu, slots in enumerate(self.slots):
            bank = slots.banks.get((layer, variant))
            if bank is not None and bank.free:
                return _GpuSlot(gpu, (layer, variant), bank.free.pop(0) if take else bank.free[0])
        return None

    def _bank(self, slot: _GpuSlot) -> Any:
        return self.slots[slot.gpu].banks[slot.key]

    # -- the filling thread --------------------------------------------------------------------------------------------

    def _fill(self, in_ram: RamCopies) -> None:
        assert self._staging is not None
        memory = self._staging.array
        while not self._closing.is_set():
            upload = self._uploads.get()
            if upload is None:
                return
            try:
                self._copy(in_ram, upload, memory)
            except BaseException as error:  # on any error the expert stays where it was
                self._uploaded.put((upload, error))
            else:
                self._uploaded.put((upload, None))

    def _copy(self, in_ram: RamCopies, upload: _Upload, memory: npt.NDArray[np.uint8]) -> None:
        slots = self.slots[upload.slot.gpu]
        sizes = slots.banks[upload.slot.key].row_bytes
        variant = upload.slot.key[1]
        rows = memory[: sum(sizes)]
        if not in_ram.copy_rows(upload.layer, upload.expert, variant, rows):
            self._read(in_ram, Slot(upload.layer, upload.expert, int(memory.ctypes.data), sum(sizes), variant))
        ends = np.cumsum((0, *sizes))
        slots.upload(upload.slot.key, upload.slot.slot, [memory[a:b] for a, b in itertools.pairwise(ends)])

    def _read(self, in_ram: RamCopies, target: Slot) -> None:
        tickets: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
        in_ram.read_rows(target, tickets.put)
        ticket = tickets.get()  # also when the tier is closing: it writes into our memory
        if ticket.error is not None:
            raise ticket.error

    def close(self) -> None:
        """Ends the filling thread, then frees the GPUs' memory; before the store is closed."""
        self._closing.set()
        self._uploads.put(None)
        if self._thread is not None:
            self._thread.join()
        for thread in self.threads:
            thread.close()
        if self._staging is not None:
            self._staging.close()
        for slots in self.slots:
            slots.close()
        self.threads, self.slots = [], []


class GpuCall:
    """One layer call's work on GPUs: start it, then wait. For the decoding thread; `abandon` ends it in any case.

    For few tokens, this thread starts the graphs; from `LONG_TOKENS` on each GPU's own thread does everything, so the CPU's
    share never waits for it.

    Args:
        x, out: the call's inputs and outputs.
        weights: (K,) of one token's choices, whose weighted sums are wanted in `sums` instead of their rows of `out`.

    Attributes:
        sums: (1, D) of each part, and `summed`, the choices that they hold; complete after `wait`.
    """

    def __init__(self, tier: GpuTier, layer: int, x: F32, out: F32, weights: F32 | None = None) -> None:
        self._tier, self._layer, self._x, self._out, self._weights = tier, layer, x, out, weights
        self.sums: list[F32] = []
        self.summed: list[int] = []
        self._running: list[tuple[GpuSlots, F32, I32]] = []
        self._jobs: list[StreamJob] = []

    def choose(
        self, n_pairs: I32, variants: I32, in_ram: npt.NDArray[np.bool_], others: int, resident: int
    ) -> npt.NDArray[np.int32]:
        """Chooses experts to stream.

        Args:
            n_pairs: (n,) pairs of each candidate.
            variants: (n,) the variant that would be used.
            in_ram: (n,) whether it is in RAM.
            others: pairs that the CPU must compute in any case.
            resident: pairs of experts on GPUs.

        Returns:
            Indices of candidates, ascending; usually none.
        """
        rings = self._tier.rings
        nobody = np.zeros(0, np.int32)
        if rings is None:
            return nobody
        cpu_s, gpu_s = np.zeros(n_pairs.size), np.full(n_pairs.size, np.inf)
        used = []
        for variant in np.unique(variants):
            ring, same = self._tier.ring_of(self._layer, int(variant)), variants == variant
            if ring is None:
                cpu_s[same] = rings.costs[0].cpu.of(n_pairs[same])
                continue
            costs = rings.costs[ring]
            used.append(costs)
            cpu_s[same] = costs.cpu.of(n_pairs[same])
            gpu_s[same] = np.maximum(costs.gpu.of(n_pairs[same]) - np.where(in_ram[same], 0.0, costs.unpack_s), 1e-9)
        if not used:
            return nobody
        return choose(
            cpu_s,
            gpu_s,
            others_s=others * used[0].cpu.pair_s,
            busy_s=resident * used[0].gpu.pair_s,
            slowdown=max(costs.slowdown for costs in used),
        )

    def ring_of(self, variant: int) -> int | None:
        """Ring through which experts of a variant pass, if any does."""
        return self._tier.ring_of(self._layer, variant)

    def start(self, routing: Routing | None) -> None:
        """Starts the pairs of experts that are all on GPUs, few of them."""
        for gpu, pairs in self._tier.pairs(self._layer, routing) if routing is not None else ():
            slots = self._tier.slots[gpu]
            if self._weights is not None:
                order = np.argsort(pairs.out_rows)  # the order of choices is that of the sum
                weights = self._weights[pairs.out_rows[order]]
                result = slots.start(pairs.key, pairs.slots[order], self._x, weights)
            else:
                result = slots.start(pairs.key, pairs.slots, self._x[pairs.x_rows])
            self._running.append((slots, result, pairs.out_rows))

    def start_long(self, routing: Routing | None, passing: Sequence[Passing]) -> None:
        """Starts the pairs of experts that are all on GPUs, and streams others.

        Args:
            passing: in file order; experts with an address stay there until `wait` or `abandon` returns.
        """
        jobs: dict[int, StreamJob] = {}
        for gpu, pairs in self._tier.pairs(self._layer, routing) if routing is not None else ():
            job = jobs.setdefault(gpu, StreamJob(self._x, self._out))
            job.resident = [*job.resident, pairs]
        if passing and self._tier.rings is not None:
            jobs.setdefault(self._tier.rings.gpu, StreamJob(self._x, self._out)).passing = passing
        for gpu, job in jobs.items():
            self._jobs.append(job)
            self._tier.threads[gpu].submit(job)

    def wait(self, check_stop: Callable[[], None] = lambda: None) -> int:
        """Waits until all outputs are written; returns the bytes read.

        Args:
            check_stop: called periodically during a long call; if it raises, waiting ends, and `abandon` must follow.

        Raises:
            DecodeError, StoreError, ChecksumError: the first failure.
        """
        running, self._running = self._running, []
        with contextlib.ExitStack() as all_of_them:  # whatever any of them reports
            for slots in {id(slots): slots for slots, _, _ in running}.values():
                all_of_them.callback(slots.finish)
        for _, result, out_rows in running:
            if self._weights is None:
                self._out[out_rows] = result
            else:
                self.sums.append(result)
                self.summed += out_rows.tolist()
        for job in self._jobs:
            while not job.done.wait(_STOP_POLL_S):
                check_stop()
        jobs, self._jobs = (
            self._jobs,
            [],
        )  # not earlier: if the wait is interrupted, `abandon` must know what is running
        for job in jobs:
            if job.error is not None:
                raise job.error
        return sum(job.bytes_read for job in jobs)

    def abandon(self) -> None:
        """After an error elsewhere: ends what runs, because it uses the call's memory."""
        for job in self._jobs:
            job.cancelled = True
        try:
            self.wait()
        except Exception as error:  # the first one counts
            log.debug("blk.%d: %s", self._layer, error)


def share_out(
    gpus: Sequence[tuple[GpuDevice, int]],
    specs: Mapping[BankKey, FfnSpec],
    wanted: Mapping[int, I32],
    ranking: Sequence[tuple[int, int]],
) -> list[dict[BankKey, int]]:
    """Slots per GPU, layer and format: the likeliest experts, each on the GPU with the most room left.

    Raises:
        BudgetError: a budget is too small for intermediate results and one expert.
    """
    scratch = max(scratch_bytes(spec) for spec in specs.values())
    result: list[dict[BankKey, int]] = [{} for _ in gpus]
    left = [budget - scratch for _, budget in gpus]
    for (device, budget), rest in zip(gpus, left, strict=True):
        smallest = min(slot_bytes(spec, 1, device) for spec in specs.values())
        if rest < smallest:
            raise BudgetError(
                f"{device.name}: {format_size(budget)} is too little for experts: intermediate results take "
                f"{format_size(scratch)} and one expert {format_size(smallest)}",
                hint="raise --vram, or use --gpu none",
            )
    limits = [{spec: most_slots(spec, device) for spec in set(specs.values())} for device, _ in gpus]
    size_of: dict[tuple[int, BankKey, int], int] = {}

    def grown(gpu: int, key: BankKey, count: int) -> int:
        at = (gpu, key, count)
        if at not in size_of:
            size_of[at] = slot_bytes(specs[key], count, gpus[gpu][0]) if count else 0
        return size_of[at]

    for layer, expert in ranking:
        key = (layer, int(wanted[layer][expert]))
        for gpu in sorted(range(len(gpus)), key=lambda gpu: -left[gpu]):
            count = result[gpu].get(key, 0)
            if count >= limits[gpu][specs[key]]:
                continue
            cost = grown(gpu, key, count + 1) - grown(gpu, key, count)
            if cost <= left[gpu]:
                result[gpu][key] = count + 1
                left[gpu] -= cost
                break
    return result
