"""Panels beside the chat, or instead of it where there is no room."""

from __future__ import annotations

from localrun.tui.controllers.panels import ENGINE_COLUMNS, WIDE_COLUMNS
from localrun.tui.widgets.conversation_list import ConversationList
from localrun.tui.widgets.engine_panel import EnginePanel
from tests.tui.support import Setup, Talk


def shown(talk: Talk) -> tuple[bool, bool]:
    """Whether the list and the engine's panel are on the screen."""
    return bool(talk.screen.query_one(ConversationList).display), bool(talk.screen.query_one(EnginePanel).display)


async def test_a_narrow_screen_shows_one_panel_at_a_time(setup: Setup) -> None:
    setup.size = (WIDE_COLUMNS - 1, 30)
    async with setup.start() as talk:
        panels = talk.screen.panels
        assert panels.narrow
        assert (panels.engine, shown(talk)) == ("off", (False, False))
        await talk.press("f2")
        assert shown(talk) == (True, False)
        await talk.press("f3")
        assert (panels.engine, shown(talk)) == ("full", (False, True))
        assert panels.close_one()
        assert (panels.engine, shown(talk)) == ("off", (False, False))
        assert not panels.close_one()


async def test_a_wide_screen_shows_both_and_the_engine_grows(setup: Setup) -> None:
    setup.size = (WIDE_COLUMNS, 30)
    async with setup.start() as talk:
        panels = talk.screen.panels
        assert (panels.narrow, panels.engine) == (False, "off")
        await talk.press("f2")
        for state in ("side", "full", "off", "side", "full"):
            await talk.press("f3")
            assert (panels.engine, shown(talk)) == (state, (True, state != "off"))
        panels.uncover_input()
        assert panels.engine == "side"
        await talk.pilot.resize_terminal(WIDE_COLUMNS - 1, 30)
        await talk.until(lambda: shown(talk) == (False, False), "what no longer fits closes")
        await talk.pilot.resize_terminal(WIDE_COLUMNS + 5, 30)
        await talk.settled()
        assert shown(talk) == (False, False), "and stays so"


async def test_a_very_wide_screen_begins_with_the_engine(setup: Setup) -> None:
    setup.size = (ENGINE_COLUMNS, 30)
    async with setup.start() as talk:
        assert talk.screen.panels.engine == "side"
        assert shown(talk) == (False, True)
