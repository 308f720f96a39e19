"""Scratch memory of the kernels: one growing buffer per thread, aligned to cache lines, shared by all layers' kernels."""

from __future__ import annotations

import threading

import numpy as np

from localrun.alignment import LINE_BYTES, align_up

_local = threading.local()


def workspace(n_bytes: int) -> int:
    """Address of at least `n_bytes`, aligned to `LINE_BYTES`, valid until this thread asks again; contents undefined."""
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.nbytes < n_bytes + LINE_BYTES:
        _local.buffer = None  # frees the old one before the new one exists
        buffer = _local.buffer = np.empty(n_bytes + n_bytes // 4 + LINE_BYTES, np.uint8)
    return int(align_up(buffer.ctypes.data, LINE_BYTES))
