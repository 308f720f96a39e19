"""`localrun doctor`: checks in the order in which failures cascade, each with a verdict, the finding, and the command that
fixes it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from localrun import config, paths
from localrun.api import demo
from localrun.commands.output import Output
from localrun.engine import memory
from localrun.errors import LocalrunError
from localrun.units import format_duration, format_size

EXAMPLES = """\
examples:
  localrun doctor
  localrun doctor --warm        also compile the kernels, so chats don't wait for them
"""

LOW_MEMORY_BYTES = 8 * 2**30
LOW_DISK_BYTES = 10 * 2**30
PROBE_TIMEOUT_S = 120

CARDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "0x10de": ("NVIDIA", ("CUDA", "Vulkan"), "make cuda"),
    "0x1002": ("AMD", ("ROCm", "Vulkan"), "make rocm, or make vulkan"),
    "0x8086": ("Intel", ("Vulkan",), "make vulkan"),
}
"""By PCI vendor: who made the card, ggml's backends for it, and how to get one."""

GPU_DRIVERS = {
    "CUDA": "install or load the NVIDIA driver: nvidia-smi must list the card",
    "ROCm": "load the amdgpu driver and join the groups render and video: rocminfo must list the card",
    "Vulkan": "install the card's Vulkan driver (Mesa's: apt install mesa-vulkan-drivers): vulkaninfo --summary must list the card",
}
"""By ggml backend: what is missing when it finds no card."""

NO_DRIVER = Path(sys.prefix) / "no-driver"
"""A libcuda without a device, which set-up makes where it compiles for NVIDIA's GPUs and finds no driver."""

DRIVER_LIBRARIES = {
    "libcuda.so": "install the NVIDIA driver, or, without an NVIDIA GPU, make cpu",
    "libcudart": "make cuda, or add the CUDA toolkit's lib64 to LD_LIBRARY_PATH or ldconfig, or make cpu",
    "libcublas": "make cuda, or add the CUDA toolkit's lib64 to LD_LIBRARY_PATH or ldconfig, or make cpu",
    "libvulkan": "install the Vulkan loader (apt install libvulkan1), or make cpu",
    "libamdhip64": "add ROCm's lib folder to LD_LIBRARY_PATH or ldconfig, or make cpu",
    "blas.so": "add ROCm's lib folder to LD_LIBRARY_PATH or ldconfig, or make cpu",
}
"""By shared library that a build for a GPU needs: what mends its absence."""

Verdict = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check.

    Attributes:
        verdict: only FAIL makes the command fail.
        fix: the command or step that fixes it, or, if all is well, that may be of use.
    """

    name: str
    verdict: Verdict
    detail: str
    fix: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun doctor`."""
    parser.epilog = EXAMPLES
    parser.add_argument("--warm", action="store_true", help="compile the kernels now and try the demo model")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    out, results = Output(), []
    for result in checks(warm=args.warm, status=out.status):
        out.clear_status()
        results.append(result)
        if not args.json:
            out.line(f"{result.verdict:4}  {result.name}: {result.detail}")
            if result.fix:
                out.line(f"      {'hint' if result.verdict == 'ok' else 'fix'}: {result.fix}")
    if args.json:
        out.json([asdict(result) for result in results])
    return int(any(result.verdict == "FAIL" for result in results))


def checks(*, warm: bool, status: Callable[[str], None]) -> Iterator[CheckResult]:
    """All checks, one after another. Stops where the rest could only repeat the failure."""
    yield check_python()
    yield check_settings()
    library = check_library()
    yield library
    if library.verdict != "FAIL":
        yield check_rpc()
        yield check_devices()
        yield check_gpus()
    yield check_processor()
    yield check_memory()
    yield check_folder("cache", paths.cache_dir())
    yield check_folder("data", paths.data_dir())
    if library.verdict != "FAIL":
        yield check_kernels(warm=warm, status=status)
        yield check_demo(warm=warm, status=status)


def check_python() -> CheckResult:
    """Version and path of the interpreter; always ok."""
    # An older one can't even read this file: set-up refuses it.
    return CheckResult("python", "ok", f"{platform.python_version()}, {sys.executable}")


def check_settings() -> CheckResult:
    """Whether the config file, if there is one, is valid."""
    path = paths.config_dir() / config.FILE_NAME
    try:
        config.load()
    except LocalrunError as error:
        return CheckResult("settings", "FAIL", str(error), error.hint or f"edit or remove {path}")
    return CheckResult("settings", "ok", str(path) if path.exists() else f"defaults ({path} does not exist)")


