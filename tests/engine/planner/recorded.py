"""Whole runs as they were measured: what the planner's arithmetic has to give for them.

Machine: two Zen 4 cores (AVX-512 with VNNI), 24 GiB, no GPU, one virtual drive, nothing else running. Models: whole
DeepSeek-V4-Flash, random weights (`tools.make_checkpoint flash`, `tools.convert_whole`). Command: `localrun bench MODEL
--frontiers 0 --new-tokens 40 --warm-up 60 --context 2048 --json`; the figures are that JSON's.
"""

from __future__ import annotations

from dataclasses import dataclass

from localrun.engine.planner.hardware import Hardware
from localrun.engine.planner.hit_rates import HitRates
from localrun.engine.planner.plan import Plan, PlanOptions
from localrun.engine.planner.planner import make_plan
from localrun.engine.planner.sizes import ModelSizes, format_of, sizes_of
from localrun.engine.planner.token_rates import Spent
from localrun.offload.kernels.rates import CpuRates, ExpertRates

DRIVE = "254:0 ext4 /dev/vda"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One phase of decoding.

    Attributes:
        base, dense: formats.
        decode_s: of an expert alone, by the probe.
        ram_bytes: free when it was planned.
        cost: of all its tokens.
        seconds: of all its tokens.
    """

    base: str
    dense: str
    decode_s: float
    ram_bytes: int
    cost: Spent
    seconds: float
    n_tokens: int = 40

    @property
    def token_s(self) -> float:
        return self.seconds / self.n_tokens

    @property
    def sizes(self) -> ModelSizes:
        return sizes_of("flash", base=format_of(self.base), dense=format_of(self.dense))

    def plan(self, machine: Hardware, rates: HitRates | None = None) -> Plan:
        """As it would have been made for this run on `machine`."""
        (types,) = {group.types for group in self.sizes.experts}
        expert = ExpertRates(decode_s=self.decode_s, few_s=0.65e-3, many_s=3.6e-3)
        cpu = CpuRates(dense_bytes_per_s=53.66e9, dense_macs_per_s=326e9, experts={types: expert})
        here = Hardware(
            ram_bytes=self.ram_bytes,
            total_ram_bytes=25276502016,
            disk_bytes_per_s=machine.disk_bytes_per_s,
            drive=DRIVE,
            memory_bytes_per_s=55.13e9,
            n_threads=2,
            cpu=cpu,
            seen=machine.seen,
            others=machine.others,
            n_cores=2,
            company_cost=machine.company_cost,
        )
        options = PlanOptions(n_ctx=2048, n_batch=512, position=20)
        return make_plan(self.sizes, here, options, suggest=False, rates=rates)


LOSSLESS = Recorded(
    base="mxfp4",
    dense="q8_0",
    decode_s=0.3898e-3,
    ram_bytes=24675160064,
    cost=Spent(
        matrices_s=40 * 0.3018,
        attention_s=40 * 0.0037,
        experts_s=40 * 0.1692,
        waiting_s=40 * 0.3324,
        disk_bytes=47461171200,
        requests=10320,
        wasted=466,
        evictions=3399,
    ),
    seconds=37.371,
)
LOSSLESS_AGAIN = Recorded(
    base="mxfp4",
    dense="q8_0",
    decode_s=0.3898e-3,
    ram_bytes=24599592960,
    cost=Spent(
        matrices_s=40 * 0.2867,
        attention_s=40 * 0.0038,
        experts_s=40 * 0.1672,
        waiting_s=40 * 0.3407,
        disk_bytes=47554756608,
        requests=10320,
        wasted=456,
        evictions=3406,
    ),
    seconds=36.789,
)
TWO_BITS = Recorded(
    base="q2_k",
    dense="q4_k",
    decode_s=0.3552e-3,
    ram_bytes=24586215424,
    cost=Spent(
        matrices_s=40 * 0.2248,
        attention_s=40 * 0.0029,
        experts_s=40 * 0.1204,
        waiting_s=40 * 0.1333,
        disk_bytes=16960978944,
        requests=10320,
        wasted=310,
        evictions=1918,
    ),
    seconds=23.174,
)
