"""A loaded model: weights in llama.cpp and in our expert slots, the vocabulary, and facts about the model.

The engine process, tests and scripts use `Engine` and `Session`. `localrun.offload` stores and computes experts; this module
only decides budgets, threads and context length.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import llama_cpp as L
import xxhash

from localrun import time_slices
from localrun.engine import memory
from localrun.engine.chat.format import ChatEncoder, encoder_for
from localrun.engine.company import seconds_of_others
from localrun.engine.facts import Json, ModelFacts
from localrun.engine.first_context import FirstContext
from localrun.engine.grammar import Grammars
from localrun.engine.llama import Context, Vocab, metadata_int, metadata_str
from localrun.engine.options import DEFAULT_BATCH, EngineOptions, check_lengths
from localrun.engine.planner import hardware
from localrun.engine.planner.batch import BatchChoice
from localrun.engine.planner.compute_buffers import compute_bytes
from localrun.engine.planner.gpu import GpuPlacement, place_on_gpus, wanted_gpus
from localrun.engine.planner.hardware import Hardware
from localrun.engine.planner.hit_rates import hit_rates
from localrun.engine.planner.last_runs import Kind
from localrun.engine.planner.plan import GpuShare, Plan, PlanOptions
from localrun.engine.planner.planner import DEFAULT_CONTEXT, batch_for, is_large, plan_load
from localrun.engine.planner.sizes import ModelSizes, sizes_of_source
from localrun.engine.planner.token_rates import Spent, learn_tokens
from localrun.engine.session import Session
from localrun.engine.snapshots import SnapshotStore
from localrun.engine.tokenizer import Tokenizer
from localrun.errors import GpuMemoryError
from localrun.ggml.structures import LLAMA_CPP_PYTHON_VERSION
from localrun.offload.cache.trace import TraceHeader, TraceRecorder
from localrun.offload.memory_watch import reserve_bytes
from localrun.offload.model import OffloadedModel, OffloadOptions, open_offloaded
from localrun.options import check_fields
from localrun.paths import cache_dir
from localrun.quant.convert.dense_cache import DenseCache
from localrun.quant.model.source import ModelSource
from localrun.quant.open import dense_type, open_model

log = logging.getLogger(__name__)

LoadProgress = Callable[[float, str], None]
"""Called with (0 to 1, what is being done)."""


class LoadedModel(Protocol):
    """What the engine needs of a model; `OffloadedModel` is such, and so is llama.cpp's own in comparisons."""

    model: Any

    def take_error(self) -> BaseException | None:
        """Why the last llama_decode failed, if the model's own device was the cause; asked once."""

    def request_stop(self) -> None:
        """Fails the running decode within a layer; any thread."""

    def clear_stop(self) -> None:
        """Forgets an earlier stop."""

    def close(self) -> None:
        """Frees the model; contexts are freed before."""


