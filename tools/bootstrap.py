"""Setup: creates `.venv` with everything localrun needs, with llama.cpp compiled including its RPC backend. Run by `make`.

    python tools/bootstrap.py [cuda|vulkan|rocm|cpu]

With a name llama.cpp is compiled for that kind of GPU, too (`cpu`: for none), and later runs keep to it. Builds are kept: going
back to one compiles nothing. GPU_ARCH in the environment names cards that are not in the machine (`89`, `gfx1100`).

Runs on any Python 3.7+ so that it can say what is wrong with an old one; imports the standard library only. Does
nothing when `.venv` was made from the present constraints.txt and pyproject.toml.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script its folder is there, not the project's

from tools import gpu_build  # noqa: E402
from tools.gpu_build import SetupError  # noqa: E402

VENV = ROOT / ".venv"
STAMP = VENV / "localrun-setup"
LOG = VENV / "setup.log"
CONSTRAINTS = ROOT / "constraints.txt"

MIN_PYTHON = (3, 11)
CMAKE_ARGS = "-DGGML_RPC=ON -DLLAVA_BUILD=OFF"
"""RPC: a second process or machine as a ggml device, which also stands in for a GPU in tests. LLAVA: image input, not
used."""

NEEDED_BYTES = 3 * 10**9
GPU_CHOICE = VENV / "localrun-gpu"
"""Three lines: backend, the user's arguments for CMake, ours."""
CUDA_ROOT = VENV / "cuda"
"""The toolkit made of PyPI's packages."""
NO_DRIVER = VENV / "no-driver"
"""A libcuda for the self-check of a build on a machine without NVIDIA's driver."""
INSTALLED_BUILD = VENV / "localrun-llama-build"


class GpuBackend(NamedTuple):
    """What compiling llama.cpp for one kind of GPU takes.

    Attributes:
        switch: CMake's.
        programs: to be found in PATH or in `bin` of a prefix.
        files: by the name that people know, glob patterns under the prefixes, one of which has to be there, and a word in it.
        variables: of the environment, each naming a prefix.
        prefixes: where things lie besides.
        hint: how to get it all.
    """

    switch: str
    programs: tuple[str, ...]
    files: dict[str, tuple[tuple[str, ...], str]]
    variables: tuple[str, ...]
    prefixes: tuple[str, ...]
    hint: str


GPU_BACKENDS: dict[str, GpuBackend] = {
    "cuda": GpuBackend(
        "-DGGML_CUDA=ON",
        ("nvcc",),
        {"cuBLAS (cublas_v2.h)": (("include/cublas_v2.h", "targets/*/include/cublas_v2.h"), "")},
        ("CUDAToolkit_ROOT", "CUDA_PATH", "CUDA_HOME"),
        ("/usr/local/cuda", "/opt/cuda"),
        "install NVIDIA's CUDA toolkit with cuBLAS (NVIDIA's packages: cuda-toolkit), or name its folder in CUDA_PATH",
    ),
    # find_package(Vulkan COMPONENTS glslc) and find_package(SPIRV-Headers CONFIG) of ggml-vulkan/CMakeLists.txt
    "vulkan": GpuBackend(
        "-DGGML_VULKAN=ON",
        ("glslc",),
        {
            "Vulkan's C++ headers (vulkan/vulkan.hpp)": (("include/vulkan/vulkan.hpp",), ""),
            # VK_EXT_layer_settings, which ggml-vulkan.cpp uses without asking. Debian 12's headers are 1.3.239.
            "Vulkan's headers in version 1.3.272 or newer": (("include/vulkan/vulkan_core.h",), "VkLayerSettingEXT"),
            "Vulkan's loader (libvulkan.so)": (
                ("lib*/libvulkan.so", "lib/*/libvulkan.so", "lib/libvulkan*.dylib"),
                "",
            ),
            "SPIRV-Headers": (
                tuple(
                    f"{folder}/cmake/SPIRV-Headers/SPIRV-HeadersConfig.cmake" for folder in ("share", "lib*", "lib/*")
                ),
                "",
            ),
        },
        ("VULKAN_SDK",),
        (),
        "Debian, Ubuntu: apt install libvulkan-dev glslc spirv-headers; Fedora: dnf install vulkan-loader-devel "
        "vulkan-headers glslc spirv-headers-devel; Arch: pacman -S vulkan-headers vulkan-icd-loader shaderc spirv-headers; "
        "where these are too old: LunarG's Vulkan SDK, named in VULKAN_SDK",
    ),
    # find_package of ggml-hip/CMakeLists.txt
    "rocm": GpuBackend(
        "-DGGML_HIP=ON",
        ("hipcc",),
        {
            f"{people} for developers": (
                tuple(f"{folder}/cmake/{name}/{name}-config.cmake" for folder in ("lib*", "lib/*")),
                "",
            )
            for people, name in (("hipBLAS", "hipblas"), ("rocBLAS", "rocblas"))
        },
        ("ROCM_PATH",),
        ("/opt/rocm",),
        "install AMD's ROCm 6.1 or newer with its HIP SDK (hipcc, hipBLAS, rocBLAS), or put hipcc into PATH",
    ),
}


