"""Loads a `ModelSource` into llama.cpp with all routed experts on our device.

llama.cpp gets metadata and a callback that fills dense tensors one by one (`llama_model_init_from_user`); expert tensors are
placed into our device's weights buffer, which holds nothing. With this entry llama.cpp checks no shapes against the file and
creates optional tensors that the model lacks, so both are handled here.
"""

from __future__ import annotations

import contextlib
import ctypes as C
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import BudgetError, FormatError, GpuMemoryError, LocalrunError, UnsupportedModelError
from localrun.ggml import log as llama_log
from localrun.ggml import structures as ggml
from localrun.ggml.devices import GpuDevice
from localrun.ggml.library import library
from localrun.ggml.structures import Tensor
from localrun.offload.cache.drive_probe import DiskProfile, probe_disk
from localrun.offload.cache.slots import SlotState
from localrun.offload.cache.store import ExpertStore
from localrun.offload.cache.telemetry import Telemetry
from localrun.offload.dense import DenseMatrices, dense_pattern, dense_tensors
from localrun.offload.device.compiled import MAX_VARIANTS
from localrun.offload.device.device import EXPERT_TENSORS, Weight, expert_device
from localrun.offload.gpu.slots import scratch_bytes
from localrun.offload.gpu.stream import Rings, StreamCosts, staging_bytes
from localrun.offload.gpu.stream_probe import measure, unpackers
from localrun.offload.gpu.tier import GpuTier
from localrun.offload.kernels import FfnKernel, FfnSpec, make_kernel
from localrun.offload.learning import Learner
from localrun.offload.pool import ExpertPool, floor_bytes, largest_slot
from localrun.offload.readahead import ReadAhead
from localrun.quant.model.source import PROJECTIONS, ModelSource, clamp_limits
from localrun.quant.open import open_model
from localrun.units import format_size

log = logging.getLogger(__name__)

_DIGITS = np.array(list("0123456789abcdefghijklmnopqrstuvwxyz"))

RING_SHARE = 0.25
"""Most of a GPU's memory for experts that rings may take: what lives there serves every token, what passes only long prompts."""

MAX_BATCH = 2048
"""Largest batch whose experts the compiled path takes at once; longer ones go through Python, dense matrices in pieces."""


@dataclass(frozen=True, slots=True)
class OffloadOptions:
    """How a model is placed.

    Attributes:
        ram_bytes: RAM for experts, staging included; None: as much as all experts need.
        ram_is_advice: nobody asked for `ram_bytes`: take what one layer needs if it is less, instead of refusing.
        n_threads: threads of the expert kernels.
        math: "int8": activations rounded to 8 bits as llama.cpp does; "f32": exact and slow.
        n_gpu_layers: layers of the dense model that llama.cpp puts on the first of `gpus`.
        gpus: devices that may be used, and how many bytes of each experts may take (0: none). Devices round experts' outputs in
            their own way, so the same seed may give other tokens than without.
        verify: compare checksums on an expert's first read.
        dense_on_device: our kernels multiply the big dense matrices too, where no GPU has them and `math` is "int8".
        probe: measure the drive (about a second, remembered) and read accordingly; else fixed defaults.
        profile_folder: where routing profiles are kept, to warm the next start; None: nothing is kept.
        stream: how long prompts use the GPUs for experts that have no place there: None: as measured at load (some tenths of a
            second), and not at all where that gains nothing; else by these times of any expert.
        mirror: a second copy of the model on another drive, read in parallel.
        adaptive: answer a miss from the base's smaller copy and read the better one later; the same seed may give other tokens.
        progress: called with (tensors loaded, tensors in all) while dense tensors are read.
    """

    ram_bytes: int | None = None
    ram_is_advice: bool = False
    n_threads: int = 1
    math: Literal["int8", "f32"] = "int8"
    n_gpu_layers: int = 0
    gpus: Sequence[tuple[GpuDevice, int]] = ()
    verify: bool = True
    dense_on_device: bool = True
    probe: bool = False
    profile_folder: Path | None = None
    stream: StreamCosts | None = None
    mirror: Path | None = None
    adaptive: bool = False
    progress: Callable[[int, int], None] | None = None


