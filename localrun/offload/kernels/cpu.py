"""The kernel levels that this processor supports.

Levels, each with what it needs: `generic` (nothing: plain vector code), `avx2` (with FMA and F16C), `avx-vnni` (AVX2 with 256-bit
VNNI), `avx512` (F, BW, VL, DQ) and `avx512-vnni`. The best supported one is used unless `LOCALRUN_KERNELS` names another. The
level is part of the cache key of compiled code, so levels can be alternated.
"""

from __future__ import annotations

import functools
import os
from enum import Enum

from llvmlite import binding as llvm
from numba.core import codegen, config

from localrun.errors import UsageError


class Level(Enum):
    """Instruction sets with dedicated kernels, best last."""

    GENERIC = "generic"
    AVX2 = "avx2"
    AVX_VNNI = "avx-vnni"
    AVX512 = "avx512"
    AVX512_VNNI = "avx512-vnni"


_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
_NEEDS = {
    Level.GENERIC: frozenset[str](),
    Level.AVX2: _AVX2,
    Level.AVX_VNNI: _AVX2 | {"avxvnni"},
    Level.AVX512: _AVX512,
    Level.AVX512_VNNI: _AVX512 | {"avx512vnni"},
}


@functools.cache
def _host_features() -> str:
    """LLVM asks the processor anew each time, which takes 0.19 ms, and every token asks which level there is."""
    return str(codegen.get_host_cpu_features())


def features() -> frozenset[str]:
    """LLVM's names of what code may use: all that the processor has, or what `NUMBA_CPU_FEATURES` leaves of it."""
    return _named(_host_features() if config.CPU_FEATURES is None else config.CPU_FEATURES)


@functools.cache
def _named(chosen: str) -> frozenset[str]:
    return frozenset(name[1:] for name in chosen.split(",") if name.startswith("+"))


def processor() -> str:
    """LLVM's name of the processor that code is compiled for, for example "znver4"; part of the key of numba's cache."""
    return str(config.CPU_NAME or llvm.get_host_cpu_name())


def levels() -> list[Level]:
    """What can run here, best last."""
    present = features()
    return [level for level in Level if present >= _NEEDS[level]]


def level() -> Level:
    """The level to use.

    Raises:
        UsageError: `LOCALRUN_KERNELS` is not a level, or one that the processor lacks.
    """
    runnable = levels()
    asked = os.environ.get("LOCALRUN_KERNELS")
    if not asked:
        return runnable[-1]
    here = ", ".join(known.value for known in runnable)
    if asked not in [known.value for known in Level]:
        raise UsageError(
            f"LOCALRUN_KERNELS={asked} is not a kernel level",
            hint=f"this processor has {here}; unset it to use the last of these",
        )
    if Level(asked) not in runnable:
        missing = ", ".join(sorted(_NEEDS[Level(asked)] - features()))
        raise UsageError(
            f"LOCALRUN_KERNELS={asked}: this processor lacks {missing}",
            hint=f"it has {here}; unset it to use the last of these",
        )
    return Level(asked)