def main(arguments: list[str]) -> int:
    try:
        check_python()
        if arguments:
            choose_gpu(arguments[0])
        if not up_to_date():
            set_up()
    except SetupError as error:
        message, hint = error.args
        print(f"error: {message}\nhint: {hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


def set_up() -> None:
    """All steps; the stamp comes last, so that a broken set-up is done again."""
    check_compiler()
    check_space()
    start = time.monotonic()
    STAMP.unlink() if STAMP.exists() else None
    make_venv()
    pip = pinned("pip")
    step(f"pip {pip}", ["install", "--upgrade", f"pip=={pip}"])
    if f"={CUDA_ROOT}/" in cmake_args() and not cuda_packages_installed():
        install_cuda()
    if not has_llama_cpp() or installed_build() != cmake_args():
        build_llama_cpp()
    # Build requirements of our own package are pinned in pyproject.toml.
    step("other packages", ["install", "--editable", f"{ROOT}[dev]", "--constraint", str(CONSTRAINTS)])
    if not has_llama_cpp():
        raise SetupError(
            "another step replaced llama-cpp-python by a build without RPC", f"see {LOG}, then make clean setup"
        )
    say("compiling the kernels for this processor")
    without_driver = gpu_choice()[0] == "cuda" and not gpu_build.has_cuda_driver()
    environment = without_cuda_driver() if without_driver else dict(os.environ)
    check = subprocess.run([str(python()), "-m", "localrun.cli", "doctor", "--warm"], cwd=str(ROOT), env=environment)
    if check.returncode:
        raise SetupError("the self-check failed", "the lines above say what to do")
    STAMP.write_text(fingerprint())
    if without_driver:
        say(
            "built for NVIDIA's GPUs and checked; what this machine lacks is NVIDIA's driver, without which it does not start"
        )
    say(f"ready after {round(time.monotonic() - start)} s")


def choose_gpu(name: str) -> None:
    """Remembers for which GPU llama.cpp is to be compiled, and CMake's arguments, after a look at what compiling needs."""
    if name not in GPU_BACKENDS and name != "cpu":
        raise SetupError(f"no GPU backend '{name}'", f"one of {', '.join(GPU_BACKENDS)}, or cpu")
    extra = os.environ.get("CMAKE_ARGS", "")
    ours = {"cuda": prepare_cuda, "rocm": prepare_rocm, "vulkan": prepare_vulkan}.get(name, refuse_missing)(name, extra)
    make_venv()
    GPU_CHOICE.write_text(f"{name}\n{extra}\n{ours}\n")


def refuse_missing(name: str, _extra: str = "") -> str:
    """Says by name what compiling for a GPU needs and this machine lacks."""
    missing = missing_for(GPU_BACKENDS[name]) if name in GPU_BACKENDS else []
    if missing:
        raise SetupError(
            f"llama.cpp can't be compiled for {name}: {', '.join(missing)} not found", GPU_BACKENDS[name].hint
        )
    return ""


def prepare_cuda(_name: str, extra: str) -> str:
    """Compares cards, driver, toolkits and compiler, and chooses the toolkit; the result is for CMake."""
    named = os.environ.get("GPU_ARCH", "")
    in_arguments = re.search(r"-DCMAKE_CUDA_ARCHITECTURES(?::STRING)?=(\S+)", extra)
    cards = [] if named else gpu_build.nvidia_cards()
    if named:
        wanted = gpu_build.capabilities(named)
    elif in_arguments and in_arguments.group(1)[0].isdigit():
        wanted = gpu_build.capabilities(in_arguments.group(1))
    else:
        wanted = sorted({card.capability for card in cards})
    if not wanted:
        raise SetupError(
            "llama.cpp is compiled for the NVIDIA card in the machine, and none is found",
            "install NVIDIA's driver (nvidia-smi must list the card), or name the cards, e.g. for RTX 30 and 40: "
            "make cuda GPU_ARCH='86;89' (75: RTX 20, 120: RTX 50)",
        )
    for card in cards:
        say(
            f"{card.name}: compute capability {gpu_build.dotted(card.capability)}, driver {gpu_build.dotted(card.driver)}"
        )
    driver = cards[0].driver if cards else ()
    toolkit, reasons = gpu_build.choose_toolkit(cuda_toolkits(), wanted, driver, gpu_build.host_gcc())
    for reason in reasons:
        say(f"not used: {reason}")
    version = toolkit.version if toolkit else gpu_build.PACKAGED_CUDA
    root = toolkit.root if toolkit else CUDA_ROOT
    origin = "" if toolkit else ", from PyPI"
    say(
        f"CUDA {gpu_build.dotted(version)} ({root}{origin}) for compute capability {' and '.join(map(gpu_build.dotted, wanted))}"
    )
    if toolkit is None and not cuda_packages_installed():
        check_space(NEEDED_BYTES + gpu_build.CUDA_BYTES)
    arguments = [f"-DCUDAToolkit_ROOT={root}", f"-DCMAKE_CUDA_COMPILER={root}/bin/nvcc", "-DGGML_CUDA_NCCL=OFF"]
    if not in_arguments:
        arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={gpu_build.architectures(wanted)}")
    if str(root) != "/usr":
        arguments.append(f"-DCMAKE_SHARED_LINKER_FLAGS=-Wl,-rpath,{root}/{'lib64' if toolkit else 'lib'}")
    return " ".join(arguments)


def cuda_toolkits() -> list[gpu_build.Toolkit]:
    """Whole toolkits in the machine, the one that the user names first."""
    backend = GPU_BACKENDS["cuda"]
    found: dict[Path, gpu_build.Toolkit] = {}
    for prefix in map(Path, gpu_prefixes(backend)):
        patterns = [pattern for patterns, _ in backend.files.values() for pattern in patterns]
        if any(path for pattern in patterns for path in prefix.glob(pattern)):
            toolkit = gpu_build.toolkit_at(prefix)
            if toolkit is not None:
                found.setdefault(prefix.resolve(), toolkit)
    return list(found.values())


def prepare_rocm(name: str, extra: str) -> str:
    """Compares cards and ROCm's version; the result is for CMake."""
    refuse_missing(name)
    wanted = gpu_build.amd_named(os.environ.get("GPU_ARCH", "")) or gpu_build.amd_architectures()
    prefixes = gpu_prefixes(GPU_BACKENDS[name])
    version = gpu_build.rocm_version(prefixes)
    bad = gpu_build.rocm_misfits(version, wanted) or gpu_build.rocblas_misfits(prefixes, wanted)
    if bad:
        raise SetupError("; ".join(bad), "AMD's packages, or make vulkan, which needs the card's driver only")
    if "GPU_TARGETS" in extra or "CMAKE_HIP_ARCHITECTURES" in extra:
        return ""
    if not wanted:
        raise SetupError(
            "llama.cpp is compiled for the AMD card in the machine, and the amdgpu driver shows none",
            "load the driver (rocminfo must list the card), or name the card: make rocm GPU_ARCH=gfx1100",
        )
    say(f"ROCm {gpu_build.dotted(version) or 'of unknown version'} for {' and '.join(wanted)}")
    return f"-DGPU_TARGETS={';'.join(wanted)}"


def prepare_vulkan(name: str, _extra: str) -> str:
    """Looks for what compiling needs, and says so if no driver is there: the build is the same for all cards."""
    refuse_missing(name)
    drivers = gpu_build.vulkan_drivers()
    if drivers:
        say(f"Vulkan drivers: {', '.join(drivers)}")
    else:
        say(
            "no Vulkan driver for a card is installed; the build will do without, localrun needs one "
            "(Mesa's: apt install mesa-vulkan-drivers; NVIDIA's comes with its driver)"
        )
    return vulkan_loader()


def vulkan_loader() -> str:
    """For CMake: the loader's library in a folder that is named, where FindVulkan looks into `lib` only, not into
    `lib/x86_64-linux-gnu`; empty if the system's is used."""
    backend = GPU_BACKENDS["vulkan"]
    for prefix in map(Path, gpu_prefixes(backend)):
        if str(prefix) in ("/usr", "/usr/local"):
            return ""
        patterns, _ = backend.files["Vulkan's loader (libvulkan.so)"]
        found = [path for pattern in patterns for path in sorted(prefix.glob(pattern))]
        if found:
            return f"-DVulkan_LIBRARY={found[0]}"
    return ""


def missing_for(backend: GpuBackend) -> list[str]:
    """What compiling needs and this machine lacks."""
    prefixes = [Path(prefix) for prefix in gpu_prefixes(backend)]
    missing = [
        name
        for name in backend.programs
        if not shutil.which(name) and not any((prefix / "bin" / name).exists() for prefix in prefixes)
    ]
    for name, (patterns, word) in backend.files.items():
        found = (path for prefix in prefixes for pattern in patterns for path in prefix.glob(pattern))
        if not any(not word or word in path.read_text(errors="replace") for path in found):
            missing.append(name)
    return missing


def gpu_prefixes(backend: GpuBackend) -> list[str]:
    """Folders with `bin`, `include` and `lib` in which a toolkit may lie; those that the user names come first."""
    named = [os.environ.get(variable, "") for variable in backend.variables]
    named += os.environ.get("CMAKE_PREFIX_PATH", "").split(os.pathsep)
    # A toolkit that is in PATH only; the program may be a link into it.
    paths = [shutil.which(program) for program in backend.programs]
    beside = [
        str(folder)
        for path in paths
        if path
        for folder in (Path(path).parent.parent, Path(path).resolve().parent.parent)
    ]
    return [prefix for prefix in (*named, *beside, *backend.prefixes, "/usr/local", "/usr", "/opt/homebrew") if prefix]


def gpu_choice() -> tuple[str, str, str]:
    """What `choose_gpu` remembered: backend, or cpu; the user's arguments for CMake; ours."""
    lines = GPU_CHOICE.read_text().splitlines() if GPU_CHOICE.is_file() else []
    name, extra, ours = (line.strip() for line in [*lines, "", "", ""][:3])
    return (name if name in GPU_BACKENDS else "cpu"), extra, ours


def cmake_args() -> str:
    """For llama.cpp's build; the user's come last, so that they count."""
    gpu, extra, ours = gpu_choice()
    switch = GPU_BACKENDS[gpu].switch if gpu != "cpu" else ""
    parts = [CMAKE_ARGS, switch, ours, os.environ.get("CMAKE_ARGS", extra)]
    return " ".join(part for part in parts if part)


def build_path() -> str:
    """PATH with the folders in which the chosen GPU's compiler lies."""
    gpu = gpu_choice()[0]
    folders = [f"{prefix}/bin" for prefix in gpu_prefixes(GPU_BACKENDS[gpu])] if gpu != "cpu" else []
    path = os.environ.get("PATH", "").split(os.pathsep)
    return os.pathsep.join([*path, *(folder for folder in folders if folder not in path and Path(folder).is_dir())])


def fingerprint() -> str:
    """Changes when set-up has to run again."""
    digest = hashlib.sha256()
    for path in (CONSTRAINTS, ROOT / "pyproject.toml", Path(__file__), Path(gpu_build.__file__)):
        digest.update(path.read_bytes())
    digest.update(f"{sys.version_info[:2]} {ROOT} {cmake_args()}".encode())
    return digest.hexdigest()


def up_to_date() -> bool:
    """Whether `.venv` is what this checkout asks for."""
    return STAMP.is_file() and STAMP.read_text() == fingerprint() and python().exists()


def check_python() -> None:
    """Raises SetupError for a Python that is too old."""
    if sys.version_info < MIN_PYTHON:
        have, need = (".".join(map(str, v)) for v in (sys.version_info[:2], MIN_PYTHON))
        raise SetupError(
            f"{sys.executable} is Python {have}, localrun needs {need} or newer",
            f"install one and name it: make setup PYTHON=python{need}",
        )


def check_compiler() -> None:
    """Raises SetupError without a C++ compiler."""
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name.split()[0]) for name in compilers):
        raise SetupError(
            f"no C++ compiler ({', '.join(compilers)}): llama.cpp is compiled from source",
            "Debian, Ubuntu: apt install build-essential; Fedora: dnf install gcc-c++; macOS: xcode-select --install",
        )


