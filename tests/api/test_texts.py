"""Texts to measure on are read whole, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from localrun.api.texts import read_text
from localrun.errors import UsageError


def test_a_text_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(" ä\r\n".encode() + b"x")
    assert read_text(path) == " ä\nx"


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"ab\xff", "not UTF-8 text (invalid start byte at byte 2)"), (b" \n", "the text is empty")],
)
def test_what_is_no_text_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        read_text(path)
    assert str(caught.value) == f"{path}: {message}"


def test_what_can_t_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory"):
        read_text(tmp_path / "nothing")
    with pytest.raises(UsageError, match="Is a directory"):
        read_text(tmp_path)
