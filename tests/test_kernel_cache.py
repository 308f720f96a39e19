"""Compiled kernels: found again exactly when the same would be compiled, kept where nobody else can write, never a reason to
fail, and no business of anybody else who uses numba."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import localrun

PACKAGE = Path(localrun.__file__).parent

COUNT = """
import json
from localrun import kernel_cache
from localrun.kernel_cache import KernelCache
compiled = []
original = KernelCache.save_overload
KernelCache.save_overload = lambda self, sig, data: (compiled.append(self._name[0]), original(self, sig, data))
import numpy as np
"""
COMPILE_ONE = """
from localrun.quant.formats.kernels import f32_to_bf16
out = np.zeros(2, np.uint16)
f32_to_bf16(np.array([1.0, -2.0], np.float32).view(np.uint32), out)
assert out.tolist() == [0x3F80, 0xC000], out
"""
REPORT = "\nprint(json.dumps([str(kernel_cache.folder()), sorted(compiled)]))"


def start(code: str, kernel_dir: Path, **environment: str) -> tuple[Path, list[str]]:
    """Runs code in a process of its own; the folder that it kept kernels in, and what it compiled."""
    variables = os.environ | {"LOCALRUN_KERNEL_DIR": str(kernel_dir)} | environment
    done = subprocess.run(
        [sys.executable, "-P", "-c", COUNT + code + REPORT], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    folder, compiled = json.loads(done.stdout.splitlines()[-1])
    return Path(folder), compiled


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_kernels_are_kept_in_a_private_folder_whose_files_may_be_damaged_but_are_nobody_elses(tmp_path: Path) -> None:
    kernels = tmp_path / "kernels"
    folder, compiled = start(COMPILE_ONE, kernels, TMPDIR=str(tmp_path))
    assert (folder.parent, compiled) == (kernels, ["kernels.f32_to_bf16"])
    assert folder.stat().st_mode & 0o077 == 0
    assert start(COMPILE_ONE, kernels, PYTHONHASHSEED="7") == (folder, [])

    (file,) = folder.glob("*f32_to_bf16*")
    file.write_bytes(file.read_bytes()[:100])
    assert start(COMPILE_ONE, kernels) == (folder, ["kernels.f32_to_bf16"])

    file.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    folder.chmod(0o777)
    other, _ = start(COMPILE_ONE, kernels, TMPDIR=str(tmp_path))
    assert other.parent == tmp_path / f"localrun-{os.getuid()}"
    assert not (tmp_path / "sprung").exists()
    pickle.loads(file.read_bytes())
    assert (tmp_path / "sprung").exists(), "the trap works"


def test_without_a_writable_folder_kernels_are_compiled_all_the_same(tmp_path: Path) -> None:
    (tmp_path / f"localrun-{os.getuid()}").write_text("in the way")
    folder, _ = start(COMPILE_ONE, Path(os.devnull) / "kernels", TMPDIR=str(tmp_path))
    assert folder.parent == Path(os.devnull)


def test_what_nobody_uses_goes_and_other_peoples_files_stay(tmp_path: Path) -> None:
    folder, _ = start(COMPILE_ONE, tmp_path)
    (kept,) = folder.iterdir()
    unused, other_tools, other = folder / "old.kernel", tmp_path / f"quant-{'0' * 16}", tmp_path / "my thesis"
    unused.touch()
    other_tools.mkdir()
    other.mkdir()
    for path in (unused, other_tools, other):
        os.utime(path, (0, 0))
    assert start(COMPILE_ONE, tmp_path)[1] == []
    assert sorted(folder.iterdir()) == [kept]
    assert sorted(tmp_path.iterdir()) == sorted([folder, other])


def edit(package: Path, changes: Mapping[str, tuple[str, str]]) -> None:
    """Replaces text in modules of a copy of the package, by path."""
    for name, (old, new) in changes.items():
        path = package / name
        text = path.read_text()
        assert text.count(old) >= 1, (name, old)
        path.write_text(text.replace(old, new, 1))


MADE_UP = '''
from __future__ import annotations
from localrun.kernel_cache import cached_cfunc
from localrun.offload.device.tensors import NE
from localrun.offload.kernels.lowlevel import load_i64

STEP = 1

@cached_cfunc("intp(intp)")
def loads(address):
    """Loads."""
    return load_i64(address) + STEP

@cached_cfunc("intp(intp)")
def shape(tensor):
    """Where a tensor's shape is."""
    return tensor + NE
'''


def test_only_what_goes_into_the_code_is_a_reason_to_compile(tmp_path: Path) -> None:
    package, kernels = tmp_path / "source" / "localrun", tmp_path / "kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("demo", "__pycache__"))
    (package / "offload" / "made_up.py").write_text(MADE_UP)

    def compiled() -> list[str]:
        code = f"""
from localrun.offload import made_up
assert made_up.__file__ == {str(package / "offload" / "made_up.py")!r}
assert made_up.loads.address and made_up.shape.address
"""
        return start(code, kernels, PYTHONPATH=str(package.parent), PYTHONDONTWRITEBYTECODE="1")[1]

    assert compiled() == ["made_up.loads", "made_up.shape"]
    edit(
        package,
        {
            "errors.py": ("class LocalrunError", "UNRELATED = 1\n\n\nclass LocalrunError"),
            "offload/made_up.py": ('"""Loads."""', '"""Another\n\n    docstring, some lines longer."""'),
            "offload/kernels/lowlevel.py": ('"""memcpy."""', '"""Copies."""  # memcpy'),
            "ggml/structures.py": ("import ctypes", "# A comment that moves every line.\nimport ctypes"),
        },
    )
    assert compiled() == []
    # An offset into a C structure, and the alignment of a load: Python that generates code, in other modules.
    edit(
        package, {"ggml/structures.py": ('("ne", C.c_int64 * 4),', '("made_up", _P),\n        ("ne", C.c_int64 * 4),')}
    )
    assert compiled() == ["made_up.shape"]
    edit(package, {"offload/kernels/lowlevel.py": ("value.align = 1", "value.align = 2")})
    assert compiled() == ["made_up.loads"]


NEIGHBOUR = """
import sys
from numba import njit

@njit(cache=True)
def double(x):
    return 2 * x
"""

STATE = """
import importlib, pkgutil, sys
import numba
from numba.core import caching, ccallback, config, decorators, dispatcher, registry, typing
modules = (numba, caching, ccallback, config, decorators, dispatcher, registry)
classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
def state():
    seen = {f"{module.__name__}.{name}": value for module in modules for name, value in vars(module).items()}
    for cls in classes:
        seen |= {f"{cls.__module__}.{cls.__qualname__}.{name}": value for name, value in vars(cls).items()}
    seen["locators"] = tuple(caching.CacheImpl._locator_classes)
    return seen
before = state()
import localrun
for package in ("localrun.quant", "localrun.offload"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
after = state()
def same(a, b):
    return a is b or type(a) is type(b) and isinstance(a, (int, float, str, tuple)) and a == b
print([name for name in before | after if not same(before.get(name), after.get(name))])
import neighbour
neighbour.double(3)
print(neighbour.double._cache.cache_path)
"""


def test_importing_localrun_changes_nothing_for_other_users_of_numba(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    environment["PYTHONPATH"] = f"{PACKAGE.parent}{os.pathsep}{tmp_path}"
    done = subprocess.run([sys.executable, "-c", STATE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    changed, folder = done.stdout.splitlines()
    assert changed == "[]"
    assert Path(folder) == tmp_path / "__pycache__"
    assert list(Path(folder).glob("neighbour.double*.nbc"))
