"""Predicts tokens per second from a token's bytes and multiplications, and identifies the bottleneck.

A token's time on a machine is a sum over resources, each with its own rate: dense matrices and cache rows through RAM or GPU
memory, experts through the memory that they are in, misses through the drive, and a time per layer for everything else (mHC,
attention, routing, norms, graph overhead). With experts on a GPU and in RAM, both compute concurrently, as far as they don't
slow each other down. The three estimates differ in what can't be known beforehand: `low` assumes changing topics and no overlap
of reads, `high` a single topic and reads overlapped with computation, `likely` is in between.

Rates of kernels, memory, drive and GPUs come from the machine (`hardware.py`), measured or assumed. The rest are constants
here; docs/planner.md has the known weaknesses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from localrun.engine.planner.hardware import Hardware, Known
from localrun.engine.planner.hit_rates import HitRates, touched
from localrun.engine.planner.sizes import ModelSizes
from localrun.offload.gpu.rates import GpuRates
from localrun.offload.kernels.layout import expert_layout
from localrun.offload.kernels.rates import ExpertRates, assumed_dense, assumed_expert
from localrun.options import OWN_KV_TYPES
from localrun.quant.model.shape import CSA, HCA
from localrun.quant.model.source import ExpertTypes

LAYER_S = 0.2e-3
LAYER_VALUE_S = 0.15e-6
"""Per layer and token on the CPU besides weights and attention: fixed, and per value of the hidden state. [m] Whole Flash (4096
values) on two Zen 4 cores: 0.78, 0.84, 0.86 and 0.87 ms in four runs. How much is fixed follows from slices with 512, 4096 and
7168 values. More cores: not measured."""

ATTENTION_MACS_PER_CORE = 8e9
BATCH_ATTENTION_MACS_PER_CORE = 10e9
"""Multiplications per second of attention and indexer in llama.cpp, one token and batches. [m] The slices at 0 to 2048 tokens."""

OWN_ATTENTION_MACS_PER_CORE = 30e9
OWN_BATCH_ATTENTION_MACS_PER_CORE = 37e9
"""The same of our kernels. [m] Three layers of Flash on two Zen 4 cores: 394 million for a token at 131,072 in 5.9 ms (33e9 per
core), 69 million at 4096 in 1.4 ms (24e9); in batches 142 million at 32,256 in 1.8 ms (39e9), 35 million at 0 in 0.51 ms (34e9)."""

BATCH_VALUE_S = 0.28e-6
"""Per layer, token and value of the hidden state, of one core, in batches, besides matrices and attention. [m] The same slices:
0.23 to 0.38."""

TOKEN_S = 0.5e-3
"""Per token besides layers: embedding, logits, the call itself. [m] With `LAYER_S`, together."""

LAYER_NODES = 120
"""Operations of a layer that a GPU has to start. llama.cpp's graph has 196 per layer, views included."""

LAYER_VALUES = 190
"""Passes over the hidden state that a layer's small operations come to in a batch, from `BATCH_VALUE_S` and what the GPU probe says
of one pass on a core of the same machine."""

BUS_SHARE = 0.8
"""Of a bus's rate on paper that copies of pinned memory reach. Assumed."""

PAGEABLE_SHARE = 0.4
"""The same of ordinary memory, in which llama.cpp has a cache. Assumed."""

CACHE_CALLS = 3
"""Round trips of the expert path that a layer's additional ones come to with the cache in RAM. [m] On the RPC device 12 more waits
per layer and token; that four cost as much as one of a whole call is assumed."""

DISK_SHARE = (0.75, 1.0, 1.2)
"""Effective read rate for misses, relative to the probed rate: low, likely, high. [m] Whole Flash, two Zen 4 cores: 1.35 to 1.69
GB/s while a read was under way, of a drive that sustains 1.7 to 1.9 with 8 reads of 4 MiB, 1.2 with 4; beside other programs,
which slow the probe down more than tokens, 1.59, 1.27 and 1.41 where it said 1.27, 1.21 and 1.10."""

HIDDEN_READS = (0.4, 0.58, 0.85)
"""Part of a token's reads that hides behind its computing: reads of the next layers' likely experts and of hash layers go on
while others are multiplied; what nobody guessed is waited for. More than the computing takes can't hide. [m] Whole Flash on two
Zen 4 cores, guessing two layers ahead: 0.54 and 0.53 of 0.7 s in MXFP4, 0.63 and 0.63 of 0.3 s in Q2_K, 0.48 of 0.5 s with half
of the memory; beside one busy process per core, which makes the computing longer, 0.85 and 0.73."""

