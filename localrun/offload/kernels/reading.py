"""How kernels read weights from memory, which differs by processor. What they compute does not.

A processor's own prefetching follows reads that are in order, but on some it keeps too few lines under way for one core to reach
what memory gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Final

from localrun.offload.kernels.cpu import processor


class Reading(Enum):
    """Ways to read; every line is read once, by `Simd.load_in_order` or `Simd.touch`."""

    IN_ORDER = "in order"
    """Nothing but reads in order."""
    AHEAD = "ahead"
    """In any order; each line is requested a fixed distance in advance."""
    PAGES = "pages"
    """In order, and each read requests one line of the next four pages, in turns: processors prefetch within a page, so these are
    four streams instead of one."""


_BY_PROCESSOR: Final[Mapping[str, Reading]] = MappingProxyType({
    "znver5": Reading.AHEAD,
    "sapphirerapids": Reading.PAGES,  # the same core as the next, not measured
    "emeraldrapids": Reading.PAGES,
})  # fmt: skip
"""By LLVM's names. [m] Q4_K on both cores: Emerald Rapids 18 GB/s in order, 20 ahead, 26 in pages; Zen 4, one core, 26 in order
and 11 ahead (docs/benchmarks.md, "Kernels"). Zen 5: kernels were tuned there with requests ahead."""


def reading() -> Reading:
    """What this processor is best at, as far as measured; otherwise in order."""
    return _BY_PROCESSOR.get(processor(), Reading.IN_ORDER)
