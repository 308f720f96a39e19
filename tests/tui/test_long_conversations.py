"""Thousands of messages: few of them are widgets, any place can be reached, and the view stays where it is."""

from __future__ import annotations

import gc
import os
import time

from textual.widgets import Markdown

from localrun.engine import memory
from localrun.engine.conversations import ConversationStore
from localrun.tui.widgets.chat_view import ChatView
from localrun.tui.widgets.message_view import MessageView
from tests.tui.fake_engine import text
from tests.tui.support import Setup, Talk

N_MESSAGES = 2000
MOST_WIDGETS = 60
"""Enough for several pages of the shortest messages, far from all."""

ANSWER = "Answer {n}\n\nA paragraph with some words in it.\n\n- one\n- two\n\n```py\nx = {n}\n```\n"


def fill(setup: Setup, n: int = N_MESSAGES) -> None:
    """A conversation of `n` messages, the last one opened at the start."""
    with ConversationStore.open(setup.folder / "c.sqlite3") as store:
        talk, parent = store.create("long").id, None
        with store._transaction():
            for i in range(n):
                role, content = ("assistant", ANSWER.format(n=i)) if i % 2 else ("user", f"Question {i}")
                parent = store._db.execute(
                    "INSERT INTO messages (conversation_id, parent_id, role, content, reasoning, state, created_at, details)"
                    " VALUES (?, ?, ?, ?, '', 'complete', ?, '{}')",
                    (talk, parent, role, content, time.time()),
                ).lastrowid
            store._db.execute("UPDATE conversations SET head = ? WHERE id = ?", (parent, talk))
        store.set_state("last_conversation", talk)


def in_view(chat: ChatView) -> list[int]:
    """Positions of the messages that can be seen now, top first."""
    views = [view for view in chat.query(MessageView) if view.region.overlaps(chat.region) and view.region.height]
    return sorted(chat._index[view.message_id] for view in views)


def n_mounted(chat: ChatView) -> int:
    """Messages that have a widget."""
    return len(chat.query(MessageView))


async def settled(talk: Talk, *, holds: int) -> None:
    """Until message `holds` is in view and the window does not move any more."""
    chat = talk.screen.chat
    await talk.until(lambda: holds in in_view(chat) and not chat._update_pending, f"message {holds} in view")


