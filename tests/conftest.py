"""No test reads or writes the user's folders; compiled kernels are shared, because compiling them takes a minute.

`LOCALRUN_KERNELS=avx2 make test` runs all tests as on a processor of that level: numba's compiler then uses nothing newer either.
(llama.cpp is as it was built.) Tests of numerics run at every level that there is in any case: fixture `kernel_level`.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Generator, Iterator

import pytest
from hypothesis import settings

from localrun.engine import memory
from localrun.engine.process.process import EngineProcess
from localrun.paths import kernel_dir
from localrun.units import format_size

_AVX2 = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+popcnt,+sse3,+ssse3,+sse4.1,+sse4.2"
_PROCESSORS = {
    "generic": ("x86-64", "+sse2"),
    "avx2": ("haswell", _AVX2),
    "avx-vnni": ("haswell", f"{_AVX2},+avxvnni"),
    "avx512": ("skylake-avx512", f"{_AVX2},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl"),
}
"""Level -> LLVM's name of a processor that has it and no more, and its features. The best level: this machine's own."""

if os.environ.get("LOCALRUN_KERNELS") in _PROCESSORS:  # read by numba when it is imported
    _name, _features = _PROCESSORS[os.environ["LOCALRUN_KERNELS"]]
    os.environ.setdefault("NUMBA_CPU_NAME", _name)
    os.environ.setdefault("NUMBA_CPU_FEATURES", _features)
# Without bytecode each worker would rewrite all assertions (5 s of CPU time), and each engine process compile the package.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.setdefault("LOCALRUN_KERNEL_DIR", str(kernel_dir()))
_folder = tempfile.TemporaryDirectory(prefix="localrun-tests-")
for _name in ("CACHE", "DATA", "CONFIG"):
    os.environ[f"LOCALRUN_{_name}_DIR"] = os.path.join(_folder.name, _name.lower())
# Spinning threads starve each other when cores are shared; read by libgomp when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


ENGINE_BYTES = 512 << 20
"""An engine process with a tiny model takes 160 MiB, refuses RAM that is not there, and gives experts away when less than 256 MiB
are left: with less than this its tests would be about memory."""

_REALLY_AVAILABLE = memory.available_memory  # before `_room_in_ram`

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")  # --hypothesis-profile=default looks for new cases


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules and tests stay to the end. Looking for garbage among them took a sixth of the UI tests' CPU time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000, 10, 10)
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _room_in_ram() -> Iterator[None]:
    """Whatever else runs here, three quarters of the RAM count as free in this process. Tests of what happens when memory is short
    say themselves how much there is, by files or by a function of their own."""
    system = memory.PROC

    def roomy() -> int | None:
        available, total = _REALLY_AVAILABLE(), memory.total_memory()
        if available is None or total is None or system != memory.PROC:
            return available
        return max(available, total * 3 // 4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "available_memory", roomy)
        yield


@pytest.fixture(scope="session", autouse=True)
def _patience() -> Iterator[None]:
    """An engine process that answers late, because this machine is busy, is no fault. Tests of time limits say theirs."""
    with pytest.MonkeyPatch.context() as patch:
        for ask in (EngineProcess.stats, EngineProcess.count, EngineProcess.count_tokens, EngineProcess.tokenize):
            patch.setattr(ask, "__kwdefaults__", {**(ask.__kwdefaults__ or {}), "timeout_s": 300.0})
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what starts engine processes where there is no room for one: they see the machine as it is."""
    if item.get_closest_marker("engine_process") is not None:
        available = _REALLY_AVAILABLE()
        if available is not None and available < ENGINE_BYTES:
            pytest.skip(f"an engine process needs {format_size(ENGINE_BYTES)}, and {format_size(available)} are free")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `kernel_level` run once per level that this processor has."""
    if "kernel_level" in metafunc.fixturenames:
        from localrun.offload.kernels.cpu import levels

        metafunc.parametrize("kernel_level", [level.value for level in levels()], indirect=True)


@pytest.fixture
def kernel_level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernels that are made during the test are of this level."""
    monkeypatch.setenv("LOCALRUN_KERNELS", request.param)
    return str(request.param)
