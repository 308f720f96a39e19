"""How a model's experts are set up: the kernel for each format, what is streamed through GPUs, and the division of RAM.

Everything here is decided from headers and measurements, before any weight is read.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import BudgetError, FormatError, UnsupportedModelError
from localrun.ggml.devices import GpuDevice, free_memory
from localrun.offload.device.weight_records import MAX_VARIANTS
from localrun.offload.gpu.graphs import slot_bytes
from localrun.offload.gpu.slots import DeviceClosedError, scratch_bytes
from localrun.offload.gpu.stream import Rings, StreamCosts, staging_bytes
from localrun.offload.gpu.stream_probe import measure, unpackers
from localrun.offload.gpu.tier import GpuTier
from localrun.offload.kernels import FfnKernel, FfnSpec, make_kernel
from localrun.offload.residency import floor_bytes, largest_slot
from localrun.quant.convert.dense_cache import DenseCache
from localrun.quant.model.shape import shape_of
from localrun.quant.model.source import ModelSource
from localrun.units import format_size

log = logging.getLogger(__name__)

RING_SHARE = 0.25
"""Most of a GPU's memory for experts that rings may take: what lives there serves every token, what passes only long prompts."""


class Closable(Protocol):
    """Something to close before the model is freed."""

    def close(self) -> None:
        """Frees it."""


@dataclass(frozen=True, slots=True)
class OffloadOptions:
    """How a model is loaded.

    Attributes:
        ram_bytes: RAM for experts, staging included; None: as much as all experts need.
        ram_is_advice: nobody asked for `ram_bytes`: take what one layer needs if it is less, instead of refusing.
        n_threads: threads of the expert kernels.
        math: "int8": activations rounded to 8 bits as llama.cpp does; "f32": exact and slow.
        n_gpu_layers: layers of the dense model that llama.cpp puts on the first of `gpus`.
        gpus: devices that may be used, and how many bytes of each experts may take (0: none). Devices round experts' outputs in
            their own way, so the same seed may give different tokens than without.
        first_context: where the dense model is on a GPU, makes a context of the `llama_model *` and computes with it: what that
            takes is known only afterwards, and experts get what is left. Meanwhile experts answer with zeros.
        gpu_spare: bytes that stay free on a GPU, by its name, when experts get what is left; 0 for others.
        verify: compare checksums of experts on every read.
        dense_on_device: our kernels multiply the big dense matrices too, where no GPU has them and `math` is "int8".
        probe: measure the drive (about a second, remembered) and read accordingly; else fixed defaults.
        profile_folder: where routing profiles are kept, to warm the next start; None: nothing is kept.
        stream: how long prompts use the GPUs for experts that have no place there: None: as measured at load (some tenths of a
            second), and not at all where that gains nothing; else by these times of any expert.
        mirror: a second copy of the model on another drive, read in parallel.
        adaptive: answer a miss from the base's smaller copy and read the better one later; the same seed may give different tokens.
        dense_cache: keeps an official checkpoint's dense part as it was converted, for the next start; None: nothing does.
        note: called with a line for the user about that.
        available: RAM that can be allocated without swapping or being killed, if known: experts are given back while it is less
            than `reserve_bytes`; None: nobody looks.
        progress: called with (tensors loaded, tensors in all) while dense tensors are read.
    """

    ram_bytes: int | None = None
    ram_is_advice: bool = False
    n_threads: int = 1
    math: Literal["int8", "f32"] = "int8"
    n_gpu_layers: int = 0
    gpus: Sequence[tuple[GpuDevice, int]] = ()
    first_context: Callable[[Any], Closable] | None = None
    gpu_spare: Mapping[str, int] = field(default_factory=dict)
    verify: bool = True
    dense_on_device: bool = True
    probe: bool = False
    profile_folder: Path | None = None
    stream: StreamCosts | None = None
    mirror: Path | None = None
    adaptive: bool = False
    dense_cache: DenseCache | None = None
    note: Callable[[str], None] | None = None
    available: Callable[[], int | None] | None = None
    reserve_bytes: int = 0
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True, slots=True)
class ExpertSetup:
    """What a load has decided about a model's experts.

    Attributes:
        kernels: by layer a kernel for each variant.
        wanted: by layer (n_experts,) the variant that each expert is read in: its better copy where it has one.
        n_used: experts per token.
        gpus: devices that get experts, and how many bytes of each.
        rings: what long prompts stream through which GPU; None: nothing.
    """

    kernels: Mapping[int, Sequence[FfnKernel]]
    wanted: Mapping[int, npt.NDArray[np.int32]]
    n_used: int
    gpus: Sequence[tuple[GpuDevice, int]]
    rings: Rings | None

    @property
    def slots_bytes(self) -> int:
        """RAM in which every expert would have its slot."""
        return sum(
            align_up(self.kernels[layer][variant].slot_bytes, PAGE_BYTES)
            for layer, variants in self.wanted.items()
            for variant in variants
        )

    @property
    def gpu_staging_bytes(self) -> int:
        """RAM through which experts go on their way to GPUs, as ggml rows, which are no larger than a slot."""
        if not self.gpus:
            return 0
        return largest_slot(self.kernels) + (staging_bytes(self.rings.kernels) if self.rings is not None else 0)

    @property
    def scratch_bytes(self) -> int:
        """What the largest call of a kernel needs."""
        return max(kernel.call.scratch_bytes for variants in self.kernels.values() for kernel in variants)


