"""Records of layers, stacked experts and dense matrices, through which compiled code finds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from localrun.offload.device import compiled_gpu as gpu_native
from localrun.offload.device import compiled_misses as miss_native
from localrun.offload.device.layouts import KIND_DENSE, KIND_EXPERTS, LAYER, VARIANT, WEIGHT
from localrun.offload.kernels.records import Record
from localrun.offload.kernels.tasks import KernelCall

MAX_VARIANTS: Final = 16
"""Formats that experts of one layer may have."""


class LayerRecord:
    """A layer's fields; keeps the arrays that they point to alive. `calls`: by variant."""

    def __init__(
        self,
        number: int,
        n_experts: int,
        resident: npt.NDArray[np.uint64],
        stamps: npt.NDArray[np.int64],
        uses: npt.NDArray[np.int64],
        tick: npt.NDArray[np.int64],
        telemetry: npt.NDArray[np.int64],
        compiled_below: npt.NDArray[np.int64],
        calls: Sequence[KernelCall],
        gate_address: int,
    ) -> None:
        assert 1 <= len(calls) <= MAX_VARIANTS
        self._calls = np.concatenate(
            [VARIANT.make(call=c.address, jobs_bytes=c.jobs_bytes, tasks_bytes=c.tasks_bytes) for c in calls]
        )
        self._keep = (resident, stamps, uses, tick, telemetry, compiled_below, calls)
        self.fields = LAYER.make(
            number=number,
            n_experts=n_experts,
            resident=resident.ctypes.data,
            stamps=stamps.ctypes.data,
            uses=uses.ctypes.data,
            tick=tick.ctypes.data,
            telemetry=telemetry.ctypes.data,
            compiled_below=compiled_below.ctypes.data,
            n_calls=len(calls),
            calls=self._calls.ctypes.data,
            gpu=0,
            misses=0,
            gate=gate_address,
        )

    @property
    def address(self) -> int:
        return int(self.fields.ctypes.data)

    def use_misses(self, record: miss_native.MissRecord | None) -> None:
        """From now on calls of few tokens ask there for what they lack (None: they go to Python); between two decodes. The caller
        keeps it alive."""
        self.fields[LAYER.misses] = 0 if record is None else record.address

    def use_gpu(self, experts: gpu_native.LayerOnGpu | None) -> None:
        """From now on these experts of the layer are on GPUs (None: none); between two decodes. The caller keeps them alive."""
        self.fields[LAYER.gpu] = 0 if experts is None else experts.address


def expert_record(projection: int, layer: LayerRecord) -> Record:
    """Fields of a stacked expert tensor; the caller keeps the array as long as the tensor's `extra` points to it."""
    record = WEIGHT.empty()
    WEIGHT.fill(record, kind=KIND_EXPERTS, projection=projection, layer=layer.address)
    return record


def dense_record(call: KernelCall, packed: npt.NDArray[np.uint64]) -> Record:
    """Fields of a dense matrix; `packed`: address of each of its matrices (one, or one per group)."""
    record = WEIGHT.empty()
    WEIGHT.fill(
        record,
        kind=KIND_DENSE,
        call=call.address,
        jobs_bytes=call.jobs_bytes,
        tasks_bytes=call.tasks_bytes,
        n_batch=packed.size,
        packed=packed.ctypes.data,
    )
    return record
