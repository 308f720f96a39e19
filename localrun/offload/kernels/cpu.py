"""Which kernels this processor can run.

`LOCALRUN_KERNELS` forces a level: `generic` (no processor-specific instructions), `avx2`, `avxvnni` (AVX2 with VNNI) or `avx512`
(with VNNI). Asking for more than the processor has is an error.
"""

from __future__ import annotations

import functools
import os
from enum import Enum

import llvmlite.binding

from localrun.errors import UsageError


class Level(Enum):
    """Instruction sets with kernels of their own, best last."""

    GENERIC = "generic"
    AVX2 = "avx2"
    AVX_VNNI = "avxvnni"
    AVX512 = "avx512"


_NEEDS = {
    Level.GENERIC: set[str](),
    Level.AVX2: {"avx2", "fma", "f16c"},
    Level.AVX_VNNI: {"avx2", "fma", "f16c", "avxvnni"},
    Level.AVX512: {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"},
}


@functools.cache
def features() -> frozenset[str]:
    """LLVM's names of what the processor has."""
    return frozenset(name for name, present in llvmlite.binding.get_host_cpu_features().items() if present)


def level() -> Level:
    """The level to use.

    Raises:
        UsageError: `LOCALRUN_KERNELS` names no level, or one that the processor lacks.
    """
    runnable = [known for known in Level if features() >= _NEEDS[known]]
    asked = os.environ.get("LOCALRUN_KERNELS")
    if not asked:
        return runnable[-1]
    if asked not in [known.value for known in Level]:
        raise UsageError(
            f"LOCALRUN_KERNELS={asked} is not a kernel level",
            hint=f"one of {', '.join(known.value for known in Level)}",
        )
    if Level(asked) not in runnable:
        raise UsageError(f"this processor can't run LOCALRUN_KERNELS={asked}", hint="unset it")
    return Level(asked)