def check_space(needed: int = NEEDED_BYTES) -> None:
    """Raises SetupError where fewer than `needed` bytes are free."""
    free = shutil.disk_usage(str(ROOT)).free
    if free < needed:
        raise SetupError(f"{ROOT}: {free / 1e9:.1f} GB free, the set-up needs {needed / 1e9:.0f} GB", "make room")


def make_venv() -> None:
    """Keeps a working `.venv`: what is installed there need not be built again."""
    if python().exists() and succeeds([str(python()), "-m", "pip", "--version"]):
        return
    say(f"making {VENV}")
    if VENV.exists():
        shutil.rmtree(str(VENV))
    made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if made.returncode:
        if VENV.exists():
            shutil.rmtree(str(VENV))
        raise SetupError(
            f"{sys.executable} can't make a virtual environment: {made.stdout.decode(errors='replace').strip()[-300:]}",
            f"Debian, Ubuntu: apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv",
        )


def python() -> Path:
    """The interpreter of `.venv`."""
    return VENV / "bin" / "python"


def build_folder() -> Path:
    """Where the wheel of the chosen build is kept: one folder for each configuration."""
    text = f"llama-cpp-python=={pinned('llama-cpp-python')} {cmake_args()} {sys.version_info[:2]}"
    return VENV / "wheels" / hashlib.sha256(text.encode()).hexdigest()[:12]


