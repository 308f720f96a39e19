"""Makes foreign text safe to print on a terminal: what a model writes, file names, error messages of other programs.

A terminal obeys control characters, so a model's answer could retitle the window, fill the clipboard, or hide and
rewrite what stands on the screen. Control characters are shown as visible stand-ins instead of being dropped, because
somebody who looks at a file with an escape sequence in it should see that it is there.

Works character by character, so a text may be cut into any chunks (with the exception of CR LF, which is one line end
when it comes in one piece).
"""

from __future__ import annotations

import re

# Everything below blank but tab and newline, DEL and C1, both line separators, characters that reorder the text around
# them (bidirectional controls), halves of surrogate pairs (undecodable bytes of file names), and invisible tag letters.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)
_UNSAFE_IN_LINE = re.compile(_UNSAFE.pattern + "|[\t\n]")


def visible(text: str) -> str:
    """`text` with its control characters replaced by pictures of them; tabs and newlines stay.

    >>> visible("\\x1b[31mred")
    '␛[31mred'
    """
    return _UNSAFE.sub(_picture, text.replace("\r\n", "\n"))


def visible_line(text: str, *, max_chars: int = 0) -> str:
    """As `visible`, in one line: tabs become blanks, newlines `⏎`.

    Args:
        max_chars: longer texts are cut and end in `…`; 0: no bound.
    """
    line = _UNSAFE_IN_LINE.sub(_picture_in_line, text.replace("\r\n", "\n"))
    if max_chars and len(line) > max_chars:
        return line[: max_chars - 1].rstrip() + "…"
    return line


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was no UTF-8 (PEP 383)
        return f"<{code - 0xDC00:02x}>"
    return f"<{code:02x}>" if code < 0x100 else f"<U+{code:04X}>"


def _picture_in_line(match: re.Match[str]) -> str:
    return {"\t": " ", "\n": "⏎"}.get(match[0]) or _picture(match)
