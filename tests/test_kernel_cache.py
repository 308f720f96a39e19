"""Compiled kernels: kept where nobody else can write, never a reason to fail."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.caching import IndexDataCacheFile

from localrun import kernel_cache

assert kernel_cache, "changes numba's cache"

CODE = """
import sys
from localrun import kernel_cache
from localrun.quant.formats.kernels import f32_to_bf16
import numpy as np
folder = kernel_cache.folder_of(kernel_cache._PACKAGE / "quant" / "format_kernels.py")
out = np.zeros(2, np.uint16)
f32_to_bf16(np.array([1.0, -2.0], np.float32).view(np.uint32), out)
assert out.tolist() == [0x3F80, 0xC000], out
print(folder, sum(f32_to_bf16.stats.cache_hits.values()))
"""


def start(kernel_dir: Path, temporary: Path) -> tuple[Path, int]:
    """Compiles a kernel in a process of its own; returns the folder that it used and how much was found compiled."""
    environment = os.environ | {"LOCALRUN_KERNEL_DIR": str(kernel_dir), "TMPDIR": str(temporary)}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder, hits = done.stdout.split()
    return Path(folder), int(hits)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_kernels_are_kept_in_a_private_folder_whose_files_may_be_damaged_but_are_nobody_elses(tmp_path: Path) -> None:
    folder, hits = start(tmp_path / "kernels", tmp_path)
    assert (folder.parent, hits) == (tmp_path / "kernels", 0)
    assert folder.stat().st_mode & 0o077 == 0
    assert start(tmp_path / "kernels", tmp_path)[1] > 0

    for path in folder.rglob("*.nb?"):
        path.write_bytes(b"\x80\x04.")
    assert start(tmp_path / "kernels", tmp_path) == (folder, 0)

    (index,) = folder.rglob("*f32_to_bf16*.nbi")
    index.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    folder.chmod(0o777)
    other, _ = start(tmp_path / "kernels", tmp_path)
    assert other.parent == tmp_path / f"localrun-{os.getuid()}"
    assert not (tmp_path / "sprung").exists()
    pickle.loads(index.read_bytes())
    assert (tmp_path / "sprung").exists(), "the trap works"


def test_without_a_writable_folder_kernels_are_compiled_all_the_same(tmp_path: Path) -> None:
    (tmp_path / f"localrun-{os.getuid()}").write_text("in the way")
    assert start(Path(os.devnull) / "kernels", tmp_path)[1] == 0


def test_two_programs_that_compile_at_the_same_time_never_find_each_others_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, reader = (IndexDataCacheFile(str(tmp_path), "module.rows-80.py311", "stamp") for _ in range(3))
    before = second._load_index()
    first.save("a", "code of a")
    of_a = reader._load_index()
    monkeypatch.setattr(second, "_load_index", lambda: before)
    second.save("b", "code of b")
    assert reader.load("b") == "code of b"
    assert reader.load("a") in (None, "code of a")
    monkeypatch.setattr(reader, "_load_index", lambda: of_a)
    assert reader.load("a") == "code of a"