def build_llama_cpp() -> None:
    """Compiles and installs llama-cpp-python.

    The wheel is kept in a folder of its own per build: an interrupted set-up need not compile again, and pip's cache,
    which does not look at CMAKE_ARGS, is not asked.
    """
    name = "llama-cpp-python"
    requirement = f"{name}=={pinned(name)}"
    folder = build_folder()
    if not list(folder.glob("*.whl")):
        n_jobs = str(os.cpu_count() or 1)
        environment = {
            "CMAKE_BUILD_PARALLEL_LEVEL": n_jobs,
            **os.environ,
            "CMAKE_ARGS": cmake_args(),
            "PATH": build_path(),
        }
        partial = folder.with_name(f"{folder.name}.partial")
        arguments = [
            "wheel",
            "--no-deps",
            "--no-cache-dir",
            "--no-binary",
            name,
            "--wheel-dir",
            str(partial),
            requirement,
        ]
        arguments += ["--build-constraint", str(CONSTRAINTS)]
        step(f"llama.cpp, compiled from source on {n_jobs} cores; this takes minutes", arguments, environment)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    INSTALLED_BUILD.unlink() if INSTALLED_BUILD.exists() else None
    (wheel,) = folder.glob("*.whl")
    arguments = ["install", "--force-reinstall", "--constraint", str(CONSTRAINTS), str(wheel)]
    step("llama-cpp-python", arguments)
    if not has_llama_cpp():
        shutil.rmtree(str(folder))
        raise SetupError(
            f"{requirement} was built without ggml_backend_rpc_start_server", f"see {LOG}, then make setup"
        )
    INSTALLED_BUILD.write_text(cmake_args())


