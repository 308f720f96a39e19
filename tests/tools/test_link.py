"""`make install` and `make uninstall`: a link to this checkout's program, and nobody else's is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tools import link


def test_the_link_is_made_once_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bin"
    monkeypatch.setenv("PATH", "/usr/bin")
    for _ in range(2):
        assert link.main(["install", str(folder)]) == 0
        assert (folder / "localrun").readlink() == link.PROGRAM
        assert f"{folder} is not in your PATH" in capsys.readouterr().out
    monkeypatch.setenv("PATH", f"/usr/bin:{folder}")
    assert link.main(["install", str(folder)]) == 0
    assert "PATH" not in capsys.readouterr().out
    assert link.main(["uninstall", str(folder)]) == 0
    assert list(folder.iterdir()) == []
    assert link.main(["uninstall", str(folder)]) == 0


def test_somebody_else_s_program_stays(tmp_path: Path) -> None:
    makers: list[Callable[[Path], object]] = [
        lambda path: path.write_text("#!/bin/sh\n"),
        lambda path: path.symlink_to("/bin/true"),
    ]
    for make in makers:
        other = tmp_path / "localrun"
        other.unlink(missing_ok=True)
        make(other)
        before = other.lstat()
        assert link.main(["install", str(tmp_path)]) == 1
        assert link.main(["uninstall", str(tmp_path)]) == 1
        assert other.lstat() == before


def test_a_link_to_a_checkout_that_has_gone_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "localrun").symlink_to("/gone/localrun/.venv/bin/localrun")
    assert link.main(["install", str(tmp_path)]) == 0
    assert (tmp_path / "localrun").readlink() == link.PROGRAM
