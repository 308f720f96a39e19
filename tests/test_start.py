"""The program's first lines: an interrupt before the command line is ready ends the process without a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from types import FrameType

import pytest

from localrun import cli, start


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_python_s_own_handler_gives_way_to_the_system_s(monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile: list[object] = []
    monkeypatch.setattr(cli, "main", lambda: (meanwhile.append(signal.getsignal(signal.SIGINT)), 7)[1])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert start.main() == 7
    assert meanwhile == [signal.SIG_DFL]


def test_a_handler_of_somebody_s_own_and_ignoring_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(number: int, frame: FrameType | None) -> None:
        pass

    for handler in (own, signal.SIG_IGN):
        signal.signal(signal.SIGINT, handler)
        monkeypatch.setattr(cli, "main", lambda: 0)
        assert start.main() == 0
        assert signal.getsignal(signal.SIGINT) is handler


def test_the_module_is_the_program() -> None:
    done = subprocess.run([sys.executable, "-m", "localrun", "dance"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