CUDA_PINS = " ".join(f"{name}=={version}" for name, version in sorted(gpu_build.CUDA_PACKAGES.items()))


def cuda_packages_installed() -> bool:
    """The toolkit of PyPI's packages is whole, in the pinned versions."""
    stamp = CUDA_ROOT / "packages"
    return stamp.is_file() and stamp.read_text() == CUDA_PINS and (CUDA_ROOT / "bin" / "nvcc").exists()


def install_cuda() -> None:
    """NVIDIA's toolkit from PyPI. The libraries in it are used by the finished build, too, so it stays."""
    step("CUDA's toolkit, 0.7 GB to download", ["install", "--no-deps", *CUDA_PINS.split()])
    folders = sorted(VENV.glob("lib/python*/site-packages/nvidia/cu13"))
    if not folders:
        raise SetupError("NVIDIA's packages have no nvidia/cu13", f"see {LOG}, then make clean cuda")
    gpu_build.lay_out(folders[-1], CUDA_ROOT)
    (CUDA_ROOT / "packages").write_text(CUDA_PINS)


def without_cuda_driver() -> dict[str, str]:
    """The environment in which a build for NVIDIA's GPUs can be loaded where no driver is: it sees no card."""
    gpu_build.make_stub(NO_DRIVER / "libcuda.so.1")
    paths = [str(NO_DRIVER), *os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(path for path in paths if path)}


