"""Compiles the expert kernels of this processor and keeps them on disk, so that no chat waits for the compiler."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from localrun.offload.kernels import FfnSpec, make_kernel
from localrun.offload.kernels.ggml_types import block_type
from localrun.offload.kernels.interleaved.formats import FORMATS

WIDTH = 256
"""Rows and columns of the tiny expert that each kernel computes: a whole block of every type."""


def warm_up(status: Callable[[str], None]) -> int:
    """Runs every compiled kernel once. Returns how many there are."""
    for number, type_ in enumerate(FORMATS):
        status(f"compiling kernels: {type_.name} ({number + 1} of {len(FORMATS)})")
        spec = FfnSpec((type_, type_, type_), WIDTH, WIDTH, 10.0)
        kernel = make_kernel(spec, math="int8", n_threads=1)
        raw = np.zeros(3 * WIDTH * block_type(type_).row_bytes(WIDTH), np.uint8)
        memory = np.zeros(kernel.slot_bytes + 4096, np.uint8)
        slot = -(-memory.ctypes.data // 4096) * 4096
        kernel.pack(raw, slot)
        for n_tokens in (1, 16):  # decode and prefill have code of their own
            x = np.zeros((n_tokens, WIDTH), np.float32)
            rows = np.arange(n_tokens, dtype=np.int32)
            starts = np.array([0, n_tokens], np.int32)
            kernel.run(np.array([slot], np.uint64), starts, rows, rows, x, np.empty_like(x))
    return len(FORMATS)