def choose_setup(source: ModelSource, options: OffloadOptions) -> ExpertSetup:
    """Chooses kernels and, by measurement, what is streamed through GPUs.

    Raises:
        UnsupportedModelError: the model has no experts, or a layer has them in too many formats.
    """
    if not source.moe_layers:
        raise UnsupportedModelError(
            f"{source.path}: no routed experts (blk.N.ffn_gate_exps)",
            hint="localrun runs mixture-of-experts models; dense ones run in llama.cpp itself",
        )
    n_used = shape_of(source).n_used
    if n_used < 1:
        key = f"{source.metadata.get('general.architecture')}.expert_used_count"
        raise FormatError(f"{source.path}: metadata key {key} does not tell how many experts each token uses")
    kernels = _make_kernels(source, options)
    wanted = {layer: _wanted_variants(source, layer) for layer in source.moe_layers}
    gpus = [(device, budget) for device, budget in options.gpus if budget > 0]
    return ExpertSetup(kernels, wanted, n_used, gpus, _choose_rings(kernels, wanted, gpus, options))


def slot_budget(setup: ExpertSetup, options: OffloadOptions, reading_bytes: int) -> int:
    """RAM for slots: what `options` give less what reads and uploads take, and no more than all experts need.

    Args:
        reading_bytes: of the store's buffers.

    Raises:
        BudgetError: less than one layer's experts, and somebody asked for just that.
    """
    # In adaptive mode experts have two slots while copies change, and copies of two sizes leave holes.
    all_bytes = setup.slots_bytes * (2 if options.adaptive else 1)
    if options.ram_bytes is None:
        return all_bytes
    buffers = reading_bytes + setup.gpu_staging_bytes
    budget = min(all_bytes, options.ram_bytes - buffers)
    # An upgrade holds two slots until the next token, so that they can't serve its neighbours.
    floor = floor_bytes(setup.kernels, setup.n_used + (2 if options.adaptive else 0))
    if budget < floor and options.ram_is_advice:
        log.warning("little memory is free: using the minimum RAM for experts, %s", format_size(floor))
        return floor
    if budget < floor:
        raise BudgetError(
            f"--ram {format_size(options.ram_bytes)} is too little: one layer's {setup.n_used} experts need "
            f"{format_size(floor)} and reading needs {format_size(reading_bytes)}",
            hint=f"set --ram to at least {format_size(floor + buffers)}",
        )
    return budget


def make_tier(source: ModelSource, setup: ExpertSetup, ranking: Sequence[tuple[int, int]]) -> GpuTier | None:
    """The experts on GPUs, None if there are none; a device that can't be opened gets none, with a warning.

    Args:
        ranking: (layer, expert), the likeliest first; those that it lacks follow.
    """
    specs = {
        (layer, variant): kernel.spec
        for layer, variants in setup.kernels.items()
        for variant, kernel in enumerate(variants)
    }
    ranked = set(ranking)
    layers = source.moe_layers
    n_experts = max(moe.n_experts for moe in layers.values())
    others = [(layer, expert) for expert in range(n_experts) for layer, moe in layers.items() if expert < moe.n_experts]
    order = [*ranking, *(at for at in others if at not in ranked)]
    while setup.gpus:
        try:
            return GpuTier(setup.gpus, specs, setup.wanted, order, setup.rings)
        except DeviceClosedError as error:
            index = next(i for i, (device, _) in enumerate(setup.gpus) if device.name == error.device.name)
            setup = _without_gpu(setup, index)
            log.warning("%s; %s", error, "it gets no experts" if setup.gpus else "no experts go to GPUs")
    return None


def fit_into_free(setup: ExpertSetup, spare: Mapping[str, int]) -> ExpertSetup:
    """Limits experts to the GPUs' remaining memory, with a warning for each that has less than planned.

    Args:
        spare: bytes to leave, by the device's name.
    """
    specs = {kernel.spec for variants in setup.kernels.values() for kernel in variants}
    scratch = max(map(scratch_bytes, specs))
    for index in reversed(range(len(setup.gpus))):
        device, planned = setup.gpus[index]
        budget = min(planned, free_memory(device) - spare.get(device.name, 0))
        if budget == planned:
            continue
        fits = budget >= scratch + min(slot_bytes(spec, 1, device) for spec in specs)
        log.warning(
            "%s: after the first tokens, %s of the planned %s are left for experts%s",
            device.name,
            format_size(max(0, budget)),
            format_size(planned),
            "" if fits else ": it gets none",
        )
        if not fits:
            setup = _without_gpu(setup, index)
            continue
        rings = setup.rings
        if rings is not None and rings.gpu == index and rings.bytes_on(device) > (budget - scratch) * RING_SHARE:
            rings = None
        gpus = [*setup.gpus[:index], (device, budget), *setup.gpus[index + 1 :]]
        setup = replace(setup, gpus=gpus, rings=rings)
    return setup