def check_library() -> CheckResult:
    """In a separate process, because an incompatible library may crash."""
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return CheckResult("llama.cpp", "FAIL", "llama-cpp-python is not installed", paths.how_to_reinstall())
    version_of_ggml = "from localrun.ggml import library; print(library.library().ggml_version().decode())"
    code, output = _probe(version_of_ggml)
    if code and "libcuda.so" in output and NO_DRIVER.is_dir() and not _probe(version_of_ggml, libraries=NO_DRIVER)[0]:
        detail = f"llama-cpp-python {version}, built for NVIDIA GPUs: the build is fine, but the driver (libcuda.so.1) is missing"
        return CheckResult("llama.cpp", "FAIL", detail, DRIVER_LIBRARIES["libcuda.so"])
    if code:
        fix = next((fix for name, fix in DRIVER_LIBRARIES.items() if name in output), paths.how_to_reinstall())
        return CheckResult("llama.cpp", "FAIL", f"llama-cpp-python {version}: {_last_line(output, code)}", fix)
    return CheckResult(
        "llama.cpp", "ok", f"llama-cpp-python {version}, ggml {_last_line(output, code)}, structures match"
    )


def check_rpc() -> CheckResult:
    """Whether llama.cpp's RPC backend can be loaded; warns if not. In a separate process, like `check_library`."""
    code, output = _probe(
        "import ctypes, os, llama_cpp; folder = os.path.join(llama_cpp.__path__[0], 'lib')\n"
        "name = next(n for n in sorted(os.listdir(folder)) if n.startswith('libggml-rpc.'))\n"
        "ctypes.CDLL(os.path.join(folder, name), ctypes.RTLD_GLOBAL).ggml_backend_rpc_start_server"
    )
    if code:
        return CheckResult(
            "RPC backend", "warn", f"not compiled in ({_last_line(output, code)})", paths.how_to_reinstall()
        )
    return CheckResult("RPC backend", "ok", "compiled in")


def check_devices() -> CheckResult:
    """The devices that llama.cpp finds and the backends it was compiled for; warns if they can't be listed."""
    code, output = _probe(
        "import llama_cpp as L; from localrun.ggml import library as ggml, log; log.install(); L.llama_backend_init()\n"
        "lib = ggml.library(); devices = [lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count())]\n"
        "backends = [lib.ggml_backend_reg_get(i) for i in range(lib.ggml_backend_reg_count())]\n"
        "print(', '.join(lib.ggml_backend_dev_name(d).decode() for d in devices), end='; compiled for ')\n"
        "print(', '.join(lib.ggml_backend_reg_name(b).decode() for b in backends))"
    )
    if code:
        return CheckResult("devices", "warn", f"can't be listed: {_last_line(output, code)}")
    return CheckResult("devices", "ok", output.strip().splitlines()[-1])


def check_gpus() -> CheckResult:
    """Compares the machine's graphics cards with what llama.cpp was compiled for."""
    code, output = _probe(
        "import json; from localrun.ggml import library as ggml; from localrun.ggml.devices import gpu_devices\n"
        "devices = [(d.name, d.description, d.free_bytes, d.total_bytes) for d in gpu_devices()]; lib = ggml.library()\n"
        "backends = [lib.ggml_backend_reg_get(i) for i in range(lib.ggml_backend_reg_count())]\n"
        "print(json.dumps([devices, [lib.ggml_backend_reg_name(b).decode() for b in backends]]))"
    )
    if code:
        return CheckResult("GPU", "warn", f"can't be listed: {_last_line(output, code)}", "--gpu none")
    usable, backends = json.loads(output.strip().splitlines()[-1])
    if usable:
        listed = (
            f"{name} ({what}), {format_size(free)} of {format_size(all_)} free" for name, what, free, all_ in usable
        )
        return CheckResult("GPU", "ok", "; ".join(listed))
    return check_unused_gpus(_display_vendors(), backends)


def check_unused_gpus(vendors: Sequence[str], backends: Sequence[str]) -> CheckResult:
    """Why llama.cpp can use none of the machine's cards.

    Args:
        vendors: PCI numbers of their makers.
        backends: what llama.cpp was compiled for, by ggml's names.
    """
    cards = [CARDS[vendor] for vendor in vendors if vendor in CARDS]
    compiled = [name for name in GPU_DRIVERS if name in backends]
    if not cards:
        if not compiled:
            return CheckResult("GPU", "ok", "none found; localrun runs on the CPU")
        kinds = ", ".join(compiled)
        return CheckResult(
            "GPU", "ok", f"none found; llama.cpp's build for {kinds} is fine, but there is no card: running on the CPU"
        )
    makers = ", ".join(dict.fromkeys(maker for maker, _, _ in cards))
    fitting = [name for _, names, _ in cards for name in names if name in compiled]
    if fitting:
        fixes = "; ".join(dict.fromkeys(GPU_DRIVERS[name] for name in fitting))
        return CheckResult(
            "GPU", "warn", f"{makers}, but {', '.join(dict.fromkeys(fitting))} finds no usable card", fixes
        )
    fixes = ", ".join(dict.fromkeys(fix for _, _, fix in cards))
    return CheckResult("GPU", "warn", f"{makers}, but llama.cpp was compiled without support for it", fixes)


