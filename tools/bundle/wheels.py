"""The wheels of a bundle: which packages, of which versions, for which Python; downloaded, or built here.

Versions come from constraints.txt, the list of packages from the requirements of what is installed: no resolver decides anything,
so the same source gives the same list.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

from tools.bootstrap import CMAKE_ARGS, CONSTRAINTS, ROOT, pinned

CACHE = ROOT / "build" / "bundle-cache"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")

PORTABLE_CMAKE_ARGS = " ".join(
    (
        CMAKE_ARGS,
        "-DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON -DCMAKE_INSTALL_BINDIR=llama_cpp/lib",
    )
)
"""Every instruction set's CPU backend as a module of its own, chosen when the program starts. The modules go where the other
libraries are; without the last option they would land outside the package, where nothing finds them."""


class BundleError(Exception):
    """The bundle can't be made; the second argument says what to do."""


def machine() -> str:
    """The processor architecture as wheels name it."""
    return platform.machine()


def say(text: str) -> None:
    print(f"[bundle] {text}", flush=True)


# --- which packages ------------------------------------------------------------------------------------------------


def runtime_packages(python: str) -> list[str]:
    """Canonical names of all packages that localrun needs on a Python version, itself left out, llama-cpp-python included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    waiting = [Requirement(text) for text in project["dependencies"]]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            key = f"{name}[{extra}]"
            if key in found:
                continue
            found.add(key)
            waiting += _requirements_of(name, python, extra)
    return sorted({key.partition("[")[0] for key in found})


def _requirements_of(name: str, python: str, extra: str) -> list[Requirement]:
    environment = {key: str(value) for key, value in default_environment().items()}
    environment |= {"python_version": python, "python_full_version": f"{python}.0", "extra": extra}
    try:
        texts = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise BundleError(f"{name} is not installed here, so its requirements are unknown", "make setup") from None
    requirements = [Requirement(text) for text in texts]
    if extra:
        requirements = [r for r in requirements if r.marker is not None and "extra" in str(r.marker)]
    return [r for r in requirements if r.marker is None or r.marker.evaluate(environment)]


# --- wheels that are downloaded --------------------------------------------------------------------------------------


def download(python: str, names: Sequence[str]) -> dict[str, Path]:
    """Wheels of pinned packages for a Python version, from the cache or the index: name -> file."""
    folder = CACHE / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: _cached(folder, name, python) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        say(f"downloading {len(missing)} wheels for Python {python}")
        options = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
        options += [word for name in _platforms() for word in ("--platform", name)]
        pip("download", *options, "--dest", str(folder), *(f"{name}=={pinned(name)}" for name in missing))
    result = {name: found[name] or _cached(folder, name, python) for name in names}
    for name, path in result.items():
        if path is None:
            raise BundleError(
                f"no wheel of {name} {pinned(name)} for Python {python}", "leave this Python out: --python"
            )
    return {name: path for name, path in result.items() if path is not None}


def _cached(folder: Path, name: str, python: str) -> Path | None:
    supported = supported_tags(python)
    for path in sorted(folder.glob("*.whl")):
        wheel_name, version, _, tags = parse_wheel_filename(path.name)
        if wheel_name == name and str(version) == pinned(name) and tags & supported:
            return path
    return None


def supported_tags(python: str) -> frozenset[Tag]:
    """Wheel tags that a Python of that version on this kind of machine installs."""
    major, minor = map(int, python.split("."))
    platforms = _platforms()
    binary = cpython_tags((major, minor), platforms=platforms)
    return frozenset((*binary, *compatible_tags((major, minor), f"cp{major}{minor}", platforms)))


def _platforms() -> list[str]:
    """Platform tags, newest glibc first: no wheel may need a newer one than this machine has."""
    version = platform.libc_ver()[1] or "2.17"
    newest = int(version.split(".")[1])
    here = machine()
    old = ["manylinux2014", "manylinux2010", "manylinux1"]
    return [f"manylinux_2_{minor}_{here}" for minor in range(newest, 4, -1)] + [f"{name}_{here}" for name in old]


# --- wheels that are built -----------------------------------------------------------------------------------------


def llama_wheel() -> Path:
    """The portable llama-cpp-python, compiled if the cache has none of these versions and options. Takes many minutes."""
    requirement = f"llama-cpp-python=={pinned('llama-cpp-python')}"
    key = hashlib.sha256(f"{requirement} {PORTABLE_CMAKE_ARGS} {compiler()} {machine()}".encode()).hexdigest()[:12]
    folder = CACHE / "llama" / key
    if not list(folder.glob("*.whl")):
        n_jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        say(f"compiling llama.cpp for all processors, {n_jobs} jobs; this takes many minutes")
        environment = {"CMAKE_ARGS": PORTABLE_CMAKE_ARGS, "CMAKE_BUILD_PARALLEL_LEVEL": n_jobs}
        options = ["--no-deps", "--no-cache-dir", "--no-binary", "llama-cpp-python"]
        options += ["--build-constraint", str(CONSTRAINTS)]
        partial = folder.with_name(f"{key}.partial")
        pip("wheel", *options, "--wheel-dir", str(partial), requirement, environment=environment)
        partial.rename(folder)
    (wheel,) = folder.glob("*.whl")
    check_llama_wheel(wheel)
    return wheel


def check_llama_wheel(wheel: Path) -> None:
    """Refuses a wheel that lacks the backends or was not built portably."""
    with zipfile.ZipFile(wheel) as archive:
        libraries = {Path(name).name for name in archive.namelist() if name.startswith("llama_cpp/lib/")}
    variants = [name for name in libraries if re.fullmatch(r"libggml-cpu-\w+\.so", name)]
    needed = {"libllama.so", "libggml.so", "libggml-base.so", "libggml-rpc.so"}
    if missing := needed - libraries:
        raise BundleError(f"{wheel.name} lacks {', '.join(sorted(missing))}", f"remove {wheel.parent} and start again")
    if len(variants) < 2 or "libggml-cpu.so" in libraries:
        raise BundleError(f"{wheel.name} has no variants of the CPU backend", f"remove {wheel.parent} and start again")


def llama_source() -> Path:
    """llama-cpp-python's source archive, which has the licences that its wheel lacks."""
    folder = CACHE / "source"
    name = f"llama_cpp_python-{pinned('llama-cpp-python')}.tar.gz"
    if not (folder / name).is_file():
        say("fetching llama.cpp's licences")
        # pip also asks the package for its metadata, which needs the build tools: keep them out of the way with a plain fetch.
        options = ["--no-deps", "--no-binary", "llama-cpp-python", "--build-constraint", str(CONSTRAINTS)]
        pip("download", *options, "--dest", str(folder), f"llama-cpp-python=={pinned('llama-cpp-python')}")
    return folder / name


