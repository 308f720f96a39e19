"""What a conversion remembers when it is killed, and what it refuses to go on with."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from localrun.errors import DiskSpaceError, FormatError, LocalrunError, UsageError
from localrun.quant.convert.journal import Journal, PartResult, describe_changes
from localrun.quant.formats.transcode import Loss

OPTIONS = {"base": "mxfp4", "tiers": "q8_0:1"}
FACTS = {"source": "/a", "identity": "i", "plan": "p"}
FIRST = PartResult("0123456789abcdef", "w" * 16, "", None)
SECOND = PartResult("fedcba9876543210", "v" * 16, "s" * 16, Loss(0.25, 4.0))


def journal(folder: Path, options: Mapping[str, str] = OPTIONS, facts: Mapping[str, str] = FACTS) -> Journal:
    return Journal(folder, options, facts)


def test_finished_parts_are_found_again(tmp_path: Path) -> None:
    first = journal(tmp_path)
    assert first.done == {}
    first.append([(3, FIRST)])
    first.append([(1, SECOND)])
    first.close()
    again = journal(tmp_path)
    assert again.done == {3: FIRST, 1: SECOND}
    again.close()


@pytest.mark.parametrize(
    "end", ['[2, "0123456789abcdef", "w", ""', "[2, 1, 2, 3, []]\n", '[2, "short", "w", "", []]\n', "{}\n", "\xff\n"]
)
def test_what_was_not_written_to_its_end_is_cut_off(tmp_path: Path, end: str) -> None:
    first = journal(tmp_path)
    first.append([(0, FIRST)])
    first.close()
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + end.encode("latin-1") + b'[9, "0123456789abcdef", "w", "", []]\n')
    again = journal(tmp_path)
    assert again.done == {0: FIRST}
    assert path.read_bytes() == whole
    again.append([(2, SECOND)])
    again.close()
    last = journal(tmp_path)
    assert last.done == {0: FIRST, 2: SECOND}
    last.close()


def test_a_full_drive_is_named_and_what_was_half_written_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = journal(tmp_path)
    first.append([(0, FIRST)])

    writes = [20]

    def full(fd: int, data: bytes) -> int:
        if not writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.pwrite(fd, data[: writes.pop()], os.lseek(fd, 0, os.SEEK_END))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(DiskSpaceError, match=r"journal\.jsonl: No space left on device") as caught:
            first.append([(1, SECOND)])
    assert "same command again" in str(caught.value.hint)
    first.close()
    again = journal(tmp_path)
    assert again.done == {0: FIRST}
    again.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = journal(tmp_path)
    with pytest.raises(LocalrunError, match="another conversion is writing here"):
        journal(tmp_path)
    first.close()
    journal(tmp_path).close()


@pytest.mark.parametrize(
    ("options", "facts", "message"),
    [
        ({"base": "q2_k"}, {}, "--base was mxfp4 and is now q2_k"),
        ({"tiers": "q8_0:2"}, {}, "--hot or --target was q8_0:1 and is now q8_0:2"),
        ({"dense": "bf16"}, {}, "--dense was not given and is now bf16"),
        ({}, {"identity": "j"}, "the files of the source have changed"),
        ({}, {"identity": "j", "source": "/b"}, "the source was /a and is now /b"),
        ({}, {"plan": "q"}, "the name, tokenizer or chat template of the source has changed, or localrun was updated"),
        ({"base": "q2_k"}, {"plan": "q"}, "--base was mxfp4 and is now q2_k"),
    ],
)
def test_something_else_is_not_resumed(
    tmp_path: Path, options: dict[str, str], facts: dict[str, str], message: str
) -> None:
    journal(tmp_path).close()
    with pytest.raises(UsageError) as caught:
        journal(tmp_path, OPTIONS | options, FACTS | facts)
    assert str(caught.value) == f"{tmp_path}: an unfinished conversion can't be resumed: {message}"
    journal(tmp_path).close()  # and the lock is free again


def test_an_option_that_is_missing_now_is_named() -> None:
    before = {"options": OPTIONS, **FACTS}
    assert describe_changes(before, {"options": {"base": "mxfp4"}, **FACTS}) == [
        "--hot or --target was q8_0:1 and is now not given"
    ]
    assert describe_changes(before, {"options": dict(OPTIONS), **FACTS, "source": "/moved"}) == []


def test_a_damaged_or_foreign_state_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    state.write_text("{")
    with pytest.raises(FormatError, match=r"state\.json: damaged"):
        journal(tmp_path)
    state.write_text('{"version": 0}')
    with pytest.raises(UsageError, match="it was started by another version of localrun"):
        journal(tmp_path)
