"""Gets the user's attention: the terminal bell, or a desktop notification through the terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, cast

How = Literal["bell", "desktop", "off"]
"""The values of the option `notify`."""

BELL = "\x07"


def sequence(how: str, text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The control sequence to write; empty for `off`.

    Desktop notifications have two forms: OSC 777 (rxvt, foot, terminals made with VTE) and OSC 9 (iTerm2, kitty, WezTerm,
    Ghostty, Windows Terminal). Some terminals know both and would show it twice. Others ignore them: the bell rings as well.

    Args:
        text: for people, without control characters or semicolons.
    """
    if cast(How, how) != "desktop":
        return BELL if how == "bell" else ""
    term = environment.get("TERM", "")
    if "VTE_VERSION" in environment or term.startswith(("rxvt", "foot")):
        told = f"\x1b]777;notify;localrun;{text}{BELL}"
    else:
        told = f"\x1b]9;localrun: {text}{BELL}"
    if environment.get("TMUX"):  # to the terminal outside, where tmux allows it (allow-passthrough)
        told = "\x1bPtmux;" + told.replace("\x1b", "\x1b\x1b") + "\x1b\\"
    return told + BELL
