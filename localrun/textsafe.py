"""Makes untrusted text safe to print on a terminal: model output, file names, error messages of other programs.

A terminal obeys control characters, so a model's answer could retitle the window, fill the clipboard, or hide and
rewrite what is on the screen. Control characters are replaced by visible symbols instead of being dropped, so that an escape
sequence in a file can be seen.

Works character by character, so text may be split into chunks anywhere (except within CR LF, which is one line ending only
within a chunk).
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
    """`text` with control characters replaced by visible symbols; tabs and newlines stay.

    >>> visible("\\x1b[31mred")
    '␛[31mred'
    """
    return _UNSAFE.sub(_picture, text.replace("\r\n", "\n"))


def visible_line(text: str, *, max_chars: int = 0) -> str:
    """Like `visible`, on one line: tabs become spaces, newlines `⏎`.

    Args:
        max_chars: longer text is truncated with `…`; 0: no limit.
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
