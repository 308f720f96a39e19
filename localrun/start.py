"""The program's first lines: until the command line has its own handlers, an interrupt ends the process without a traceback."""

from __future__ import annotations

import signal


def main() -> int:
    """Runs the command line; returns the exit code."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from localrun.cli import main as run

    return run()
