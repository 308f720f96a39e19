from __future__ import annotations

import math

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from localrun.errors import UsageError
from localrun.offload.kernels import FfnSpec, make_kernel
from localrun.offload.kernels.cpu import Level, level
from tests.offload.kernels.support import Experts, Pairs, relative_error

TYPES = [T.MXFP4, T.Q8_0, T.Q2_K, T.Q3_K, T.IQ2_XXS]


def available(name: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setenv("LOCALRUN_KERNELS", name)
    try:
        return level() == Level(name)
    except UsageError:
        return False


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("name", ["generic", "avx2", "avxvnni"])
def test_every_level_of_this_processor_agrees_with_its_best(
    name: str, type_: T, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(int(type_))
    spec = FfnSpec((type_,) * 3, 256, 256, math.inf)
    monkeypatch.delenv("LOCALRUN_KERNELS", raising=False)
    best = make_kernel(spec, n_threads=2)
    if not available(name, monkeypatch):
        pytest.skip(f"this processor has no {name}")
    other = make_kernel(spec, n_threads=2)
    experts, pairs = Experts.random(spec, 3, rng), Pairs.random([1, 11, 3], 4, rng)
    x, outputs = rng.standard_normal((4, 256), dtype=np.float32), []
    for kernel in (best, other):
        _memory, slots = experts.pack(kernel)
        outputs.append(np.zeros((15, 256), np.float32))
        kernel.run(slots, pairs.starts, pairs.x_rows, pairs.out_rows, x, outputs[-1])
    # Activations and integer sums are the same; only the order of F32 sums differs, and the few values that it rounds otherwise.
    assert relative_error(outputs[1], outputs[0].astype(np.float64)) < 1e-3


def test_a_level_that_does_not_exist_or_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALRUN_KERNELS", "avx1024")
    with pytest.raises(UsageError, match="avx1024 is not a kernel level"):
        level()
    monkeypatch.setattr("localrun.offload.kernels.cpu.features", lambda: frozenset({"avx2", "fma", "f16c"}))
    monkeypatch.setenv("LOCALRUN_KERNELS", "avx512")
    with pytest.raises(UsageError, match="can't run"):
        level()
    monkeypatch.delenv("LOCALRUN_KERNELS")
    assert level() == Level.AVX2
