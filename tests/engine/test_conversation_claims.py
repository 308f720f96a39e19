"""Two windows on the same conversations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from localrun.engine.conversations import Claims


def test_a_conversation_is_one_windows_until_it_takes_another(tmp_path: Path) -> None:
    first, second = Claims(tmp_path / "c"), Claims(tmp_path / "c")
    assert first.take(1)
    assert first.take(1)
    assert not second.take(1)
    assert not second.is_free(1)
    assert first.is_free(1)
    assert second.take(2)
    assert not first.take(2)
    assert not second.is_free(1)  # the first window has kept what it has
    assert first.take(3)
    assert second.take(1)
    second.leave()
    assert first.take(1)
    first.close()
    assert second.take(1)


def test_windows_have_the_lowest_free_numbers(tmp_path: Path) -> None:
    first, second, third = (Claims(tmp_path / "c") for _ in range(3))
    assert (first.window, second.window, third.window) == (1, 2, 3)
    second.close()
    assert Claims(tmp_path / "c").window == 2


def test_a_killed_program_has_nothing_open(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from localrun.engine.conversations import Claims\n"
    program += "claims = Claims(Path(sys.argv[1])); claims.take(5); print(claims.window, flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "c")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "1\n"
    claims = Claims(tmp_path / "c")
    assert claims.window == 2
    assert not claims.take(5)
    other.kill()
    other.communicate()
    assert claims.take(5)


def test_without_a_file_everything_is_granted(tmp_path: Path) -> None:
    for where in (None, tmp_path / "no such folder/c"):
        claims = Claims(where)
        assert claims.window == 1
        assert claims.take(1)
        assert claims.is_free(1)
        claims.leave()
        claims.close()
