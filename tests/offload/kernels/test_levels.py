from __future__ import annotations

import math

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from numba.core import config

from localrun.errors import UsageError
from localrun.offload.kernels import DenseKernel, FfnSpec, make_kernel
from localrun.offload.kernels.cpu import Level, level, levels
from localrun.offload.kernels.interleaved.rows import rows_function
from localrun.offload.kernels.reading import Reading
from tests.offload.kernels.support import Experts, Pairs, relative_error

AVX2 = "+avx2,+fma,+f16c"
AVX512 = f"{AVX2},+avx512f,+avx512bw,+avx512vl,+avx512dq"


@pytest.mark.parametrize("type_", [T.MXFP4, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.IQ2_XXS], ids=lambda t: t.name)
def test_a_level_computes_what_the_best_one_computes(
    kernel_level: str, type_: T, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(int(type_))
    spec = FfnSpec((type_,) * 3, 256, 256, math.inf)
    this = make_kernel(spec, n_threads=2)
    monkeypatch.delenv("LOCALRUN_KERNELS")
    best = make_kernel(spec, n_threads=2)
    experts, pairs = Experts.random(spec, 3, rng), Pairs.random([1, 11, 3], 4, rng)
    x, outputs = rng.standard_normal((4, 256), dtype=np.float32), []
    for kernel in (best, this):
        _memory, slots = experts.pack(kernel)
        outputs.append(np.zeros((15, 256), np.float32))
        kernel.run(slots, pairs.starts, pairs.x_rows, pairs.out_rows, x, outputs[-1])
    # Activations and integer sums are the same; only the order of F32 sums differs, and the few values that it rounds otherwise.
    assert relative_error(outputs[1], outputs[0].astype(np.float64)) < 1e-3


def test_the_forced_level_is_what_runs_and_has_compiled_code_of_its_own(kernel_level: str) -> None:
    assert level() == Level(kernel_level)
    assert DenseKernel(T.Q8_0, 64, 64, n_threads=1).name == f"q8_0-{kernel_level}"
    with_rows_of_their_own = [known for known in levels() if known is not Level.GENERIC]
    files = {
        rows_function(T.Q8_0, known, Reading.IN_ORDER)._cache._file("s", FakeCodegen())
        for known in with_rows_of_their_own
    }
    assert len(files) == len(with_rows_of_their_own)


class FakeCodegen:
    def magic_tuple(self) -> tuple[str, ...]:
        return ("one processor",)


@pytest.mark.parametrize(
    ("present", "best"),
    [
        ("+sse2", "generic"),
        (AVX2, "avx2"),
        (f"{AVX2},+avxvnni", "avx-vnni"),
        (AVX512, "avx512"),
        (f"{AVX512},+avx512vnni", "avx512-vnni"),
        (f"{AVX512},-avx512vnni,+avxvnni", "avx512"),
    ],
)
def test_a_processor_s_features_decide_its_level(present: str, best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCALRUN_KERNELS", raising=False)
    monkeypatch.setattr(config, "CPU_FEATURES", present)
    assert level().value == best


def test_a_level_that_does_not_exist_or_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CPU_FEATURES", AVX2)
    monkeypatch.setenv("LOCALRUN_KERNELS", "avx1024")
    with pytest.raises(UsageError, match="avx1024 is not a kernel level") as unknown:
        level()
    assert unknown.value.hint == "this processor has generic, avx2; unset it to use the last of these"
    monkeypatch.setenv("LOCALRUN_KERNELS", "avx512")
    with pytest.raises(UsageError, match="lacks avx512bw, avx512dq, avx512f, avx512vl") as lacking:
        level()
    assert lacking.value.hint == "it has generic, avx2; unset it to use the last of these"
