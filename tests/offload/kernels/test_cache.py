from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CODE = """
import json, math
from localrun.kernel_cache import KernelCache
misses = []
original = KernelCache.save_overload
KernelCache.save_overload = lambda self, sig, data: (misses.append(self._name), original(self, sig, data))
import numpy as np
from gguf import GGMLQuantizationType as T
from localrun.offload.kernels import DenseKernel, FfnSpec, make_kernel
kernel = make_kernel(FfnSpec((T.MXFP4, T.MXFP4, T.Q4_0), 64, 64, math.inf), n_threads=2)
memory = np.zeros(kernel.slot_bytes + 64, np.uint8)
slots = np.array([-(-memory.ctypes.data // 64) * 64], np.uint64)
zero, x, out = np.zeros(1, np.int32), np.ones((1, 64), np.float32), np.ones((1, 64), np.float32)
kernel.run(slots, np.array([0, 1], np.int32), zero, zero, x, out)
print(json.dumps({"name": kernel.name, "compiled": len(misses)}))
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"LOCALRUN_KERNEL_DIR": str(tmp_path)}

    def start() -> dict[str, object]:
        done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout))

    first, second = start(), start()
    assert first["name"] == second["name"]
    assert first["compiled"] != 0
    assert second["compiled"] == 0
