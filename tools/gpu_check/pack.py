"""Packs the project and the build of llama.cpp for a machine that has a driver, Python and nothing else.

Of the build, each library goes in once and stripped: wheels hold three copies of every one, under the names that loaders ask for.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tarfile
from pathlib import Path

from localrun.errors import UsageError

_NUMBERED = re.compile(r"(?P<stem>.+\.so)(?:\.\d+)*")
_PROJECT = ("localrun", "tools", "tests", "pyproject.toml")

RUN = """#!/bin/sh
# On the machine with the card: unpacks, installs what else is needed from PyPI's wheels beside it, measures.
set -e
cd "$(dirname "$0")"
tar xf project.tar.xz
tar xf llama_cpp.tar.xz -C project
cd project
python3 -m tools.gpu_check run "${OUT:-..}/gpu-check.json" "$@"
python3 -m tools.gpu_check table "${OUT:-..}/gpu-check.json"
"""


def pack(target: Path, *, site: Path | None = None) -> Path:
    """Fills `target` with the project, the stripped build and `run.sh`; numpy, numba, gguf and the like are the machine's.

    Args:
        site: site-packages with llama-cpp-python as built for the card; None: this interpreter's.

    Raises:
        UsageError: no llama-cpp-python there.
    """
    site = site or Path(sysconfig.get_paths()["platlib"])
    source = site / "llama_cpp"
    if not source.is_dir():
        raise UsageError(f"{site}: no llama-cpp-python", hint="`make cuda` builds one")
    target.mkdir(parents=True, exist_ok=True)
    scratch = target / "llama_cpp"
    shutil.copytree(source, scratch, ignore=shutil.ignore_patterns("__pycache__", "lib"))
    one_of_each(source / "lib", scratch / "lib")
    _tar(target / "llama_cpp.tar.xz", [(scratch, "llama_cpp")])
    shutil.rmtree(scratch)
    root = Path(__file__).parents[2]
    _tar(target / "project.tar.xz", [(root / name, f"project/{name}") for name in _PROJECT])
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
        if (strip := shutil.which("strip")) is not None:
            subprocess.run([strip, "--strip-unneeded", target / stem], check=True)
        for file in names:
            if file.name != stem:
                (target / file.name).symlink_to(stem)


def _tar(path: Path, contents: list[tuple[Path, str]]) -> None:
    def clean(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if "__pycache__" in member.name else member

    with tarfile.open(path, "w:xz", preset=1) as archive:
        for source, name in contents:
            archive.add(source, name, filter=clean)
