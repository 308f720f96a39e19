"""A link to this checkout's `localrun`, so that it can be typed anywhere: `make install`, `make uninstall`.

    python3 tools/link.py install ~/.local/bin

Runs before anything is installed: standard library only. A `localrun` that is somebody else's stays as it is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / ".venv/bin/localrun"
NAME = "localrun"


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    what, folder = arguments
    link = Path(folder) / NAME
    return install(link) if what == "install" else uninstall(link)


def install(link: Path) -> int:
    """Makes the link, or finds it made."""
    if os.path.lexists(link) and not is_ours(link):
        print(f"error: {link} is there already and belongs to something else", file=sys.stderr)
        print("hint: remove it, or name another folder: make install LINKS=DIR", file=sys.stderr)
        return 1
    link.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(link):
        link.unlink()
    link.symlink_to(PROGRAM)
    print(f"{link} -> {PROGRAM}")
    if str(link.parent) not in os.environ.get("PATH", "").split(os.pathsep):
        print(f"{link.parent} is not in your PATH; for bash and zsh, add this line to ~/.profile and log in again:")
        print(f'    export PATH="{link.parent}:$PATH"')
    return 0


def uninstall(link: Path) -> int:
    """Removes the link; what belongs to somebody else stays."""
    if not os.path.lexists(link):
        print(f"{link} is not there")
        return 0
    if not is_ours(link):
        print(f"error: {link} belongs to something else and stays", file=sys.stderr)
        return 1
    link.unlink()
    print(f"{link} is gone; .venv and your data stay (make clean removes .venv)")
    return 0


def is_ours(link: Path) -> bool:
    """It is a link to this checkout, or to a checkout that has gone."""
    if not link.is_symlink():
        return False
    target = Path(os.readlink(link))
    return target == PROGRAM or (target.parts[-3:] == PROGRAM.parts[-3:] and not target.exists())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
