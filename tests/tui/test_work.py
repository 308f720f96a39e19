"""Commands that take time are done one after the other; the conversations file is awaited without blocking."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, cast

import pytest

from localrun.engine.conversations import ConversationError, ConversationStore, StoreThread
from localrun.errors import LocalrunError, UsageError
from localrun.tui.controllers import records
from localrun.tui.controllers.records import GoneError, Records
from localrun.tui.controllers.work import WorkQueue
from localrun.tui.faults import as_ours


async def test_work_is_done_in_order_and_none_finds_another_half_done() -> None:
    done: list[str] = []
    failures: list[str] = []

    async def guard(work: Awaitable[None]) -> None:
        try:
            await work
        except ValueError as error:
            failures.append(str(error))

    async def work(name: str) -> None:
        done.append(f"{name} begins")
        await asyncio.sleep(0)
        if name == "b":
            raise ValueError(name)
        done.append(f"{name} ends")

    queue = WorkQueue(guard)
    assert queue.idle
    for name in "abc":
        queue.add(work(name))
    assert not queue.idle
    runner = asyncio.create_task(queue.run())
    while not queue.idle:
        await asyncio.sleep(0)
    assert done == ["a begins", "a ends", "b begins", "c begins", "c ends"]
    assert failures == ["b"]
    runner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await runner


async def test_a_queue_that_ends_closes_what_waits() -> None:
    async def guard(work: Awaitable[None]) -> None:
        await work

    async def never() -> None:
        raise AssertionError("begun")

    held = asyncio.Event()
    queue, waiting = WorkQueue(guard), never()
    queue.add(cast("Any", held.wait()))
    queue.add(waiting)
    runner = asyncio.create_task(queue.run())
    await asyncio.sleep(0)
    runner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await runner
    assert queue.idle
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        await waiting


def test_an_unexpected_error_is_shown_with_its_place() -> None:
    own = UsageError("no")
    assert as_ours(own) is own
    try:
        raise KeyError("x")
    except KeyError as error:
        ours = as_ours(error)
    assert str(ours) == "unexpected KeyError: 'x'"
    assert ours.hint == "please report this, including the details"
    assert "test_an_unexpected_error_is_shown_with_its_place" in ours.__notes__[0]


async def test_the_store_is_awaited_and_what_is_gone_has_a_name(tmp_path: Path) -> None:
    work = Records(StoreThread(lambda: ConversationStore.open(tmp_path / "c.sqlite3")))
    with pytest.raises(ConversationError, match="the conversations are not open"):
        await work(ConversationStore.conversations)
    assert await work.open() == tmp_path / "c.sqlite3"
    talk = await work(lambda store: store.create("one"))
    assert [found.id for found in await work(ConversationStore.conversations)] == [talk.id]
    with pytest.raises(GoneError) as caught:
        await work(lambda store: store.conversation(talk.id + 1))
    assert caught.value.hint == "it was deleted, perhaps by another localrun"
    assert [hit.title for hit in work.search("one")] == ["one"]
    assert work.close(300)


async def test_errors_of_what_nobody_waits_for_arrive_on_the_loop(tmp_path: Path) -> None:
    work, failures, arrived = Records(StoreThread(lambda: ConversationStore.open(tmp_path / "c"))), [], asyncio.Event()

    def failed(error: LocalrunError) -> None:
        failures.append((str(error), threading.current_thread()))
        arrived.set()

    await work.open()
    work.post(lambda store: store.conversation(99), failed)  # gone: nobody's loss
    work.post(lambda store: 1 // 0, failed)
    await asyncio.wait_for(arrived.wait(), 300)
    assert [text.partition(":")[0] for text, _ in failures] == ["unexpected ZeroDivisionError"]
    assert failures[0][1] is threading.current_thread()
    assert work.close(300)


async def test_a_file_that_keeps_us_waiting_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, slow = [], threading.Event()
    work = Records(StoreThread(lambda: ConversationStore.open(tmp_path / "c")), lambda: (told.append(1), slow.set()))
    monkeypatch.setattr(records, "SLOW_S", 300.0)
    await work.open()
    await work(lambda store: None)
    assert told == []
    monkeypatch.setattr(records, "SLOW_S", 0.0)
    assert await work(lambda store: slow.wait(300))
    assert told == [1]
    assert work.close(300)