class Engine:
    """A loaded model. Owns the model and its sessions; a context manager, `close` frees everything.

    Not thread-safe, except `stats` and the sessions' `stop`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        options: EngineOptions,
        *,
        path: Path,
        identity: str,
        file_bytes: int,
        placement: GpuPlacement | None = None,
        plan: Plan | None = None,
        first: FirstContext | None = None,
    ) -> None:
        self._loaded = loaded
        self._first = first
        self._sessions: list[Session] = []
        options = replace(options, n_batch=options.n_batch or DEFAULT_BATCH)
        self.options = options
        self.plan = plan
        self.vocab = Vocab(loaded.model)
        self._metadata = loaded.source.metadata if isinstance(loaded, OffloadedModel) else {}
        facts = _facts(loaded, options, path, identity, file_bytes, placement or GpuPlacement())
        self.facts = replace(facts, think_modes=self.chat_encoder.modes)

    @classmethod
    def open(
        cls,
        path: Path | str,
        options: EngineOptions,
        progress: LoadProgress | None = None,
        *,
        announce: Callable[[Plan], None] | None = None,
        note: Callable[[str], None] | None = None,
        learn: bool = True,
    ) -> Engine:
        """Loads a converted directory, a llama.cpp GGUF or an official checkpoint, experts on our device.

        Args:
            announce: called with the plan before any weight is read.
            note: called with what the user should know about this load besides.
            learn: use and update the model's routing profile; not for measurements on synthetic tokens.

        Raises:
            LocalrunError: any reason, with message and hint.
        """
        check_options(options)
        time_slices.shorten()
        report = progress or (lambda fraction, text: None)
        report(0.0, "reading the model's headers")
        source = open_model(Path(path), dense=dense_type(options.dense))
        sizes = sizes_of_source(source)
        n_ctx = _context_length(sizes, options)
        machine = _machine(source, sizes, options)
        batch = None if options.n_batch else _choose_batch(sizes, options, machine, learn=learn)
        if batch is not None:
            options = replace(options, n_batch=batch.n_batch)
        placement = place_on_gpus(source, sizes, options, n_ctx) if source.moe_layers else GpuPlacement()
        while True:
            first = _first_context(sizes, options, placement, n_ctx)
            try:
                plan, loaded = cls._load(
                    source, sizes, options, machine, placement, batch, report, announce, note, first, learn=learn
                )
                break
            except GpuMemoryError as error:
                if not placement.n_gpu_layers:
                    raise
                # A load takes a while: half, then nothing.
                most_share = 0.5 if placement.dense_share >= 1 else 0.0
                log.warning("%s; %s", error, "trying half of it" if most_share else "the dense model stays on the CPU")
                placement = place_on_gpus(source, sizes, options, n_ctx, most_share=most_share)
        file_bytes = sum(file.stat().st_size for file in source.files)
        return cls._checked(
            loaded,
            first.options if first is not None else options,
            path=Path(path),
            identity=source.identity,
            file_bytes=file_bytes,
            placement=placement,
            plan=plan,
            first=first,
        )

    @staticmethod
    def _load(
        source: ModelSource,
        sizes: ModelSizes,
        options: EngineOptions,
        machine: Hardware,
        placement: GpuPlacement,
        batch: BatchChoice | None,
        report: Callable[[float, str], None],
        announce: Callable[[Plan], None] | None,
        note: Callable[[str], None] | None,
        first: FirstContext | None,
        *,
        learn: bool,
    ) -> tuple[Plan, OffloadedModel]:
        plan = _plan(sizes, options, machine, placement, batch, learn=learn)
        if announce is not None:
            announce(plan)
        offload = OffloadOptions(
            ram_bytes=plan.placement.ram_bytes,
            ram_is_advice=options.ram_bytes is None,
            n_threads=options.n_threads or memory.physical_cores(),
            math=options.math,
            n_gpu_layers=placement.n_gpu_layers,
            gpus=placement.experts,
            first_context=first.make if first is not None else None,
            gpu_spare=placement.spare,
            mirror=Path(options.mirror).expanduser() if options.mirror else None,
            adaptive=options.adaptive,
            probe=True,
            profile_folder=cache_dir() / "profiles" if learn else None,
            dense_cache=DenseCache(cache_dir() / "dense", options.keep_dense_bytes),
            note=note,
            available=memory.available_memory,
            reserve_bytes=reserve_bytes(memory.total_memory() or 0),
            progress=lambda done, total: report(
                0.95 * done / max(1, total), f"reading dense tensors ({done} of {total})"
            ),
        )
        return plan, open_offloaded(source, offload)

    @classmethod
    def _checked(cls, loaded: LoadedModel, options: EngineOptions, **rest: Any) -> Engine:
        try:
            return cls(loaded, options, **rest)
        except BaseException:
            if (first := rest.get("first")) is not None:
                first.close()
            loaded.close()
            raise

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back. Raises LocalrunError if the model has no tokenizer."""
        return Tokenizer(self.vocab)

    @cached_property
    def chat_encoder(self) -> ChatEncoder:
        """The prompt format that the model was trained with."""
        return encoder_for(self._metadata)

    @cached_property
    def grammars(self) -> Grammars:
        """Grammars for the vocabulary. Raises LocalrunError if the model has no tokenizer."""
        return Grammars(self.tokenizer, self.facts.n_vocab, self.end_tokens)

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return tuple(token for token in range(self.facts.n_vocab) if self.vocab.is_end(token))

    @property
    def state_key(self) -> str:
        """32 hex digits: same key, interchangeable session snapshots."""
        parts = self.facts.identity, self.options.kv_type, LLAMA_CPP_PYTHON_VERSION  # whose format a state has
        return xxhash.xxh3_128_hexdigest(" ".join(parts).encode())

    def session(self, *, all_logits: bool = False, snapshots: SnapshotStore | None = None) -> Session:
        """A new, empty session.

        Args:
            snapshots: where the session saves and finds states.
            all_logits: enable `Session.feed_all_logits`; takes memory for n_batch rows of logits.
        """
        facts = self.facts
        context = self._first.take() if self._first is not None else None
        if context is not None and all_logits:
            context.close()  # its memory is for the other one
            context = None
        if context is None:
            context = Context(
                self._loaded.model, self.options, n_ctx=facts.n_ctx, n_threads=facts.n_threads, all_logits=all_logits
            )
        context.small_operations = isinstance(self._loaded, OffloadedModel) and self._loaded.dense.n_bytes > 0
        session = Session(self, context, snapshots)
        self._sessions.append(session)
        return session

    def stats(self) -> Mapping[str, Json]:
        """The expert path's counters, empty for a model without one; any thread."""
        if not isinstance(self._loaded, OffloadedModel):
            return {}
        telemetry = self._loaded.telemetry
        totals = telemetry.totals()
        tier = self._loaded.pool.residency.gpu
        gpu = (
            {
                "gpu_bytes": tier.used_bytes,
                "gpu_experts": tier.n_resident,
                "gpu_under_way": tier.n_under_way,
                "gpu_exchanges": tier.n_exchanged,
            }
            if tier
            else {}
        )
        table = self._loaded.pool.residency.table
        memory_facts = {
            "slot_bytes": table.used_bytes,
            "withheld_bytes": table.withheld_bytes,
            "unused_bytes": table.unused_bytes,
        }
        return {**asdict(totals), **gpu, **memory_facts, "hit_rate": totals.hit_rate, "layers": telemetry.layers()}

    def expert_map(self) -> Mapping[str, Json] | None:
        """Where every expert is; None for a model without our device; any thread."""
        return self._loaded.expert_map() if isinstance(self._loaded, OffloadedModel) else None

    @property
    def dense_ns(self) -> int:
        """Nanoseconds that our device has spent on dense matrices since the process began; 0 for a model without it."""
        return self._loaded.dense_ns if isinstance(self._loaded, OffloadedModel) else 0

    @property
    def attention_ns(self) -> int:
        """The same of attention and the indexer where they are ours."""
        return self._loaded.attention_ns if isinstance(self._loaded, OffloadedModel) else 0

    def spent(self) -> Spent:
        """What tokens have cost since the model was loaded; two of these tell what lies between."""
        if not isinstance(self._loaded, OffloadedModel):
            return Spent()
        totals = self._loaded.telemetry.totals()
        return Spent(
            matrices_s=self.dense_ns / 1e9,
            attention_s=self.attention_ns / 1e9,
            experts_s=totals.compute_s,
            waiting_s=totals.wait_s,
            reading_s=self._loaded.pool.residency.store.reading_s,
            others_s=seconds_of_others(),
            disk_bytes=totals.bytes_read,
            requests=totals.requests,
            wasted=totals.guesses_wasted,
            evictions=totals.evictions,
        )

    def learn_tokens(self, since: Spent, *, n_tokens: int, seconds: float, position: int) -> None:
        """Remembers for later plans what tokens cost here; they were decoded one by one and nothing else was.

        Args:
            since: `spent` before.
            seconds: of all of them.
            position: tokens in the context, on average.
        """
        if self.plan is not None and isinstance(self._loaded, OffloadedModel):
            kind: Kind = "answers" if self._loaded.learner.is_saved else "measurements"
            learn_tokens(
                self.plan,
                self.spent() - since,
                n_tokens=n_tokens,
                seconds=seconds,
                position=position,
                direct=self._loaded.pool.residency.store.direct,
                kind=kind,
            )

    def decoding(self, tokens: Sequence[int]) -> AbstractContextManager[None]:
        """Around each `llama_decode` of these tokens, for the expert path."""
        return self._loaded.decoding(tokens) if isinstance(self._loaded, OffloadedModel) else nullcontext()

    @contextmanager
    def recording(self, path: Path) -> Iterator[None]:
        """Appends the routing of everything that runs meanwhile to a trace file (`localrun.offload.cache.trace`); no effect
        without our device.

        Raises:
            FormatError, StoreError: the file is not a trace, or can't be written.
        """
        if not isinstance(self._loaded, OffloadedModel):
            yield
            return
        source, pool = self._loaded.source, self._loaded.pool
        header = TraceHeader.of(source.identity, source.moe_layers, self.facts.n_experts_used)
        with TraceRecorder(path, header) as recorder:
            pool.record(recorder)
            try:
                yield
            finally:
                pool.record(None)

    def forget(self, session: Session) -> None:
        """A session of this engine was closed."""
        if session in self._sessions:
            self._sessions.remove(session)

    def take_error(self) -> BaseException | None:
        """See `LoadedModel.take_error`."""
        return self._loaded.take_error()

    def request_stop(self) -> None:
        """See `LoadedModel.request_stop`."""
        self._loaded.request_stop()

    def clear_stop(self) -> None:
        """See `LoadedModel.clear_stop`."""
        self._loaded.clear_stop()

    def close(self) -> None:
        """Frees the sessions, then the model."""
        for session in list(self._sessions):
            session.close()
        if self._first is not None:
            self._first.close()
        self.vocab.close()
        self._loaded.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def check_options(options: EngineOptions) -> None:
    """Raises UsageError for values out of bounds or beyond this machine."""
    check_fields("engine", options)
    memory.check_threads(options.n_threads)
    memory.check_ram(options.ram_bytes)


