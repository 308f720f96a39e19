"""Text with control characters in a text field: stored unchanged, drawn harmlessly.

A text field draws its document, counts its cells and splits it into lines, but a terminal obeys control characters, and Python
recognizes more line ends than newline. So each unsafe character is represented in the document by one of the last private-use
characters, which is one cell wide like the symbol drawn for it. Where a text has one of those itself, a mark precedes it.
"""

from __future__ import annotations

import re

from localrun.textsafe import visible

_FIRST = 0x10F000
_MARK = "\U0010fffd"

_UNSAFE = [
    *(code for code in range(0x20) if code not in (0x09, 0x0A)),
    *range(0x7F, 0xA0),
    *(0x061C, 0x200E, 0x200F),
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xE0000, 0xE0080),
]
"""What `textsafe.visible` replaces, halves of surrogate pairs apart: no terminal sends them."""

_SEAL = {code: chr(_FIRST + index) for index, code in enumerate(_UNSAFE)}
_UNSEAL = {_FIRST + index: chr(code) for index, code in enumerate(_UNSAFE)}
_DRAW = {
    _FIRST + index: picture if len(picture := visible(chr(code))) == 1 else "�" for index, code in enumerate(_UNSAFE)
} | {ord(_MARK): "�"}
_OURS = f"[{chr(_FIRST)}-{chr(_FIRST + len(_UNSAFE) - 1)}{_MARK}]"
_OWN = re.compile(_OURS)
_SEALED = re.compile(f"{_MARK}({_OURS})|{_OURS}")


def sealed(text: str) -> str:
    """For a document; line ends become newlines."""
    return _OWN.sub(_MARK + r"\g<0>", text.replace("\r\n", "\n")).translate(_SEAL)


def unsealed(document: str) -> str:
    """The text that was sealed."""
    return _SEALED.sub(lambda match: match[1] or match[0].translate(_UNSEAL), document)


def pictures(document: str) -> str:
    """What a terminal may see of it, character by character."""
    return document.translate(_DRAW)
