"""The line of keys: what can be pressed now, built anew only when that is something else."""

from __future__ import annotations

from textual.widgets import Footer
from textual.widgets._footer import FooterKey

from localrun.tui.widgets.key_footer import KeyFooter
from tests.tui.support import Setup, Talk


def labels(talk: Talk) -> list[str]:
    return [key.description for key in talk.screen.query(FooterKey)]


def usable(talk: Talk) -> list[str]:
    """One label for all keys of a command."""
    shown = (each.binding for each in talk.screen.active_bindings.values() if each.binding.show)
    return list({binding.action: binding.description for binding in shown}.values())


async def test_labels_stay_where_the_focus_moves_among_widgets_of_the_same_keys(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.ask("q")
        before = list(talk.screen.query(FooterKey))
        focused = talk.screen.focused
        await talk.press("f6")
        assert talk.screen.focused is not focused
        assert list(talk.screen.query(FooterKey)) == before
        await talk.press("f1", "escape")
        assert list(talk.screen.query(FooterKey)) == before


async def test_labels_are_those_of_the_keys_that_can_be_pressed(setup: Setup) -> None:
    async with setup.start() as talk:
        assert isinstance(talk.screen.query_one(Footer), KeyFooter)
        without = labels(talk)
        assert without == usable(talk)
        await talk.press("f2")  # the list has keys of its own
        await talk.until(lambda: labels(talk) == usable(talk))
        assert len(labels(talk)) > len(without)
        await talk.press("escape")
        await talk.until(lambda: labels(talk) == without)