class OffloadedModel:
    """A loaded model: llama.cpp's handle and our experts. A context manager; `close` frees everything.

    Attributes:
        model: llama.cpp's `llama_model *`.
        source: where the bytes come from.
        pool: the experts.
        dense: dense matrices on our device.
        ahead: read-ahead.
        learner: the routing profile.
        ram_bytes: RAM for experts, reads in flight included.
    """

    def __init__(
        self,
        source: ModelSource,
        model: Any,
        pool: ExpertPool,
        dense: DenseMatrices,
        ahead: ReadAhead,
        learner: Learner,
        ram_bytes: int,
    ) -> None:
        self.source = source
        self.model = model
        self.pool = pool
        self.dense = dense
        self.ahead = ahead
        self.learner = learner
        self.ram_bytes = ram_bytes

    @property
    def telemetry(self) -> Telemetry:
        """Counters of the expert path."""
        return self.pool.telemetry

    @contextlib.contextmanager
    def decoding(self, tokens: Sequence[int]) -> Iterator[None]:
        """Around each `llama_decode`: starts reading what these tokens are certain to need, and keeps guesses off the drive."""
        self.pool.busy = True
        try:
            self.pool.upgrade()
            self.pool.step_gpu(self.learner.heat)
            self.ahead.prepare(tokens)
            yield
        finally:
            self.pool.last_call = time.monotonic()
            self.pool.busy = False

    def expert_map(self) -> dict[str, Any]:
        """Where every expert is, for the map of the user interface; any thread.

        Returns:
            `{"n_experts": n, "layers": [row, ...]}`, a row being `{"layer": block, "where": "rdl...", "types": ["Q2_K", "MXFP4"],
            "type_of": "001...", "heat": [...]}` with one letter, digit and number per expert: g on a GPU, r in RAM, l being read,
            d on disk; which of the types its copy in RAM has (base 36); the number of uses, older ones counting less.
        """
        table = self.pool.table
        loading = {(slot.layer, slot.expert) for slot in table if slot.state is SlotState.LOADING}
        rows = []
        for layer, moe in self.source.moe_layers.items():
            where = np.where(table.resident[layer, : moe.n_experts] != 0, "r", "d")
            for expert in [e for at, e in loading if at == layer]:
                where[expert] = "l"
            if self.pool.gpu is not None:
                where[self.pool.gpu.where[layer, : moe.n_experts] >= 0] = "g"
            rows.append(
                {
                    "layer": layer,
                    "where": "".join(where.tolist()),
                    "types": ["/".join(dict.fromkeys(kind.name for kind in types)) for types in moe.variants],
                    "type_of": "".join(_DIGITS[self.pool.variants_of(layer)]),
                    "heat": [round(float(count), 1) for count in self.learner.heat(layer)],
                }
            )
        return {"n_experts": max(moe.n_experts for moe in self.source.moe_layers.values()), "layers": rows}

    def take_error(self) -> BaseException | None:
        """Why the last `llama_decode` failed, if our device was the cause; asked once."""
        return self.pool.take_error()

    def request_stop(self) -> None:
        """Ends the running decode at the next layer; any thread."""
        self.pool.request_stop()

    def clear_stop(self) -> None:
        """Forgets an earlier stop request."""
        self.pool.clear_stop()

    def close(self) -> None:
        """Frees llama.cpp's model and the experts. Contexts of the model must be freed before."""
        if self.model is not None:
            model, self.model = self.model, None
            with contextlib.ExitStack() as steps:  # all of them, last one first, whatever fails
                steps.callback(self.dense.close)
                steps.callback(self.pool.close)
                steps.callback(_free_model, model)
                steps.callback(self.learner.close)
                steps.callback(self.ahead.close)

    def __enter__(self) -> OffloadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_offloaded(source: ModelSource, options: OffloadOptions) -> OffloadedModel:
    """Loads the dense model and prepares the experts; no expert is read.

    Raises:
        BudgetError: `ram_bytes` is below one layer's experts.
        FormatError, UnsupportedModelError: llama.cpp does not accept the model.
        GpuMemoryError: it does not accept it with the dense model on a GPU, as `n_gpu_layers` asks.
        StoreError: a file can't be read.
    """
    llama_log.install()
    device = expert_device()
    with contextlib.ExitStack() as opened:  # closes what was opened if anything after it fails
        kernels = _make_kernels(source, options)
        rings = _rings(source, kernels, options)
        pool, ram_bytes = _open_pool(source, kernels, rings, options)
        opened.callback(pool.close)
        dense = DenseMatrices(n_threads=options.n_threads)
        opened.callback(dense.close)
        with device.loading(pool):
            model = _load(source, options, pool, dense)
        opened.callback(_free_model, model)
        scratch = max(
            [dense.scratch_bytes, *(k.call.scratch_bytes for layer in source.moe_layers for k in pool.kernels(layer))]
        )
        device.process.grow(scratch, MAX_BATCH * _metadata_int(source, "expert_used_count"), MAX_BATCH)
        learner, ahead = Learner(source, pool, options.profile_folder), ReadAhead(source, pool, depth=pool.read_depth)
        _use_gpus(pool, rings, options, learner.profile.ranking())
        learner.keep_hottest()
        result = OffloadedModel(source, model, pool, dense, ahead, learner, ram_bytes)
        opened.pop_all()
    if options.profile_folder is not None:
        ahead.warm(learner.profile.ranking())
    return result


