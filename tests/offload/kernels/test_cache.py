"""Compiled expert kernels are found again by the next process, whose objects lie elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import json, math
from localrun.kernel_cache import KernelCache
compiled, found = [], []
save, load = KernelCache.save_overload, KernelCache.load_overload
KernelCache.save_overload = lambda self, sig, data: (compiled.append(self._name), save(self, sig, data))

def load_and_note(self, sig, context):
    code = load(self, sig, context)
    if code is not None:
        found.append(self._name)
    return code

KernelCache.load_overload = load_and_note
import numpy as np
from gguf import GGMLQuantizationType as T
from localrun.offload.kernels import DenseKernel, FfnSpec, make_kernel
kernel = make_kernel(FfnSpec((T.MXFP4, T.MXFP4, T.Q4_0), 64, 64, math.inf), n_threads=2)
memory = np.zeros(kernel.slot_bytes + 64, np.uint8)
slots = np.array([-(-memory.ctypes.data // 64) * 64], np.uint64)
zero, x, out = np.zeros(1, np.int32), np.ones((1, 64), np.float32), np.ones((1, 64), np.float32)
kernel.run(slots, np.array([0, 1], np.int32), zero, zero, x, out)
print(json.dumps([kernel.name, compiled, len(found)]))
"""


def test_a_second_process_compiles_nothing() -> None:
    """The first one compiles what the run's folder has not yet (in an empty one, whatever is: tests/test_kernel_cache.py)."""
    first, second = (
        json.loads(subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout)
        for _ in range(2)
    )
    assert first[0] == second[0]
    assert second[1] == []
    assert second[2] >= 3, "the kernel's own functions at least"
