"""Checks before llama.cpp is compiled for a GPU that the card, driver, toolkit and C++ compiler are compatible.

NVIDIA's toolkit is the machine's own where it fits, else PyPI's packages, laid out under `.venv` as CMake expects a toolkit. Knows
nothing about `.venv` otherwise, nor about llama.cpp. Standard library only, readable by Python 3.7, as `bootstrap.py` is.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

CUDA_PACKAGES = {
    "nvidia-cuda-nvcc": "13.5.37",
    "nvidia-nvvm": "13.5.37",
    "nvidia-cuda-crt": "13.5.37",
    "nvidia-cuda-runtime": "13.5.37",
    "nvidia-cuda-nvrtc": "13.5.37",  # cuBLAS asks for it
    "nvidia-cuda-cccl": "13.3.5.0.6",
    "nvidia-cublas": "13.10.0.20",
}
"""PyPI's CUDA toolkit as far as llama.cpp needs it, without dependencies of its own."""

PACKAGED_CUDA = (13, 5)
CUDA_BYTES = 3 * 10**9
"""Disk that the packages take with pip's copies of them: 0.7 GB to download, 1.1 GB unpacked."""

DRIVER_FOR = {13: (580,), 12: (525, 60), 11: (450, 80)}
"""CUDA's major version -> the oldest Linux driver that runs its programs (minor version compatibility; CUDA Compatibility, NVIDIA).
PTX needs a driver as new as the toolkit, so only machine code is built (`-real`)."""

FIRST_CUDA = {
    (8, 0): (11, 0),
    (8, 6): (11, 1),
    (8, 7): (11, 4),
    (8, 9): (11, 8),
    (9, 0): (11, 8),
    (10, 0): (12, 8),
    (12, 0): (12, 8),
    (10, 3): (12, 9),
    (12, 1): (12, 9),
    (11, 0): (13, 0),
}
"""Compute capability -> the first CUDA that compiles for it (release notes); older cards: any."""

OLDEST_CARD = {13: (7, 5), 12: (5, 0), 11: (3, 5)}
"""CUDA's major version -> the lowest compute capability that it compiles for."""

ROCM_LEAST = (6, 1)  # ggml-hip/CMakeLists.txt
FIRST_ROCM = {
    "gfx1150": (6, 3),
    "gfx1151": (6, 4),
    "gfx1152": (6, 4),
    "gfx1200": (6, 4),
    "gfx1201": (6, 4),
    "gfx950": (7, 0),
}
"""AMD's architectures that the oldest ROCm that ggml takes does not know (ROCm's release notes)."""

LIBCUDA_NAMES = (
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuMemGetAllocationGranularity",
    "cuMemCreate",
    "cuMemAddressReserve",
    "cuMemMap",
    "cuMemRelease",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuMemAddressFree",
    "cuGetErrorString",
)
"""What ggml-cuda calls of the driver itself. A stub with these names links it on a machine without the driver."""


class SetupError(Exception):
    """Something that the user has to mend; the second argument says how."""


class Card(NamedTuple):
    """An NVIDIA card, as nvidia-smi has it: name, compute capability and driver version."""

    name: str
    capability: tuple[int, ...]
    driver: tuple[int, ...]


class Toolkit(NamedTuple):
    """A CUDA toolkit: its folder, version, and the newest GCC that its headers accept (None: any)."""

    root: Path
    version: tuple[int, ...]
    newest_gcc: int | None


def dotted(version: tuple[int, ...]) -> str:
    """Such as 12.8."""
    return ".".join(map(str, version))


