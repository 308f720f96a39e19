"""The store on its thread: order, errors, an end; and what search shows of a message."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from localrun.engine.conversations import ConversationError, ConversationStore
from localrun.engine.conversations.background import StoreThread
from localrun.engine.conversations.records import Attachment, details_json, storable
from localrun.engine.conversations.search import _snippet


@pytest.fixture
def thread(tmp_path: Path) -> Iterator[StoreThread]:
    thread = StoreThread(lambda: ConversationStore.open(tmp_path / "c.sqlite3"))
    yield thread
    thread.close(300)


def test_work_is_done_in_order_on_one_thread(thread: StoreThread) -> None:
    thread.open()
    order: list[int] = []
    futures = [
        thread.submit(lambda store, n=n: order.append(n) or threading.current_thread().name)  # type: ignore[misc]
        for n in range(5)
    ]
    assert {future.result(300) for future in futures} == {"conversations"}
    assert order == [0, 1, 2, 3, 4]


def test_a_store_that_is_not_open_says_so_and_can_be_opened_later(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    attempts = 0

    def open_store() -> ConversationStore:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise ConversationError("the drive is gone")
        return ConversationStore.open(folder / "c")

    thread = StoreThread(open_store)
    with pytest.raises(ConversationError, match="are not open"):
        thread.submit(ConversationStore.conversations).result(300)
    with pytest.raises(ConversationError, match="the drive is gone"):
        thread.open().result(300)
    assert thread.open().result(300) == thread.open().result(300) == folder / "c"
    assert attempts == 2
    assert thread.close(300)


def test_a_failure_ends_its_own_work_only(thread: StoreThread) -> None:
    thread.open()
    with pytest.raises(SystemExit):
        thread.submit(lambda store: exec("raise SystemExit")).result(300)
    assert thread.submit(ConversationStore.conversations).result(300) == []


def test_who_gave_up_waiting_has_the_change_all_the_same(thread: StoreThread) -> None:
    thread.open()
    held = threading.Event()
    thread.submit(lambda store: held.wait(300))
    change = thread.submit(lambda store: store.create("kept"))
    assert change.cancel()
    held.set()
    assert [talk.title for talk in thread.submit(ConversationStore.conversations).result(300)] == ["kept"]


def test_closing_does_what_was_handed_over_first_and_waits_no_longer_than_asked(tmp_path: Path) -> None:
    thread = StoreThread(lambda: ConversationStore.open(tmp_path / "c"))
    thread.open()
    held = threading.Event()
    thread.submit(lambda store: held.wait(300))
    change = thread.submit(lambda store: store.create("kept").title)
    assert not thread.close(0.0)
    held.set()
    assert change.result(300) == "kept"
    thread._thread.join(300)
    assert not thread._thread.is_alive()


@pytest.mark.parametrize(
    ("words", "texts", "snippet"),
    [
        (["two"], ["one\n  two\tthree"], "one two three"),
        (["two", "one"], ["", "one two"], "one two"),
        (["needle"], ["x" * 100 + "NEEDLE" + "y" * 200], "…" + "x" * 40 + "NEEDLE" + "y" * 74 + "…"),
        (["elsewhere"], ["a b " * 100], ("a b " * 100)[:120]),
    ],
)
def test_one_line_around_the_first_word(words: list[str], texts: list[str], snippet: str) -> None:
    assert _snippet(words, *texts) == snippet


def test_halves_of_characters_and_attachments_can_be_stored() -> None:
    assert storable("a\ud83d b") == "a? b"
    assert storable("ä") == "ä"
    assert details_json({"x": 1}, []) == '{"x": 1}'
    assert details_json({}, [Attachment("n", "t", 3)]) == '{"attachments": [{"name": "n", "text": "t", "n_tokens": 3}]}'
