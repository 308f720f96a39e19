"""CPU arithmetic of routed experts: from packed expert bytes and activations to expert outputs.

A kernel belongs to one expert shape (`FfnSpec`) and knows nothing about caches, files or llama.cpp's graph. It determines an
expert's layout in its slot (`pack`) and computes any number of (token, expert) pairs in one call (`run`), for decode (one pair
per expert) as well as prefill (hundreds). Router weights are not applied here.
"""

from __future__ import annotations

from localrun.offload.kernels.dense import DenseKernel
from localrun.offload.kernels.kernel import make_kernel, warm_up
from localrun.offload.kernels.spec import FfnKernel, FfnSpec

__all__ = ["DenseKernel", "FfnKernel", "FfnSpec", "make_kernel", "warm_up"]
