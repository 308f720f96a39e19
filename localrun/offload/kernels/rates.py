"""The processor's rates, all threads together, measured by `probe.py` or assumed. Only numbers, no kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gguf import GGMLQuantizationType

from localrun.quant.model.source import ExpertTypes

_T = GGMLQuantizationType

MEMORY_SHARE: Final = 0.88
"""Share of RAM bandwidth reached by products with one row. [m] Two cores with AVX-512, memory 22 GB/s: 8-bit dense matrices
0.85 to 0.95, MXFP4 experts 0.92 (docs/planner.md). More, 1.2, where kernels ask for lines and plain reading doesn't (`reading`)."""

WEIGHTS_PER_CORE: Final[Mapping[GGMLQuantizationType, float]] = {
    _T.MXFP4: 65e9, _T.Q4_K: 60e9, _T.Q2_K: 80e9, _T.Q3_K: 55e9, _T.Q8_0: 43e9, _T.Q5_K: 40e9, _T.Q6_K: 48e9, _T.IQ4_XS: 33e9,
    _T.IQ2_XXS: 19e9, _T.IQ3_XXS: 5.5e9, _T.IQ2_XS: 0.3e9, _T.IQ2_S: 0.3e9, _T.IQ3_S: 0.3e9,
}  # fmt: skip
"""Assumed weights per second of one core in decode, where nothing is measured: our AVX2 kernels, the slowest but the portable ones.
[m] Matrices in L2, one core of Zen 4 at 3.7 GHz. AVX-512 has 1.0 to 1.7 times as many, for IQ2_XXS 3 and for IQ3_XXS 6 times.
The last three are multiplied in F32. AVX-512 on one core of an Emerald Rapids host that other guests use, too: 0.5 to 1.2 times as
many, for IQ2_XXS 1.7 to 2.4 times."""

MACS_PER_CORE: Final = 92e9
"""int8 multiplications per second of one core in batches, where nothing is measured. [m] AVX-512 VNNI; others are slower."""


FEW: Final = 8
MANY: Final = 48
"""Tokens per expert of two batches: their difference gives the cost per token, the rest the cost per expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRates:
    """Seconds of one expert, in one mix of formats and one shape, several in a call.

    Attributes:
        decode_s: with one token.
        few_s, many_s: with `FEW` and `MANY` tokens.
    """

    decode_s: float
    few_s: float
    many_s: float

    @property
    def pair_s(self) -> float:
        """Of one (token, expert) pair in a batch."""
        return max(self.many_s - self.few_s, 0.1 * self.many_s) / (MANY - FEW)

    @property
    def batch_s(self) -> float:
        """Of one expert in a batch, on top, whatever the number of its tokens."""
        return max(0.0, self.few_s - FEW * self.pair_s)

    def times(self, factor: float) -> ExpertRates:
        """So much slower."""
        return ExpertRates(decode_s=self.decode_s * factor, few_s=self.few_s * factor, many_s=self.many_s * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuRates:
    """Our kernels on this processor. Rates of all threads together.

    Attributes:
        dense_bytes_per_s: of 8-bit matrices multiplied with one row.
        dense_macs_per_s: multiplications per second with a batch.
        experts: by formats of gate, up and down.
    """

    dense_bytes_per_s: float
    dense_macs_per_s: float
    experts: Mapping[ExpertTypes, ExpertRates]


def assumed_expert(
    types: ExpertTypes, file_bytes: int, n_weights: int, memory_bytes_per_s: float, n_threads: int
) -> ExpertRates:
    """Assumed rates of an unmeasured processor: bound by memory or compute, whichever is slower.

    Args:
        file_bytes, n_weights: of one expert.
    """
    read_s = file_bytes / (MEMORY_SHARE * memory_bytes_per_s)
    weight_s = sum(1 / WEIGHTS_PER_CORE.get(kind, 30e9) for kind in types) / 3 / n_threads
    pair_s = n_weights / (MACS_PER_CORE * n_threads)
    return ExpertRates(
        decode_s=max(read_s, n_weights * weight_s),
        few_s=read_s + FEW * pair_s,
        many_s=read_s + MANY * pair_s,
    )


def assumed_dense(memory_bytes_per_s: float, n_threads: int) -> tuple[float, float]:
    """`dense_bytes_per_s` and `dense_macs_per_s` of such a processor."""
    return MEMORY_SHARE * memory_bytes_per_s, MACS_PER_CORE * n_threads
