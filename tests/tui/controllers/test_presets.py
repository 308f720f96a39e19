"""`/preset`: saves, lists, takes and deletes; a file that is damaged is told when it is used, and not before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from localrun.errors import UsageError
from localrun.tui import presets
from localrun.tui.controllers.presets import Presets, preset_arguments
from localrun.tui.controllers.work import Invocation
from localrun.tui.options import ChatOptions


class Desk:
    """The controller between a conversation's settings and notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.options = ChatOptions()
        notices: Any = SimpleNamespace(note=self.notes.append)
        self.controller = Presets(notices, self)  # type: ignore[arg-type]

    def set_options(self, options: ChatOptions) -> None:
        self.options = options

    async def say(self, argument: str) -> str:
        await self.controller.commands()["preset"](Invocation(argument))  # type: ignore[misc]
        return self.notes[-1]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setenv("LOCALRUN_CONFIG_DIR", str(tmp_path))
    return Desk()


async def test_settings_come_back_by_their_name(desk: Desk) -> None:
    assert await desk.say("") == "No presets yet: /preset save NAME"
    desk.options = saved = replace(ChatOptions(), system="Be brief.", think="high")
    assert "saved as brief" in await desk.say("save brief")
    desk.options = ChatOptions()
    assert await desk.say("brief") == "This conversation now uses preset brief"
    assert desk.options == saved
    assert await desk.say("") == "Presets: brief"
    assert preset_arguments() == ["brief", "save ", "delete brief"]
    assert "deleted" in await desk.say("delete brief")
    assert presets.names() == []
    assert preset_arguments() == ["save "]


@pytest.mark.parametrize("argument", ["nothing", "save delete", "save a b", "save", "delete nothing"])
async def test_what_can_not_be_is_refused_and_changes_nothing(desk: Desk, argument: str) -> None:
    await desk.say("save kept")
    before = desk.options
    with pytest.raises(UsageError) as caught:
        await desk.say(argument)
    assert caught.value.hint is not None
    assert desk.options is before
    assert presets.names() == ["kept"]


async def test_a_damaged_file_is_told_when_it_is_used(desk: Desk) -> None:
    presets.path().write_text("[half")
    assert preset_arguments() == ["save "]
    with pytest.raises(UsageError, match=r"presets\.toml"):
        await desk.say("")
