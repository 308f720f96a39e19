"""The set-up script: what it refuses, and that its pins fit the package. It never builds anything here."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest

from tools import bootstrap, gpu_build
from tools.bootstrap import ROOT
from tools.gpu_build import SetupError

VersionInfo = namedtuple("VersionInfo", "major minor micro releaselevel serial")


def test_every_dependency_is_pinned_to_a_version_that_it_allows() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["dev"]]
    requirements += project["build-system"]["requires"]
    for text in requirements:
        requirement = Requirement(text)
        assert requirement.specifier.contains(bootstrap.pinned(requirement.name)), text


def test_constraints_are_exact_and_sorted() -> None:
    lines = [line for line in bootstrap.CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 for line in lines)
    names = [line.split("==")[0] for line in lines]
    assert len(set(names)) == len(names)


def test_missing_pin_is_named() -> None:
    with pytest.raises(SetupError, match="no-such-package"):
        bootstrap.pinned("no-such-package")


def test_old_python_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", VersionInfo(3, 9, 2, "final", 0))
    with pytest.raises(SetupError) as caught:
        bootstrap.check_python()
    message, hint = caught.value.args
    assert "3.9" in message
    assert "PYTHON=python3.11" in hint


def test_missing_compiler_is_one_message_and_a_hint(tmp_path: Path) -> None:
    copy = tmp_path / "project"
    (copy / "tools").mkdir(parents=True)
    for name in ("constraints.txt", "pyproject.toml", "tools/__init__.py", "tools/bootstrap.py", "tools/gpu_build.py"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    environment = {key: value for key, value in os.environ.items() if key != "CXX"}
    done = subprocess.run(
        [sys.executable, str(copy / "tools" / "bootstrap.py")],
        env={**environment, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert "no C++ compiler" in error
    assert "build-essential" in hint
    assert not (copy / ".venv").exists()


def test_set_up_runs_again_when_pins_python_or_build_flags_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bootstrap.fingerprint()
    assert bootstrap.fingerprint() == first
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    flags = bootstrap.fingerprint()
    monkeypatch.delenv("CMAKE_ARGS")
    pins = tmp_path / "constraints.txt"
    pins.write_text(bootstrap.CONSTRAINTS.read_text() + "x==1\n")
    monkeypatch.setattr(bootstrap, "CONSTRAINTS", pins)
    assert len({first, flags, bootstrap.fingerprint()}) == 3


def test_this_interpreter_has_the_pinned_library_with_its_rpc_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "python", lambda: Path(sys.executable))
    assert bootstrap.has_llama_cpp()
    monkeypatch.setattr(bootstrap, "pinned", lambda name: "0.0.1")
    assert not bootstrap.has_llama_cpp()


def test_the_script_can_be_read_by_an_old_python() -> None:
    import ast

    for file in (bootstrap.__file__, gpu_build.__file__):
        assert ast.parse(Path(file).read_text(), feature_version=(3, 7)).body


MADE_UP = bootstrap.GpuBackend(
    "-DGGML_MADE_UP=ON",
    ("no-such-compiler",),
    {
        "its headers": (("include/no-such.hpp",), ""),
        "its library": (("lib*/libnosuch.so", "lib/*/libnosuch.so"), ""),
        "a newer library": (("lib/*/libnosuch.so",), "version 2"),
    },
    ("NO_SUCH_SDK",),
    (),
    "install it",
)


def test_gpu_choice_is_remembered_once_everything_for_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bootstrap.GPU_BACKENDS, "made-up", MADE_UP)
    monkeypatch.setattr(bootstrap, "GPU_CHOICE", tmp_path / "choice")
    monkeypatch.setattr(bootstrap, "make_venv", lambda: None)
    monkeypatch.setenv("NO_SUCH_SDK", str(tmp_path))
    monkeypatch.setenv("CMAKE_ARGS", "-DX=1;2")
    for folder in ("bin", "include", "lib/x86"):
        (tmp_path / folder).mkdir(parents=True)
    for name, file in {"no-such-compiler": "bin/no-such-compiler", "its headers": "include/no-such.hpp"}.items():
        with pytest.raises(SetupError, match=f"{name}, .*its library, a newer library not found"):
            bootstrap.choose_gpu("made-up")
        (tmp_path / file).touch()
    (tmp_path / "lib/x86/libnosuch.so").write_text("version 1")
    with pytest.raises(SetupError, match="made-up: a newer library not found"):
        bootstrap.choose_gpu("made-up")
    (tmp_path / "lib/x86/libnosuch.so").write_text("version 2")
    bootstrap.choose_gpu("made-up")
    monkeypatch.delenv("CMAKE_ARGS")
    assert bootstrap.cmake_args().endswith("-DGGML_MADE_UP=ON -DX=1;2")
    assert bootstrap.build_path().endswith(f"{tmp_path}/bin")
    bootstrap.choose_gpu("cpu")
    assert bootstrap.cmake_args() == bootstrap.CMAKE_ARGS