USEFUL_READS = 0.95
"""Part of the bytes read that a layer then uses; the rest are wrong guesses. [m] The same runs: 0.97, 0.97, 0.93, 0.95 and 0.94; in
company 0.85 and 0.87."""

PACK_WEIGHTS_PER_CORE = 16e9
"""Weights per second of one core that arranges experts it has read for the kernels, on the cores that compute. [m] One Zen 4 core,
the thread's own time, with the code of the recorded runs: MXFP4 17.5e9, Q2_K 14.2e9. Reading rows in order takes 1 / 1.2 and
1 / 2.4 of that, which no whole run has been recorded with: two bits may be planned some 20 ms too slow."""

INSIDE = {"dense model in RAM": 0.775}
"""Rate inside a token, relative to what the probe of a single kernel gives: threads wake for each matrix, shapes differ, and reads
and packing use the same cores and memory. [m] Whole Flash at rest: 8-bit matrices 0.89 and 0.96, Q4_K 0.73, 0.59 and 0.71."""

INSIDE_THREADS = 4
"""`INSIDE` is for few cores; with more, nothing is known, and the probes' rates are used as they are."""

PROMPT_HIDDEN_READS = (0.0, 0.5, 1.0)
"""The same for a prompt, where the next layer is read ahead too, at the drive's probed rate. [m] The slice under 2,
3 and 5 GiB, nine prompts: 0.5 fits best on average."""

HIDDEN, USEFUL = "hidden reads", "useful reads"
"""Names in `Hardware.seen` of what `HIDDEN_READS` and `USEFUL_READS` assume."""

SECOND_DRIVE_GAIN = 0.375
"""A second drive's gain by reading from a mirror, as published (colibri: +37.5 % with block-level mirrors)."""

MARGIN = 0.15
"""How much the same run differs an hour later, for no visible cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentShares:
    """A model's placement, as shares.

    Attributes:
        dense_share: of the dense model's layers and their cache, on the GPU.
        cache_in_ram: that cache is in RAM, from where llama.cpp copies it to the GPU for every batch.
        gpu_share, ram_share: of all experts; what is on the GPU is not in RAM.
        gpu: rates of the slowest GPU; None without one.
        bus_bytes_per_s: of the slowest GPU, in one direction, on paper.
        miss_bytes: bytes that a miss waits for.
    """

    ram_share: float
    gpu_share: float = 0.0
    dense_share: float = 0.0
    cache_in_ram: bool = False
    gpu: GpuRates | None = None
    bus_bytes_per_s: float = math.inf
    miss_bytes: float

    @property
    def is_cpu_only(self) -> bool:
        """No GPU has a part in it."""
        return self.gpu_share == 0 and self.dense_share == 0

    @property
    def share(self) -> float:
        """Of experts that need no drive."""
        return min(1.0, self.ram_share + self.gpu_share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """One estimate of a phase.

    Attributes:
        tokens_per_s: the rate.
        hit_rate: share of expert requests that need no read.
        disk_bytes: read per token.
        seconds: seconds per token by resource; overlapped time counts less.
    """

    tokens_per_s: float
    hit_rate: float
    disk_bytes: float
    seconds: Mapping[str, float]

    @property
    def limit(self) -> str:
        """The resource that takes most of the time."""
        return max(self.seconds, key=lambda name: self.seconds[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Three estimates of a phase."""

    low: Rate
    likely: Rate
    high: Rate

    def covers(self, tokens_per_s: float) -> bool:
        """Whether a measurement is within the range."""
        return self.low.tokens_per_s <= tokens_per_s <= self.high.tokens_per_s

    def error(self, tokens_per_s: float) -> float:
        """Of `likely`, relative to a measurement: 0.2 is 20 % too fast."""
        return self.likely.tokens_per_s / tokens_per_s - 1


# --- answers ----------------------------------------------------------------------------------------------------------