def numbers(text: str) -> tuple[int, ...]:
    """The first version number in a text, such as (580, 65, 6); empty without one."""
    match = re.search(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def output_of(command: list[str]) -> str | None:
    """What a program prints; None if it is missing or fails."""
    if not shutil.which(command[0]):
        return None
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


# -- NVIDIA ------------------------------------------------------------------------------------------------------------


def nvidia_cards() -> list[Card]:
    """The cards that the driver shows; none without one.

    Raises:
        SetupError: a driver so old that it does not know the question.
    """
    listed = output_of(["nvidia-smi", "--query-gpu=compute_cap,driver_version,name", "--format=csv,noheader"])
    if listed is None:
        if output_of(["nvidia-smi", "-L"]):
            raise SetupError(
                "nvidia-smi does not say the card's compute capability: NVIDIA's driver is older than 510",
                "install a newer driver (580 for CUDA 13), or name the card: make cuda GPU_ARCH=86",
            )
        return []
    cards = []
    for line in listed.splitlines():
        fields = [field.strip() for field in line.split(",", 2)]
        if len(fields) == 3 and len(numbers(fields[0])) == 2:
            cards.append(Card(fields[2], numbers(fields[0]), numbers(fields[1])))
    return cards


def capabilities(names: str) -> list[tuple[int, ...]]:
    """Compute capabilities that the user names: `89`, `8.9`, `86;120a`, `90-real`.

    Raises:
        SetupError: something else.
    """
    result: set[tuple[int, ...]] = set()
    for name in re.split(r"[;,\s]+", names.strip()):
        match = re.match(r"(?:sm_)?(\d{1,2})\.?(\d)[af]?(?:-real|-virtual)?$", name)
        if not match:
            raise SetupError(f"GPU_ARCH={names}: '{name}' is no compute capability", "such as GPU_ARCH=89, or 86;120")
        result.add((int(match.group(1)), int(match.group(2))))
    return sorted(result)


def architectures(wanted: list[tuple[int, ...]]) -> str:
    """For CMake; machine code only. ggml makes 120a of 120."""
    return ";".join(f"{major}{minor}-real" for major, minor in wanted)


def toolkit_at(root: Path) -> Toolkit | None:
    """The CUDA toolkit in a folder; None if nvcc is not there or does not run."""
    nvcc = root / "bin" / "nvcc"
    said = output_of([str(nvcc), "--version"]) or ""
    match = re.search(r"release (\d+)\.(\d+)", said)
    if not match:
        return None
    newest = None
    for header in ("include/crt/host_config.h", "targets/x86_64-linux/include/crt/host_config.h"):
        if (root / header).is_file():
            limit = re.search(r"__GNUC__ > (\d+)", (root / header).read_text(errors="replace"))
            newest = int(limit.group(1)) if limit else None
            break
    return Toolkit(root, (int(match.group(1)), int(match.group(2))), newest)


def host_gcc() -> int | None:
    """Major version of the GCC that nvcc would call; None: another compiler, or none."""
    name = os.environ.get("CUDAHOSTCXX") or os.environ.get("NVCC_CCBIN") or "g++"
    found = numbers(output_of([*name.split(), "-dumpfullversion", "-dumpversion"]) or "")
    return found[0] if found and "clang" not in name else None


def misfits(
    version: tuple[int, ...],
    newest_gcc: int | None,
    wanted: list[tuple[int, ...]],
    driver: tuple[int, ...],
    gcc: int | None,
) -> list[str]:
    """Why a CUDA toolkit can't serve these cards here, each with its fix; empty if it can.

    Args:
        version, newest_gcc: the toolkit's.
        wanted: compute capabilities to compile for.
        driver: its version; empty: none here, so nothing is said about it.
        gcc: the host compiler's major version, if it is GCC.
    """
    result = []
    name = f"CUDA {dotted(version)}"
    for card in wanted:
        # One that nobody has heard of yet is newer than all of them.
        first = FIRST_CUDA.get((card[0], card[1]), (0,) if card < (8, 0) else max(FIRST_CUDA.values()))
        if version < first:
            result.append(
                f"{name} can't compile for compute capability {dotted(card)}, CUDA {dotted(first)} or newer can"
            )
        oldest = OLDEST_CARD.get(version[0], OLDEST_CARD[13] if version[0] > 13 else (0,))
        if card < oldest:
            last = max(major for major, least in OLDEST_CARD.items() if card >= least)
            result.append(
                f"{name} has dropped compute capability {dotted(card)}: install CUDA {last}.x and name it in CUDA_PATH"
            )
    needed = DRIVER_FOR.get(version[0], DRIVER_FOR[13] if version[0] > 13 else (0,))
    if driver and driver < needed:
        result.append(
            f"{name} needs NVIDIA's driver {dotted(needed)} or newer, here is {dotted(driver)}: update the driver"
        )
    if gcc and newest_gcc and gcc > newest_gcc:
        result.append(
            f"{name} takes GCC up to {newest_gcc}, here is {gcc}: install g++-{newest_gcc} and set CUDAHOSTCXX=g++-{newest_gcc}"
        )
    return result


def has_packaged_cuda() -> bool:
    """PyPI has the toolkit for this machine."""
    return platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")


def choose_toolkit(
    found: list[Toolkit], wanted: list[tuple[int, ...]], driver: tuple[int, ...], gcc: int | None
) -> tuple[Toolkit | None, list[str]]:
    """The first of these toolkits that fits.

    Returns:
        (toolkit, None for PyPI's; why none of those before it does).

    Raises:
        SetupError: neither does PyPI's.
    """
    reasons: list[str] = []
    for toolkit in found:
        bad = misfits(toolkit.version, toolkit.newest_gcc, wanted, driver, gcc)
        if not bad:
            return toolkit, reasons
        reasons += [f"{toolkit.root}: {reason}" for reason in bad]
    bad = misfits(PACKAGED_CUDA, 16, wanted, driver, gcc)
    if not has_packaged_cuda():
        bad.append(f"PyPI has no CUDA toolkit for {platform.system()} {platform.machine()}: install NVIDIA's")
    if bad:
        raise SetupError(
            "no CUDA toolkit fits this machine: " + "; ".join([*reasons, *bad]),
            "any of the ways above, or make vulkan, which needs the card's driver only",
        )
    return None, reasons


def lay_out(packages: Path, root: Path) -> None:
    """Makes a toolkit of PyPI's packages, as CMake looks for it: links, and a stub of the driver's library.

    Args:
        packages: `nvidia/cu13` among the installed packages.
        root: the toolkit's folder; replaced.

    Raises:
        SetupError: no C compiler for the stub.
    """
    if root.exists():
        shutil.rmtree(str(root))
    (root / "lib" / "stubs").mkdir(parents=True)
    for name in ("bin", "include", "nvvm"):
        (root / name).symlink_to(packages / name)
    for path in sorted((packages / "lib").iterdir()):
        (root / "lib" / path.name).symlink_to(path)
        stem, dot, _ = path.name.partition(".so.")
        if dot and not (root / "lib" / f"{stem}.so").exists():
            (root / "lib" / f"{stem}.so").symlink_to(path)
    (root / "lib64").symlink_to("lib")
    target = root / "targets" / ("sbsa-linux" if platform.machine() == "aarch64" else "x86_64-linux")
    target.mkdir(parents=True)
    for name in ("lib", "include"):
        (target / name).symlink_to(Path("..") / ".." / name)
    make_stub(root / "lib" / "stubs" / "libcuda.so")


def make_stub(path: Path) -> None:
    """A libcuda whose functions say that there is no device (CUDA_ERROR_NO_DEVICE): for linking, and for loading a build where no
    driver is. A folder that programs are linked with must not have it as libcuda.so.1: they would find it before the driver."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.with_suffix(".c")
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in LIBCUDA_NAMES))
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), "cc")
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(path), str(source)]
    try:
        made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise SetupError(f"no C compiler: {error}", "Debian, Ubuntu: apt install build-essential") from None
    if made.returncode:
        raise SetupError(f"{source} can't be compiled: {made.stdout.decode(errors='replace')[-300:]}", "see above")


def has_cuda_driver() -> bool:
    """The driver's library is where the loader looks."""
    return bool(
        re.search(r"libcuda\.so\.1\b", output_of(["ldconfig", "-p"]) or output_of(["/sbin/ldconfig", "-p"]) or "")
    )


# -- AMD and Vulkan ----------------------------------------------------------------------------------------------------

KFD = Path("/sys/class/kfd/kfd/topology/nodes")


def amd_architectures() -> list[str]:
    """Of the cards that the amdgpu driver shows, such as gfx1100."""
    found = set()
    for path in sorted(KFD.glob("*/properties")):
        match = re.search(r"^gfx_target_version (\d+)", path.read_text(errors="replace"), re.MULTILINE)
        number = int(match.group(1)) if match else 0
        if number:  # 0: the processor
            found.add(f"gfx{number // 10000}{number // 100 % 100:x}{number % 100:x}")
    return sorted(found)


def rocm_version(prefixes: list[str]) -> tuple[int, ...]:
    """The installed ROCm's; empty if it does not say."""
    for prefix in prefixes:
        path = Path(prefix) / ".info" / "version"
        if path.is_file():
            return numbers(path.read_text(errors="replace"))
    return numbers(output_of(["hipconfig", "--version"]) or "")


def rocm_misfits(version: tuple[int, ...], wanted: list[str]) -> list[str]:
    """Why a ROCm can't serve these architectures, each with its fix."""
    if not version:
        return []
    result = []
    for least, what in [(ROCM_LEAST, "llama.cpp"), *((FIRST_ROCM.get(name, (0,)), name) for name in wanted)]:
        if version < least:
            result.append(f"ROCm {dotted(version[:2])} is too old for {what}: install {dotted(least)} or newer")
    return result


def amd_named(names: str) -> list[str]:
    """Architectures that the user names: `gfx1100`, `gfx1030;gfx1100`.

    Raises:
        SetupError: something else.
    """
    named = [name for name in re.split(r"[;,\s]+", names.strip()) if name]
    for name in named:
        if not re.match(r"gfx[0-9a-f]{3,4}$", name):
            raise SetupError(
                f"GPU_ARCH={names}: '{name}' is no architecture of AMD's",
                "such as GPU_ARCH=gfx1100 (rocminfo lists the card's)",
            )
    return named


def rocblas_misfits(prefixes: list[str], wanted: list[str]) -> list[str]:
    """Architectures for which the installed rocBLAS has no kernels: programs end with its first product there.

    Says nothing where no kernels are found at all: they may lie elsewhere.
    """
    names = [path.name for prefix in prefixes for path in Path(prefix).glob("lib*/rocblas/library/*gfx*")]
    if not names:
        return []
    return [f"rocBLAS has no kernels for {name}" for name in wanted if not any(name in file for file in names)]


VULKAN_DRIVERS = ("/etc/vulkan/icd.d", "/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d")


def vulkan_drivers() -> list[str]:
    """Names of the installed Vulkan drivers' files; those that compute on the CPU are left out."""
    named = os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES") or ""
    files = [Path(name) for name in named.split(os.pathsep) if name]
    files += [path for folder in VULKAN_DRIVERS for path in sorted(Path(folder).glob("*.json"))]
    return [path.stem for path in files if "lvp" not in path.stem and "swiftshader" not in path.stem]
