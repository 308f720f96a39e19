"""A device that lies, fails and counts: a shim in ggml's own tables of functions, under llama.cpp's RPC device.

What is above, our code and ggml's generic functions, runs as with a card. The tables are put back at the end; a buffer keeps its
counting functions for its life.
"""

from __future__ import annotations

import ctypes as C
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from localrun.ggml import structures as ggml
from localrun.ggml.devices import GpuDevice
from localrun.ggml.library import library


@dataclass
class Shim:
    """What to do, and what was done.

    Attributes:
        fail_allocation: number of the buffer (from 1) that the device does not give; 0: none.
        fail_from: every buffer from this one on; 0: none.
        free_bytes: what the device says is free; None: the truth.
        free_after_launch: what it says once it has computed; None: the same as before.
        delay_s: how much longer the device takes for a graph, and for each copy from and to it.
        opens: the device can be opened.
        bytes_allocated: of all buffers that were given.
        n_allocations, n_in, bytes_in, n_out, bytes_out: buffers asked for, copies to the device and back, and their bytes.
        n_cleared: buffers set to one value.
        n_synchronized, n_launched: waits for the device, and graphs started.
        n_asked: how often the device was asked for its memory.
    """

    fail_allocation: int = 0
    fail_from: int = 0
    free_bytes: int | None = None
    free_after_launch: int | None = None
    delay_s: float = 0.0
    opens: bool = True
    n_allocations: int = 0
    bytes_allocated: int = 0
    n_in: int = 0
    bytes_in: int = 0
    n_out: int = 0
    bytes_out: int = 0
    n_cleared: int = 0
    n_asked: int = 0
    n_synchronized: int = 0
    n_launched: int = 0
    keep: list[Any] = field(default_factory=list)

    @property
    def free_now(self) -> int | None:
        """What the device says is free at this moment; None: the truth."""
        return self.free_bytes if self.free_after_launch is None or not self.n_launched else self.free_after_launch

    def delay(self) -> None:
        if self.delay_s:
            time.sleep(self.delay_s)


@contextmanager
def shim(device: GpuDevice) -> Iterator[Shim]:
    """Puts a shim under a device while the context lasts."""
    state = Shim()
    interface = ggml.Device.from_address(device.address).iface
    buffers = ggml.BufferType.from_address(library().ggml_backend_dev_buffer_type(device.address)).iface
    memory, open_, allocate, props = (
        interface.get_memory,
        interface.init_backend,
        buffers.alloc_buffer,
        interface.get_props,
    )
    originals = [_copy(function) for function in (memory, open_, allocate, props)]
    real_memory, real_open, real_allocate, real_props = originals

    def get_memory(address: int, free: Any, total: Any) -> None:
        state.n_asked += 1
        real_memory(address, free, total)
        if state.free_now is not None:
            free[0] = state.free_now

    def get_props(address: int, found: Any) -> None:
        state.n_asked += 1
        real_props(address, found)
        if state.free_now is not None:
            found[0].memory_free = state.free_now

    def init_backend(address: int, parameters: bytes | None) -> int | None:
        backend = real_open(address, parameters) if state.opens else None
        if backend:
            _count_calls(state, ggml.Backend.from_address(backend).iface)
        return int(backend) if backend else None

    def alloc_buffer(kind: int, size: int) -> int | None:
        state.n_allocations += 1
        if state.n_allocations == state.fail_allocation or 0 < state.fail_from <= state.n_allocations:
            return None
        buffer = real_allocate(kind, size)
        if buffer:
            state.bytes_allocated += size
            _count(state, _BufferStart.from_address(buffer).iface)
        return int(buffer) if buffer else None

    replaced = {
        "get_memory": (interface, get_memory),
        "get_props": (interface, get_props),
        "init_backend": (interface, init_backend),
        "alloc_buffer": (buffers, alloc_buffer),
    }
    for name, (table, function) in replaced.items():
        _replace(state, table, name, function)
    try:
        yield state
    finally:
        interface.get_memory, interface.init_backend, buffers.alloc_buffer, interface.get_props = originals
        _KEEP.append(state)  # buffers may outlive this


_KEEP: list[Shim] = []


class _BufferStart(C.Structure):
    """struct ggml_backend_buffer begins with its functions."""

    _fields_ = [("iface", ggml.BufferInterface)]


def _copy(function: Any) -> Any:
    """The function itself; a field of a structure would change with it."""
    return type(function)(C.cast(function, C.c_void_p).value)


def _replace(state: Shim, table: Any, name: str, function: Any) -> None:
    kind = type(getattr(table, name))
    made = kind(function)
    state.keep.append(made)
    setattr(table, name, made)


def _count(state: Shim, interface: Any) -> None:
    real_set, real_get, real_clear = (
        _copy(function) for function in (interface.set_tensor, interface.get_tensor, interface.clear)
    )

    def set_tensor(buffer: int, tensor: int, data: int, offset: int, size: int) -> None:
        state.n_in += 1
        state.bytes_in += size
        state.delay()
        real_set(buffer, tensor, data, offset, size)

    def get_tensor(buffer: int, tensor: int, data: int, offset: int, size: int) -> None:
        state.n_out += 1
        state.bytes_out += size
        state.delay()
        real_get(buffer, tensor, data, offset, size)

    def clear(buffer: int, value: int) -> None:
        state.n_cleared += 1
        real_clear(buffer, value)

    for name, function in (("set_tensor", set_tensor), ("get_tensor", get_tensor), ("clear", clear)):
        _replace(state, interface, name, function)


_Copy = C.CFUNCTYPE(None, C.c_void_p, C.c_void_p, C.c_void_p, C.c_size_t, C.c_size_t)
_Wait = C.CFUNCTYPE(None, C.c_void_p)


def _count_calls(state: Shim, interface: Any) -> None:
    """The functions of an opened device; those that it lacks, ggml replaces by the buffer's."""

    def copy_in(real: Any) -> Any:
        def set_async(backend: int, tensor: int, data: int, offset: int, size: int) -> None:
            state.n_in += 1
            state.bytes_in += size
            real(backend, tensor, data, offset, size)

        return _Copy(set_async)

    def copy_out(real: Any) -> Any:
        def get_async(backend: int, tensor: int, data: int, offset: int, size: int) -> None:
            state.n_out += 1
            state.bytes_out += size
            real(backend, tensor, data, offset, size)

        return _Copy(get_async)

    def wait(real: Any) -> Any:
        def synchronize(backend: int) -> None:
            state.n_synchronized += 1
            real(backend)

        return _Wait(synchronize)

    for name, kind, wrap in (
        ("set_tensor_async", _Copy, copy_in),
        ("get_tensor_async", _Copy, copy_out),
        ("synchronize", _Wait, wait),
    ):
        address = getattr(interface, name)
        if address:
            made = wrap(kind(address))
            state.keep.append(made)
            setattr(interface, name, C.cast(made, C.c_void_p))
    real_compute = _copy(interface.graph_compute)

    def compute(backend: int, graph: int) -> int:
        state.n_launched += 1
        state.delay()
        return int(real_compute(backend, graph))

    _replace(state, interface, "graph_compute", compute)