def _rings(source: ModelSource, kernels: Mapping[int, Sequence[FfnKernel]], options: OffloadOptions) -> Rings | None:
    """What long prompts stream through which GPU, by measurement; None: nothing.

    All formats of the model through the GPU on which its commonest format is fastest; rings take at most a quarter of what experts
    may have there.
    """
    count: Counter[FfnSpec] = Counter()
    by_spec: dict[FfnSpec, FfnKernel] = {}
    for layer, variants in kernels.items():
        for variant, n in zip(*np.unique(_wanted_variants(source, layer), return_counts=True), strict=True):
            kernel = variants[int(variant)]
            by_spec[kernel.spec] = kernel
            count[kernel.spec] += int(n)
    ordered = [by_spec[spec] for spec, _ in count.most_common()]
    if not ordered:
        return None
    n_unpackers = unpackers(options.n_threads)

    def times(device: GpuDevice, kernel: FfnKernel) -> StreamCosts | None:
        return options.stream or measure(device, kernel, n_unpackers)

    best: tuple[float, int, StreamCosts] | None = None
    scratch = max(scratch_bytes(kernel.spec) for kernel in ordered)  # else what is left could hold no expert
    for gpu, (device, budget) in enumerate(_expert_gpus(options)):
        if Rings(gpu, ordered[:1], ()).bytes_on(device) > (budget - scratch) * RING_SHARE:
            continue
        costs = times(device, ordered[0])
        if costs is not None and (best is None or costs.expert_s < best[0]):
            best = costs.expert_s, gpu, costs
    if best is None:
        return None
    _, gpu, costs = best
    device, budget = _expert_gpus(options)[gpu]
    found = [(ordered[0], costs)]
    for kernel in ordered[1:]:
        if Rings(gpu, [k for k, _ in found] + [kernel], ()).bytes_on(device) > (budget - scratch) * RING_SHARE:
            break
        other = times(device, kernel)
        if other is not None:
            found.append((kernel, other))
    log.info("%s: long prompts stream experts (%s)", device.name, costs)
    return Rings(gpu, [kernel for kernel, _ in found], [costs for _, costs in found])


def _expert_gpus(options: OffloadOptions) -> list[tuple[GpuDevice, int]]:
    return [(device, budget) for device, budget in options.gpus if budget > 0]


def _use_gpus(
    pool: ExpertPool, rings: Rings | None, options: OffloadOptions, ranking: Sequence[tuple[int, int]]
) -> None:
    gpus = _expert_gpus(options)
    if not gpus:
        return
    specs = {
        (layer, variant): kernel.spec for layer in pool.layers for variant, kernel in enumerate(pool.kernels(layer))
    }
    ranked = set(ranking)
    n_experts = max(moe.n_experts for moe in pool.layers.values())
    others = [
        (layer, expert) for expert in range(n_experts) for layer, moe in pool.layers.items() if expert < moe.n_experts
    ]
    order = [*ranking, *(at for at in others if at not in ranked)]
    pool.use_gpu(GpuTier(gpus, specs, pool.wanted, order, rings), n_unpackers=unpackers(options.n_threads))


def _free_model(model: Any) -> None:
    import llama_cpp

    llama_cpp.llama_model_free(model)


