"""One operation of ggml at a time, on its CPU backend: what an operation of ours is compared with."""

from __future__ import annotations

import ctypes as C
from typing import Any

import numpy as np
import numpy.typing as npt

from localrun.ggml.library import library
from localrun.ggml.structures import DEVICE_TYPE_CPU, TYPE_F16, TYPE_F32, InitParams, Tensor

_SIZE = 1 << 20
"""Bytes for tensors' descriptions."""


class Graph:
    """Tensors in the CPU's memory and operations on them. Inputs first: `run` gives all tensors their memory.

    Attributes:
        context: the `ggml_context *`.
        graph: the `ggml_cgraph *` of the last `run`.
    """

    def __init__(self) -> None:
        self._lib = library()
        self.context = self._lib.ggml_init(InitParams(_SIZE, None, True))
        self._device = self._lib.ggml_backend_dev_by_type(DEVICE_TYPE_CPU)
        self.graph = 0
        self._inputs: list[tuple[int, npt.NDArray[Any]]] = []
        self._buffer: int | None = None

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.ggml_backend_buffer_free(self._buffer)
        self._lib.ggml_free(self.context)

    def input(self, values: npt.NDArray[Any], kind: int = TYPE_F32) -> int:
        """A tensor whose dimensions are those of `values`, last one first; at most three. `values` has the type's bytes."""
        n0, n1, n2 = [*reversed(values.shape), 1, 1][:3]
        tensor = int(self._lib.ggml_new_tensor_3d(self.context, kind, n0, n1, n2))
        self._inputs.append((tensor, np.ascontiguousarray(values)))
        return tensor

    def call(self, name: str, *arguments: float | int | None, first: bool = True) -> int:
        """An operation by its C function; tensors and integers as int, F32 as float. `first`: its first argument is the context."""
        function = self._lib.handle[name]
        function.restype = C.c_void_p
        kinds = [C.c_float if isinstance(a, float) else C.c_void_p for a in arguments]
        function.argtypes = [C.c_void_p, *kinds] if first else kinds
        return int(function(self.context, *arguments) if first else function(*arguments))

    def run(self, node: int) -> npt.NDArray[Any]:
        """Computes `node` and what it needs; its values."""
        lib = self._lib
        self.graph = int(lib.ggml_new_graph_custom(self.context, 64, False))
        lib.ggml_build_forward_expand(self.graph, node)
        kind = lib.ggml_backend_dev_buffer_type(self._device)
        self._buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(self.context, kind)
        for tensor, values in self._inputs:
            lib.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
        backend = lib.ggml_backend_dev_init(self._device, None)
        try:
            assert lib.ggml_backend_graph_compute_async(backend, self.graph) == 0
        finally:
            lib.ggml_backend_free(backend)
        return values_of(node).copy()


def values_of(tensor: int) -> npt.NDArray[Any]:
    """The memory of a tensor of F32 or F16, whose values are side by side; dimensions last one first."""
    description = Tensor.from_address(tensor)
    shape, kind = tuple(reversed(description.ne)), np.float16 if description.type == TYPE_F16 else np.float32
    memory = (C.c_char * (int(np.prod(shape)) * np.dtype(kind).itemsize)).from_address(description.data)
    return np.ndarray(shape, kind, memory)
