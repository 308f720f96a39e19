"""Licences and notices of everything in a bundle, taken from the wheels themselves and from llama.cpp's source archive.

A package without a licence text in its wheel is listed with what its metadata says; one that says nothing fails the bundle.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesParser
from pathlib import Path, PurePosixPath

from packaging.utils import parse_wheel_filename

from tools.bundle.wheels import BundleError

_TEXT = re.compile(r"(?:licen[cs]e|copying|notice|authors|copyright|thirdparty)", re.IGNORECASE)

_LLAMA_TEXTS = re.compile(
    r"(?:LICENSE\.md|vendor/llama\.cpp/(?:LICENSE|AUTHORS|licenses/[^/]+|vendor/(?:.+/)?LICENSE[^/]*))"
)
"""llama-cpp-python's own licence, llama.cpp's, and those of the sources that it carries. Its web interface is not built."""

RUNTIME_LIBRARIES = {"libgomp.so.1": "libgomp1", "libstdc++.so.6": "libstdc++6", "libgcc_s.so.1": "libgcc-s1"}
"""GCC's libraries that the compiled code needs -> Debian's name of the package, whose folder has the licence."""

GCC_NOTE = """\
These are unmodified libraries of GCC, as this system's distribution ships them. They are under the GPL, version 3 or later, with
the GCC Runtime Library Exception, which lets any program use them. Their source: https://gcc.gnu.org and the distribution's
source package of the version named in bundle.json. install.sh uses them only on a machine that has none of its own.
"""


@dataclass(frozen=True, slots=True)
class Notice:
    """What the index says about one package."""

    name: str
    version: str
    licence: str
    texts: tuple[str, ...]


def collect(wheels: Iterable[Path], llama_source: Path, folder: Path) -> list[Notice]:
    """Writes `folder/<name>/...` for every package and the index; returns the index's lines.

    Raises:
        BundleError: a package says nothing about its licence.
    """
    notices: dict[str, Notice] = {}
    for wheel in wheels:
        name, version, _, _ = parse_wheel_filename(wheel.name)
        if name not in notices:
            notices[name] = _of_wheel(wheel, name, str(version), folder)
    llama = notices["llama-cpp-python"]
    texts = _of_source(llama_source, folder / llama.name)
    notices[llama.name] = Notice(llama.name, llama.version, llama.licence, tuple(sorted({*llama.texts, *texts})))
    for notice in notices.values():
        if not notice.texts and not notice.licence:
            raise BundleError(f"{notice.name}: the wheel says nothing about its licence", "find it out and add it")
    ordered = [notices[name] for name in sorted(notices)]
    (folder / "INDEX.md").write_text(_index(ordered))
    return ordered


def _of_wheel(wheel: Path, name: str, version: str, folder: Path) -> Notice:
    texts = []
    with zipfile.ZipFile(wheel) as archive:
        info = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        prefix = info.removesuffix("METADATA")
        metadata = BytesParser().parsebytes(archive.read(info))
        for member in archive.namelist():
            inside = PurePosixPath(member.removeprefix(prefix))
            if member.startswith(prefix) and not member.endswith("/") and _is_text(inside):
                texts.append(_write(folder / name, inside, archive.read(member)))
    return Notice(name, version, _licence(metadata), tuple(sorted(texts)))


def _is_text(inside: PurePosixPath) -> bool:
    return inside.parts[0] in ("licenses", "license_files") or bool(_TEXT.match(inside.name))


def _licence(metadata: Message) -> str:
    for key in ("License-Expression", "License"):
        value = str(metadata.get(key, "")).strip()
        if value and value != "UNKNOWN":
            return value.partition("\n")[0][:80]
    classifiers = [str(value) for value in metadata.get_all("Classifier", [])]
    return ", ".join(v.rpartition(":: ")[2] for v in classifiers if v.startswith("License"))


def _of_source(archive_path: Path, folder: Path) -> list[str]:
    texts = []
    with tarfile.open(archive_path) as archive:
        for member in archive:
            inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if member.isfile() and _LLAMA_TEXTS.fullmatch(str(inside)):
                file = archive.extractfile(member)
                assert file is not None
                texts.append(_write(folder, inside, file.read()))
    return texts


def _write(folder: Path, inside: PurePosixPath, data: bytes) -> str:
    if inside.is_absolute() or ".." in inside.parts:
        raise BundleError(f"{inside}: a licence's name leaves its folder", "do not use this package")
    path = folder / inside
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return f"{folder.name}/{inside}"


def _index(notices: list[Notice]) -> str:
    lines = ["# Licences of what is in this bundle", "", "| package | version | licence | texts |", "|---|---|---|---|"]
    for notice in notices:
        texts = "<br>".join(notice.texts) or "none in the package"
        lines.append(f"| {notice.name} | {notice.version} | {notice.licence or 'see the texts'} | {texts} |")
    return "\n".join(lines) + "\n"


def gcc_licence(package: str) -> bytes | None:
    """The distribution's copyright file of a GCC library, None where there is none."""
    for path in (Path("/usr/share/doc") / package / "copyright", Path("/usr/share/licenses") / package / "COPYING3"):
        if path.is_file():
            return path.read_bytes()
    return None
