"""Commands for messages before there are any, and for those that have nothing to offer."""

from __future__ import annotations

import pytest

from localrun.errors import UsageError
from localrun.tui.controllers.versions import Versions
from localrun.tui.controllers.work import Invocation
from tests.tui.fake_engine import text
from tests.tui.support import Setup, Talk

CODE = "Look:\n\n```py\none = 1\n```\n\n```sh\nls\ndf\n```\n"


async def run(talk: Talk, name: str, argument: str = "") -> None:
    versions = talk.screen.versions
    assert isinstance(versions, Versions)
    work = versions.commands()[name](Invocation(argument))
    if work is not None:
        await work


NOTHING = {
    "regenerate": "nothing to answer",
    "edit": "no message to edit",
    "fork": "nothing to branch from",
    "previous_branch": "no message has another version",
    "undo": "nothing to take back",
    "copy": "nothing to copy",
    "copy_code": "no code block",
}


async def test_an_empty_conversation_has_nothing_for_them(setup: Setup) -> None:
    async with setup.start() as talk:
        for name, says in NOTHING.items():
            with pytest.raises(UsageError, match=says):
                await run(talk, name)


async def test_code_blocks_are_copied_by_their_number(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(text(CODE))
        await talk.ask("code?")
        await run(talk, "copy_code")
        assert talk.clipboard == "ls\ndf"
        await run(talk, "copy_code", "1")
        assert talk.clipboard == "one = 1"
        await run(talk, "copy")
        assert talk.clipboard.strip() == CODE.strip()
        for wrong in ("0", "3", "x", "-1"):
            with pytest.raises(UsageError, match=f"no code block {wrong}") as caught:
                await run(talk, "copy_code", wrong)
            assert caught.value.hint == "1 to 2"


async def test_taking_back_puts_the_question_into_the_input(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.ask("first")
        await talk.ask("second")
        await run(talk, "undo")
        await talk.settled()
        assert [content for role, content in talk.shown if role == "user"] == ["first"]
        assert talk.screen.prompt.text == "second"
