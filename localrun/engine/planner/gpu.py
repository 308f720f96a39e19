"""Decides what goes to GPUs: first the dense model and its cache, on the device with the most room, then experts on all."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from localrun.engine.options import EngineOptions
from localrun.engine.planner.placement import (
    GPU_HEADROOM_BYTES,
    DenseFit,
    fit_dense,
    gpu_budgets,
    layers_that_fit,
    whole_on_gpu,
)
from localrun.engine.planner.sizes import ModelSizes
from localrun.errors import BudgetError, UsageError
from localrun.ggml.devices import GpuDevice, choose_gpus
from localrun.offload.gpu.graphs import slot_bytes
from localrun.offload.gpu.slots import scratch_bytes
from localrun.offload.kernels import FfnSpec
from localrun.quant.model.source import ModelSource
from localrun.units import format_size

log = logging.getLogger(__name__)

ALL_LAYERS = 999

DRIVER_BYTES = 128 << 20
"""Memory kept free on a GPU regardless of `--vram`, for scratch memory of the expert kernels."""


@dataclass(frozen=True, slots=True)
class GpuPlacement:
    """Attributes:
    n_gpu_layers: for llama.cpp, whose output head counts as the last layer; `ALL_LAYERS`, fewer, or 0.
    dense_share: of the dense model's layers.
    experts: devices and the bytes available for experts on each; may be 0.
    ram_bytes: the part of this that integrated GPUs take from RAM.
    cache_in_ram: llama.cpp keeps the KV cache in RAM although all layers are on the GPU.
    spare: bytes that stay free, by device name: for the driver and windows, or only for the driver with `--vram`.
    """

    n_gpu_layers: int = 0
    dense_share: float = 0.0
    experts: tuple[tuple[GpuDevice, int], ...] = ()
    ram_bytes: int = 0
    spare: Mapping[str, int] = field(default_factory=dict)
    cache_in_ram: bool = False


def wanted_gpus(options: EngineOptions) -> list[GpuDevice]:
    """The devices that a load may use. Raises as `choose_gpus`."""
    rpc = [endpoint.strip() for endpoint in (options.rpc or "").split(",") if endpoint.strip()]
    return choose_gpus(options.gpu, rpc)


def place_on_gpus(
    source: ModelSource, sizes: ModelSizes, options: EngineOptions, n_ctx: int, *, most_share: float = 1.0
) -> GpuPlacement:
    """Chooses devices and divides their memory.

    Args:
        sizes: the source's.
        n_ctx: tokens of context that the cache must hold.
        most_share: of the dense model's layers that may go there; 0: experts get all.

    Raises:
        UsageError: `--gpu` names a missing device, or one without dedicated memory and without `--vram`; `--vram` without a GPU.
        BudgetError: `--vram` is too little for anything.
        LocalrunError: an unreachable RPC server.
    """
    devices = wanted_gpus(options)
    if options.gpu == "auto":  # the user's order counts
        devices.sort(key=lambda device: -device.free_bytes)
    if not devices:
        if options.vram_bytes:
            raise UsageError(
                "--vram: this llama.cpp finds no usable GPU",
                hint="run `localrun doctor`, or leave out --vram",
            )
        return GpuPlacement()
    integrated = [device.name for device in devices if device.is_integrated]
    if integrated and options.vram_bytes is None:
        raise UsageError(
            f"--gpu {options.gpu}: {', '.join(integrated)} has no dedicated memory",
            hint="set how much RAM it may use, e.g. --vram 8GiB",
        )
    free = [device.free_bytes for device in devices]
    if options.vram_bytes is not None and options.vram_bytes > sum(free):
        raise BudgetError(
            f"--vram {format_size(options.vram_bytes)}: "
            + ", ".join(f"{device.name} has {format_size(device.free_bytes)} free" for device in devices),
            hint="lower --vram, or leave it out to use what fits",
        )
    needed = whole_on_gpu(sizes, n_ctx, options.kv_type, options.n_batch)
    if options.vram_bytes is None:
        free = [max(0, device.free_bytes - device.display_bytes) for device in devices]
    budgets = gpu_budgets(free, options.vram_bytes, needed)
    ram_bytes = sum(budget for device, budget in zip(devices, budgets, strict=True) if device.is_integrated)
    n_layers, dense = sizes.shape.n_layers, DenseFit(0, 0)
    if most_share:
        limit = min(budgets[0], needed if most_share >= 1 else int(most_share * needed))
        if most_share >= 1:
            dense = fit_dense(sizes, limit, n_ctx, options.kv_type, options.n_batch)
        else:
            dense = DenseFit(*layers_that_fit(sizes, limit, n_ctx, options.kv_type, options.n_batch))
        budgets[0] -= dense.n_bytes
        if dense.n_layers < n_layers or dense.cache_in_ram:
            log.warning(
                "%s: the dense model and its cache need %s, but only %s are for them: %s",
                devices[0].name,
                format_size(needed),
                format_size(limit),
                _in_words(dense, n_layers),
            )
    n_gpu_layers = dense.n_layers + 1 if 0 < dense.n_layers < n_layers else ALL_LAYERS if dense.n_layers else 0
    for index, device in enumerate(devices):
        least = _least_for_experts(source, device)
        if budgets[index] < least:
            budgets[index] = 0
    if not n_gpu_layers and not any(budgets):
        if options.vram_bytes:
            raise BudgetError(
                f"--vram {format_size(options.vram_bytes)} is too little: experts need at least "
                f"{format_size(_least_for_experts(source, devices[0]))}, the dense model and its cache {format_size(needed)}",
                hint="raise it, or use --gpu none",
            )
        return GpuPlacement()
    spare = {
        device.name: GPU_HEADROOM_BYTES + device.display_bytes if options.vram_bytes is None else DRIVER_BYTES
        for device in devices
    }
    return GpuPlacement(
        n_gpu_layers,
        dense.n_layers / n_layers,
        tuple(zip(devices, budgets, strict=True)),
        ram_bytes,
        spare,
        dense.cache_in_ram,
    )


def _in_words(dense: DenseFit, n_layers: int) -> str:
    if dense.cache_in_ram:
        return "the cache stays in RAM, from where it is copied for every token"
    if dense.n_layers:
        return f"{dense.n_layers} of {n_layers} layers go there, the others stay on the CPU"
    return "they stay on the CPU"


def _least_for_experts(source: ModelSource, device: GpuDevice) -> int:
    specs = [FfnSpec(types, moe.n_embd, moe.n_ff, 0.0) for moe in source.moe_layers.values() for types in moe.variants]
    return max(scratch_bytes(spec) for spec in specs) + min(slot_bytes(spec, 1, device) for spec in set(specs))