def _open_pool(
    source: ModelSource, kernels: Mapping[int, Sequence[FfnKernel]], rings: Rings | None, options: OffloadOptions
) -> tuple[ExpertPool, int]:
    if not source.moe_layers:
        raise UnsupportedModelError(
            f"{source.path}: no routed experts (blk.N.ffn_gate_exps)",
            hint="localrun runs mixture-of-experts models; dense ones run in llama.cpp itself",
        )
    drive = probe_disk(source.files) if options.probe else DiskProfile()
    store = ExpertStore(
        source,
        kernels,
        n_lanes=drive.lanes * (2 if options.mirror else 1),
        piece_bytes=drive.piece_bytes,
        verify=options.verify,
        mirror=_open_mirror(source, options.mirror) if options.mirror else None,
    )
    try:
        n_used = _metadata_int(source, "expert_used_count")
        wanted = {layer: _wanted_variants(source, layer) for layer in source.moe_layers}
        all_bytes = sum(
            align_up(kernels[layer][variant].slot_bytes, PAGE_BYTES)
            for layer in source.moe_layers
            for variant in wanted[layer]
        )
        if options.adaptive:
            all_bytes *= 2  # while copies change, experts have two, and copies of two sizes leave holes
        # What goes to a GPU goes through more buffers, as ggml rows, which are no larger than a slot.
        gpu_staging = largest_slot(kernels) if _expert_gpus(options) else 0
        if rings is not None:
            gpu_staging += staging_bytes(rings.kernels)
        if options.ram_bytes is None:
            arena_bytes = all_bytes
        else:
            arena_bytes = min(all_bytes, options.ram_bytes - store.staging_bytes - gpu_staging)
            # An upgrade holds two slots until the next token, so that they can't serve its neighbours.
            floor = floor_bytes(kernels, n_used + (2 if options.adaptive else 0))
            if arena_bytes < floor and options.ram_is_advice:
                log.warning("little memory is free: RAM for experts is the least that works, %s", format_size(floor))
                arena_bytes = floor
            if arena_bytes < floor:
                raise BudgetError(
                    f"--ram {format_size(options.ram_bytes)} is too little: one layer's {n_used} experts need "
                    f"{format_size(floor)} and reading needs {format_size(store.staging_bytes)}",
                    hint=f"give --ram at least {format_size(floor + store.staging_bytes + gpu_staging)}",
                )
        pool = ExpertPool(source.moe_layers, kernels, wanted, store, arena_bytes, n_used, adaptive=options.adaptive)
    except BaseException:
        store.close()
        raise
    return pool, arena_bytes + store.staging_bytes + gpu_staging


def _open_mirror(source: ModelSource, path: Path) -> ModelSource:
    """The second copy, checked to be one."""
    mirror = open_model(path)
    if mirror.identity != source.identity or [f.stat().st_size for f in mirror.files] != [
        f.stat().st_size for f in source.files
    ]:
        raise FormatError(
            f"{path}: not a copy of {source.path}", hint="copy the model's directory again, or leave out the mirror"
        )
    return mirror


def _make_kernels(source: ModelSource, options: OffloadOptions) -> dict[int, list[FfnKernel]]:
    """By layer a kernel for each variant; one per distinct shape, shared by the layers that have it."""
    limits = clamp_limits(source)
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


def _metadata_int(source: ModelSource, key: str) -> int:
    name = f"{source.metadata['general.architecture']}.{key}"
    value = source.metadata.get(name)
    if not isinstance(value, int) or value <= 0:
        raise FormatError(f"{source.path}: metadata key {name} is {value!r}, not a positive integer")
    return value


def _load(source: ModelSource, options: OffloadOptions, pool: ExpertPool, dense: DenseMatrices) -> Any:
    import llama_cpp

    lib = library()
    llama_cpp.llama_backend_init()
    header = source.gguf_header()
    metadata = lib.gguf_init_from_buffer(header, len(header), ggml.GgufInitParams(True, None))
    if not metadata:
        raise FormatError(f"{source.path}: llama.cpp does not accept the metadata: {llama_log.recent_errors()}")
    filler = _Filler(source, pool, dense, options.progress)
    patterns = [EXPERT_TENSORS]
    if options.dense_on_device and options.math == "int8" and options.n_gpu_layers == 0:
        patterns += filter(None, [dense_pattern(dense_tensors(source))])
    overrides = (ggml.TensorBuftOverride * (len(patterns) + 1))()  # the last one, empty, ends the list
    for override, pattern in zip(overrides, patterns, strict=False):
        override.pattern, override.buft = pattern.encode(), expert_device().weights_buffer_type
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = options.n_gpu_layers
    params.use_extra_bufts = False
    # The dense model goes to one device: the first that was chosen. An empty list means none, whatever llama.cpp was built for.
    devices = (C.c_void_p * 2)(options.gpus[0][0].address if options.n_gpu_layers else None, None)
    params.devices = C.cast(devices, C.c_void_p)
    params.tensor_buft_overrides = C.cast(overrides, C.c_void_p)
    callback = llama_cpp.llama_model_set_tensor_data_t(filler)
    llama_log.clear()
    try:
        model = llama_cpp.llama_model_init_from_user(metadata, callback, None, params)
    finally:
        lib.gguf_free(metadata)
    if filler.error is not None:
        if model:
            llama_cpp.llama_model_free(model)
        raise filler.error
    if not model and options.n_gpu_layers:
        raise GpuMemoryError(
            f"{options.gpus[0][0].name} does not take the dense model: {llama_log.recent_errors()}", hint="--gpu none"
        )
    if not model:
        raise UnsupportedModelError(f"{source.path}: llama.cpp can't load this model: {llama_log.recent_errors()}")
    return model


