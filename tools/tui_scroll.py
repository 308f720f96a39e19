"""Measures whether the interface lags in a long conversation: time from a key, or a piece of an answer, to the finished screen.

    python -m tools.tui_scroll [--messages 20 2000] [--keys 200] [--pieces 200] [--json]

Drives the real interface without a terminal (the bytes that one would get are made, and dropped) and with a scripted engine,
so that nothing but the interface is measured. A key's screen is finished with the first painting of what the conversation then
stays at, which includes messages that had to be made first. A key comes when all is done for the one before; pieces come 30
times a second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from textual._compositor import CompositorUpdate
from textual.pilot import Pilot

from localrun.engine.conversations import ConversationStore
from localrun.engine.process.process import GenerateEvent
from localrun.engine.process.protocol import Delta, Generate
from localrun.tui import app as app_module
from localrun.tui.app import Launch, LocalrunApp
from localrun.tui.widgets.chat_view import ChatView
from tests.tui.fake_engine import FakeEngine, finished

SIZE = (120, 40)
PIECES_PER_S = 30.0
QUIET_S = 0.05
PATIENCE_S = 60.0
QUESTION = "Question {n}: what follows from it?"
ANSWER = "Answer {n}\n\nA paragraph with some words in it, **bold** ones too.\n\n- one\n- two\n\n```py\nx = {n}\n```\n"


class TimedApp(LocalrunApp):
    """The interface; keeps what the conversation showed at each painting, and when the painting was done."""

    CSS_PATH = str(Path(app_module.__file__).with_name("localrun.tcss"))  # relative ones count from a class's own file

    paintings: list[tuple[float, str]]

    def _display(self, screen: Any, renderable: Any) -> None:
        super()._display(screen, renderable)
        if isinstance(renderable, CompositorUpdate):
            renderable.render_segments(self.console)
        done = time.perf_counter()
        if self.chat is not None and self.chat.is_mounted:
            self.paintings.append((done, visible(self.chat.chat)))


def visible(chat: ChatView) -> str:
    """The conversation's part of the screen, as text."""
    x, y, width, height = chat.scrollable_content_region
    return "\n".join(strip.crop(x, x + width).text for strip in chat.screen._compositor.render_strips()[y : y + height])


def fill(path: Path, n_messages: int) -> None:
    """One conversation of alternating questions and answers, the one that is opened at the start."""
    with ConversationStore.open(path) as store:
        talk, parent = store.create("long").id, None
        for n in range(n_messages):
            role, text = ("assistant", ANSWER) if n % 2 else ("user", QUESTION)
            parent = store.add(talk, parent, role, text.format(n=n)).id  # type: ignore[arg-type]
        store.set_state("last_conversation", talk)


async def until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the interface is not done")
        await asyncio.sleep(0.005)


async def settle(app: TimedApp, chat: ChatView) -> None:
    """Until nothing waits to be done and nothing was painted for a while."""
    begin = time.perf_counter()
    await until(
        lambda: (
            not (chat._update_pending or chat.lock.is_locked)
            and time.perf_counter() - max(begin, app.paintings[-1][0] if app.paintings else 0) > QUIET_S
        )
    )


async def key_times(app: TimedApp, pilot: Pilot[None], chat: ChatView, key: str) -> tuple[float, float]:
    """Seconds from a key to the first painting that shows something else, and to the one that shows what stays."""
    app.paintings.clear()
    before, start = visible(chat), time.perf_counter()
    await pilot.press(key)
    await settle(app, chat)
    final = visible(chat)
    first = next(done for done, shown in app.paintings if shown != before)
    return first - start, next(done for done, shown in app.paintings if shown == final) - start


async def page_times(app: TimedApp, pilot: Pilot[None], chat: ChatView, n_keys: int) -> list[tuple[float, float]]:
    """Page after page, up to the beginning, down to the end, and so on."""
    times: list[tuple[float, float]] = []
    key = "pageup"
    while len(times) < n_keys:
        if chat.scroll_y <= 0:
            key = "pagedown"
        elif chat.scroll_y >= chat.max_scroll_y:
            key = "pageup"
        times.append(await key_times(app, pilot, chat, key))
    return times


