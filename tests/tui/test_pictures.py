"""A few whole screens as text, compared with files. `LOCALRUN_UPDATE_PICTURES=1` writes them anew; look at the difference."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from textual.widgets import Static

from localrun.errors import ContextFullError
from localrun.tui.screens.dialog import ChoiceDialog
from tests.tui.fake_engine import FakeEngine, failing, text
from tests.tui.support import PATIENCE_S, Setup, Talk

FOLDER = Path(__file__).parent / "pictures"

ANSWER = """## Greatest common divisor

Euclid's **algorithm** takes `a % b` until nothing is left:

```python
def gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a
```

1. it ends
   - because `b` shrinks
2. it is fast

| a | b | gcd |
|---|---|---|
| 12 | 18 | 6 |
"""


def picture(talk: Talk) -> str:
    """The screen as text, times of day blanked out."""
    lines = [strip.text.rstrip() for strip in talk.app.screen._compositor.render_strips()]
    return re.sub(r"\b\d\d:\d\d\b", "HH:MM", "\n".join(lines)) + "\n"


async def repainted(talk: Talk) -> str:
    """The screen after its counters were brought up to date.

    Textual paints up to a sixtieth of a second later, and a dialog keeps its copy of the screen behind it until it is painted
    itself: what is on view at one moment depends on the machine's speed.
    """
    talk.screen.monitor.tick_live()
    talk.app.screen.refresh()
    await talk.pilot.pause(0.02)
    return picture(talk)


async def conversation(talk: Talk) -> None:
    talk.engine.scripts.put(text(ANSWER, thinking="Something short."))
    talk.screen.chat.styles.scrollbar_size_vertical = 0
    await talk.ask("Write gcd in Python")


async def engine_panel(talk: Talk) -> None:
    await talk.ask("q")
    await talk.press("f3")
    await talk.until(lambda: "· disk" in str(talk.screen.query_one("#map-legend", Static).render()))


async def error(talk: Talk) -> None:
    talk.engine.scripts.put(failing(ContextFullError("9,000 tokens don't fit into a context of 4,096")))
    await talk.ask("one")
    await talk.until(lambda: isinstance(talk.app.screen, ChoiceDialog))


async def slash(talk: Talk) -> None:
    await talk.press("/", "e")


def prepare(engine: FakeEngine) -> None:
    engine.telemetry = {"hits": 90, "misses": 10, "tokens": 30, "bytes_read": 10 << 20, "total_s": 2.0, "wait_s": 0.5}
    row = {"types": ["IQ2_XXS"], "heat": [round(1.6**n) for n in range(16)]}
    engine.experts = {
        "n_experts": 16,
        "layers": [{"layer": n, "where": "d" * (10 - n) + "l" + "r" * (n + 3) + "gg", **row} for n in range(3)],
    }


@pytest.mark.parametrize(
    ("name", "size", "act"),
    [
        ("conversation", (80, 24), conversation),
        ("engine_panel", (80, 24), engine_panel),
        ("context_full", (80, 24), error),
        ("slash_commands", (60, 16), slash),
    ],
)
async def test_screen(setup: Setup, name: str, size: tuple[int, int], act: Callable[[Talk], Awaitable[None]]) -> None:
    setup.size, setup.prepare = size, prepare
    async with setup.start() as talk:
        await act(talk)
        await talk.until(lambda: talk.screen.monitor.last_stats)
        path = FOLDER / f"{name}.txt"
        if os.environ.get("LOCALRUN_UPDATE_PICTURES"):
            await asyncio.sleep(1)
            FOLDER.mkdir(exist_ok=True)
            path.write_text(await repainted(talk))
        expected, end = path.read_text(), time.monotonic() + PATIENCE_S
        while (shown := await repainted(talk)) != expected and time.monotonic() < end:
            pass
    assert shown == expected
