"""A loaded model: llama.cpp's dense part and our experts, from opening to closing.

`setup.py` chooses kernels and divides the memory, `fill.py` reads the dense part, `pool.py` manages the experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from localrun.errors import DecodeError, FormatError
from localrun.ggml import log as llama_log
from localrun.offload.cache.drive_probe import DiskProfile, probe_disk
from localrun.offload.cache.slots import SlotState
from localrun.offload.cache.store import ExpertStore
from localrun.offload.cache.telemetry import Telemetry
from localrun.offload.dense import DenseMatrices
from localrun.offload.device.device import expert_device
from localrun.offload.fill import fill_model, free_model
from localrun.offload.gpu.stream_probe import unpackers
from localrun.offload.learning import Learner
from localrun.offload.memory_watch import MemoryWatch
from localrun.offload.pool import ExpertPool
from localrun.offload.readahead import hash_tables
from localrun.offload.routers import Routers
from localrun.offload.setup import ExpertSetup, OffloadOptions, choose_setup, fit_into_free, make_tier, slot_budget
from localrun.quant.checkpoint.source import CheckpointSource
from localrun.quant.model.shape import shape_of
from localrun.quant.model.source import ModelSource
from localrun.quant.open import open_model

__all__ = ["OffloadOptions", "OffloadedModel", "open_offloaded"]

_DIGITS = np.array(list("0123456789abcdefghijklmnopqrstuvwxyz"))

MAX_BATCH = 2048
"""Largest batch for the compiled expert path; longer ones go through Python, with dense matrices in pieces."""


class OffloadedModel:
    """A loaded model: llama.cpp's handle and our experts. A context manager; `close` frees everything.

    Attributes:
        model: llama.cpp's `llama_model *`.
        source: where the bytes come from.
        pool: the experts.
        dense: dense matrices on our device.
        learner: the routing profile.
        watch: gives memory back when it is short; None: nobody does.
        ram_bytes: RAM for experts, reads in flight included.
    """

    def __init__(
        self,
        source: ModelSource,
        model: Any,
        pool: ExpertPool,
        dense: DenseMatrices,
        learner: Learner,
        ram_bytes: int,
        watch: MemoryWatch | None = None,
    ) -> None:
        self.source = source
        self.model = model
        self.pool = pool
        self.dense = dense
        self.learner = learner
        self.ram_bytes = ram_bytes
        self.watch = watch

    @property
    def telemetry(self) -> Telemetry:
        """Counters of the expert path."""
        return self.pool.telemetry

    @property
    def dense_ns(self) -> int:
        """Nanoseconds that dense matrices took, of all models of this process."""
        return expert_device().process.dense_ns

    @property
    def attention_ns(self) -> int:
        """The same of attention and the indexer where they are ours."""
        return expert_device().process.attention_ns

    @contextlib.contextmanager
    def decoding(self, tokens: Sequence[int]) -> Iterator[None]:
        """Around each `llama_decode`: starts reading what these tokens are certain to need, and keeps guesses off the drive."""
        with self.pool.ahead.decoding():
            self.pool.residency.begin_batch(len(tokens))
            self.pool.residency.upgrade()
            self.pool.residency.step_gpu(self.learner.heat)
            self.pool.ahead.prepare(tokens)
            yield

    def expert_map(self) -> dict[str, Any]:
        """Where every expert is, for the map of the user interface; any thread.

        Returns:
            `{"n_experts": n, "layers": [row, ...]}`, a row being `{"layer": block, "where": "rdl...", "types": ["Q2_K", "MXFP4"],
            "type_of": "001...", "heat": [...]}` with one letter, digit and number per expert: g on a GPU, r in RAM, l being read,
            d on disk; which of the types its copy in RAM has (base 36); the number of uses, older ones counting less.
        """
        residency, layers = self.pool.residency, self.source.moe_layers
        loading = {(slot.layer, slot.expert) for slot in residency.table if slot.state is SlotState.LOADING}
        rows = []
        for layer, moe in layers.items():
            where = np.where(residency.table.resident[layer, : moe.n_experts] != 0, "r", "d")
            for expert in [e for at, e in loading if at == layer]:
                where[expert] = "l"
            if residency.gpu is not None:
                where[residency.gpu.where[layer, : moe.n_experts] >= 0] = "g"
            rows.append(
                {
                    "layer": layer,
                    "where": "".join(where.tolist()),
                    "types": ["/".join(dict.fromkeys(kind.name for kind in types)) for types in moe.variants],
                    "type_of": "".join(_DIGITS[residency.variants_of(layer)]),
                    "heat": [round(float(count), 1) for count in self.learner.heat(layer)],
                }
            )
        return {"n_experts": max(moe.n_experts for moe in layers.values()), "layers": rows}

    def take_error(self) -> BaseException | None:
        """Why the last `llama_decode` failed, if our device was the cause; asked once."""
        unread = expert_device().process.take_unread_joins()
        errors = self.pool.handover.take_error(), expert_device().take_error()
        error = errors[0] or errors[1]
        if error is None and unread:
            return DecodeError(f"the keys of {unread} layers were left to our device, and attention to llama.cpp")
        return error

    def request_stop(self) -> None:
        """Ends the running decode at the next layer; any thread."""
        self.pool.handover.request_stop()

    def clear_stop(self) -> None:
        """Forgets an earlier stop request."""
        self.pool.handover.clear_stop()

    def close(self) -> None:
        """Frees llama.cpp's model and the experts. Contexts of the model must be freed before."""
        if self.model is not None:
            model, self.model = self.model, None
            with contextlib.ExitStack() as steps:  # all of them, last one first, whatever fails
                steps.callback(self.dense.close)
                steps.callback(self.pool.close)
                steps.callback(_free, model)
                steps.callback(self.learner.close)
                steps.callback(self.pool.ahead.close)
                if self.watch is not None:
                    steps.callback(self.watch.close)

    def __enter__(self) -> OffloadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_offloaded(source: ModelSource, options: OffloadOptions) -> OffloadedModel:
    """Loads the dense model and prepares the experts; no expert is read.

    The order on GPUs: dense tensors, a first context that has computed (`options.first_context`), then slots in what is left.

    Raises:
        BudgetError: `ram_bytes` is below one layer's experts.
        FormatError, UnsupportedModelError: llama.cpp does not accept the model.
        GpuMemoryError: it does not accept it with the dense model on a GPU, as `n_gpu_layers` asks.
        StoreError: a file can't be read.
    """
    llama_log.install()
    device = expert_device()
    with contextlib.ExitStack() as opened:  # closes what was opened if anything after it fails
        setup = choose_setup(source, options)
        routers = Routers(source)
        pool, ram_bytes = _open_pool(source, setup, options, routers)
        opened.callback(pool.close)
        dense = DenseMatrices(n_threads=options.n_threads)
        opened.callback(dense.close)
        with device.loading(pool):
            model = fill_model(source, options, pool.handover.adopt, dense, routers.adopt)
        opened.callback(_free, model)
        device.exchange_with(
            options.gpus[0][0] if options.n_gpu_layers else None,
            all_layers=options.n_gpu_layers > shape_of(source).n_layers,
        )
        if options.first_context is not None and options.n_gpu_layers:
            with pool.idle():
                opened.callback(options.first_context(model).close)
            setup = fit_into_free(setup, options.gpu_spare)
        device.process.grow(max(dense.scratch_bytes, setup.scratch_bytes), MAX_BATCH * setup.n_used, MAX_BATCH)
        device.process.prepare_attention(options.n_threads)
        learner = Learner(source, pool.residency, pool.telemetry, options.profile_folder)
        tier = make_tier(source, setup, learner.profile.ranking())
        if tier is not None:
            pool.use_gpu(tier, n_unpackers=unpackers(options.n_threads))
        learner.keep_hottest()
        watch = None
        if options.available is not None:
            watch = MemoryWatch(pool.residency, options.available, options.reserve_bytes)
        result = OffloadedModel(source, model, pool, dense, learner, ram_bytes, watch)
        opened.pop_all()
    if options.profile_folder is not None:
        pool.ahead.warm(learner.profile.ranking())
    return result