async def jump_times(app: TimedApp, pilot: Pilot[None], chat: ChatView, n_keys: int) -> list[tuple[float, float]]:
    """From one end to the other."""
    times: list[tuple[float, float]] = []
    for number in range(n_keys):
        times.append(await key_times(app, pilot, chat, "ctrl+end" if number % 2 else "ctrl+home"))
    return times


async def piece_times(app: TimedApp, pilot: Pilot[None], engine: FakeEngine, chat: ChatView, n: int) -> list[float]:
    """An answer at the end: from each piece's arrival to the painting that shows it."""
    sent: list[float] = []

    def script(engine: FakeEngine, command: Generate) -> Iterator[GenerateEvent]:
        for number in range(n):
            time.sleep(1 / PIECES_PER_S)
            sent.append(time.perf_counter())
            yield Delta(request=1, kind="text", text=f"w{number:04d} " + "\n\n" * (number % 40 == 39), tokens=(number,))
        yield finished("eos", n)

    assert app.chat is not None
    engine.scripts.put(script)
    app.paintings.clear()
    app.chat.prompt.set_text("go on")
    await pilot.press("enter")
    await until(lambda: len(sent) == n and app.chat is not None and not app.chat.asking.answering.running)
    await settle(app, chat)
    latest = [(done, max(map(int, re.findall(r"\bw(\d{4})\b", shown)), default=-1)) for done, shown in app.paintings]
    return [next(done for done, last in latest if last >= number) - at for number, at in enumerate(sent)]


async def measure(n_messages: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All times of a conversation of so many messages, in ms."""
    engines: list[FakeEngine] = []

    def factory(on_death: Any) -> FakeEngine:
        engines.append(FakeEngine(on_death))
        return engines[-1]

    with tempfile.TemporaryDirectory(prefix="tui-scroll-") as folder:
        for name in ("DATA", "CACHE", "CONFIG"):
            os.environ[f"LOCALRUN_{name}_DIR"] = folder
        store = Path(folder) / "c.sqlite3"
        fill(store, n_messages)
        app = TimedApp(Launch(model=Path("/models/scripted")), engine_factory=factory, store_path=store)
        app.paintings = []
        async with app.run_test(size=SIZE) as pilot:
            await until(lambda: app.chat is not None and app.chat.is_mounted and app.chat.model.facts)
            assert app.chat is not None
            chat = app.chat.chat
            await until(lambda: chat.is_vertical_scroll_end and chat.max_scroll_y > 0)
            await settle(app, chat)
            await jump_times(app, pilot, chat, 2)  # fills the toolkit's caches
            pages = await page_times(app, pilot, chat, args.keys)
            jumps = await jump_times(app, pilot, chat, args.keys // 10 * 2)
            return {
                "page, first change": summary([first for first, _ in pages]),
                "page, finished": summary([final for _, final in pages]),
                "jump, first change": summary([first for first, _ in jumps]),
                "jump, finished": summary([final for _, final in jumps]),
                "piece": summary(await piece_times(app, pilot, engines[0], chat, args.pieces)),
            }


def summary(times: list[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum, in ms."""
    ordered = sorted(1000 * t for t in times)
    return {
        "n": len(ordered),
        "median": statistics.median(ordered),
        "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "max": ordered[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, nargs="+", default=[20, 2000])
    parser.add_argument("--keys", type=int, default=200)
    parser.add_argument("--pieces", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = {n: asyncio.run(measure(n, args)) for n in args.messages}
    if args.json:
        print(json.dumps(results, indent=1))
        return
    for n, result in results.items():
        for what, of in result.items():
            print(
                f"{n:6} messages, {what:18}: median {of['median']:.0f} ms, p95 {of['p95']:.0f}, max {of['max']:.0f} ({of['n']})"
            )


if __name__ == "__main__":
    main()