def predict_decode(
    sizes: ModelSizes,
    shares: ResidentShares,
    machine: Hardware,
    rates: HitRates,
    *,
    position: int,
    kv_type: str,
    company: float = 1.0,
) -> Range:
    """Speed of answers with `position` tokens in the context.

    Args:
        company: how many times as long the CPU takes for matrices because other programs use it, too.
    """
    used = len(sizes.shape.moe_layers) * sizes.shape.n_used
    on_gpu = rates.hottest(shares.gpu_share) if shares.gpu_share > 0 else 0.0
    known = machine.known(sizes.formats, reads=True) if shares.is_cpu_only else Known()

    def rate(hits: float, estimate: int) -> Rate:
        disk_bytes = (1 - hits) * used * shares.miss_bytes / known.of(USEFUL, USEFUL_READS)
        seconds = inside(sizes, shares, machine, on_gpu, disk_bytes, position=position, kv_type=kv_type)
        seconds = {name: s * (1 + (company - 1) * COMPANY.get(name, 0.0)) for name, s in seconds.items()}
        computing_s = sum(seconds.values())
        seconds["drive"] = waiting_for(machine, known, disk_bytes, computing_s, estimate)
        return Rate(tokens_per_s=1 / sum(seconds.values()), hit_rate=hits, disk_bytes=disk_bytes, seconds=seconds)

    unsteady, steady, best = (
        max(curve(shares.share), on_gpu) if sizes.n_copies else 1.0
        for curve in (rates.unsteady, rates.steady, rates.best)
    )
    return _widened(rate(unsteady, 0), rate(steady, 1), rate(best, 2))


def inside(
    sizes: ModelSizes,
    shares: ResidentShares,
    machine: Hardware,
    on_gpu: float,
    disk_bytes: float,
    *,
    position: int,
    kv_type: str,
) -> dict[str, float]:
    """Seconds as `computing` has them, but as they are inside whole tokens: as seen on this machine, or as usual."""

    def by_rates_of(machine: Hardware) -> dict[str, float]:
        return computing(sizes, shares, machine, on_gpu, disk_bytes, position=position, kv_type=kv_type)

    alone = by_rates_of(machine)
    if not shares.is_cpu_only:
        return alone
    reads = disk_bytes >= FEW_READS * used_bytes(sizes, shares)
    usual = INSIDE if machine.cpu is not None and machine.n_threads <= INSIDE_THREADS and reads else {}
    others, same = machine.known("", reads=reads), machine.known(sizes.formats, reads=reads)
    by_reference = by_rates_of(machine.reference)
    return {
        name: by_reference[name] / same.rates[name] if name in same.rates else s / others.of(name, usual.get(name, 1.0))
        for name, s in alone.items()
    }


def used_bytes(sizes: ModelSizes, shares: ResidentShares) -> float:
    """Bytes of the experts that a token uses."""
    return len(sizes.shape.moe_layers) * sizes.shape.n_used * shares.miss_bytes


FEW_READS = 0.02
"""Share of a token's expert bytes below which reads don't matter for what else it does."""


def computing(
    sizes: ModelSizes,
    shares: ResidentShares,
    machine: Hardware,
    on_gpu: float,
    disk_bytes: float,
    *,
    position: int,
    kv_type: str,
) -> dict[str, float]:
    """Seconds of a token by resource, all but waiting for the drive, by the rates of single kernels.

    Args:
        on_gpu: share of its experts that GPUs compute.
        disk_bytes: read meanwhile, and packed into slots.
    """
    used = len(sizes.shape.moe_layers) * sizes.shape.n_used
    expert_s = used * experts_on(machine, sizes).decode_s if sizes.n_copies else 0.0
    seconds = dense_token(sizes, shares, machine, position, kv_type)
    on_gpu_s = 0.0
    if shares.gpu is not None and on_gpu:
        on_gpu_s = on_gpu * used * sizes.mean_file_bytes / shares.gpu.decode_bytes_per_s
        on_gpu_s += len(sizes.shape.moe_layers) * shares.gpu.latency_s
    seconds |= _both((1 - on_gpu) * expert_s, on_gpu_s, shares.gpu)
    n_packed = disk_bytes / shares.miss_bytes if shares.miss_bytes else 0.0
    seconds["experts in RAM"] += n_packed * sizes.shape.expert_weights / (PACK_WEIGHTS_PER_CORE * machine.n_threads)
    return seconds