def check_processor() -> CheckResult:
    """Which of our kernels the processor can run; warns about an x86 one without AVX2."""
    flags = _cpu_flags()
    cores = memory.physical_cores()
    kind = f"{platform.machine()}, {cores} cores"
    if platform.machine() not in ("x86_64", "AMD64"):
        return CheckResult("processor", "ok", f"{kind}, generic kernels")
    if {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"} <= flags:
        return CheckResult("processor", "ok", f"{kind}, AVX-512 VNNI")
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        return CheckResult("processor", "ok", f"{kind}, AVX-512")
    if "avx2" in flags:
        return CheckResult("processor", "ok", f"{kind}, AVX2")
    return CheckResult("processor", "warn", f"{kind}, no AVX2: answers will be slow")


def check_memory() -> CheckResult:
    """Size of RAM; warns if it is unknown or below `LOW_MEMORY_BYTES`."""
    total = memory.total_memory()
    if total is None:
        return CheckResult("memory", "warn", "size unknown", "set --ram")
    verdict: Verdict = "warn" if total < LOW_MEMORY_BYTES else "ok"
    return CheckResult("memory", verdict, memory.describe())


def check_folder(name: str, folder: Path) -> CheckResult:
    """Writable, and how much is free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        variable = f"LOCALRUN_{name.upper()}_DIR"
        return CheckResult(
            f"{name} folder", "warn", f"{folder}: {error.strerror}", f"set {variable} to a writable folder"
        )
    free = shutil.disk_usage(folder).free
    verdict: Verdict = "warn" if free < LOW_DISK_BYTES else "ok"
    dense = sum(file.stat().st_size for file in folder.glob("dense/*/dense.gguf")) if name == "cache" else 0
    kept = f", {format_size(dense)} of converted dense matrices" if dense else ""
    return CheckResult(f"{name} folder", verdict, f"{folder}, {format_size(free)} free{kept}")


def check_kernels(*, warm: bool, status: Callable[[str], None]) -> CheckResult:
    """How many are compiled; with `warm`, compiles all that a chat may need. They are kept."""
    if not warm:
        return check_compiled()
    from localrun.commands.warm import warm_kernels

    start = time.monotonic()
    try:
        n_types = warm_kernels(status)
    except Exception as error:  # the report must continue whatever the compiler raises
        return CheckResult(
            "kernels", "FAIL", f"{type(error).__name__}: {error}", "report this with your processor's name"
        )
    return CheckResult("kernels", "ok", f"of {n_types} types, ready after {format_duration(time.monotonic() - start)}")


def check_compiled() -> CheckResult:
    """How many kernels are in the cache. In a separate process, since numba takes long to import."""
    code, output = _probe("from localrun.kernel_cache import n_kept; print(n_kept())")
    if code:
        return CheckResult("kernels", "FAIL", _last_line(output, code), paths.how_to_reinstall())
    if n_kept := int(_last_line(output, code)):
        return CheckResult("kernels", "ok", f"{n_kept} compiled; others when they are first used")
    return CheckResult("kernels", "ok", "compiled on first use", "localrun doctor --warm compiles them now")


def check_demo(*, warm: bool, status: Callable[[str], None]) -> CheckResult:
    """Whether the demo model is there; with `warm`, whether it answers."""
    try:
        folder = demo.checkpoint()
    except LocalrunError as error:
        return CheckResult("demo model", "warn", str(error), error.hint)
    n_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    detail = f"{folder}, checkpoint of {format_size(n_bytes)}"  # the same size as in `localrun list`
    if not warm:
        return CheckResult("demo model", "ok", detail)
    from localrun.commands.warm import try_demo_model

    try:
        timings = try_demo_model(status)
    except LocalrunError as error:
        return CheckResult("demo model", "FAIL", f"{detail}: {error}", error.hint)
    return CheckResult("demo model", "ok", f"{detail}, answered {timings.new_tokens} tokens")


def _probe(code: str, *, libraries: Path | None = None) -> tuple[int, str]:
    """Runs Python code in a separate process; returns exit code and output.

    Args:
        libraries: a folder that the loader searches first.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(config.__file__).parent.parent)}
    if libraries is not None:
        paths = [str(libraries), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PROBE_TIMEOUT_S,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {PROBE_TIMEOUT_S} s"
    return done.returncode, done.stdout


def _display_vendors() -> list[str]:
    """PCI vendor numbers of the machine's display and compute cards (Linux)."""
    vendors = []
    for device in sorted(Path("/sys/bus/pci/devices").glob("*")):
        try:
            kind, vendor = (device / "class").read_text().strip(), (device / "vendor").read_text().strip()
        except OSError:
            continue
        if kind.startswith(("0x03", "0x12")):  # display controllers, processing accelerators
            vendors.append(vendor)
    return vendors


def _last_line(output: str, code: int) -> str:
    lines = output.strip().splitlines()
    return lines[-1] if lines else f"exit code {code}"


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split(":", 1)[1].split()}