def localrun_wheel(folder: Path) -> Path:
    """Builds this checkout's wheel into `folder`."""
    say("building localrun's wheel")
    partial = CACHE / "localrun"
    shutil.rmtree(partial, ignore_errors=True)
    pip("wheel", "--no-deps", "--build-constraint", str(CONSTRAINTS), "--wheel-dir", str(partial), str(ROOT))
    (wheel,) = partial.glob("*.whl")
    return Path(shutil.copy2(wheel, folder / wheel.name))


def compiler() -> str:
    """The C++ compiler's version line."""
    name = os.environ.get("CXX", "c++")
    done = subprocess.run([*name.split(), "--version"], capture_output=True, text=True)
    return done.stdout.partition("\n")[0] or name


def pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    """Runs pip; its output goes to a log that a failure quotes.

    Raises:
        BundleError: it failed.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    log = CACHE / "pip.log"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    with log.open("wb") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})})
    if done.returncode:
        tail = log.read_text(errors="replace").splitlines()[-12:]
        print("\n".join(f"  {line}" for line in tail), file=sys.stderr)
        raise BundleError(f"pip {arguments[0]} failed", f"the whole log is {log}")


def requirements(wheels: Iterable[Path]) -> str:
    """A requirements file that lets pip install exactly these wheels."""
    hashes: dict[str, list[str]] = {}
    for path in wheels:
        name, version, _, _ = parse_wheel_filename(path.name)
        hashes.setdefault(f"{name}=={version}", []).append(hashlib.sha256(path.read_bytes()).hexdigest())
    return "".join(
        f"{name}{''.join(f' --hash=sha256:{digest}' for digest in sorted(digests))}\n"
        for name, digests in sorted(hashes.items())
    )
