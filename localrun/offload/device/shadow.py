"""Activations that our device exchanges with llama.cpp, in a GPU's memory, and their shadow in RAM.

With the dense model on a GPU, our buffer type for activations is a copy of that GPU's: to ggml's scheduler it is another type, so
our device's inputs are copied (`compiled.copy_in` fetches them into the shadow), but the GPU's backend takes it for its own and
uses our results in place. A shadow is pinned RAM of the same layout: a tensor is at the same offset in both. What compiled code
or Python computes is written into the shadow and queued for upload behind what the GPU is doing; what a GPU computes for
us is written where llama.cpp expects it, and nobody waits for it.

Buffers stay those of the GPU's own type, because backends insist on that before they copy asynchronously; only reading them back,
as the CPU does for operations that the GPU lacks, goes through `_read_back`, which first waits for the GPU. That function
in a buffer's table is also how compiled code recognizes such buffers. All of them share one shadow: it only holds
what one part of a graph reads and writes, and parts are computed one after the other.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable
from typing import Any, Final

import numba as nb

from localrun.ggml import structures as ggml
from localrun.ggml.devices import GpuDevice, HostMemory
from localrun.ggml.library import library
from localrun.offload.device.layouts import MOST_INPUTS, PROCESS
from localrun.offload.device.tensors import BUFFER, DATA
from localrun.offload.kernels.lowlevel import call_5, call_i64, load_i64, store_i64
from localrun.offload.kernels.records import Record, get, put

_GET_TENSOR: Final = ggml.Buffer.iface.offset + ggml.BufferInterface.get_tensor.offset


@nb.njit
def is_shadowed(process: int, tensor: int) -> bool:
    """The tensor is in a GPU's memory, in a buffer of ours for activations."""
    buffer, read_back = load_i64(tensor + BUFFER), get(process, PROCESS.read_back)
    return read_back != 0 and buffer != 0 and load_i64(buffer + _GET_TENSOR) == read_back


@nb.njit
def in_ram(process: int, tensor: int) -> int:
    """Address of a tensor's bytes in RAM: its own, or those of its shadow."""
    if not is_shadowed(process, tensor):
        return load_i64(tensor + DATA)
    base = call_i64(get(process, PROCESS.get_base), load_i64(tensor + BUFFER), 0)
    return int(get(process, PROCESS.shadow) + load_i64(tensor + DATA) - base)


@nb.njit
def note_input(process: int, tensor: int, target: int) -> None:
    """Remembers of which tensor a split's input is a copy."""
    n = get(process, PROCESS.n_inputs)
    if n < MOST_INPUTS:
        store_i64(get(process, PROCESS.inputs) + n * 16, target)
        store_i64(get(process, PROCESS.inputs) + n * 16 + 8, tensor)
        put(process, PROCESS.n_inputs, n + 1)


@nb.njit
def original(process: int, target: int) -> int:
    """The tensor of which this input of the running split is a copy; 0: it is none."""
    for i in range(get(process, PROCESS.n_inputs)):
        if load_i64(get(process, PROCESS.inputs) + i * 16) == target:
            return int(load_i64(get(process, PROCESS.inputs) + i * 16 + 8))
    return 0


@nb.njit
def push(process: int, tensor: int) -> None:
    """Queues a tensor whose shadow has been computed for upload, if it has one."""
    if not is_shadowed(process, tensor):
        return
    backend, size = get(process, PROCESS.near), call_i64(get(process, PROCESS.n_bytes), tensor, 0)
    source = in_ram(process, tensor)
    if backend != 0:
        call_5(get(process, PROCESS.set_tensor), backend, tensor, source, 0, size)
        put(process, PROCESS.behind, backend)
    else:  # nothing came from the GPU, so which of its queues to use is unknown
        call_5(get(process, PROCESS.set_now), tensor, source, 0, size, 0)


class Activations:
    """The buffer type on one GPU. Lives as long as contexts use it: ggml keeps pointers to it.

    Args:
        device: the GPU on which the dense model is.
        process: fields of the process's record.
        failed: keeps an error of what ggml calls here, through which none may pass.
    """

    def __init__(self, device: GpuDevice, process: Record, failed: Callable[[BaseException], None]) -> None:
        self._lib, self._device, self._process, self._failed = library(), device, process, failed
        self._memory: HostMemory | None = None
        self._reads: dict[int, Any] = {}  # buffer -> its own get_tensor
        self._own = self._lib.ggml_backend_dev_buffer_type(device.address)
        self.type = ggml.BufferType.from_buffer_copy(ggml.BufferType.from_address(self._own))
        functions: Any = self.type.iface
        self._allocate = type(functions.alloc_buffer)(self._alloc_buffer)
        functions.alloc_buffer = self._allocate
        # One buffer, or none: two would overlap in the shadow. (Null: no limit.)
        functions.get_max_size = type(functions.get_max_size)()
        reading: Any = ggml.BufferInterface().get_tensor
        self._read = type(reading)(self._read_back)
        process[PROCESS.read_back] = C.cast(self._read, C.c_void_p).value or 0

    @property
    def address(self) -> int:
        """Of the buffer type."""
        return C.addressof(self.type)

    def _alloc_buffer(self, _type: int, size: int) -> int | None:
        buffer = self._lib.ggml_backend_buft_alloc_buffer(self._own, size)
        if not buffer:
            return None
        try:
            self._grow(size)
        except BaseException as error:
            self._lib.ggml_backend_buffer_free(buffer)
            self._failed(error)
            return None
        interface = ggml.Buffer.from_address(buffer).iface
        self._reads[buffer] = type(interface.get_tensor)(C.cast(interface.get_tensor, C.c_void_p).value)
        interface.get_tensor = self._read
        return int(buffer)

    def _grow(self, size: int) -> None:
        """Makes the shadow large enough. If that fails, the one that contexts have stays."""
        if self._memory is not None and self._memory.array.nbytes >= size:
            return
        memory = HostMemory(self._device, size)
        self.close()
        self._memory = memory
        self._process[PROCESS.shadow] = memory.array.ctypes.data

    def _read_back(self, buffer: int, tensor: int, data: int, offset: int, size: int) -> None:
        try:
            behind = int(self._process[PROCESS.behind])
            if behind:
                self._lib.ggml_backend_synchronize(behind)
            self._reads[buffer](buffer, tensor, data, offset, size)
        except BaseException as error:
            self._failed(error)

    def close(self) -> None:
        """Frees the shadow; nothing is decoded, and contexts of this type compute no more."""
        memory, self._memory = self._memory, None
        self._process[PROCESS.shadow] = 0
        if memory is not None:
            memory.close()