def _context_length(sizes: ModelSizes, options: EngineOptions) -> int:
    """Tokens of context. Raises UsageError: more than the model was trained for."""
    trained = sizes.shape.n_ctx_train
    check_lengths(trained or 0, n_ctx=options.n_ctx, n_batch=options.n_batch)
    return options.n_ctx or min(trained or DEFAULT_CONTEXT, DEFAULT_CONTEXT)


def _first_context(
    sizes: ModelSizes, options: EngineOptions, placement: GpuPlacement, n_ctx: int
) -> FirstContext | None:
    """None: the dense model is not to go to a GPU."""
    if not placement.n_gpu_layers:
        return None
    device, _ = placement.experts[0]
    return FirstContext(
        device.name,
        replace(options, cache_in_ram=placement.cache_in_ram),
        n_ctx=n_ctx,
        n_threads=options.n_threads or memory.physical_cores(),
        cache_bytes=sizes.kv_bytes(n_ctx, options.kv_type, options.n_batch) if placement.dense_share >= 1 else 0,
        buffer_bytes=compute_bytes(sizes, n_ctx, options.n_batch),
    )


def _machine(source: ModelSource, sizes: ModelSizes, options: EngineOptions) -> Hardware:
    """What this load runs on, but its GPUs. A model that is small enough not to matter costs no measurement."""
    return hardware.detect(
        source.files,
        n_threads=options.n_threads,
        probe=is_large(sizes),
        n_drives=2 if options.mirror else 1,
        specs=sizes.specs,
        dense=sizes.dense_format,
    )