COMPANY = {"dense model in RAM": 1.0, "attention": 1.0, "layers": 1.5, "experts in RAM": 0.6}
"""How much longer resources in `Rate.seconds` take while other programs compute, relative to matrices; drives and GPUs don't.
Small operations belong to one thread, for which all others wait; the calls of experts are long, and follow a pause. [m] Whole
Flash on two Zen 4 cores beside one busy process per core: matrices 3.2 times as long, small operations 2.3, experts 2.7 in MXFP4,
where more of the reads hid; 2.0, 2.8 and 1.9 in Q2_K; 1.5 to 2.2 in earlier runs."""


def waiting_for(machine: Hardware, known: Known, disk_bytes: float, computing_s: float, estimate: int = 1) -> float:
    """Seconds that a token waits for reads.

    Args:
        known: of models in its formats.
        disk_bytes: that it reads.
        estimate: 0: low, 1: likely, 2: high.
    """
    # A rate that tokens have shown is one of tokens.
    share = 1.0 if machine.drive_seen and estimate else DISK_SHARE[estimate]
    slowest, fastest = machine.disk_spread
    share = (min(share, slowest), share, max(share, fastest))[estimate]
    read_s = disk_bytes / (share * drive_bytes_per_s(machine))
    return waiting(read_s, computing_s, known.of(HIDDEN, HIDDEN_READS[estimate]))


def waiting(read_s: float, computing_s: float, hidden: float = HIDDEN_READS[1]) -> float:
    """Seconds of a token's reads that nothing hides."""
    return max((1 - hidden) * read_s, read_s - computing_s)


def dense_token(
    sizes: ModelSizes, shares: ResidentShares, machine: Hardware, position: int, kv_type: str
) -> dict[str, float]:
    """Seconds per token by resource, without experts."""
    n_bytes = sizes.dense_token_bytes + sizes.kv_read_bytes(position, kv_type)
    attention = attention_macs(sizes, position)
    on_gpu: dict[str, float] = {}
    if shares.dense_share and shares.gpu is not None:
        gpu = shares.gpu
        on_gpu = {
            "dense model on the GPU": n_bytes / gpu.dense_bytes_per_s + attention / gpu.dense_macs_per_s,
            "layers": sizes.shape.n_layers * (LAYER_NODES * gpu.node_s + gpu.latency_s) + TOKEN_S,
        }
        if shares.cache_in_ram:
            on_gpu["layers"] += CACHE_CALLS * sizes.shape.n_layers * gpu.latency_s
            on_gpu["GPU's bus"] = cache_copy_s(sizes, position, kv_type, shares.bus_bytes_per_s)
    layer_s = LAYER_S + LAYER_VALUE_S * sizes.shape.n_embd
    on_cpu = {
        "dense model in RAM": n_bytes / dense_on(machine)[0],
        "attention": attention / (machine.n_threads * attention_rates(sizes, kv_type)[0]),
        "layers": sizes.shape.n_layers * layer_s + TOKEN_S,
    }
    return _shared(on_gpu, on_cpu, shares.dense_share if on_gpu else 0.0)


def _shared(on_gpu: Mapping[str, float], on_cpu: Mapping[str, float], share: float) -> dict[str, float]:
    """Seconds by resource where `share` of the layers are on the GPU: one after the other."""
    if share in (0, 1):
        return dict(on_gpu if share else on_cpu)
    names = [*on_gpu, *(name for name in on_cpu if name not in on_gpu)]
    return {name: share * on_gpu.get(name, 0.0) + (1 - share) * on_cpu.get(name, 0.0) for name in names}


def _both(on_cpu_s: float, on_gpu_s: float, gpu: GpuRates | None) -> dict[str, float]:
    """Time for experts on the CPU and on a GPU concurrently: the longer one, plus the part of the shorter that does not overlap."""
    seconds = {"experts in RAM": on_cpu_s}
    if gpu is not None and on_gpu_s:
        hidden = gpu.overlap * min(on_cpu_s, on_gpu_s)
        if on_cpu_s > on_gpu_s:
            seconds["experts on the GPU"] = on_gpu_s - hidden
        else:
            seconds |= {"experts in RAM": on_cpu_s - hidden, "experts on the GPU": on_gpu_s}
    return seconds


# --- prompts ----------------------------------------------------------------------------------------------------------