class _Filler:
    """llama.cpp's callback: fills each tensor that it created. Errors are kept; after the first one nothing more is read."""

    def __init__(
        self, source: ModelSource, pool: ExpertPool, dense: DenseMatrices, progress: Callable[[int, int], None] | None
    ) -> None:
        self._source, self._pool, self._dense, self._progress = source, pool, dense, progress
        self._lib = library()
        self._n_dense = sum("_exps" not in name for name in source.tensors)
        self._n_done = 0
        self.error: BaseException | None = None

    def __call__(self, address: int, user_data: Any) -> None:
        if self.error is not None:
            return
        try:
            self._fill(address)
        except BaseException as error:  # a callback from C: ctypes would swallow it
            self.error = error

    def _fill(self, address: int) -> None:
        tensor = Tensor.from_address(address)
        name = tensor.name.decode()
        info = self._source.tensors.get(name)
        if info is None:
            self._fill_optional(address, name)
            return
        shape = tuple(tensor.ne)
        # wo_a is stored as two dimensions and created as three (deepseek4.cpp): rows and elements must agree.
        if shape[0] != info.shape[0] or math.prod(shape) != math.prod(info.shape) or tensor.type != info.type:
            raise FormatError(
                f"{self._source.path}: {name} is {info.type.name} {list(info.shape)}, llama.cpp expects "
                f"{GGMLQuantizationType(tensor.type).name} {list(shape)}",
                hint="the file does not fit its own metadata; convert it again",
            )
        weight = expert_weight(name)
        if weight is not None and expert_device().is_ours(address):
            self._pool.adopt(address, weight)
            return
        if expert_device().is_ours(address):
            expert_device().attach(address, self._dense.add(info.type, shape, self._source.read_tensor(name)))
        else:
            self._set(address, name, self._source.read_tensor(name))
        self._n_done += 1
        if self._progress is not None:
            self._progress(self._n_done, self._n_dense)

    def _set(self, address: int, name: str, data: np.ndarray[Any, Any]) -> None:
        expected = self._lib.ggml_nbytes(address)
        if data.nbytes != expected:
            raise FormatError(f"{self._source.path}: {name} has {data.nbytes} bytes, llama.cpp expects {expected}")
        self._lib.ggml_backend_tensor_set(address, data.ctypes.data, 0, data.nbytes)

    def _fill_optional(self, address: int, name: str) -> None:
        """Tensors that `llama_model_init_from_user` creates although the model has none: neutral values."""
        tensor = Tensor.from_address(address)
        n = math.prod(tensor.ne)
        if name == "output.weight" and "token_embd.weight" in self._source.tensors:
            self._set(address, name, self._tied_output(tensor))
        elif tensor.type == ggml.TYPE_F32 and name.endswith(("scale", "bias")):
            self._set(address, name, np.full(n, 1.0 if name.endswith("scale") else 0.0, np.float32))
        else:
            raise FormatError(
                f"{self._source.path}: tensor {name} {list(tensor.ne)} is missing", hint="convert or download it again"
            )

    def _tied_output(self, tensor: Tensor) -> np.ndarray[Any, Any]:
        """A model without output.weight uses its token embeddings; llama.cpp created the tensor as F32."""
        import gguf

        info = self._source.tensors["token_embd.weight"]
        raw = self._source.read_tensor("token_embd.weight")
        rows = gguf.dequantize(raw.reshape(info.shape[1], -1), info.type)
        if tensor.type != ggml.TYPE_F32 or rows.shape != (tensor.ne[1], tensor.ne[0]):
            raise LocalrunError(
                f"{self._source.path}: output.weight is missing and can't be made from token_embd.weight"
            )
        return np.ascontiguousarray(rows, np.float32)


def expert_weight(name: str) -> Weight | None:
    """`blk.3.ffn_up_exps.weight` -> Weight(3, 1); None for other tensors."""
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[3] != "weight" or not parts[2].endswith("_exps"):
        return None
    projection = parts[2].removeprefix("ffn_").removesuffix("_exps")
    return Weight(int(parts[1]), PROJECTIONS.index(projection)) if projection in PROJECTIONS else None