def _choose_batch(sizes: ModelSizes, options: EngineOptions, machine: Hardware, *, learn: bool) -> BatchChoice:
    """For a load that leaves it to the plan, before GPUs are divided and measured: their rates are assumed."""
    machine = replace(machine, gpus=hardware.measured_gpus(wanted_gpus(options), probe=False))
    shapes = dict.fromkeys(sizes.shape.moe_layers, sizes.shape.n_experts)
    rates = hit_rates(sizes.identity, shapes, learned=learn)
    return batch_for(sizes, machine, PlanOptions.of(options), rates)


def _plan(
    sizes: ModelSizes,
    options: EngineOptions,
    machine: Hardware,
    placement: GpuPlacement,
    batch: BatchChoice | None,
    *,
    learn: bool,
) -> Plan:
    """Budgets and expectations of a load."""
    gpus = hardware.measured_gpus([device for device, _ in placement.experts], probe=is_large(sizes))
    share = GpuShare(
        dense_share=placement.dense_share,
        expert_bytes=sum(size for _, size in placement.experts),
        cache_in_ram=placement.cache_in_ram,
    )
    ram_bytes = None if machine.ram_bytes is None else max(0, machine.ram_bytes - placement.ram_bytes)
    machine = replace(machine, gpus=gpus, ram_bytes=ram_bytes)
    return plan_load(sizes, options, machine, share, batch=batch, suggest=is_large(sizes), learned=learn)


def dense_bytes(source: ModelSource) -> int:
    """Size of all tensors but the stacked experts."""
    return sum(info.n_bytes for name, info in source.tensors.items() if "_exps." not in name)


def _facts(
    loaded: LoadedModel, options: EngineOptions, path: Path, identity: str, file_bytes: int, placement: GpuPlacement
) -> ModelFacts:
    model = loaded.model
    n_ctx_train = int(L.llama_model_n_ctx_train(model))
    vocab = Vocab(model)
    offloaded = loaded if isinstance(loaded, OffloadedModel) else None
    moe_layers = offloaded.source.moe_layers if offloaded else {}
    tier = offloaded.pool.residency.gpu if offloaded else None
    return ModelFacts(
        path=str(path),
        name=metadata_str(model, "general.name") or path.stem,
        architecture=metadata_str(model, "general.architecture") or "unknown",
        identity=identity,
        file_bytes=file_bytes,
        n_layers=int(L.llama_model_n_layer(model)),
        n_embd=int(L.llama_model_n_embd(model)),
        n_vocab=vocab.n_tokens,
        n_ctx=options.n_ctx or min(n_ctx_train, DEFAULT_CONTEXT),
        n_ctx_train=n_ctx_train,
        n_batch=options.n_batch,
        n_threads=options.n_threads or memory.physical_cores(),
        n_moe_layers=len(moe_layers),
        n_experts=metadata_int(model, "expert_count"),
        n_experts_used=metadata_int(model, "expert_used_count"),
        expert_bytes=max((layer.expert_bytes for layer in moe_layers.values()), default=0),
        ram_bytes=offloaded.ram_bytes if offloaded else 0,
        has_tokenizer=vocab.has_tokenizer,
        gpus=tuple(slots.device.name for slots in tier.slots if slots.banks) if tier is not None else (),
        dense_on_gpu=placement.dense_share >= 1,
        dense_gpu=placement.experts[0][0].name if placement.n_gpu_layers else "",
        n_gpu_layers=placement.n_gpu_layers,
    )
