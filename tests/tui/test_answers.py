"""Asking: what the engine sends appears, is saved as it comes, and can be stopped, repeated, edited and branched."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

from textual.widgets import Button, Markdown, Static

from localrun.engine.conversations import Attachment, ConversationStore
from localrun.engine.process.process import GenerateEvent
from localrun.engine.process.protocol import Delta, Generate, PromptProgress, ToolCall
from localrun.errors import BudgetError, ContextFullError, DecodeError
from localrun.tui.controllers.answering import _progress_line
from localrun.tui.screens.dialog import ChoiceDialog
from localrun.tui.screens.models import ModelChosen, ModelsScreen
from localrun.tui.widgets.message_view import MessageView
from localrun.tui.widgets.notices import ErrorPanel
from localrun.tui.widgets.thinking import ThinkingBlock
from tests.gguf_models import write_deepseek4
from tests.tui.fake_engine import FakeEngine, failing, finished, held, text
from tests.tui.support import Setup, Talk


def last_view(talk: Talk) -> MessageView:
    view = talk.screen.chat.view(talk.screen.chat.entries[-1].message.id)
    assert view is not None
    return view


async def test_a_question_is_answered_and_both_are_saved(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.ask("Hello there")
        assert talk.shown == [("user", "Hello there"), ("assistant", "You said: Hello there")]
        assert last_view(talk).query_one(Markdown).source == "You said: Hello there"
        assert talk.screen.prompt.text == ""
        assert talk.screen.current.title == "Hello there"
        await talk.ask("And again")
        roles = [m["role"] for m in talk.engine.commands[-1].messages]
        assert roles == ["user", "assistant", "user"]
    with ConversationStore.open(setup.folder / "c.sqlite3") as store:
        (conversation,) = store.conversations()
        messages = store.branch(conversation.id)
    assert [m.state for m in messages] == ["complete"] * 4
    assert messages[1].details["timings"]["new_tokens"] == 1
    assert messages[1].details["seed"] == 7


async def test_the_answer_is_on_screen_and_on_disk_while_it_is_written(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(held("one ", "two ", "three"))
        await talk.type("count")
        await talk.until(lambda: "three" in last_view(talk).query_one(Markdown).source)
        assert talk.screen.asking.answering.running
        with ConversationStore.open(setup.folder / "c.sqlite3") as other:
            question, answer = other.branch(other.conversations()[0].id)
            assert question.content == "count"
            assert answer.state == "writing"
        await talk.press("escape")
        await talk.idle()
        assert talk.screen.chat.entries[-1].message.state == "stopped"
        assert talk.shown[-1] == ("assistant", "one two three")


async def test_a_crash_of_the_interface_keeps_what_was_written(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(held("partial"))
        await talk.type("question")
        await talk.until(lambda: talk.screen.asking.answering.answer and talk.screen.asking.answering.answer.text)
        talk.screen.asking.answering.save()  # as it does every second
    async with setup.start() as talk:
        assert talk.shown == [("user", "question"), ("assistant", "partial")]
        assert talk.screen.chat.entries[-1].message.state == "writing"
        assert "not finished" in str(last_view(talk).query_one(".message-ending", Static).render())


async def test_thinking_has_its_own_block_with_its_time_and_folds(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(text("The answer", thinking="First this.\nThen that."))
        await talk.ask("why")
        block = last_view(talk).query_one(ThinkingBlock)
        assert block.display
        assert "Thought for" in str(block.query_one("ThinkingHeader", Static).render())
        body = block.query_one("#thinking-text", Static)
        assert not body.display
        await talk.press("f6", "enter")
        assert body.display
        assert "Then that." in str(body.render())
        await talk.press("enter")
        assert not body.display
        await talk.click("ThinkingHeader")
        await talk.until(lambda: body.display)
        # the next question does not lose the reasoning
        await talk.ask("next")
        assert talk.engine.commands[-1].messages[1]["reasoning_content"] == "First this.\nThen that."


async def test_thinking_is_shown_while_it_is_written(setup: Setup) -> None:
    def script(engine: FakeEngine, command: Generate) -> Iterator[GenerateEvent]:
        yield Delta(request=1, kind="thinking", text="\n".join(f"step {n}" for n in range(30)), tokens=(1,))
        engine.stopped.wait(300)
        yield finished("stopped", 1)

    async with setup.start() as talk:
        talk.engine.scripts.put(script)
        await talk.type("think")
        await talk.until(lambda: last_view(talk).query_one("#thinking-text").display)
        shown = str(last_view(talk).query_one("#thinking-text", Static).render())
        assert "step 29" in shown
        assert "step 3\n" not in shown
        await talk.press("escape")
        await talk.idle()
        assert not last_view(talk).query_one("#thinking-text").display


async def test_terminal_escapes_of_a_model_become_visible_and_html_is_not_dropped(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(text("red \x1b[31m and \x9b2J", "\n\n<div>box</div>\n"))
        await talk.ask("attack")
        source = last_view(talk).query_one(Markdown).source
        assert "\x1b" not in source
        assert "␛[31m" in source
        await talk.until(
            lambda: "<div>box</div>" in talk.app.export_screenshot().replace("&lt;", "<").replace("&gt;", ">")
        )
        assert talk.shown[-1][1].startswith("red \x1b[31m")  # kept as it was written


async def test_a_tool_call_is_shown(setup: Setup) -> None:
    def script(engine: FakeEngine, command: Generate) -> Iterator[GenerateEvent]:
        yield ToolCall(request=1, index=0, name="lookup", id="call_1", arguments='{"q": 1}', tokens=(1,))
        yield finished()

    async with setup.start() as talk:
        talk.engine.scripts.put(script)
        await talk.ask("call")
        assert "Tool call `lookup`" in talk.shown[-1][1]


async def test_prefill_shows_how_far_it_is_and_what_is_left() -> None:
    line = _progress_line(PromptProgress(request=1, done=1500, total=4000, reused=500, elapsed_s=10.0))
    assert "1,500 of 4,000" in line
    assert "100/s" in line
    assert "25.0s left" in line
    assert _progress_line(None)


async def test_regenerate_makes_another_version_and_both_stay(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(text("first"))
        talk.engine.scripts.put(text("second"))
        await talk.ask("q")
        await talk.press("ctrl+r")
        await talk.idle()
        assert talk.shown == [("user", "q"), ("assistant", "second")]
        assert (talk.screen.chat.entries[-1].version, talk.screen.chat.entries[-1].n_versions) == (2, 2)
        await talk.press("f6", "left")
        assert talk.shown[-1] == ("assistant", "first")
        await talk.press("right")
        assert talk.shown[-1] == ("assistant", "second")
        assert "2/2" in str(last_view(talk).query_one(".message-header", Static).render())


async def test_editing_an_earlier_question_branches_and_the_old_branch_can_be_shown(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.ask("one")
        await talk.ask("two")
        await talk.press("f6", "home")
        await talk.until(lambda: talk.screen.chat.focused_message == talk.screen.chat.entries[0].message.id)
        await talk.press("e")
        assert talk.screen.prompt.text == "one"
        await talk.ask("one, edited")
        assert talk.shown == [("user", "one, edited"), ("assistant", "You said: one, edited")]
        await talk.ask("/prev")
        assert [content for _, content in talk.shown][::2] == ["one", "two"]


async def test_editing_can_be_given_up(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.ask("one")
        await talk.type("/edit ")
        assert talk.screen.composer.editing is not None
        await talk.press("escape")
        assert talk.screen.composer.editing is None
        assert talk.screen.prompt.text == ""
        assert len(talk.shown) == 2


async def test_branch_from_an_answer_keeps_what_followed(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.ask("one")
        await talk.ask("two")
        await talk.press("f6", "up", "up", "b")
        assert [content for _, content in talk.shown] == ["one", "You said: one"]
        await talk.ask("another two")
        assert (talk.screen.chat.entries[2].version, talk.screen.chat.entries[2].n_versions) == (2, 2)
        await talk.ask("/prev")
        assert talk.shown[2] == ("user", "two")


async def test_undo_takes_the_question_back_into_the_input_and_loses_nothing(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.ask("one")
        await talk.ask("two")
        await talk.type("/undo ")
        assert len(talk.shown) == 2
        assert talk.screen.prompt.text == "two"
        await talk.ask("two again")
        await talk.ask("/prev")
        assert talk.shown[2] == ("user", "two")


async def test_a_failed_answer_is_a_panel_with_a_way_out_and_leaves_no_empty_message(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(failing(DecodeError("the forward pass failed", hint="try again")))
        await talk.type("q")
        await talk.until(lambda: talk.errors)
        assert talk.errors == ["the forward pass failed"]
        assert talk.shown == [("user", "q")]
        panel = talk.screen.query_one(ErrorPanel)
        assert "try again" in str(panel.query_one(".error-hint", Static).render())
        await talk.click("#do-regenerate")
        await talk.until(lambda: len(talk.shown) == 2)
        await talk.idle()
        assert talk.shown[-1] == ("assistant", "You said: q")
        assert talk.errors == []


async def test_a_failure_in_the_middle_keeps_the_partial_answer(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(failing(DecodeError("bad"), "half an "))
        await talk.type("q")
        await talk.until(lambda: talk.errors)
        assert talk.shown[-1] == ("assistant", "half an ")
        assert talk.screen.chat.entries[-1].message.state == "failed"


async def test_engine_killed_in_the_middle_is_shown_restarted_and_the_partial_answer_stays(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(held("half an answer"))
        await talk.type("q")
        await talk.until(lambda: talk.screen.asking.answering.answer and talk.screen.asking.answering.answer.text)
        talk.engine.die()
        await talk.until(
            lambda: talk.errors and talk.screen.model.facts is not None and not talk.screen.asking.answering.running
        )
        assert talk.engine.n_reloads == 1
        assert "SIGKILL" in talk.errors[0]
        assert talk.shown[-1] == ("assistant", "half an answer")
        assert talk.screen.chat.entries[-1].message.state == "failed"
        await talk.ask("still there?")
        assert talk.shown[-1] == ("assistant", "You said: still there?")


async def test_engine_dying_while_idle_is_shown_and_it_is_started_again(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.die()
        await talk.until(lambda: talk.errors and talk.screen.model.facts is not None)
        assert talk.engine.n_reloads == 1
        assert {button.id for button in talk.screen.query("ErrorPanel Button")} == {
            "do-reload",
            "do-models",
            "do-close",
        }
        details = str(talk.screen.query_one(".error-details", Static).render())
        assert "/models/fake" in details
        assert "last words of the engine" in details


async def test_a_second_question_while_an_answer_is_written_stays_in_the_input(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(held("..."))
        await talk.type("first")
        await talk.until(lambda: talk.screen.asking.answering.running)
        await talk.type("second")
        assert talk.screen.prompt.text == "second"
        assert any("being written" in note for note in talk.notes)
        await talk.press("escape")
        await talk.idle()


async def test_a_question_before_the_model_is_loaded_waits_for_it(setup: Setup) -> None:
    import threading

    gate = threading.Event()

    def prepare(engine: FakeEngine) -> None:
        engine.load_gate = gate

    setup.prepare, setup.ready = prepare, False
    async with setup.start() as talk:
        await talk.until(lambda: talk.screen.is_mounted and talk.screen.model.loading)
        await talk.type("early")
        assert talk.engine.commands == []
        gate.set()
        await talk.until(lambda: len(talk.shown) == 2)
        await talk.idle()
        assert talk.shown[-1] == ("assistant", "You said: early")


# --- context full


async def test_context_full_offers_a_new_branch_with_the_last_turns(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.ask("old " * 1500)
        await talk.ask("recent")
        talk.engine.scripts.put(failing(ContextFullError("5000 tokens don't fit into 4096")))
        await talk.type("now")
        await talk.until(lambda: isinstance(talk.app.screen, ChoiceDialog))
        assert "choose-branch" in {button.id for button in talk.app.screen.query("Button")}
        await talk.click("#choose-branch")
        await talk.until(lambda: len(talk.shown) == 4)
        await talk.idle()
        assert [content for role, content in talk.shown if role == "user"] == ["recent", "now"]
        assert talk.screen.chat.entries[0].n_versions == 2
        await talk.ask("/prev")
        assert len(talk.shown) == 5
        assert talk.shown[0][1].startswith("old")


async def test_context_full_can_be_answered_by_more_context(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(text("cut", reason="context"))
        await talk.type("long question")
        await talk.until(lambda: isinstance(talk.app.screen, ChoiceDialog))
        await talk.click("#choose-raise")
        await talk.until(lambda: len(talk.engine.loads) == 2)
        assert talk.engine.loads[-1][1].n_ctx == 8192
        await talk.until(lambda: len(talk.engine.commands) == 2)
        await talk.idle()
        assert talk.shown == [("user", "long question"), ("assistant", "You said: long question")]
        await talk.ask("/prev")
        assert talk.shown[-1] == ("assistant", "cut")


async def test_context_full_can_be_left_as_it_is(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(text("cut", reason="context"))
        await talk.type("q")
        await talk.until(lambda: isinstance(talk.app.screen, ChoiceDialog))
        await talk.press("escape")
        assert talk.shown[-1] == ("assistant", "cut")
        assert talk.screen.chat.entries[-1].message.state == "context"


# --- attachments


async def test_an_attachment_shows_its_tokens_first_and_goes_before_the_text(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("one two three four")
    async with setup.start() as talk:
        await talk.type("/attach notes.txt")
        await talk.until(lambda: "4 tokens" in str(talk.app.screen.query_one("#attach-size", Static).render()))
        assert talk.screen.prompt.attachments == []
        await talk.press("enter")
        assert talk.screen.prompt.attachments == [Attachment("notes.txt", "one two three four", 4)]
        await talk.ask("summarize")
        content = talk.engine.commands[-1].messages[-1]["content"]
        assert content == "File `notes.txt`:\n\n```\none two three four\n```\n\nsummarize"
        assert talk.shown[0] == ("user", "summarize")
        assert talk.screen.prompt.attachments == []
        await talk.type("/edit ")
        assert talk.screen.prompt.attachments[0].name == "notes.txt"


async def test_what_is_no_text_is_not_attached(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    async with setup.start() as talk:
        await talk.press("ctrl+o")
        await talk.press(*"image.png", "enter")
        assert "not a text file" in str(talk.app.screen.query_one("#attach-size", Static).render())
        await talk.press("escape")
        assert talk.screen.prompt.attachments == []


async def test_backspace_in_an_empty_input_removes_the_attachment(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.screen.prompt.set_attachments([Attachment("a", "x", 1)])
        await talk.press("backspace")
        assert talk.screen.prompt.attachments == []


# --- models that fail


async def test_a_model_with_unsound_headers_leaves_the_working_one_loaded(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nonsense")
    async with setup.start() as talk:
        await talk.type("/model bad.gguf")
        await talk.until(lambda: talk.errors)
        assert "bad.gguf" in talk.errors[0]
        assert talk.screen.model.facts is not None
        assert len(talk.engine.loads) == 1
        await talk.ask("still there?")
        assert talk.shown[-1] == ("assistant", "You said: still there?")


async def test_a_model_that_fails_later_makes_room_for_the_one_before(setup: Setup, tmp_path: Path) -> None:
    write_deepseek4(tmp_path / "large.gguf")
    async with setup.start() as talk:
        talk.engine.load_error = BudgetError("too little RAM", hint="give --ram at least 3 GiB")
        await talk.type("/model large.gguf")
        await talk.until(lambda: talk.errors and talk.screen.model.facts is not None)
        assert talk.errors == ["too little RAM"]
        assert [path for path, _ in talk.engine.loads] == ["/models/fake", "large.gguf", "/models/fake"]
        await talk.ask("still there?")
        assert talk.shown[-1] == ("assistant", "You said: still there?")


async def test_a_question_without_a_model_is_kept_whatever_fails_until_there_is_one(setup: Setup) -> None:
    def prepare(engine: FakeEngine) -> None:
        engine.load_error = BudgetError("too little RAM")

    setup.prepare, setup.ready = prepare, False
    async with setup.start() as talk:
        await talk.until(lambda: talk.errors)
        await talk.type("kept?")
        await talk.until(lambda: isinstance(talk.app.screen, ModelsScreen))
        assert talk.screen.asking.pending is not None
        talk.engine.load_error = BudgetError("too little RAM again")
        talk.app.screen.dismiss(ModelChosen(Path("/models/other")))
        await talk.until(lambda: talk.errors == ["too little RAM again"])
        assert talk.screen.asking.pending is not None
        third = setup.folder / "third.gguf"
        third.touch()
        await talk.type(f"/model {third}")
        await talk.until(lambda: len(talk.shown) == 2)
        await talk.idle()
        assert talk.shown == [("user", "kept?"), ("assistant", "You said: kept?")]


async def test_after_a_crash_there_are_restart_another_model_and_details(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.die()
        await talk.until(lambda: talk.errors and talk.screen.model.facts is not None)
        panel = talk.screen.query_one(ErrorPanel)
        assert [button.id for button in panel.query(Button)] == ["do-reload", "do-models", "do-close"]
        assert "last words of the engine" in str(panel.query_one(".error-details", Static).render())
        await talk.click("#do-models")
        await talk.until(lambda: isinstance(talk.app.screen, ModelsScreen))


async def test_with_a_locked_file_one_can_still_stop_and_quit_and_the_question_is_written_later(
    setup: Setup, tmp_path: Path
) -> None:
    async with setup.start() as talk:
        await talk.ask("one")
        other = sqlite3.connect(tmp_path / "c.sqlite3", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        talk.screen.prompt.set_text("two")
        await talk.focus(talk.screen.prompt.area)
        await talk.pilot.press("enter")
        await talk.until(lambda: any("another program has it locked" in note for note in talk.notes))
        assert talk.screen.prompt.text == "", "the interface goes on"
        await talk.pilot.press("x")
        await talk.until(lambda: talk.screen.prompt.text == "x")
        other.execute("COMMIT")
        other.close()
        await talk.idle()
        assert talk.shown[-1] == ("assistant", "You said: two")
