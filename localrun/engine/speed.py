"""Predicts tokens per second from the bytes and multiplications of a token, and says what limits them.

A token's time on a machine is a sum over resources, each with its own rate: dense matrices and cache rows through RAM or GPU
memory, experts through the memory that they are in, misses through the drive, and a fixed time per layer for what is neither
(mHC, routing, norms, graph overhead). The three estimates differ in what nobody can know beforehand: `low` has changing topics and
reads that nothing hides, `high` a steady topic and reads hidden behind computing, `likely` lies between.

Rates of the CPU were measured or fitted on two cores with AVX-512; docs/planner.md says how far predictions were off there. Rates
of GPUs are assumptions, except what `hardware.measured_gpus` finds out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gguf import GGMLQuantizationType

from localrun.engine.hardware import Hardware
from localrun.engine.hit_rates import HitRates
from localrun.engine.sizes import ModelSizes

_T = GGMLQuantizationType

DENSE_SHARE = 0.75
"""Of RAM bandwidth that the dense matrices reach in decode. This and `LAYER_S` are fits: a slice of Flash was 13 % faster."""

EXPERT_SHARE = 0.89
"""Of RAM bandwidth that the experts reach in decode: 26.7 of 29.9 GB/s on two cores."""

LAYER_S = 0.9e-3
"""Per layer and token on the CPU besides weights."""

TOKEN_S = 1.0e-3
"""Per token besides layers: embedding, head's bookkeeping, logits, the call itself."""

DISK_SHARE = 0.85
"""Of the drive's probed rate that single misses reach: one expert's three pieces keep fewer reads in flight."""

HIDDEN_READS = 0.5
"""Part of the computing of a call's present experts behind which reads of the missing ones hide."""

SECOND_DRIVE_GAIN = 0.375
"""A second drive's gain by reading from a mirror, as published (colibri: +37.5 % with block-level mirrors)."""

EXPERT_MACS_PER_CORE = 105e9
DENSE_MACS_PER_CORE = 42e9
"""int8 multiplications per second of one core in prefill: experts, and dense matrices with attention and all else that llama.cpp
computes. AVX-512 VNNI; processors without it are slower."""

WEIGHTS_PER_CORE: Mapping[GGMLQuantizationType, float] = {
    _T.MXFP4: 15e9, _T.Q4_K: 15e9, _T.Q2_K: 19.5e9, _T.Q3_K: 12e9, _T.Q8_0: 6.8e9,
    _T.IQ2_XXS: 8.8e9, _T.IQ2_XS: 8.8e9, _T.IQ2_S: 8.8e9, _T.IQ3_XXS: 5.5e9, _T.IQ3_S: 5.5e9,
}  # fmt: skip
"""Weights per second of one core in decode, measured with ggml's kernels on two threads, halved: formats with tables are bound by
computing, not by memory. Those not named are taken as Q4_K."""

GPU_LAYER_S = 0.15e-3
GPU_MACS_PER_BYTE = 100.0
"""Per layer, two hand-overs included; prefill multiplications per second as a multiple of bandwidth. Assumptions, not measured."""

DISTINCT_SHARE = (1.0, 0.85, 0.7)
"""Distinct experts of a batch, relative to evenly drawn ones: real routing repeats itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """Where a model is, as shares.

    Attributes:
        dense_on_gpu: the dense model and the cache.
        gpu_share, ram_share: of all experts; what is on the GPU is not in RAM.
        gpu: bytes per second of GPU memory, 0 without one.
    """

    ram_share: float
    gpu_share: float = 0.0
    dense_on_gpu: bool = False
    gpu: float = 0.0

    @property
    def share(self) -> float:
        """Of experts that need no drive."""
        return min(1.0, self.ram_share + self.gpu_share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """One estimate of a phase.

    Attributes:
        tokens_per_s: the rate.
        hit_rate: of expert requests that need no drive.
        disk_bytes: read per token.
        parts: seconds per token by resource; reads that are hidden count less.
    """

    tokens_per_s: float
    hit_rate: float
    disk_bytes: float
    parts: Mapping[str, float]

    @property
    def limit(self) -> str:
        """The resource that takes most of the time."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Three estimates of a phase."""

    low: Rate
    likely: Rate
    high: Rate

    def covers(self, tokens_per_s: float) -> bool:
        """Whether a measurement lies in it."""
        return self.low.tokens_per_s <= tokens_per_s <= self.high.tokens_per_s

    def error(self, tokens_per_s: float) -> float:
        """Of `likely`, relative to a measurement: 0.2 is 20 % too fast."""
        return self.likely.tokens_per_s / tokens_per_s - 1


