"""Signals that arrive where Python drops exceptions still end what runs."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import pytest

from localrun import interrupts

CALLED_FROM_C = ctypes.CFUNCTYPE(None)


def in_a_function_that_c_calls(number: int) -> None:
    CALLED_FROM_C(lambda: signal.raise_signal(number))()


def in_a_finalizer(number: int) -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(number)

    Dying()


def twice_in_a_row(number: int) -> None:
    """C code calls again and again: what is brought back is swallowed once more."""

    def slow() -> None:
        signal.raise_signal(number)
        end = time.monotonic() + 5 * interrupts.SWALLOWED_S
        while time.monotonic() < end:
            time.sleep(interrupts.SWALLOWED_S / 10)

    CALLED_FROM_C(slow)()


def lose_and_wait(lose: Callable[[int], None], number: int) -> None:
    lose(number)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.parametrize("lose", [in_a_function_that_c_calls, in_a_finalizer, twice_in_a_row])
@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_that_is_swallowed_is_raised_again(
    lose: Callable[[int], None], number: int, ends: type[BaseException]
) -> None:
    def end(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # as the command line does
        raise SystemExit(128 + number)

    before = signal.signal(number, interrupts.Once() if number == signal.SIGINT else end)
    try:
        with interrupts.raised_again(), pytest.raises(ends) as raised:
            lose_and_wait(lose, number)
    finally:
        signal.signal(number, before)
    assert raised.value.args == (() if ends is KeyboardInterrupt else (143,))


def test_other_exceptions_that_are_dropped_are_told_as_ever() -> None:
    told: list[Any] = []
    usual, sys.unraisablehook = sys.unraisablehook, told.append
    try:
        with interrupts.raised_again():
            CALLED_FROM_C(lambda: 1 // 0)()
        assert sys.unraisablehook == told.append
    finally:
        sys.unraisablehook = usual
    assert [type(dropped.exc_value) for dropped in told] == [ZeroDivisionError]


COMPILES = """
import sys
from localrun import cli

def run(args):
    import numba
    from numba.core.codegen import CPUCodeLibrary
    usual = CPUCodeLibrary._object_compiled_hook.__func__
    def hook(kind, module, buffer):
        print("compiled", flush=True)
        sys.stdin.readline()
        return usual(kind, module, buffer)
    CPUCodeLibrary._object_compiled_hook = classmethod(hook)
    for number in range(20):
        numba.njit(lambda x: x + number)(1)
    return 0

class Command:
    add_arguments = staticmethod(lambda parser: None)
    run = staticmethod(run)

cli._module = lambda name: Command
sys.argv = ["localrun", "doctor"]
sys.exit(cli.main())
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_kernels_are_compiled_ends_the_command(number: signal.Signals, code: int) -> None:
    """LLVM waits in our hands, in the function that it calls, until the signal is there."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM)],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "compiled\n"
    process.send_signal(number)
    out, _err = process.communicate("\n" * 20, timeout=300)
    assert process.returncode == code
    assert out.count("compiled") < 15, "it went on compiling"
