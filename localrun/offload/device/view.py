"""Tensors of a running ggml graph as numpy arrays, without copying."""

from __future__ import annotations

import ctypes as C
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from localrun.errors import DecodeError
from localrun.ggml.structures import Tensor

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class View:
    """A tensor's memory: address, `ne` elements and `nb` byte strides of the first three dimensions (innermost first)."""

    address: int
    ne: tuple[int, int, int]
    nb: tuple[int, int, int]


def view(tensor: Tensor, address: int | None = None) -> View:
    """Reads a live ggml tensor's placement; `address`: where its bytes are, if not at its own."""
    ne, nb = tensor.ne, tensor.nb
    return View((tensor.data or 0) if address is None else address, (ne[0], ne[1], ne[2]), (nb[0], nb[1], nb[2]))


def rows_at(place: View, dtype: type[Any]) -> npt.NDArray[Any]:
    """A ggml tensor's memory as (ne2 * ne1, ne0) or, for ne2 == 1, (ne1, ne0): rows with a single stride.

    Raises:
        DecodeError: rows that don't have one common stride.
    """
    ne0, ne1, ne2 = place.ne
    nb0, nb1, nb2 = place.nb
    itemsize = np.dtype(dtype).itemsize
    if nb0 != itemsize or (ne1 > 1 and ne2 > 1 and nb2 != nb1 * ne1):
        raise DecodeError(f"unexpected strides {place.nb} of a tensor of shape {place.ne}")
    rows, stride = ne1 * ne2, nb1 if ne1 > 1 else nb2
    if rows == 1:
        stride = ne0 * itemsize
    memory: Any = (C.c_char * ((rows - 1) * stride + ne0 * itemsize)).from_address(place.address)
    return np.ndarray((rows, ne0), dtype, memory, 0, (stride, itemsize))


def ids_at(place: View) -> I32:
    """(T, K) view of a ggml tensor of shape (K, T)."""
    k_used, n_tokens, _ = place.ne
    memory: Any = (C.c_char * ((n_tokens - 1) * place.nb[1] + k_used * 4)).from_address(place.address)
    return np.ndarray((n_tokens, k_used), np.int32, memory, 0, (place.nb[1], 4))


def matrices_at(place: View) -> F32:
    """(ne2, ne1, ne0) view of F32 memory, any strides but the innermost.

    Raises:
        DecodeError: values of a row that are not adjacent.
    """
    ne0, ne1, ne2 = place.ne
    nb0, nb1, nb2 = place.nb
    if nb0 != 4:
        raise DecodeError(f"unexpected strides {place.nb} of a tensor of shape {place.ne}")
    memory: Any = (C.c_char * ((ne2 - 1) * nb2 + (ne1 - 1) * nb1 + ne0 * 4)).from_address(place.address)
    return np.ndarray((ne2, ne1, ne0), np.float32, memory, 0, (nb2, nb1, nb0))