def _without_gpu(setup: ExpertSetup, index: int) -> ExpertSetup:
    rings = setup.rings
    if rings is not None:
        rings = None if rings.gpu == index else replace(rings, gpu=rings.gpu - (rings.gpu > index))
    return replace(setup, gpus=[*setup.gpus[:index], *setup.gpus[index + 1 :]], rings=rings)


def _make_kernels(source: ModelSource, options: OffloadOptions) -> dict[int, list[FfnKernel]]:
    """By layer a kernel for each variant; one per distinct shape, shared by the layers that have it."""
    limits = shape_of(source).clamp_limits
    made: dict[FfnSpec, FfnKernel] = {}
    kernels: dict[int, list[FfnKernel]] = {}
    for layer, moe in source.moe_layers.items():
        if len(moe.variants) > MAX_VARIANTS:
            raise UnsupportedModelError(f"{source.path}: blk.{layer}: experts in {len(moe.variants)} formats")
        for types in moe.variants:
            spec = FfnSpec(types, moe.n_embd, moe.n_ff, limits.get(layer, math.inf))
            if spec not in made:
                made[spec] = make_kernel(spec, math=options.math, n_threads=options.n_threads)
            kernels.setdefault(layer, []).append(made[spec])
    return kernels


def _wanted_variants(source: ModelSource, layer: int) -> npt.NDArray[np.int32]:
    """(n_experts,) which of the layer's variants each expert is read in: its better copy where it has one."""
    moe = source.moe_layers[layer]
    wanted = np.zeros(moe.n_experts, np.int32)
    if moe.better:
        for expert in range(moe.n_experts):
            gate, up, down = source.expert(layer, expert)
            wanted[expert] = moe.variants.index((gate.type, up.type, down.type))
    return wanted


# -- what passes through a GPU -----------------------------------------------------------------------------------------


def _choose_rings(
    kernels: Mapping[int, Sequence[FfnKernel]],
    wanted: Mapping[int, npt.NDArray[np.int32]],
    gpus: Sequence[tuple[GpuDevice, int]],
    options: OffloadOptions,
) -> Rings | None:
    """What long prompts stream through which GPU, by measurement; None: nothing.

    All formats of the model, the commonest first, through the GPU on which that is fastest; rings take at most a quarter of what
    experts may have there.
    """
    if not gpus:
        return None
    ordered = _by_frequency(kernels, wanted)
    scratch = max(scratch_bytes(kernel.spec) for kernel in ordered)  # otherwise the rest could hold no expert

    def fit(gpu: int, streamed: Sequence[FfnKernel]) -> bool:
        device, budget = gpus[gpu]
        return Rings(gpu, streamed, ()).bytes_on(device) <= (budget - scratch) * RING_SHARE

    def times(gpu: int, kernel: FfnKernel) -> StreamCosts | None:
        return options.stream or measure(gpus[gpu][0], kernel, unpackers(options.n_threads))

    measured = [(gpu, costs) for gpu in range(len(gpus)) if fit(gpu, ordered[:1]) and (costs := times(gpu, ordered[0]))]
    if not measured:
        return None
    gpu, costs = min(measured, key=lambda item: item[1].expert_s)
    streamed = [(ordered[0], costs)]
    for kernel in ordered[1:]:
        if not fit(gpu, [*(k for k, _ in streamed), kernel]):
            break
        other = times(gpu, kernel)
        if other is not None:
            streamed.append((kernel, other))
    log.info("%s: long prompts stream experts (%s)", gpus[gpu][0].name, costs)
    return Rings(gpu, [kernel for kernel, _ in streamed], [costs for _, costs in streamed])


def _by_frequency(
    kernels: Mapping[int, Sequence[FfnKernel]], wanted: Mapping[int, npt.NDArray[np.int32]]
) -> list[FfnKernel]:
    """One kernel for each shape and format, that of most experts first."""
    count: Counter[FfnSpec] = Counter()
    by_spec: dict[FfnSpec, FfnKernel] = {}
    for layer, variants in wanted.items():
        for variant, n in zip(*np.unique(variants, return_counts=True), strict=True):
            kernel = kernels[layer][int(variant)]
            by_spec[kernel.spec] = kernel
            count[kernel.spec] += int(n)
    return [by_spec[spec] for spec, _ in count.most_common()]
