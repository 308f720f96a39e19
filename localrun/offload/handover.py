"""The interface between compiled code and Python for one model: records and thresholds in one direction, errors and stops in
the other.

A layer call stays in compiled code (`device/compiled.py`) if it has fewer tokens than a threshold that Python sets; at zero every
call comes to Python.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from localrun.errors import StoppedError
from localrun.offload.cache.slots import SlotTable
from localrun.offload.cache.telemetry import Telemetry
from localrun.offload.device.compiled_gpu import LayerOnGpu
from localrun.offload.device.compiled_misses import MissRecord
from localrun.offload.device.device import Weight, expert_device
from localrun.offload.device.view import F32
from localrun.offload.device.weight_records import LayerRecord, expert_record
from localrun.offload.gpu.stream import LONG_TOKENS
from localrun.offload.kernels import FfnKernel
from localrun.quant.model.source import MoeLayer

ANY_TOKENS: Final = 1 << 60
"""More than any call has: nothing but a read sends it to Python."""


class Handover:
    """A model's records for compiled code, and the reasons for calls to leave it.

    Owns the records (compiled code points into them: `close` the model first), the threshold, the stop request and the first error.
    There is no lock: records change only between decodes, and the threshold is recomputed until it matches its reasons, so
    `request_stop` may be called from any thread and from a signal handler during any of these methods.

    Args:
        layers: shapes by block number.
        kernels: by block number one kernel for each of the layer's variants.
        table, telemetry: their arrays are read and updated by compiled code; the table's gate says of which layer.
    """

    def __init__(
        self,
        layers: Mapping[int, MoeLayer],
        kernels: Mapping[int, Sequence[FfnKernel]],
        table: SlotTable,
        telemetry: Telemetry,
    ) -> None:
        self.threshold: npt.NDArray[np.int64] = np.full(1, ANY_TOKENS, np.int64)
        self._records = {
            layer: LayerRecord(
                layer,
                moe.n_experts,
                table.resident[layer],
                table.stamps[layer],
                table.uses[layer],
                table.tick,
                telemetry.values[layer],
                self.threshold,
                [kernel.call for kernel in kernels[layer]],
                table.gate.address,
            )
            for layer, moe in layers.items()
        }
        self._weights: dict[int, Weight] = {}
        self._has_gpu = False
        self._reasons: set[str] = set()
        self._stop = threading.Event()
        self._error: BaseException | None = None

    # -- records -------------------------------------------------------------------------------------------------------

    def weight(self, tensor: int) -> Weight | None:
        """The stacked expert tensor at that address."""
        return self._weights.get(tensor)

    def adopt(self, tensor: int, weight: Weight) -> None:
        """Called at load for each stacked expert tensor that llama.cpp created."""
        self._weights[tensor] = weight
        expert_device().attach(tensor, expert_record(weight.projection, self._records[weight.layer]))

    def use_gpu(self, layers: Mapping[int, LayerOnGpu] | None) -> None:
        """Sets the records of experts on GPUs (None: there are none); call between decodes."""
        for layer, record in self._records.items():
            record.use_gpu(None if layers is None else layers[layer])
        self._has_gpu = layers is not None
        self._set_threshold()

    def use_misses(self, record: MissRecord | None) -> None:
        """Sets where calls of few tokens ask for what they lack (None: in Python); call between decodes."""
        for layer in self._records.values():
            layer.use_misses(record)

    def weights(self, n_tokens: int, n_used: int) -> F32:
        """(T * K,) the router's weights of the running call's pairs; a copy."""
        return expert_device().process.take_weights(n_tokens, n_used)

    def add_up(self, n_tokens: int, n_used: int, rows: F32, out: F32, summed: Sequence[int] = ()) -> None:
        """After `weights`: weights the outputs of the running call's pairs, (T * K, D), and adds up each token's into `out`.

        Args:
            summed: pairs that are added up elsewhere, so not here.
        """
        expert_device().process.add_up(n_tokens, n_used, rows, out, summed)

    # -- thresholds ----------------------------------------------------------------------------------------------------

    def need_python(self, reason: str, needed: bool) -> None:
        """Routes all calls to Python for this reason, or drops the reason; any thread."""
        (self._reasons.add if needed else self._reasons.discard)(reason)
        self._set_threshold()

    def _compiled_below(self) -> int:
        """Tokens from which a call goes to Python."""
        if self._stop.is_set() or self._reasons:
            return 0
        return LONG_TOKENS if self._has_gpu else ANY_TOKENS

    def _set_threshold(self) -> None:
        """Whoever writes last has looked at the reasons after it wrote: no request is lost to another one's older value."""
        while True:
            self.threshold[0] = value = self._compiled_below()
            if value == self._compiled_below():
                return

    # -- stops and errors ----------------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Makes the running (or next) decode fail with `StoppedError` at the next layer. Any thread, also signal handlers."""
        self._stop.set()
        self._set_threshold()

    def clear_stop(self) -> None:
        """Forgets an earlier stop request; before a new answer."""
        self._stop.clear()
        self._set_threshold()

    def check_stop(self) -> None:
        """Raises StoppedError if a stop was requested."""
        if self._stop.is_set():
            raise StoppedError("stopped")

    def failed(self, error: BaseException) -> None:
        """Records the cause of a failed decode; only the first one is kept."""
        if self._error is None:
            self._error = error

    def take_error(self) -> BaseException | None:
        """The cause of the last failed decode, once."""
        error, self._error = self._error, None
        return error