def _free(model: Any) -> None:
    free_model(model)
    expert_device().forget_exchange()


def _open_pool(
    source: ModelSource, setup: ExpertSetup, options: OffloadOptions, routers: Routers
) -> tuple[ExpertPool, int]:
    """The experts, none of them read, and the RAM that they take with all buffers."""
    drive = probe_disk(source.files) if options.probe else DiskProfile()
    store = ExpertStore(
        source,
        setup.kernels,
        n_reads=drive.n_reads * (2 if options.mirror else 1),
        piece_bytes=drive.piece_bytes,
        verify=options.verify,
        mirror=_open_mirror(source, options.mirror) if options.mirror else None,
    )
    try:
        budget_bytes = slot_budget(setup, options, store.staging_bytes)
        pool = ExpertPool(
            source.moe_layers,
            setup.kernels,
            setup.wanted,
            store,
            budget_bytes,
            setup.n_used,
            hash_tables=hash_tables(source),
            adaptive=options.adaptive,
            routers=routers,
        )
    except BaseException:
        store.close()
        raise
    return pool, budget_bytes + store.staging_bytes + setup.gpu_staging_bytes


def _open_mirror(source: ModelSource, path: Path) -> ModelSource:
    """The second copy, checked to be one."""
    mirror = open_model(path, dense=source.dense if isinstance(source, CheckpointSource) else None)
    if mirror.identity != source.identity or [f.stat().st_size for f in mirror.files] != [
        f.stat().st_size for f in source.files
    ]:
        raise FormatError(
            f"{path}: not a copy of {source.path}", hint="copy the model's directory again, or leave out --mirror"
        )
    return mirror
