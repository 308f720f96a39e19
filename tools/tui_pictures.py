"""Makes the pictures in docs/pictures: the real interface with the real engine and the demo model, without a terminal.

    python -m tools.tui_pictures [--ram 8MiB] [--out docs/pictures]

The RAM budget is below the demo model's size, so that the panel shows experts on the disk too. Fonts: the SVG names a web
font; viewers without network use their own.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from textual.widgets import Select

from localrun.api import demo
from localrun.engine.options import EngineOptions, SamplingOptions
from localrun.tui.app import Launch, LocalrunApp
from localrun.tui.chat_screen import ChatScreen
from localrun.tui.options import ChatOptions
from localrun.tui.screens.convert import ConvertScreen
from localrun.units import parse_size

QUESTIONS = ("What is the capital of France?", "Write a story about a small dog.")
CHECKPOINT, CONVERTED, RECIPE = "~/models/DeepSeek-V4-Flash", "~/models/v4-flash", "ram-64"
MAX_TOKENS = 120
PATIENCE_S = 900.0


async def until(condition: Callable[[], Any]) -> None:
    """Polls; a busy machine gets all the time it needs."""
    for _ in range(int(PATIENCE_S / 0.05)):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise TimeoutError


async def picture(
    out: Path, name: str, size: tuple[int, int], ram_bytes: int, *, panel: bool = False, dialog: bool = False
) -> None:
    """One conversation, one picture: of it, or, with `dialog`, of the dialog for conversions before it."""
    launch = Launch(
        model=demo.converted(),
        options=EngineOptions(ram_bytes=ram_bytes, n_ctx=2048),
        chat=replace(ChatOptions(), sampling=SamplingOptions(temperature=0.0, seed=1), max_tokens=MAX_TOKENS),
    )
    with tempfile.TemporaryDirectory() as folder:
        app = LocalrunApp(launch, store_path=Path(folder) / "c.sqlite3")
        async with app.run_test(size=size) as pilot:
            await until(lambda: app.chat is not None and app.chat.is_mounted and app.chat.model.facts)
            screen = app.chat
            assert screen is not None
            screen.panels.set(engine="side" if panel else "off", conversations=panel)
            for question in () if dialog else QUESTIONS:
                screen.prompt.set_text(question)
                await pilot.press("enter")
                await until(partial(is_idle, screen))
            await settle(screen, pilot)
            if dialog:
                screen.run_command("convert", f"{CHECKPOINT} {CONVERTED}")
                await until(lambda: isinstance(app.screen, ConvertScreen) and app.screen.is_mounted)
                app.screen.query_one("#recipe", Select).value = RECIPE
                await pilot.pause(0.5)
            svg = app.export_screenshot(title="localrun chat")
    # No picture may ask a server for a font.
    (out / name).write_text(re.sub(r"@font-face\s*\{[^}]*\}", "", svg))


def is_idle(screen: ChatScreen) -> bool:
    """No answer is written or waits."""
    return screen.queue.idle and not screen.asking.busy


async def settle(screen: ChatScreen, pilot: Any) -> None:
    """Lets the last counters arrive."""
    screen.model.link.ask_stats(expert_map=True)
    await asyncio.sleep(2.0)
    screen.monitor.tick_live()
    await pilot.pause(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ram", type=parse_size, default=parse_size("12MiB"))
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    asyncio.run(picture(args.out, "chat-80x24.svg", (80, 24), args.ram))
    asyncio.run(picture(args.out, "convert-80x24.svg", (80, 24), args.ram, dialog=True))
    asyncio.run(picture(args.out, "engine-160x50.svg", (160, 50), args.ram, panel=True))


if __name__ == "__main__":
    main()
