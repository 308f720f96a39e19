"""The command for presets: named settings for the open conversation."""

from __future__ import annotations

import asyncio

from localrun.errors import UsageError
from localrun.tui import presets
from localrun.tui.controllers.conversation import OpenConversation
from localrun.tui.controllers.notices import Notices
from localrun.tui.controllers.work import Handler, Invocation


def preset_arguments() -> list[str]:
    """Completions for `/preset`; an invalid file is only reported when the command is used."""
    try:
        known = presets.names()
    except UsageError:
        known = []
    return [*known, "save ", *(f"delete {name}" for name in known)]


class Presets:
    """Takes and keeps presets; owns nothing, the file is read at every use."""

    def __init__(self, notices: Notices, current: OpenConversation) -> None:
        self._notices, self._current = notices, current

    def commands(self) -> dict[str, Handler]:
        return {"preset": self._preset}

    async def _preset(self, call: Invocation) -> None:
        verb, _, name = call.argument.partition(" ")
        name = name.strip()
        if not verb:
            known = await asyncio.to_thread(presets.names)
            self._notices.note(f"Presets: {', '.join(known)}" if known else "No presets yet: /preset save NAME")
        elif verb == "save":
            await asyncio.to_thread(presets.save, name, self._current.options)
            self._notices.note(f"System prompt, sampling and thinking saved as {name}: /preset {name}")
        elif verb == "delete":
            await asyncio.to_thread(presets.delete, name)
            self._notices.note(f"Preset {name} deleted; conversations that use it are unchanged")
        else:
            self._current.set_options(await asyncio.to_thread(presets.load, call.argument))
            self._notices.note(f"This conversation now uses preset {call.argument}")