def predict_decode(
    sizes: ModelSizes, place: Residency, machine: Hardware, rates: HitRates, *, position: int, kv_type: str
) -> Range:
    """Speed of answers with `position` tokens in the context."""

    def rate(share_of_steady: float, hidden: float) -> Rate:
        def hits(share: float) -> float:
            return share_of_steady * rates.steady(share) + (1 - share_of_steady) * rates.unsteady(share)

        used = len(sizes.moe_layers) * sizes.n_used
        dense = sizes.dense_token_bytes + sizes.kv_read_bytes(position, kv_type)
        parts: dict[str, float] = {}
        on_gpu = hits(place.gpu_share) if place.gpu_share > 0 else 0.0
        if on_gpu or place.dense_on_gpu:
            gpu_bytes = (dense if place.dense_on_gpu else 0) + on_gpu * used * sizes.mean_file_bytes
            parts["GPU memory"] = gpu_bytes / place.gpu
        if place.dense_on_gpu:
            parts["layers"] = sizes.n_layers * GPU_LAYER_S + TOKEN_S
        else:
            parts["dense model in RAM"] = dense / (DENSE_SHARE * machine.memory)
            parts["layers"] = sizes.n_layers * LAYER_S + TOKEN_S
        experts_s = (1 - on_gpu) * _experts_s(sizes, machine)
        parts["experts in RAM"] = experts_s
        hit = max(hits(place.share), on_gpu) if sizes.n_copies else 1.0
        disk_bytes = (1 - hit) * used * sizes.mean_file_bytes
        read_s = disk_bytes / (DISK_SHARE * drive_rate(machine))
        parts["drive"] = max(0.0, read_s - hidden * hit * experts_s)
        return Rate(tokens_per_s=1 / sum(parts.values()), hit_rate=hit, disk_bytes=disk_bytes, parts=parts)

    return _widened(rate(0.0, 0.0), rate(1.0, 0.0), rate(1.0, HIDDEN_READS))


def predict_prefill(
    sizes: ModelSizes, place: Residency, machine: Hardware, *, prompt_tokens: int, n_batch: int
) -> Range:
    """Speed of reading a prompt in an empty context, in batches, each expert that is missing read once per batch."""
    batch = max(1, min(n_batch, prompt_tokens))
    n_layers, n_experts = len(sizes.moe_layers), max(1, sizes.n_experts)
    even = n_experts * (1 - (1 - sizes.n_used / n_experts) ** batch)

    def rate(distinct_share: float, hidden: float) -> Rate:
        distinct = max(min(even, float(sizes.n_used)), even * distinct_share)
        parts: dict[str, float] = {}
        on_gpu, dense = place.gpu_share, batch * matrix_weights(sizes)
        if place.gpu > 0 and (on_gpu or place.dense_on_gpu):
            macs = batch * on_gpu * sizes.used_weights + (dense if place.dense_on_gpu else 0)
            parts["GPU computing"] = macs / (place.gpu * GPU_MACS_PER_BYTE)
        if place.dense_on_gpu:
            parts["layers"] = sizes.n_layers * GPU_LAYER_S
        else:
            parts["dense model on the CPU"] = dense / (machine.n_threads * DENSE_MACS_PER_CORE)
        compute_s = batch * (1 - on_gpu) * sizes.used_weights / (machine.n_threads * EXPERT_MACS_PER_CORE)
        touched = n_layers * distinct * (1 - on_gpu) * sizes.mean_file_bytes
        parts["experts on the CPU"] = max(compute_s, touched / (EXPERT_SHARE * machine.memory))
        disk_bytes = n_layers * distinct * (1 - place.share) * sizes.mean_file_bytes
        read_s = disk_bytes / drive_rate(machine)
        parts["drive"] = max(0.0, read_s - hidden * parts["experts on the CPU"])
        per_token = {name: seconds / batch for name, seconds in parts.items()}
        return Rate(
            tokens_per_s=1 / sum(per_token.values()),
            hit_rate=place.share,
            disk_bytes=disk_bytes / batch,
            parts=per_token,
        )

    low, likely, high = DISTINCT_SHARE
    return _widened(rate(low, 0.0), rate(likely, HIDDEN_READS), rate(high, 0.9))


def matrix_weights(sizes: ModelSizes) -> int:
    """Weights that every token of a prompt is multiplied with; the output head is for the last one only."""
    return max(0, sizes.dense_weights - sizes.n_vocab * sizes.n_embd)


def drive_rate(machine: Hardware) -> float:
    """Of all drives together."""
    return machine.disk * (1 + SECOND_DRIVE_GAIN * (machine.n_drives - 1))


def _experts_s(sizes: ModelSizes, machine: Hardware) -> float:
    """A token's experts, all of them computed by the CPU."""
    return len(sizes.moe_layers) * sizes.n_used * expert_s(sizes, machine) if sizes.n_copies else 0.0


def expert_s(sizes: ModelSizes, machine: Hardware) -> float:
    """One expert for one token on the CPU, mean of the model's: bound by memory or by computing, whichever is slower."""
    total = 0.0
    for group in sizes.experts:
        per_core = sum(1 / WEIGHTS_PER_CORE.get(kind, 15e9) for kind in group.types) / 3
        weights = 3 * sizes.n_embd * sizes.n_ff
        one = max(group.file_bytes / (EXPERT_SHARE * machine.memory), weights * per_core / machine.n_threads)
        total += group.count / sizes.n_copies * one
    return total


MARGIN = 0.15
"""Of the machine's own mood: the same run an hour later."""


def _widened(low: Rate, likely: Rate, high: Rate) -> Range:
    from dataclasses import replace

    ordered = sorted((low, likely, high), key=lambda rate: rate.tokens_per_s)
    slow, middle, fast = ordered
    return Range(
        low=replace(slow, tokens_per_s=slow.tokens_per_s * (1 - MARGIN)),
        likely=middle,
        high=replace(fast, tokens_per_s=fast.tokens_per_s * (1 + MARGIN)),
    )