def installed_build() -> str:
    """CMake's arguments of the llama.cpp that is installed."""
    return INSTALLED_BUILD.read_text() if INSTALLED_BUILD.is_file() else CMAKE_ARGS


CHECK_LLAMA_CPP = """
import ctypes, glob, importlib.metadata as m, importlib.util as u, os, sys
assert m.version("llama-cpp-python") == sys.argv[1], "another version"
folder = os.path.join(os.path.dirname(u.find_spec("llama_cpp").origin), "lib")
for stem in ("ggml-base", "ggml-cpu", "ggml-rpc"):
    (path,) = [p for p in glob.glob(os.path.join(folder, "lib" + stem + ".*")) if p.endswith((".so", ".dylib"))]
    library = ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
library.ggml_backend_rpc_start_server
"""


def has_llama_cpp() -> bool:
    """The pinned llama-cpp-python is installed and really has the RPC backend."""
    return succeeds([str(python()), "-c", CHECK_LLAMA_CPP, pinned("llama-cpp-python")])


def pinned(name: str) -> str:
    """The version of a package in constraints.txt."""
    for line in CONSTRAINTS.read_text().splitlines():
        key, _, version = line.split("#")[0].strip().partition("==")
        if key.lower().replace("_", "-") == name:
            return version
    raise SetupError(f"{CONSTRAINTS}: {name} is not pinned", "restore the file: git checkout constraints.txt")


def step(what: str, arguments: list[str], environment: dict[str, str] | None = None) -> None:
    """Runs pip with its output in the log; a failure shows CMake's first error, or the log's end.

    Args:
        environment: for pip; None: our own.
    """
    say(f"installing {what}")
    command = [str(python()), "-m", "pip", "--disable-pip-version-check", *arguments]
    began = len(LOG.read_text(errors="replace").splitlines()) if LOG.exists() else 0
    with LOG.open("ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if done.returncode == 0:
        return
    lines = LOG.read_text(errors="replace").splitlines()
    start = next((number for number, line in enumerate(lines[began:], began) if "CMake Error" in line), len(lines) - 15)
    shown = lines[max(start, began) :][:15]
    print("\n".join(f"  {line}" for line in shown), file=sys.stderr)
    if done.returncode < 0:
        raise SetupError(
            f"pip was killed by signal {-done.returncode} ({what})",
            "if memory was short, close programs; then make setup",
        )
    recent = "\n".join(lines[began:][-200:])
    offline = ("NewConnectionError", "NameResolutionError", "Network is unreachable", "No matching distribution found")
    if any(word in recent for word in offline):
        raise SetupError(f"can't download packages ({what})", "connect to the network, or set up pip's proxy or index")
    back = "; make cpu: without the GPU" if gpu_choice()[0] != "cpu" else ""
    raise SetupError(f"pip failed ({what})", f"the whole log is {LOG}{back}")


def succeeds(command: list[str]) -> bool:
    """Runs a command silently; whether it ended with 0."""
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
