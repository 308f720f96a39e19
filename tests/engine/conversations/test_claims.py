"""Claims of windows on conversations: one window each, given up with its program, and no hindrance where locks don't exist."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from localrun.engine.conversations import claims
from localrun.engine.conversations.claims import Claims

pytestmark = pytest.mark.skipif(claims._SET_LOCK is None, reason="this system has no locks of open files")


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Claims, Claims]]:
    first, second = Claims(tmp_path / "c.sqlite3"), Claims(tmp_path / "c.sqlite3")
    yield first, second
    first.close()
    second.close()


def test_a_conversation_is_one_window_s_until_that_leaves(two: tuple[Claims, Claims]) -> None:
    first, second = two
    assert first.take(7)
    assert first.take(7), "again is no change"
    assert not second.take(7)
    assert (first.is_free(7), second.is_free(7)) == (True, False), "one's own is free to oneself"
    assert second.take(8)
    assert not first.take(8)
    assert not second.is_free(7), "a refusal changes nothing"
    assert first.take(9)
    assert second.is_free(7)
    first.leave()
    assert second.take(9)
    second.close()
    assert first.take(9)


def test_a_conversation_is_held_beside_the_open_one_for_a_while(two: tuple[Claims, Claims]) -> None:
    first, second = two
    assert first.take(7)
    with first.held(8) as is_ours:
        assert is_ours
        assert not second.take(8)
    assert second.take(8)
    with first.held(8) as is_ours:
        assert not is_ours
    with first.held(7) as is_ours:
        assert is_ours
    assert not second.is_free(7), "what was open stays so"
    assert not first.is_free(8)


def test_windows_are_numbered_by_the_lowest_that_is_free(tmp_path: Path) -> None:
    windows = [Claims(tmp_path / "c.sqlite3") for _ in range(3)]
    assert [window.window for window in windows] == [1, 2, 3]
    windows[1].close()
    again = Claims(tmp_path / "c.sqlite3")
    assert again.window == 2
    for window in (windows[0], windows[2], again):
        window.close()


def test_a_program_that_is_killed_leaves_nothing_claimed(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from localrun.engine.conversations.claims import Claims
claims = Claims(Path({str(tmp_path / "c.sqlite3")!r}))
assert claims.take(7)
print(claims.window, flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"1\n"
    here = Claims(tmp_path / "c.sqlite3")
    assert (here.window, here.take(7)) == (2, False)
    other.kill()
    other.communicate()
    assert here.take(7)
    here.close()


def test_without_a_file_every_claim_is_granted(tmp_path: Path) -> None:
    for database in (None, tmp_path / "no folder" / "c.sqlite3"):
        first, second = Claims(database), Claims(database)
        assert (first.window, second.window) == (1, 1)
        assert first.take(7)
        assert second.take(7)
        assert second.is_free(7)
        first.close()
        second.close()
