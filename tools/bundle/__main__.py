"""`python -m tools.bundle`: makes the bundle's folder and tar under `dist/`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from packaging.utils import parse_wheel_filename

from localrun import __version__
from tools.bootstrap import ROOT, pinned
from tools.bundle import notices
from tools.bundle.wheels import (
    PORTABLE_CMAKE_ARGS,
    PYTHONS,
    BundleError,
    compiler,
    download,
    llama_source,
    llama_wheel,
    localrun_wheel,
    machine,
    requirements,
    runtime_packages,
    say,
)
from tools.gpu_build import SetupError

SUMS = "SHA256SUMS"
FORMAT = "localrun-bundle"
_HERE = Path(__file__).parent
_GLIBC = re.compile(rb"\0GLIBC_2\.([0-9]+)(?:\.[0-9]+)?\0")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bundle", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the folder and the tar go")
    parser.add_argument("--python", nargs="+", default=list(PYTHONS), metavar="X.Y", help="Python versions to serve")
    parser.add_argument("--no-tar", action="store_true", help="the folder only")
    args = parser.parse_args()
    try:
        folder = make(args.out, args.python)
        say(f"{folder}: {sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.0f} MB")
        if not args.no_tar:
            say(f"{pack(folder)}")
        say(f"sha256 of {SUMS}: {_sha256(folder / SUMS)}")
    except (BundleError, SetupError) as error:
        message, hint = error.args
        print(f"error: {message}\nhint: {hint}", file=sys.stderr)
        return 1
    return 0


def bundle_name() -> str:
    """Of the folder and the archive, without a suffix."""
    return f"localrun-{__version__}-linux-{machine()}"


def make(out: Path, pythons: list[str]) -> Path:
    """Makes the folder, replacing one that is there; returns it.

    Raises:
        BundleError: something is missing.
    """
    if sys.platform != "linux":
        raise BundleError("bundles are made on Linux", "use a Linux machine of the kind that will run it")
    folder = out / bundle_name()
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("wheels", "requirements", "installer", "licenses"):
        (partial / name).mkdir(parents=True)
    built = [llama_wheel(), localrun_wheel(partial / "wheels")]
    of_python = {python: _wheels_for(python, built) for python in pythons}
    wheels = sorted({wheel for found in of_python.values() for wheel in found}, key=lambda path: path.name)
    for wheel in wheels:
        if wheel.parent != partial / "wheels":
            shutil.copy2(wheel, partial / "wheels" / wheel.name)
    for python, found in of_python.items():
        (partial / "requirements" / f"{python}.txt").write_text(requirements(found))
    pip = next(iter(download(pythons[0], ["pip"]).values()))
    shutil.copy2(pip, partial / "installer" / pip.name)
    say("collecting licences")
    texts = notices.collect([*wheels, pip], llama_source(), partial / "licenses")
    libraries = _runtime_libraries(partial)
    _write_programs(partial, pythons)
    facts = _facts(pythons, wheels, built[0], libraries, texts)
    (partial / "bundle.json").write_text(json.dumps(facts, indent=1) + "\n")
    write_sums(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return folder


def _wheels_for(python: str, built: list[Path]) -> list[Path]:
    names = [name for name in runtime_packages(python) if name != "llama-cpp-python"]
    return [*built, *download(python, names).values()]


def _write_programs(folder: Path, pythons: list[str]) -> None:
    script = (_HERE / "install.sh").read_text().replace("@PYTHONS@", " ".join(pythons))
    (folder / "install.sh").write_text(script)
    (folder / "install.sh").chmod(0o755)
    shutil.copyfile(_HERE / "install.py", folder / "installer" / "install.py")
    shutil.copyfile(ROOT / "docs" / "air-gapped.md", folder / "README.md")


def _runtime_libraries(folder: Path) -> list[str]:
    """Copies of GCC's libraries for machines that have none; left out where their licence is not at hand."""
    found = []
    for name, package in notices.RUNTIME_LIBRARIES.items():
        done = subprocess.run(["cc", f"-print-file-name={name}"], capture_output=True, text=True)
        path = Path(done.stdout.strip())
        licence = notices.gcc_licence(package)
        if not path.is_absolute() or not path.is_file() or licence is None:
            say(f"{name} is left out: {'its licence' if path.is_file() else 'the library'} was not found")
            continue
        (folder / "runtime").mkdir(exist_ok=True)
        shutil.copyfile(path.resolve(), folder / "runtime" / name)
        texts = folder / "licenses" / "gcc-runtime"
        texts.mkdir(exist_ok=True)
        (texts / "README").write_text(notices.GCC_NOTE)
        (texts / f"{package}.copyright").write_bytes(licence)
        with (folder / "licenses" / "INDEX.md").open("a") as index:
            index.write(
                f"| GCC: {name} | {compiler()} | GPL-3.0 with GCC exception | gcc-runtime/{package}.copyright |\n"
            )
        found.append(name)
    return found


def _facts(
    pythons: list[str], wheels: list[Path], llama: Path, libraries: list[str], texts: list[notices.Notice]
) -> dict[str, Any]:
    """The version manifest, `bundle.json`."""
    return {
        "format": FORMAT,
        "version": 1,
        "localrun": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "system": "linux",
        "machine": machine(),
        "glibc": f"2.{needed_glibc(wheels)}",
        "pythons": pythons,
        "llama_cpp": {
            "version": pinned("llama-cpp-python"),
            "cmake_args": PORTABLE_CMAKE_ARGS,
            "compiler": compiler(),
            "cpu_variants": cpu_variants(llama),
            "source_sha256": _sha256(llama_source()),
        },
        "runtime_libraries": libraries,
        "packages": {notice.name: notice.version for notice in texts},
    }


def cpu_variants(wheel: Path) -> list[str]:
    """Names of the CPU backends in a llama-cpp-python wheel."""
    with zipfile.ZipFile(wheel) as archive:
        found = (re.fullmatch(r"llama_cpp/lib/libggml-cpu-(\w+)\.so", name) for name in archive.namelist())
        return sorted(match[1] for match in found if match)


def needed_glibc(wheels: list[Path]) -> int:
    """Minor version of the glibc that all wheels can live with: what their tags promise, or what a built one's libraries name."""
    newest = 17
    for wheel in wheels:
        tags = [tag.platform for tag in parse_wheel_filename(wheel.name)[3]]
        promised = [int(m[1]) for tag in tags if (m := re.match(r"manylinux_2_([0-9]+)_", tag))]
        if promised:
            newest = max(newest, min(promised))
        elif any(tag.startswith("linux_") for tag in tags):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if ".so" in Path(name).name:
                        newest = max([newest, *map(int, _GLIBC.findall(archive.read(name).replace(b"\0", b"\0\0")))])
    return newest


def write_sums(folder: Path) -> None:
    """SHA256SUMS over every file of the folder, as `sha256sum` writes it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SUMS)
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines))


def pack(folder: Path) -> Path:
    """A tar of the folder, the same bytes for the same contents; not compressed, because wheels are."""
    path = folder.with_name(f"{folder.name}.tar")
    partial = path.with_name(f"{path.name}.partial")

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mtime = int(os.environ.get("SOURCE_DATE_EPOCH", _git("log", "-1", "--format=%ct") or 0))
        info.mode = 0o755 if info.isdir() or info.name.endswith(".sh") else 0o644
        return info

    with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as archive:
        for member in [folder, *sorted(folder.rglob("*"))]:
            archive.add(member, member.relative_to(folder.parent).as_posix(), recursive=False, filter=plain)
    partial.replace(path)
    return path


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
