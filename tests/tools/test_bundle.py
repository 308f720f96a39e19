"""The bundle's parts: what the installer refuses, what the sums cover, which licences are found. Nothing is built or downloaded."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from tools.bundle import __main__ as bundle
from tools.bundle import notices, wheels
from tools.bundle.wheels import BundleError

HERE = ".".join(platform.python_version_tuple()[:2])
SCRIPTS = Path(bundle.__file__).parent


@pytest.fixture
def installer() -> ModuleType:
    """install.py, which is shipped as a file and belongs to no package."""
    spec = importlib.util.spec_from_file_location("bundle_installer", SCRIPTS / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle whose installer only says what it was called with."""
    folder = tmp_path / "a bundle"
    for name in ("wheels", "installer"):
        (folder / name).mkdir(parents=True)
    (folder / "wheels" / "x.whl").write_bytes(bytes(1000))
    (folder / "installer" / "install.py").write_text("import sys; print(sys.argv[1:])")
    (folder / "install.sh").write_text((SCRIPTS / "install.sh").read_text().replace("@PYTHONS@", f"3.2 {HERE}"))
    bundle.write_sums(folder)
    return folder


def install(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(folder / "install.sh"), *arguments],
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )


def test_a_whole_bundle_gets_as_far_as_its_installer(folder: Path) -> None:
    done = install(folder, "some prefix")
    assert done.stdout == f"{[str(folder), 'some prefix']}\n", done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("name", ["wheels/x.whl", "installer/install.py", "install.sh"])
def test_a_damaged_or_missing_file_is_named_and_nothing_runs(name: str, folder: Path) -> None:
    with (folder / name).open("ab") as file:
        file.write(b"\n")
    done = install(folder, "prefix")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{name}: FAILED" in done.stderr
    assert "hint: copy it again" in done.stderr
    if name != "install.sh":
        (folder / name).unlink()
        assert f"{name}: FAILED" in install(folder, "prefix").stderr


def test_another_python_is_refused_by_version(folder: Path) -> None:
    script = folder / "install.sh"
    script.write_text(script.read_text().replace(f"3.2 {HERE}", "3.2"))
    done = install(folder, "prefix", PYTHON=sys.executable)
    assert done.returncode == 1
    assert f"no Python of version 3.2 (found: {HERE})" in done.stderr
    assert install(folder).returncode == 2


def test_the_installer_refuses_what_the_wheels_are_not_for(installer: ModuleType) -> None:
    good = {"system": sys.platform, "machine": platform.machine(), "pythons": [HERE], "glibc": "2.17"}
    if platform.libc_ver()[0] == "glibc":
        installer.check_machine(good)
    for wrong, word in (
        ({"machine": "m68k"}, "m68k"),
        ({"pythons": ["3.2"]}, "3.2"),
        ({"glibc": "2.999"}, "2.999"),
    ):
        with pytest.raises(installer.InstallError, match=word):
            installer.check_machine(good | wrong)


def test_the_installer_replaces_its_own_installations_only(installer: ModuleType, tmp_path: Path) -> None:
    assert not installer.check_prefix(tmp_path / "new")
    (tmp_path / "old" / installer.MARKER).parent.mkdir(parents=True)
    (tmp_path / "old" / installer.MARKER).write_text("{}")
    assert installer.check_prefix(tmp_path / "old")
    (tmp_path / "other").mkdir()
    assert not installer.check_prefix(tmp_path / "other")
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(installer.InstallError, match="no installation of localrun"):
        installer.check_prefix(tmp_path / "other")


def test_the_tar_depends_on_the_contents_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    first = bundle.pack(folder).read_bytes()
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    assert bundle.pack(folder).read_bytes() == first


def test_every_runtime_package_is_pinned_and_none_is_a_tool() -> None:
    names = wheels.runtime_packages(HERE)
    assert {"gguf", "llama-cpp-python", "llvmlite", "numba", "numpy", "textual", "uvicorn"} <= set(names)
    assert not {"pytest", "ruff", "mypy", "openai", "anthropic"} & set(names)
    assert all(wheels.pinned(name) for name in names)  # type: ignore[attr-defined]


def make_wheel(path: Path, files: dict[str, bytes], metadata: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        prefix = "-".join(path.name.split("-")[:2]) + ".dist-info/"
        for name, data in {**files, f"{prefix}METADATA": metadata.encode()}.items():
            archive.writestr(name.replace("INFO/", prefix), data)
    return path


def test_the_glibc_is_what_tags_promise_or_libraries_name(tmp_path: Path) -> None:
    promised = make_wheel(tmp_path / "a-1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl", {}, "Name: a")
    library = b"\0GLIBC_2.2.5\0GLIBC_2.31\0GLIBC_2.9\0"
    built = make_wheel(tmp_path / "b-1-py3-none-linux_x86_64.whl", {"b/lib/libb.so": library}, "Name: b")
    assert bundle.needed_glibc([promised]) == 27
    assert bundle.needed_glibc([promised, built]) == 31


def test_licences_are_found_and_a_package_without_any_is_refused(tmp_path: Path) -> None:
    texts = {"INFO/licenses/LICENSE": b"free", "INFO/NOTICE.txt": b"thanks", "c/licence.py": b"code"}
    sound = make_wheel(tmp_path / "c-1-py3-none-any.whl", texts, "Name: c\nLicense-Expression: MIT\n")
    bare = make_wheel(tmp_path / "d-1-py3-none-any.whl", {}, "Name: d\n")
    llama = make_wheel(tmp_path / "llama_cpp_python-1-py3-none-any.whl", {}, "Name: l\nLicense: MIT\n")
    source = tmp_path / "source.tar.gz"
    _tar(source, {"l-1/LICENSE.md": b"m", "l-1/vendor/llama.cpp/licenses/LICENSE-x": b"x", "l-1/other.txt": b"o"})
    out = tmp_path / "licenses"
    out.mkdir()
    found = {notice.name: notice for notice in notices.collect([sound, llama], source, out)}
    assert found["c"].texts == ("c/NOTICE.txt", "c/licenses/LICENSE")
    assert found["llama-cpp-python"].texts == (
        "llama-cpp-python/LICENSE.md",
        "llama-cpp-python/vendor/llama.cpp/licenses/LICENSE-x",
    )
    assert (out / "c" / "NOTICE.txt").read_bytes() == b"thanks"
    assert "| c | 1 | MIT |" in (out / "INDEX.md").read_text()
    with pytest.raises(BundleError, match="d: the wheel says nothing"):
        notices.collect([sound, llama, bare], source, out)


def _tar(path: Path, files: dict[str, bytes]) -> None:
    import io
    import tarfile

    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_a_wheel_that_was_not_built_portably_is_refused(tmp_path: Path) -> None:
    libraries = {f"llama_cpp/lib/lib{name}.so": b"" for name in ("llama", "ggml", "ggml-base", "ggml-rpc", "ggml-cpu")}
    native = make_wheel(tmp_path / "llama_cpp_python-1-py3-none-linux_x86_64.whl", libraries, "Name: l")
    with pytest.raises(BundleError, match="no variants"):
        wheels.check_llama_wheel(native)
