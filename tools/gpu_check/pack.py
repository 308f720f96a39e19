"""Packs the campaign for a machine that has a driver, a C library, Python and nothing else.

The project, the build of llama.cpp, the packages that the campaign imports, and GCC's runtime. Of the build, each library goes in
once and stripped: wheels hold three copies of every one, under the names that loaders ask for. CUDA's libraries
are the machine's, or PyPI's there: they have half a gigabyte. `start.py` is the other half.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sysconfig
import tarfile
from importlib.metadata import distribution
from pathlib import Path

from localrun.errors import UsageError
from tools.gpu_check import start

_NUMBERED = re.compile(r"(?P<stem>.+\.so)(?:\.\d+)*")
_PROJECT = ("localrun", "tools", "pyproject.toml")

PACKAGES = (
    "diskcache",
    "gguf",
    "jinja2",
    "llvmlite",
    "markupsafe",
    "msgspec",
    "numba",
    "numpy",
    "platformdirs",
    "pyyaml",
    "tqdm",
    "typing_extensions",
    "xxhash",
)
"""What the campaign imports besides the project and llama-cpp-python."""

SYSTEM_LIBRARIES = ("libgomp.so.1", "libstdc++.so.6", "libgcc_s.so.1")
"""GCC's runtime, for machines without any; numpy's and numba's wheels need no more."""

RUN = """#!/bin/sh
# On the machine with the card. PYTHON: another interpreter; OUT: where the result goes; arguments: see --help.
exec "${PYTHON:-python3}" "$(dirname "$0")/start.py" "$@"
"""


def pack(target: Path, *, site: Path | None = None, packages: bool = True) -> Path:
    """Fills `target` with archives, `start.py` and `run.sh`.

    Args:
        site: site-packages with llama-cpp-python as built for the card; None: this interpreter's.
        packages: this interpreter's packages, too; False: the machine has them.

    Raises:
        UsageError: no llama-cpp-python there.
    """
    site = site or Path(sysconfig.get_paths()["platlib"])
    source = site / "llama_cpp"
    if not source.is_dir():
        raise UsageError(f"{site}: no llama-cpp-python", hint="`make cuda` builds one")
    target.mkdir(parents=True, exist_ok=True)
    scratch = target / "scratch"
    shutil.copytree(source, scratch / "llama_cpp", ignore=shutil.ignore_patterns("__pycache__", "lib"))
    one_of_each(source / "lib", scratch / "llama_cpp" / "lib")
    _tar(target / "llama_cpp.tar.xz", [(scratch / "llama_cpp", "llama_cpp")])
    if packages:
        for name in PACKAGES:
            copy_package(name, scratch / "packages")
        copy_system_libraries(source / "lib", scratch / "system")
        _tar(target / "packages.tar.xz", [(scratch / name, name) for name in ("packages", "system")])
    shutil.rmtree(scratch)
    root = Path(__file__).parents[2]
    _tar(target / "project.tar.xz", [(root / name, name) for name in _PROJECT])
    made_for = {**start.made_here(), "packages": "all" if packages else "none"}
    (target / "made-for.json").write_text(json.dumps(made_for) + "\n")
    shutil.copyfile(Path(start.__file__), target / "start.py")
    (target / "run.sh").write_text(RUN)
    (target / "run.sh").chmod(0o755)
    return target


def one_of_each(source: Path, target: Path) -> None:
    """Copies libraries once, stripped, under the name that others ask for; the other names become links."""
    target.mkdir(parents=True)
    by_stem: dict[str, list[Path]] = {}
    for file in sorted(source.iterdir()):
        match = _NUMBERED.fullmatch(file.name)
        if file.is_file() and match is not None:
            by_stem.setdefault(match["stem"], []).append(file)
    for stem, names in by_stem.items():
        largest = max(names, key=lambda file: len(file.name)).resolve()
        shutil.copyfile(largest, target / stem)
        _strip(target / stem)
        for file in names:
            if file.name != stem:
                (target / file.name).symlink_to(stem)


def copy_package(name: str, target: Path) -> None:
    """An installed distribution's modules, libraries stripped; neither its tests nor its programs."""
    for file in distribution(name).files or ():
        if file.parts[0] == ".." or "__pycache__" in file.parts or "tests" in file.parts:
            continue
        copy = target / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(file.locate()), copy)
        if ".so" in file.name:
            _strip(copy)


def copy_system_libraries(libraries: Path, target: Path) -> None:
    """GCC's runtime as llama.cpp's libraries find it here."""
    target.mkdir(parents=True)
    said = subprocess.run(["ldd", *map(str, libraries.glob("*.so"))], capture_output=True, text=True, check=False)
    for name, path in sorted(set(re.findall(r"(\S+) => (/\S+)", said.stdout))):
        if name in SYSTEM_LIBRARIES:
            shutil.copyfile(path, target / name)


def _strip(library: Path) -> None:
    # Not those of auditwheel, whose sections strip would move.
    if (strip := shutil.which("strip")) is not None and ".libs" not in str(library.parent.name):
        subprocess.run([strip, "--strip-unneeded", library], check=True)


def _tar(path: Path, contents: list[tuple[Path, str]]) -> None:
    def clean(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if "__pycache__" in member.name else member

    with tarfile.open(path, "w:xz", preset=0) as archive:
        for source, name in contents:
            archive.add(source, name, filter=clean)
