"""How fast a GPU takes experts in and multiplies with them: a short measurement on a few made-up experts of Flash's shape.

What counts is what the expert path will see: uploads in the pieces that it uses, and its own graph for one token at a time, so the
link and the hand-over are in the figures. A device of another machine (RPC) is measured the same way.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Final

import numpy as np
from gguf import GGMLQuantizationType

from localrun.errors import LocalrunError
from localrun.offload.gpu_device import GpuDevice
from localrun.offload.gpu_slots import GpuSlots, scratch_bytes
from localrun.offload.kernels import FfnSpec

log = logging.getLogger(__name__)

_T: Final = GGMLQuantizationType.MXFP4
_SPEC: Final = FfnSpec((_T, _T, _T), 4096, 2048, math.inf)
_N: Final = 8
_ROUNDS: Final = 5


@dataclass(frozen=True, slots=True)
class GpuRates:
    """Bytes per second.

    Attributes:
        upload: from RAM into slots.
        decode: of experts multiplied with one token each, eight of them in a call.
    """

    upload: float
    decode: float


def probe_gpu(device: GpuDevice, spec: FfnSpec = _SPEC) -> GpuRates | None:
    """Measures a device: a fraction of a second and 100 MB of its memory; None, with a warning, if it can't be measured."""
    rng = np.random.default_rng(0)
    try:
        slots = GpuSlots(device, {(0, 0): _N}, {(0, 0): spec}, (1 << 30) + scratch_bytes(spec))
    except LocalrunError as error:
        log.warning("%s: not measured: %s", device.name, error)
        return None
    try:
        sizes = slots.banks[0, 0].row_bytes
        # Random bytes may be NaN as weights; nobody looks at the results.
        expert = [rng.integers(0, 128, size, np.uint8) for size in sizes]
        started = time.perf_counter()
        for slot in range(_N):
            slots.upload((0, 0), slot, expert)
        upload_s = time.perf_counter() - started
        x = np.ones((_N, spec.n_embd), np.float32)
        best_s = math.inf
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            slots.start((0, 0), np.arange(_N, dtype=np.int32), x)
            slots.finish()
            best_s = min(best_s, time.perf_counter() - started)
    except LocalrunError as error:
        log.warning("%s: not measured: %s", device.name, error)
        return None
    finally:
        slots.close()
    return GpuRates(upload=_N * sum(sizes) / upload_s, decode=_N * sum(sizes) / best_s)
