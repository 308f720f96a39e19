"""Places the parts of a model on a machine, in bytes; rejects what can't fit, with numbers and the nearest setting that fits.

Memory is assigned in this order: dense model, KV cache and llama.cpp's buffers, then headroom, then experts. The first three go
to the first GPU together, or as many layers of them as fit, or the first and the third without the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gguf import GGMLQuantizationType

from localrun.engine import memory
from localrun.engine.planner.compute_buffers import compute_bytes, exchange_bytes
from localrun.engine.planner.hardware import (
    ASSUMED_BUS_BYTES_PER_S,
    ASSUMED_MEMORY_BYTES_PER_S,
    PROCESS_BYTES,
    Hardware,
)
from localrun.engine.planner.plan import GpuShare, Placement, PlanOptions, usual_position
from localrun.engine.planner.sizes import ModelSizes, padded
from localrun.engine.planner.speed import CACHE_CALLS, cache_copy_s
from localrun.errors import BudgetError
from localrun.offload.gpu.rates import LATENCY_S
from localrun.units import format_size

GPU_HEADROOM_BYTES = 512 << 20
"""Left free on each GPU by the automatic choice: the desktop's windows and the driver's own memory."""

MIN_CONTEXT = 4096
"""Minimum context in tokens."""


def headroom(available: int, total: int) -> int:
    """RAM that the automatic choice leaves free: 2 GiB or a tenth of the machine, on a small one at most a quarter of the free
    RAM."""
    wanted = max(memory.HEADROOM_BYTES, total // 10)
    return min(wanted, available // 4) if available < 8 * 2**30 else wanted


def whole_on_gpu(sizes: ModelSizes, n_ctx: int, kv_type: str, n_batch: int) -> int:
    """Bytes that the dense model with its cache and buffers takes on a GPU that holds all of it."""
    dense = sizes.dense_bytes - sizes.embedding_bytes + sizes.kv_bytes(n_ctx, kv_type, n_batch)
    return dense + compute_bytes(sizes, n_ctx, n_batch) + exchange_bytes(sizes, n_ctx, n_batch)


def gpu_share(sizes: ModelSizes, machine: Hardware, options: PlanOptions, n_ctx: int) -> GpuShare:
    """As much as fits: the dense model with cache and buffers on the largest GPU, or as many of its layers as fit; experts in the
    rest of all."""
    whole_bytes = whole_on_gpu(sizes, n_ctx, options.kv_type, options.n_batch)
    free = sorted((gpu.vram_bytes for gpu in machine.gpus), reverse=True)
    budgets = gpu_budgets(free, options.vram_bytes, whole_bytes)
    dense = fit_dense(sizes, budgets[0] if budgets else 0, n_ctx, options.kv_type, options.n_batch)
    share = dense.n_layers / max(1, sizes.shape.n_layers)
    return GpuShare(dense_share=share, expert_bytes=sum(budgets) - dense.n_bytes, cache_in_ram=dense.cache_in_ram)


class DenseFit(NamedTuple):
    """What of the dense model goes to a GPU.

    Attributes:
        n_layers: all of them, fewer, or 0.
        n_bytes: what they take there, with llama.cpp's buffers.
        cache_in_ram: the KV cache alone does not go there.
    """

    n_layers: int
    n_bytes: int
    cache_in_ram: bool = False


def fit_dense(sizes: ModelSizes, budget: int, n_ctx: int, kv_type: str, n_batch: int) -> DenseFit:
    """All of the dense model, else all but its cache or as many layers as fit, whichever costs a token less.

    Args:
        budget: bytes of the GPU.
    """
    whole = whole_on_gpu(sizes, n_ctx, kv_type, n_batch)
    if budget >= whole:
        return DenseFit(sizes.shape.n_layers, whole)
    n_layers, n_bytes = layers_that_fit(sizes, budget, n_ctx, kv_type, n_batch)
    without_cache = whole - sizes.kv_bytes(n_ctx, kv_type, n_batch)
    missing_s = (1 - n_layers / sizes.shape.n_layers) * sizes.dense_token_bytes / ASSUMED_MEMORY_BYTES_PER_S
    if budget >= without_cache and _cache_in_ram_s(sizes, n_ctx, kv_type) < missing_s:
        return DenseFit(sizes.shape.n_layers, without_cache, cache_in_ram=True)
    return DenseFit(n_layers, n_bytes)


def _cache_in_ram_s(sizes: ModelSizes, n_ctx: int, kv_type: str) -> float:
    """Seconds that a token takes longer with the cache in RAM, on a usual bus."""
    copied = cache_copy_s(sizes, usual_position(n_ctx), kv_type, ASSUMED_BUS_BYTES_PER_S)
    return copied + CACHE_CALLS * sizes.shape.n_layers * LATENCY_S


LEAST_LAYERS = 1 / 8
"""Of the dense model's layers: fewer are not worth the buffers that llama.cpp takes on a GPU for any."""


