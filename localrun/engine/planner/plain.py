"""Predicts stock llama.cpp: dense model on a GPU if it fits, all experts on the CPU, from a mapped file.

That is the usual way to run such a model (`--n-cpu-moe`), so a plan must beat it or say that it doesn't. Experts are in the
page cache, which like ours keeps what was used last; but nothing is read ahead, and a miss is a series of page faults.
"""

from __future__ import annotations

from dataclasses import replace

from gguf import GGMLQuantizationType

from localrun.engine.planner.hardware import PROCESS_BYTES, Hardware
from localrun.engine.planner.hit_rates import HitRates
from localrun.engine.planner.placement import gpu_budgets, headroom
from localrun.engine.planner.sizes import ModelSizes
from localrun.engine.planner.speed import (
    ATTENTION_MACS_PER_CORE,
    Rate,
    ResidentShares,
    attention_rates,
    predict_decode,
    slowest,
)

FAULT_SHARE = 0.2
"""Read rate of page faults, relative to that of our reads. [m] Flash in MXFP4, 24 GiB, a drive of
1.23 GB/s: 3.70 s a token with 0.4 s of computing, where localrun waited 0.58 s for about as many misses: 0.18."""

MXFP4_SLOWER = 1.7
"""How much slower llama.cpp's MXFP4 experts are on a CPU. [m] Whole tokens on slices in RAM, two AVX-512 cores: 1.64, 1.74.
Other formats are assumed to be equal ([m] Q4_K on Zen 5: 0.99)."""


def predict_plain(
    sizes: ModelSizes,
    machine: Hardware,
    rates: HitRates,
    *,
    context_bytes: int,
    vram_bytes: int | None,
    position: int,
    kv_type: str,
) -> Rate | None:
    """The likely decode speed; None if the amount of RAM is unknown.

    Args:
        context_bytes: KV cache and compute buffers.
        vram_bytes: as `--vram`.
    """
    if machine.ram_bytes is None:
        return None
    fixed = sizes.dense_bytes + context_bytes
    on_gpu = fixed - sizes.embedding_bytes
    budgets = gpu_budgets(sorted((gpu.vram_bytes for gpu in machine.gpus), reverse=True), vram_bytes, on_gpu)
    dense_on_gpu = bool(budgets) and budgets[0] >= on_gpu
    in_ram = sizes.embedding_bytes if dense_on_gpu else fixed
    spare = headroom(machine.ram_bytes, machine.total_ram_bytes or machine.ram_bytes)
    cached = max(0, machine.ram_bytes - PROCESS_BYTES - spare - in_ram)
    shares = ResidentShares(
        ram_share=min(1.0, cached / max(1, sizes.expert_file_bytes)),
        dense_share=1.0 if dense_on_gpu else 0.0,
        gpu=slowest([gpu.rates for gpu in machine.gpus]),
        miss_bytes=sizes.miss_bytes(adaptive=False),
    )
    faulting = replace(machine, disk_bytes_per_s=machine.disk_bytes_per_s * FAULT_SHARE, n_drives=1, seen={})
    likely = predict_decode(sizes, shares, faulting, rates, position=position, kv_type=kv_type).likely
    mxfp4 = sum(group.count for group in sizes.experts if GGMLQuantizationType.MXFP4 in group.types) / max(
        1, sizes.n_copies
    )
    seconds = dict(likely.seconds)
    seconds["experts in RAM"] *= 1 + (MXFP4_SLOWER - 1) * mxfp4
    if "attention" in seconds:
        seconds["attention"] *= attention_rates(sizes, kv_type)[0] / ATTENTION_MACS_PER_CORE
    return replace(likely, seconds=seconds, tokens_per_s=1 / sum(seconds.values()))