async def test_any_place_of_two_thousand_messages_is_reached_with_few_widgets(setup: Setup) -> None:
    fill(setup)
    async with setup.start() as talk:
        chat = talk.screen.chat
        await settled(talk, holds=N_MESSAGES - 1)
        assert n_mounted(chat) < MOST_WIDGETS
        await talk.press("ctrl+home")
        await settled(talk, holds=0)
        assert chat.scroll_y == 0
        assert n_mounted(chat) < MOST_WIDGETS
        chat.scroll_to(y=chat.max_scroll_y // 2, animate=False)
        # the scrollbar tells the truth, roughly
        await talk.until(lambda: 600 < (in_view(chat) or [0])[0] < 1400 and not chat._update_pending)
        assert n_mounted(chat) < MOST_WIDGETS
        await talk.press("ctrl+end")
        await settled(talk, holds=N_MESSAGES - 1)
        assert chat.is_vertical_scroll_end


async def test_memory_does_not_grow_with_time(setup: Setup) -> None:
    """Goes through the conversation again and again while answers come in, and counts the message views that are alive and not on
    the screen: a round makes and drops dozens of them. (All objects would count the toolkit's own caches, too, which fill up
    for the first rounds.) `LOCALRUN_SOAK=200` goes on for longer and prints memory."""
    n_rounds = int(os.environ.get("LOCALRUN_SOAK", "1"))
    fill(setup)
    async with setup.start() as talk:
        chat = talk.screen.chat
        forgotten: list[int] = []
        for number in range(2 + n_rounds):
            talk.engine.scripts.put(text(*(f"word{n} " for n in range(20)), thinking="Hm."))
            await talk.ask("go on")
            await talk.press("ctrl+home")
            await settled(talk, holds=0)
            chat.scroll_to(y=chat.max_scroll_y // 2, animate=False)
            await talk.until(lambda: 600 < (in_view(chat) or [0])[0] < 1400 and not chat._update_pending)
            await talk.press("ctrl+end")
            await settled(talk, holds=len(chat.entries) - 1)
            gc.collect()
            alive = sum(issubclass(type(thing), MessageView) for thing in gc.get_objects())
            forgotten.append(alive - n_mounted(chat))
            if n_rounds > 10 and number % 10 == 0:
                print(f"round {number}: {alive} views, {memory.resident_bytes() / 1e6:.1f} MB")
        assert forgotten[-1] <= forgotten[0], f"views that nobody shows, round by round: {forgotten}"


async def test_paging_up_skips_nothing(setup: Setup) -> None:
    fill(setup)
    async with setup.start() as talk:
        chat = talk.screen.chat
        await settled(talk, holds=N_MESSAGES - 1)
        before = in_view(chat)[0]
        for _ in range(12):
            await talk.press("pageup")
            seen: list[int] = []
            while not seen or chat._update_pending:
                await talk.until(lambda: in_view(chat))
                seen = in_view(chat)
            assert seen[-1] >= before - 1, "a page was skipped"
            assert seen[0] <= before
            assert n_mounted(chat) < MOST_WIDGETS
            before = seen[0]
        assert before < N_MESSAGES - 15


async def test_streaming_at_the_end_of_two_thousand_messages(setup: Setup) -> None:
    fill(setup)
    async with setup.start() as talk:
        talk.engine.scripts.put(text(*(f"word{n} " for n in range(300))))
        await talk.ask("go on")
        chat = talk.screen.chat
        view = chat.view(chat.entries[-1].message.id)
        assert view is not None
        await talk.until(lambda: view.query_one(Markdown).source.endswith("word299 "))
        await talk.until(lambda: chat.is_vertical_scroll_end)
        assert len(chat.entries) == N_MESSAGES + 2
        assert n_mounted(chat) < MOST_WIDGETS


async def test_reading_above_is_not_disturbed_by_an_answer_below(setup: Setup) -> None:
    fill(setup, 40)
    async with setup.start() as talk:
        chat = talk.screen.chat
        await settled(talk, holds=39)
        talk.engine.scripts.put(text(*("line\n\n" for _ in range(60))))
        await talk.type("go")
        await talk.press("pageup", "pageup", "pageup")
        await talk.until(lambda: in_view(chat) and not chat._update_pending)
        seen = in_view(chat)[0]
        await talk.idle()
        assert in_view(chat)[0] == seen


async def test_a_found_message_far_away_is_shown(setup: Setup) -> None:
    fill(setup)
    async with setup.start() as talk:
        await talk.type("/find Question 1002")
        chat = talk.screen.chat
        await talk.until(lambda: talk.screen.query(".found"))
        await settled(talk, holds=1002)
        assert in_view(chat)[0] == 1002


async def test_a_jump_survives_scrolling_that_is_not_over(setup: Setup) -> None:
    """The window is moved for the place that is left, before the layout has arrived at the new one."""
    fill(setup, 200)
    async with setup.start() as talk:
        chat = talk.screen.chat
        await settled(talk, holds=199)
        await chat.scroll_to_message(chat.entries[100].message.id)
        await chat._update_window()
        await settled(talk, holds=100)
        assert in_view(chat)[0] == 100


async def test_messages_keep_their_place_when_the_width_changes(setup: Setup) -> None:
    fill(setup, 200)
    async with setup.start() as talk:
        chat = talk.screen.chat
        await chat.scroll_to_message(chat.entries[100].message.id)
        await settled(talk, holds=100)
        await talk.pilot.resize_terminal(100, 40)
        await settled(talk, holds=100)
        assert in_view(chat)[0] == 100