def layers_that_fit(sizes: ModelSizes, budget: int, n_ctx: int, kv_type: str, n_batch: int) -> tuple[int, int]:
    """How many of the dense model's layers, with their cache and the output head, fit into a GPU that can't hold all.

    Every token needs all of a layer's dense matrices but few of its experts, so layers come first.

    Returns:
        (layers, 0 if too few fit; their bytes with llama.cpp's buffers).
    """
    head = sizes.dense.get("output head", 0)
    each = (
        sizes.dense_bytes - head - sizes.embedding_bytes + sizes.kv_bytes(n_ctx, kv_type, n_batch)
    ) // sizes.shape.n_layers + 1
    fixed = head + compute_bytes(sizes, n_ctx, n_batch)
    n_layers = min(sizes.shape.n_layers - 1, (budget - fixed) // each)
    if n_layers < max(1, sizes.shape.n_layers * LEAST_LAYERS):
        return 0, 0
    return n_layers, fixed + n_layers * each


def gpu_budgets(free: Sequence[int], vram_bytes: int | None, dense_bytes: int) -> list[int]:
    """Bytes to use of each GPU; the first one is for the dense model.

    Args:
        free: free bytes of each.
        vram_bytes: to use, across all: divided in proportion to free memory, but enough for the dense model on the first one,
            if it has that much; None: all but some headroom on each.
        dense_bytes: cache and buffers included.
    """
    if vram_bytes is None or not free:
        return [max(0, size - GPU_HEADROOM_BYTES) for size in free]
    total = min(vram_bytes, sum(free))
    first = total * free[0] // max(1, sum(free))
    if first < dense_bytes <= min(free[0], total):
        first = dense_bytes
    others = sum(free[1:])
    return [first, *((total - first) * size // max(1, others) for size in free[1:])]


def place(
    sizes: ModelSizes, machine: Hardware, options: PlanOptions, n_ctx: int, gpu: GpuShare | None = None
) -> Placement:
    """Divides the memory.

    Args:
        gpu: what goes to GPUs, if already decided; None: as much as fits.

    Raises:
        BudgetError: it does not fit.
    """
    dense = sizes.dense_bytes
    kv = sizes.kv_bytes(n_ctx, options.kv_type, options.n_batch)
    compute = compute_bytes(sizes, n_ctx, options.n_batch)
    if gpu is None:
        gpu = gpu_share(sizes, machine, options, n_ctx)
    if gpu.dense_share >= 1:
        in_ram = sizes.embedding_bytes + (kv if gpu.cache_in_ram else 0)
        compute += exchange_bytes(sizes, n_ctx, options.n_batch)
    else:
        compute += sizes.ranking_bytes
        in_ram = int((dense + kv) * (1 - gpu.dense_share)) + compute
    slot = max(1.0, sizes.mean_slot_bytes)
    gpu_experts = min(sizes.n_copies, int(gpu.expert_bytes / slot))
    rest = sizes.n_copies - gpu_experts
    rest_bytes = int(rest * slot + sizes.staging_bytes) if rest else 0
    spare, ram = 0, options.ram_bytes
    if machine.ram_bytes is not None:
        left = machine.ram_bytes - PROCESS_BYTES - in_ram
        if ram is None:
            spare = headroom(machine.ram_bytes, machine.total_ram_bytes or machine.ram_bytes)
            ram = max(0, left - spare)
        _check(sizes, machine, options, n_ctx, left, min(ram, rest_bytes))
        if options.ram_bytes is None and sizes.n_copies:
            ram = max(ram, sizes.floor_bytes)
            spare = max(0, min(spare, left - ram))
    arena = (rest_bytes if ram is None else min(ram, rest_bytes)) - sizes.staging_bytes
    return Placement(
        dense_share=gpu.dense_share,
        cache_in_ram=gpu.cache_in_ram,
        dense_bytes=dense,
        kv_bytes=kv,
        embedding_bytes=sizes.embedding_bytes if gpu.dense_share >= 1 else 0,
        compute_bytes=compute,
        ram_bytes=ram,
        headroom_bytes=spare,
        gpu_expert_bytes=int(gpu_experts * slot),
        ram_experts=max(0, min(rest, int(arena / slot + 1e-6))),
        gpu_experts=gpu_experts,
    )


def _check(sizes: ModelSizes, machine: Hardware, options: PlanOptions, n_ctx: int, left: int, ram: int) -> None:
    """Rejects what can't fit.

    Args:
        left: RAM minus everything but the experts.
        ram: the experts' budget.
    """
    floor = sizes.floor_bytes if sizes.n_copies else 0
    assert machine.ram_bytes is not None
    free = format_size(machine.ram_bytes)
    if options.ram_bytes is not None and ram > left >= floor:
        raise BudgetError(
            f"--ram {format_size(options.ram_bytes)} and {format_size(machine.ram_bytes - left)} for the dense model, "
            f"its context and buffers exceed the {free} that are free",
            hint=f"use --ram {_gib(left)} or less, or leave it out",
        )
    if left < floor:
        buffers = compute_bytes(sizes, n_ctx, options.n_batch) + sizes.ranking_bytes
        raise BudgetError(
            f"{sizes.name} does not fit: dense model {format_size(sizes.dense_bytes)}, KV cache of {n_ctx} tokens "
            f"{format_size(sizes.kv_bytes(n_ctx, options.kv_type, options.n_batch))}, buffers "
            f"{format_size(buffers)}, process {format_size(PROCESS_BYTES)}, "
            f"experts of one layer {format_size(floor)}; {free} free",
            hint=_nearest(sizes, machine, options, n_ctx),
        )


def _nearest(sizes: ModelSizes, machine: Hardware, options: PlanOptions, n_ctx: int) -> str:
    """The mildest change with which it fits."""
    assert machine.ram_bytes is not None

    def needed(n_ctx: int, kv_type: str) -> int:
        context = sizes.kv_bytes(n_ctx, kv_type, options.n_batch) + compute_bytes(sizes, n_ctx, options.n_batch)
        fixed = sizes.dense_bytes + sizes.ranking_bytes + PROCESS_BYTES
        return fixed + context + (sizes.floor_bytes if sizes.n_copies else 0)

    milder = list(_milder(n_ctx, options.kv_type))
    for changed, kv_type in milder:
        if needed(changed, kv_type) <= machine.ram_bytes:
            return f"it fits with {_context(n_ctx, changed, kv_type, options)}"
    smaller = sizes.with_dense(GGMLQuantizationType.Q4_K) if sizes.from_checkpoint else sizes
    saved = sizes.dense_bytes - smaller.dense_bytes
    for changed, kv_type in [(n_ctx, options.kv_type), *milder] if saved else []:
        if needed(changed, kv_type) - saved <= machine.ram_bytes:
            way = (
                "--dense q4_k" if sizes.convertible else "dense matrices of 4 bits (localrun convert ... --dense q4_k)"
            )
            unchanged = (changed, kv_type) == (n_ctx, options.kv_type)
            return f"it fits with {way}" + ("" if unchanged else f" {_context(n_ctx, changed, kv_type, options)}")
    least = min(needed(changed, kv_type) for changed, kv_type in [(n_ctx, options.kv_type), *milder])
    small = f", {format_size(least - saved)} with --dense q4_k" if saved else ""
    return f"{format_size(least)} must be free even with the smallest context{small}: close other programs, or use a larger machine"


def _context(n_ctx: int, changed: int, kv_type: str, options: PlanOptions) -> str:
    """The options that make this change of the context."""
    length = [] if changed == n_ctx else [f"--context {changed}"]
    return " ".join(length + ([] if kv_type == options.kv_type else [f"--kv {kv_type}"]))


def _milder(n_ctx: int, kv_type: str) -> Iterator[tuple[int, str]]:
    if kv_type in ("f16", "bf16", "f32"):
        yield n_ctx, "q8_0"
    while n_ctx > MIN_CONTEXT:
        n_ctx = max(MIN_CONTEXT, padded(n_ctx // 2))
        yield n_ctx, kv_type
    if kv_type in ("f16", "bf16", "f32"):
        yield n_ctx, "q8_0"


def _gib(n_bytes: int) -> str:
    return f"{max(0, n_bytes) / 2**30:.1f}GiB"