def predict_prefill(
    sizes: ModelSizes,
    shares: ResidentShares,
    machine: Hardware,
    rates: HitRates,
    *,
    prompt_tokens: int,
    n_batch: int,
    kv_type: str = "f16",
) -> Range:
    """Prompt speed in an empty context, in batches, with each missing expert read once per batch.

    Experts streamed through a GPU (`offload/gpu/stream.py`) are not included.
    """
    batch = max(1, min(n_batch, prompt_tokens))
    n_layers, n_experts = len(sizes.shape.moe_layers), max(1, sizes.shape.n_experts)
    dense_s = dense_batch(sizes, shares, machine, batch, prompt_tokens // 2, kv_type)
    expert = experts_on(machine, sizes)
    n_pairs = batch * n_layers * sizes.shape.n_used
    hidden_bytes = (
        n_layers * sizes.shape.n_embd * 2 * 4
    )  # of a token to the other side of each layer's experts and back
    on_gpu = rates.hottest(shares.gpu_share) if shares.gpu is not None and shares.gpu_share > 0 else 0.0

    def rate(used: HitRates | None, distinct: float, missing: float, hidden: float) -> Rate:
        seconds = dict(dense_s)
        # A small batch doesn't use all of the GPU's experts, so more of those that it uses are elsewhere than their number says.
        on_cpu = touched(used, shares.gpu_share, batch, sizes.shape.n_used, n_experts).missing * n_layers * n_experts
        on_cpu_s = on_cpu * expert.batch_s + (1 - on_gpu) * n_pairs * expert.pair_s if n_layers else 0.0
        on_gpu_s = 0.0
        if shares.gpu is not None and on_gpu:
            on_gpu_s = (
                on_gpu * batch * sizes.used_weights / shares.gpu.batch_macs_per_s + n_layers * shares.gpu.latency_s
            )
        seconds |= _both(on_cpu_s, on_gpu_s, shares.gpu)
        if not shares.is_cpu_only:
            seconds["GPU's bus"] = seconds.get("GPU's bus", 0.0) + batch * hidden_bytes / (
                BUS_SHARE * shares.bus_bytes_per_s
            )
        disk_bytes = missing * n_layers * n_experts * shares.miss_bytes
        seconds["drive"] = max(0.0, disk_bytes / drive_bytes_per_s(machine) - hidden * on_cpu_s)
        per_token = {name: s / batch for name, s in seconds.items()}
        return Rate(
            tokens_per_s=1 / sum(per_token.values()),
            hit_rate=1 - missing / distinct if distinct else 1.0,
            disk_bytes=disk_bytes / batch,
            seconds=per_token,
        )

    even = touched(None, shares.share, batch, sizes.shape.n_used, n_experts)
    real = touched(rates, shares.share, batch, sizes.shape.n_used, n_experts)
    low, likely, high = PROMPT_HIDDEN_READS
    return _widened(
        rate(None, even.distinct, even.distinct * (1 - shares.share), low),
        rate(rates, real.distinct, real.missing, likely),
        rate(rates, real.distinct, 0.8 * real.missing, high),
    )


def cache_copy_s(sizes: ModelSizes, position: int, kv_type: str, bus_bytes_per_s: float) -> float:
    """Seconds in which a cache in RAM is copied to the GPU. [m] On the RPC device 2.95 MB for a token at 8,212 where the cache has
    2.88 MB for as many."""
    return sizes.kv_bytes(max(1, position), kv_type, 1) / (PAGEABLE_SHARE * bus_bytes_per_s)


def dense_batch(
    sizes: ModelSizes, shares: ResidentShares, machine: Hardware, batch: int, position: int, kv_type: str = "f16"
) -> dict[str, float]:
    """Seconds of a batch by resource, all but its experts."""
    weights, attention = batch * matrix_weights(sizes), batch * attention_macs(sizes, position)
    values = batch * sizes.shape.n_layers * sizes.shape.n_embd
    on_gpu: dict[str, float] = {}
    if shares.dense_share and shares.gpu is not None:
        gpu = shares.gpu
        on_gpu = {
            "dense model on the GPU": (weights + attention) / gpu.dense_macs_per_s,
            "layers": sizes.shape.n_layers * (LAYER_NODES * gpu.node_s + gpu.latency_s)
            + values * LAYER_VALUES * gpu.value_s,
        }
        if shares.cache_in_ram:
            on_gpu["GPU's bus"] = cache_copy_s(sizes, position, kv_type, shares.bus_bytes_per_s)
    on_cpu = {
        "dense model on the CPU": weights / dense_on(machine)[1],
        "attention": attention / (machine.n_threads * attention_rates(sizes, kv_type)[1]),
        "layers": values * BATCH_VALUE_S / machine.n_threads,
    }
    return _shared(on_gpu, on_cpu, shares.dense_share if on_gpu else 0.0)


# --- amounts and rates ------------------------------------------------------------------------------------------------


def matrix_weights(sizes: ModelSizes) -> int:
    """Weights that every token of a prompt is multiplied with; the output head is for the last one only."""
    return max(0, sizes.dense_weights - sizes.shape.n_vocab * sizes.shape.n_embd)


def attention_macs(sizes: ModelSizes, position: int) -> float:
    """Multiplications of attention and indexer for one token: queries with keys, and values."""
    at = sizes.shape
    if not at.ratios:
        return sizes.shape.n_layers * at.n_heads * at.head_dim * 2.0 * position
    csa = position // CSA
    rows = sizes.shape.n_layers * min(position, at.window) + at.n_layers_of(CSA) * min(csa, at.index_top_k)
    rows += at.n_layers_of(HCA) * (position // HCA)
    return rows * at.n_heads * at.head_dim * 2.0 + at.n_layers_of(CSA) * csa * at.index_heads * at.index_dim


def attention_rates(sizes: ModelSizes, kv_type: str) -> tuple[float, float]:
    """Multiplications per second and core, one token and batches: DeepSeek-V4's attention over an F16 or Q8_0 cache is ours."""
    if sizes.shape.ratios and kv_type in OWN_KV_TYPES:
        return OWN_ATTENTION_MACS_PER_CORE, OWN_BATCH_ATTENTION_MACS_PER_CORE
    return ATTENTION_MACS_PER_CORE, BATCH_ATTENTION_MACS_PER_CORE


def drive_bytes_per_s(machine: Hardware) -> float:
    """Of all drives together."""
    return machine.disk_bytes_per_s * (1 + SECOND_DRIVE_GAIN * (machine.n_drives - 1))


def dense_on(machine: Hardware) -> tuple[float, float]:
    """Bytes per second with one row, multiplications per second with a batch: measured, or assumed."""
    if machine.cpu is not None:
        return machine.cpu.dense_bytes_per_s, machine.cpu.dense_macs_per_s
    return assumed_dense(machine.memory_bytes_per_s, machine.n_threads)


def slowest(gpus: Sequence[GpuRates]) -> GpuRates | None:
    """All of several GPUs are taken for the slowest one; None without any."""
    if not gpus:
        return None
    worst = {
        field.name: (max if field.name.endswith("_s") and not field.name.endswith("_per_s") else min)(
            getattr(gpu, field.name) for gpu in gpus
        )
        for field in fields(GpuRates)
    }
    return GpuRates(**worst)


def experts_on(machine: Hardware, sizes: ModelSizes) -> ExpertRates:
    """The model's mean expert on this CPU; formats that were not measured are assumed, and scaled by those that were."""

    def assumed(types: ExpertTypes) -> ExpertRates:
        layout = expert_layout(types, sizes.shape.n_embd, sizes.shape.n_ff)
        weights = sizes.shape.expert_weights
        return assumed_expert(types, sum(layout.raw_bytes), weights, machine.memory_bytes_per_s, machine.n_threads)

    known = machine.cpu.experts if machine.cpu is not None else {}
    slower = [rates.decode_s / assumed(types).decode_s for types, rates in known.items()]
    factor = sum(slower) / len(slower) if slower else 1.0
    parts = [
        (known.get(group.types) or assumed(group.types).times(factor)).times(group.count / sizes.n_copies)
        for group in sizes.experts
    ]
    return ExpertRates(
        decode_s=sum(part.decode_s for part in parts),
        few_s=sum(part.few_s for part in parts),
        many_s=sum(part.many_s for part in parts),
    )


def _widened(low: Rate, likely: Rate, high: Rate) -> Range:
    slow, middle, fast = sorted((low, likely, high), key=lambda rate: rate.tokens_per_s)
    return Range(
        low=replace(slow, tokens_per_s=slow.tokens_per_s * (1 - MARGIN)),
        likely=middle,
        high=replace(fast, tokens_per_s=fast.tokens_per_s * (1 + MARGIN)),
    )
