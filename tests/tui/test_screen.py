"""Everything around the conversation: commands, conversations, search, model, settings, panels, errors at the start."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from textual import events
from textual.command import CommandPalette
from textual.css.query import NoMatches
from textual.widgets import Button, DataTable, Input, OptionList, Select, Static

from localrun import paths
from localrun.api import models
from localrun.engine.conversations import ConversationStore
from localrun.engine.model_finder import FoundModel, find_models
from localrun.engine.planner.bars import bar_lines, bars
from localrun.engine.planner.boxes import BY_SLUG
from localrun.engine.planner.planner import make_plan
from localrun.engine.planner.sizes import sizes_of
from localrun.errors import BudgetError, LocalrunError
from localrun.tui.app import Launch, LocalrunApp
from localrun.tui.commands import BY_NAME, COMMANDS, INPUT_KEYS, key_label, matching_slashes
from localrun.tui.controllers.records import Records
from localrun.tui.screens.dialog import ChoiceDialog, TextDialog
from localrun.tui.screens.help import HelpScreen
from localrun.tui.screens.models import ModelsScreen
from localrun.tui.screens.plan import PlanScreen
from localrun.tui.screens.search import SearchScreen
from localrun.tui.screens.settings import SettingsScreen
from localrun.tui.widgets.conversation_list import ConversationOptions
from localrun.tui.widgets.engine_panel import EnginePanel
from localrun.tui.widgets.find_bar import FindBar
from localrun.tui.widgets.message_view import MessageView
from localrun.tui.widgets.prompt import PromptArea
from localrun.tui.widgets.status_bar import Status, StatusBar, status_line
from localrun.units import format_rate
from tests.gguf_models import write_deepseek4
from tests.tui.fake_engine import FakeEngine, held, text
from tests.tui.support import PATIENCE_S, Setup, Talk

# --- the list of commands


def test_names_and_keys_of_commands_are_unique() -> None:
    for command in COMMANDS:
        assert command.keys or command.slash, command.name
    slashes = [slash for command in COMMANDS for slash in command.slash]
    keys = [key for command in COMMANDS for key in command.keys]
    assert len(set(slashes)) == len(slashes)
    assert len(set(keys)) == len(keys)


async def test_every_command_belongs_to_a_part(setup: Setup) -> None:
    async with setup.start() as talk:
        assert set(talk.screen.handlers) == set(BY_NAME)


def test_slash_names_are_completed_canonical_ones_first() -> None:
    assert [slash for slash, _ in matching_slashes("re")][:2] == ["reload", "rename"]
    assert matching_slashes("nothing") == []
    assert key_label("ctrl+home") == "Ctrl+Home"
    assert key_label("f1") == "F1"


def test_the_manual_names_every_command() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "tui.md").read_text()
    for command in COMMANDS:
        for key in command.keys:
            assert f"`{key_label(key)}`" in manual, (command.name, key)
        if command.slash:
            assert f"`/{command.slash[0]}" in manual, command.name


async def test_help_and_footer_show_what_the_list_says(setup: Setup) -> None:
    setup.size = (120, 60)
    async with setup.start() as talk:
        await talk.press("f1")
        assert isinstance(talk.app.screen, HelpScreen)
        shown = "\n".join(str(static.render()) for static in talk.app.screen.query(Static))
        for command in COMMANDS:
            assert command.title in shown
            assert command.key_labels in shown
        assert INPUT_KEYS[0][1] in shown
        await talk.press("escape")
        footer = {b.binding.description for b in talk.screen.active_bindings.values() if b.binding.show}
        assert footer >= {command.footer for command in COMMANDS if command.footer}


async def test_the_palette_offers_every_command_and_runs_it(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.press("ctrl+p")
        assert isinstance(talk.app.screen, CommandPalette)
        await talk.press(*"conversations")
        palette = talk.app.screen
        await talk.until(lambda: palette.query_one(OptionList).option_count)
        await talk.press("enter")
        await talk.until(lambda: talk.screen.panels.conversations)


async def test_an_unknown_slash_command_stays_in_the_input(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.type("/nosuch thing")
        assert talk.screen.prompt.text == "/nosuch thing"
        assert any("/nosuch" in note for note in talk.notes)
        assert talk.shown == []


async def test_a_doubled_slash_sends_a_text_with_a_slash(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.ask("//etc/passwd is a path")
        assert talk.shown[0] == ("user", "/etc/passwd is a path")


# --- the input


async def test_enter_means_the_text_that_stands_there_however_fast_it_was_typed(setup: Setup) -> None:
    async with setup.start() as talk:
        prompt = talk.screen.prompt
        await talk.type("/", send=False)
        assert prompt.query_one("#suggestions", OptionList).display
        assert talk.screen.current.options.think == "off"
        prompt.set_text("/think max")
        assert prompt.take_key("enter"), "no message has passed since the text changed"
        await talk.settled()
        assert (talk.screen.current.options.think, prompt.text) == ("max", "")


async def test_slash_suggestions_appear_complete_and_close(setup: Setup) -> None:
    async with setup.start() as talk:
        suggestions = talk.screen.query_one("#suggestions", OptionList)
        await talk.press("/", "t", "h")
        assert suggestions.display
        assert {option.id for option in suggestions.options} == {"think", "theme"}
        await talk.press("down", "tab")
        assert talk.screen.prompt.text == "/think "
        assert [option.id for option in suggestions.options] == ["think off", "think high", "think max"]
        await talk.press("h")
        assert [option.id for option in suggestions.options] == ["think high"]
        await talk.press("tab")
        assert talk.screen.prompt.text == "/think high"
        assert not suggestions.display
        await talk.press("ctrl+u", "/", "escape")
        assert not suggestions.display
        assert talk.screen.prompt.text == "/"


async def test_several_lines_and_history(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.press(*"one", "ctrl+j", *"two")
        assert talk.screen.prompt.text == "one\ntwo"
        await talk.press("enter")
        await talk.idle()
        assert talk.shown[0] == ("user", "one\ntwo")
        await talk.press(*"half\\", "enter", *"b")
        assert talk.screen.prompt.text == "half\nb"
        await talk.press("up", "up")
        assert talk.screen.prompt.text == "one\ntwo"
        await talk.press("down")
        assert talk.screen.prompt.text == "half\nb"
    async with setup.start() as talk:  # history outlives the program
        talk.screen.prompt.set_text("")  # on a busy machine the draft, which is saved after a while, outlives it too
        await talk.press("up")
        assert talk.screen.prompt.text == "one\ntwo"


async def test_the_input_grows_with_its_text_and_stays_bounded(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.screen.prompt.set_text("line\n" * 40)
        await talk.until(lambda: talk.screen.prompt.area.size.height == 10)
        assert talk.screen.query_one("#status").region.bottom <= 24


async def test_ctrl_c_copies_stops_or_clears(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.type("words", send=False)
        talk.screen.prompt.area.select_all()
        await talk.press("ctrl+c")
        assert talk.clipboard == "words"
        talk.screen.prompt.area.move_cursor((0, 0))
        await talk.press("ctrl+c")
        assert talk.screen.prompt.text == ""
        talk.engine.scripts.put(held("x"))
        await talk.type("go")
        await talk.until(lambda: talk.screen.asking.answering.running)
        await talk.press("ctrl+c")
        await talk.idle()
        assert talk.screen.chat.entries[-1].message.state == "stopped"


# --- messages


async def test_copying_messages_and_code_blocks(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(text("See:\n\n```py\nfirst\n```\n\n```\nsecond\nline\n```\nend"))
        await talk.ask("code")
        await talk.press("f8")
        assert talk.clipboard == "second\nline"
        await talk.type("/code 1")
        assert talk.clipboard == "first"
        await talk.press("f7")
        assert talk.clipboard.startswith("See:")
        await talk.press("f6", "up", "c")
        assert talk.clipboard == "code"
        await talk.type("/code 9")
        assert any("no code block 9" in note for note in talk.notes)


async def test_messages_are_reached_by_keyboard_and_mouse(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.ask("one")
        await talk.press("f6")
        assert isinstance(talk.screen.focused, MessageView)
        await talk.press("up")
        assert talk.screen.chat.focused_message == talk.screen.chat.entries[0].message.id
        await talk.press("f6")
        assert isinstance(talk.screen.focused, PromptArea)
        last = talk.screen.chat.view(talk.screen.chat.entries[-1].message.id)
        await talk.click(last)
        await talk.until(lambda: talk.screen.focused is last)


@pytest.fixture
def opening(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """The conversations are not opened before it is set."""
    event, open_records = asyncio.Event(), LocalrunApp._open_records

    async def slowly(app: LocalrunApp) -> Records | None:
        await event.wait()
        return await open_records(app)

    monkeypatch.setattr(LocalrunApp, "_open_records", slowly)
    return event


def bare_app(setup: Setup) -> LocalrunApp:
    """One that nobody waits for."""
    return LocalrunApp(setup.launch, engine_factory=FakeEngine, store_path=setup.folder / "c.sqlite3")


async def test_what_is_typed_while_the_conversations_are_opened_is_in_the_input(
    setup: Setup, opening: asyncio.Event
) -> None:
    app = bare_app(setup)
    async with app.run_test() as pilot:
        await pilot.press("H", "i", "shift+enter", "a", "backspace")
        app.post_message(events.Paste("all"))
        await pilot.press("!")
        opening.set()
        talk = Talk(app, pilot, FakeEngine(lambda error: None))
        await talk.until(lambda: app.chat is not None and app.chat.is_mounted and talk.screen.prompt.text == "Hi\nall!")
        await talk.press("enter")
        await talk.until(lambda: talk.shown[:1] == [("user", "Hi\nall!")])


async def test_an_early_enter_sends_what_was_typed_and_the_draft_of_last_time_stays(
    setup: Setup, opening: asyncio.Event
) -> None:
    opening.set()
    async with setup.start() as talk:
        await talk.type("old draft", send=False)
        await talk.press("ctrl+q")
    opening.clear()
    app = bare_app(setup)
    async with app.run_test() as pilot:
        await pilot.press("H", "i", "enter", " ", "m", "e")
        opening.set()
        talk = Talk(app, pilot, FakeEngine(lambda error: None))
        await talk.until(lambda: app.chat is not None and app.chat.is_mounted and talk.shown[:1])
        assert talk.shown[0] == ("user", "Hi")
        assert talk.screen.prompt.text == "old draft me"
        await talk.idle()
        await talk.press("ctrl+q")
    async with setup.start() as talk:
        assert talk.screen.prompt.text == "old draft me"


@pytest.mark.parametrize("hanging", ["open", "recent_user_texts"])
async def test_the_program_can_be_left_while_the_conversations_file_hangs(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, hanging: str
) -> None:
    there, works = threading.Event(), threading.Event()
    real = getattr(ConversationStore, hanging)

    def hang(*args: Any) -> Any:
        there.set()
        assert works.wait(PATIENCE_S)
        return real(*args)

    monkeypatch.setattr(ConversationStore, hanging, staticmethod(hang) if hanging == "open" else hang)
    app = bare_app(setup)
    async with app.run_test() as pilot:
        talk = Talk(app, pilot, FakeEngine(lambda error: None))
        await talk.until(there.is_set)
        await pilot.press("H", "ctrl+q")
        await talk.until(lambda: app.return_code == 0)
        works.set()


async def test_work_that_goes_on_when_the_widgets_have_gone_is_no_error(setup: Setup) -> None:
    missed: list[NoMatches] = []

    async def look(talk: Talk) -> None:
        try:
            while True:
                assert talk.screen.prompt is not None
                await asyncio.sleep(0)
        except NoMatches as error:
            missed.append(error)
            raise

    async with setup.start() as talk:
        talk.screen.queue.add(look(talk))
        await talk.pilot.pause()
    assert missed


# --- conversations


async def test_the_last_conversation_is_opened_again_with_its_settings_and_the_draft(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.ask("remember me")
        await talk.ask("/think max")
        await talk.ask("/set temperature 0.25")
        await talk.ask("/set seed 99")
        await talk.type("half a tho", send=False)
        await talk.press("ctrl+q")
    async with setup.start() as talk:
        assert talk.shown[0] == ("user", "remember me")
        assert talk.screen.prompt.text == "half a tho"
        await talk.ask("go on")
        command = talk.engine.commands[-1]
        assert (command.think, command.sampling.temperature, command.sampling.seed) == ("max", 0.25, 99)


async def test_a_second_window_leaves_the_conversation_of_the_first_alone(setup: Setup) -> None:
    async with setup.start() as first:
        await first.ask("mine")
        await first.type("half a tho", send=False)
        first.screen.composer.save_draft()
        async with setup.start() as second:
            await second.until(lambda: second.notes)
            assert second.notes == ["“mine” is open in another window; this is a new conversation"]
            assert second.shown == []
            assert second.screen.prompt.text == ""
            mine = (await second.stored())[0].id
            second.screen.queue.add(second.screen.library.open(mine))
            await second.until(lambda: len(second.notes) == 2)
            assert "is open in another window" in second.notes[1]
            second.screen.library.act(mine, "delete")
            await second.until(lambda: len(second.notes) == 3)
            await second.ask("yours")
            await second.type("another half", send=False)
            await second.press("ctrl+q")
        await first.ask("go on")
        assert [text for _, text in first.shown] == ["mine", "You said: mine", "go on", "You said: go on"]
        await first.press("ctrl+n")
        await first.type("third", send=False)
        async with setup.start() as second:  # the first has left it
            assert second.screen.prompt.text == "another half"
            second.screen.queue.add(second.screen.library.open(mine))
            await second.until(lambda: len(second.shown) == 4)
            assert second.notes == []


async def test_a_conversation_that_another_window_opens_before_the_confirmation_is_not_deleted(setup: Setup) -> None:
    async with setup.start() as first:
        await first.ask("mine")
        mine = first.screen.current.needed().id
        await first.press("ctrl+n")

        async def delete() -> None:
            if not isinstance(first.app.screen, ChoiceDialog):
                first.screen.library.act(mine, "delete")
                await first.until(lambda: isinstance(first.app.screen, ChoiceDialog))
            first.app.screen.query_one("#choose-delete", Button).press()
            await first.until(lambda: first.app.screen is first.screen and first.screen.queue.idle)

        first.screen.library.act(mine, "delete")
        await first.until(lambda: isinstance(first.app.screen, ChoiceDialog))
        async with setup.start() as second:
            second.screen.queue.add(second.screen.library.open(mine))
            await second.until(lambda: second.shown)
            await delete()
            await first.until(lambda: first.notes)
            assert first.notes == ["“mine” is open in another window\n→ close it there, or begin a new one with Ctrl+N"]
            assert [c.id for c in await second.stored()] == [mine]
        await delete()
        assert await first.stored() == []


async def test_a_question_whose_new_conversation_another_window_opens_first_is_given_back(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with setup.start() as talk:
        with monkeypatch.context() as quicker:
            quicker.setattr(talk.screen.records.claims, "take", lambda conversation_id: False)
            await talk.type("quick")
            await talk.until(lambda: talk.notes)
        assert "“quick” is open in another window" in talk.notes[0]
        assert (talk.screen.prompt.text, talk.screen.current.id) == ("quick", None)
        await talk.press("enter")
        await talk.idle()
        assert talk.shown == [("user", "quick"), ("assistant", "You said: quick")]


async def test_new_conversations_start_empty_and_the_list_opens_old_ones(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.ask("first talk")
        await talk.press("ctrl+n")
        assert talk.shown == []
        await talk.ask("second talk")
        await talk.press("f2")
        options = talk.screen.query_one(ConversationOptions)
        assert options.has_focus
        assert options.option_count == 2
        await talk.press("down", "enter")
        await talk.until(lambda: talk.shown[:1] == [("user", "first talk")])
        assert not talk.screen.panels.conversations  # a narrow screen shows the conversation now


async def test_renaming_and_deleting_from_the_list(setup: Setup) -> None:
    setup.size = (160, 50)
    async with setup.start() as talk:
        await talk.ask("first talk")
        await talk.press("f2", "r")
        assert isinstance(talk.app.screen, TextDialog)
        talk.app.screen.query_one(Input).value = "Better name"
        await talk.press("enter")
        assert talk.screen.current.title == "Better name"
        await talk.press("d")
        assert isinstance(talk.app.screen, ChoiceDialog)
        await talk.press("enter")  # the safe choice has the focus
        assert len(await talk.stored()) == 1
        await talk.press("d")
        await talk.click("#choose-delete")
        await talk.until(lambda: talk.screen.current.conversation is None)
        assert (await talk.stored()) == []
        assert talk.shown == []


async def test_rename_and_delete_commands(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.ask("q")
        await talk.type("/rename Named")
        assert (await talk.stored())[0].title == "Named"
        await talk.type("/delete ")
        await talk.click("#choose-delete")
        await talk.until(lambda: talk.screen.current.conversation is None)


async def test_export_writes_a_file(setup: Setup, tmp_path: Path) -> None:
    async with setup.start() as talk:
        await talk.ask("What is it?")
        await talk.type("/export md")
        await talk.type("/export json out.json")
        assert "You said" in (tmp_path / "what-is-it.md").read_text()
        assert (tmp_path / "out.json").exists()
        await talk.type("/export json out.json")
        await talk.until(lambda: talk.errors)
        assert "already" in talk.errors[0]
        await talk.type("/export pdf")
        assert any("unknown export format 'pdf'" in note for note in talk.notes)


async def test_conversations_of_other_programs_are_imported_and_shown(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl").write_text(
        '{"role": "user", "content": "old"}\n{"role": "assistant", "content": "answer"}'
    )
    async with setup.start() as talk:
        await talk.type("/import talk.jsonl")
        assert talk.shown == [("user", "old"), ("assistant", "answer")]
        await talk.ask("and now?")
        assert len(talk.engine.commands[0].messages) == 3
        await talk.type("/import missing.jsonl")
        assert "can't be read" in talk.errors[0]


async def test_find_goes_from_place_to_place(setup: Setup) -> None:
    async with setup.start() as talk:
        for word in ("apple", "pear", "apple pie"):
            await talk.ask(word)
        await talk.press("ctrl+f")
        bar = talk.screen.query_one(FindBar)
        await talk.press(*"apple")
        await talk.until(lambda: len(bar.found) == 4)
        count = bar.query_one("#find-count", Static)
        assert str(count.render()) == "4/4"
        await talk.press("enter")
        await talk.until(lambda: str(count.render()) == "3/4")
        await talk.press("ctrl+f")
        await talk.until(lambda: str(count.render()) == "2/4")
        await talk.until(lambda: [v.message_id for v in talk.screen.query(".found")] == [bar.found[1]])  # type: ignore[attr-defined]
        await talk.press("escape")
        assert not bar.display


def marked(talk: Talk) -> list[str]:
    """Pieces of the screen that are drawn reversed, inside messages."""
    found = []
    for view in talk.screen.query(MessageView):
        for widget in view.query(Static):
            for strip in widget.render_lines(widget.size.region):
                found += [segment.text for segment in strip if segment.style is not None and segment.style.reverse]
    return found


async def test_find_marks_every_place_of_the_message_on_view(setup: Setup) -> None:
    answer = "One Apple.\n\n- an apple in a list\n\n| a | b |\n|---|---|\n| 1 | pineapple |\n\n```\napple = 1\n```\n"
    async with setup.start() as talk:
        talk.engine.scripts.put(text(answer))
        await talk.ask("an apple?")
        await talk.type("/find apple")
        await talk.until(lambda: len(marked(talk)) == 4, "four marks")
        assert marked(talk) == ["Apple", "apple", "apple", "apple"]
        await talk.press("enter")
        await talk.until(lambda: marked(talk) == ["apple"], "the question's mark")
        await talk.press("enter")
        await talk.until(lambda: len(marked(talk)) == 4)
        await talk.press("escape")
        await talk.until(lambda: not marked(talk))


async def test_find_scrolls_to_a_word_far_down_in_a_message(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(text("\n\n".join(f"paragraph {n}" for n in range(100)) + "\n\nneedle"))
        await talk.ask("a long one")
        await talk.press("ctrl+home")
        await talk.type("/find needle")
        chat = talk.screen.chat

        def seen() -> bool:
            view = next(iter(talk.screen.query(".found").results(MessageView)), None)
            return view is not None and view.first_mark is not None and view.first_mark.region.overlaps(chat.region)

        await talk.until(seen, "the word is in view")


async def test_search_opens_the_conversation_and_the_branch_of_the_place(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(text("hidden treasure"))
        await talk.ask("where")
        await talk.press("ctrl+r")
        await talk.idle()
        await talk.press("ctrl+n", "ctrl+g")
        assert isinstance(talk.app.screen, SearchScreen)
        screen = talk.app.screen
        await talk.press(*"treasure")
        await talk.until(lambda: screen.query_one(OptionList).option_count == 1)
        await talk.press("enter")
        await talk.until(lambda: talk.shown[-1:] == [("assistant", "hidden treasure")])


# --- model and settings


async def test_think_mode_is_switched_and_sent(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.press("ctrl+t")
        assert talk.screen.current.options.think == "high"
        await talk.ask("q")
        assert talk.engine.commands[-1].think == "high"
        await talk.type("/think sideways")
        assert any("sideways" in note for note in talk.notes)


async def test_the_system_prompt_is_sent(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.type("/system Be brief.")
        await talk.ask("q")
        assert talk.engine.commands[-1].messages[0] == {"role": "system", "content": "Be brief."}


async def test_settings_are_checked_and_engine_changes_reload(setup: Setup) -> None:
    setup.size = (120, 60)
    async with setup.start() as talk:
        await talk.press("f4")
        screen = talk.app.screen
        assert isinstance(screen, SettingsScreen)
        screen.query_one("#temperature", Input).value = "101"
        await talk.click("#apply")
        await talk.until(lambda: "temperature" in str(screen.query_one("#settings-error", Static).render()))
        screen.query_one("#temperature", Input).value = "0.5"
        screen.query_one("#max_tokens", Input).value = "100"
        screen.query_one("#think", Select).value = "high"
        screen.query_one("#theme", Select).value = "nord"
        screen.query_one("#apply", Button).press()  # the complaint moves it: a click might go where it was
        await talk.until(lambda: talk.app.screen is talk.screen)
        assert talk.screen.current.options.sampling.temperature == 0.5
        assert (talk.screen.current.options.max_tokens, talk.screen.current.options.think) == (100, "high")
        assert talk.app.theme == "nord"
        assert len(talk.engine.loads) == 1
        await talk.press("f4")
        talk.app.screen.query_one("#n_ctx", Input).value = "16384"
        talk.app.screen.query_one("#ram_bytes", Input).value = "8GiB"
        await talk.click("#apply")
        await talk.until(lambda: len(talk.engine.loads) == 2)
        assert (talk.engine.loads[-1][1].n_ctx, talk.engine.loads[-1][1].ram_bytes) == (16384, 8 << 30)
    async with setup.start() as talk:
        assert talk.app.theme == "nord"


async def test_theme_command(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.type("/theme gruvbox")
        assert talk.app.theme == "gruvbox"
        await talk.type("/theme nosuch")
        assert any("nosuch" in note for note in talk.notes)


async def test_the_chooser_lists_models_with_size_and_fit_and_loads_one(setup: Setup, tmp_path: Path) -> None:
    write_deepseek4(tmp_path / "tiny.gguf")
    (tmp_path / "broken[").mkdir()
    (tmp_path / "broken[" / "b]\x1b[2J.gguf").write_bytes(b"GGUF nonsense")
    (tmp_path / "official").mkdir()
    (tmp_path / "official" / "config.json").write_text('{"model_type": "deepseek_v4", "n_routed_experts": 8}')
    (tmp_path / "official" / "a.safetensors").write_bytes(bytes(1000))
    setup.launch = Launch(model_folders=[Path()])  # tests run in tmp_path, whose length is not to count
    setup.ready = False
    setup.size = (120, 40)
    async with setup.start() as talk:
        await talk.until(lambda: isinstance(talk.app.screen, ModelsScreen))
        screen = talk.app.screen
        await talk.until(lambda: "found in" in str(screen.query_one("#models-note", Static).render()))
        table = screen.query_one(DataTable)
        rows = {
            str(row[0]): [str(cell) for cell in row] for row in (table.get_row_at(i) for i in range(table.row_count))
        }
        assert list(rows) == ["tiny.gguf", "b]␛[2J.gguf", "official"], "what can be run first"
        assert (rows["tiny.gguf"][1], rows["tiny.gguf"][3]) == ("mxfp4", "all in RAM")
        assert rows["official"][2:] == ["1.0K", "can't be run"]
        assert rows["b]␛[2J.gguf"][3] == "can't be run"
        details = screen.query_one("#model-details", Static)
        table.move_cursor(row=1)
        await talk.until(lambda: "broken[/b]␛[2J" in str(details.render()), "neither markup nor an escape sequence")
        assert "✗ " in str(details.render()), "says what is wrong"
        table.move_cursor(row=0)
        await talk.press("enter")
        await talk.until(lambda: talk.engine.loads)
        assert Path(talk.engine.loads[0][0]).resolve() == tmp_path / "tiny.gguf"


async def test_a_model_that_cannot_be_loaded_is_a_panel_and_another_can_be_named(setup: Setup) -> None:
    def prepare(engine: FakeEngine) -> None:
        engine.load_error = BudgetError("too little RAM", hint="give --ram at least 3 GiB")

    setup.prepare, setup.ready = prepare, False
    (other := setup.folder / "other").mkdir()
    paths.config_dir().mkdir()
    (paths.config_dir() / "config.toml").write_text(f"[models]\nmine = '{other}'\n")
    async with setup.start() as talk:
        await talk.until(lambda: talk.app.chat and talk.app.chat.is_mounted and talk.errors)
        assert talk.errors == ["too little RAM"]
        assert {b.id for b in talk.screen.query("ErrorPanel Button")} >= {"do-models", "do-settings", "do-reload"}
        await talk.type("/model mine")
        await talk.until(lambda: talk.screen.model.facts is not None)
        assert talk.engine.loads[-1][0] == str(other)
        assert talk.errors == []
        await talk.until(lambda: models.last() == other)


async def test_the_chooser_knows_the_users_names(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()

    def search(folders: Sequence[Path]) -> Iterator[FoundModel]:
        yield from find_models(folders)
        assert goes_on.wait(PATIENCE_S)

    monkeypatch.setattr("localrun.tui.screens.models.find_models", search)
    away = setup.folder / "away"
    away.mkdir()
    write_deepseek4(away / "tiny.gguf")
    paths.config_dir().mkdir()
    (paths.config_dir() / "config.toml").write_text(f"[models]\nmine = '{away / 'tiny.gguf'}'\n")
    setup.launch = Launch(model_folders=[setup.folder / "none here"])
    setup.ready = False
    async with setup.start() as talk:
        await talk.until(lambda: isinstance(talk.app.screen, ModelsScreen))
        table, note = talk.app.screen.query_one(DataTable), talk.app.screen.query_one("#models-note", Static)
        await talk.until(lambda: table.row_count == 1)
        assert str(table.get_row_at(0)[0]) == "mine"
        field = talk.app.screen.query_one(Input)
        await talk.focus(field)
        field.value = "mein"
        await talk.press("enter")
        await talk.until(lambda: "no such model" in str(note.render()))
        assert "did you mean: localrun chat mine" in str(note.render())
        goes_on.set()
        await talk.until(lambda: all(thread.name != "tui-models" for thread in threading.enumerate()))
        await talk.settled()
        assert "no such model" in str(note.render()), "the search doesn't write over it"
        field.value = "mine"
        await talk.press("enter")
        await talk.until(lambda: talk.engine.loads)
        assert talk.engine.loads[0][0] == str(away / "tiny.gguf")


async def test_the_demo_model_is_prepared_while_the_interface_is_up(setup: Setup) -> None:
    setup.launch = Launch(prepare=lambda: Path("/cache/demo"))
    async with setup.start() as talk:
        assert talk.engine.loads[0][0] == "/cache/demo"


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The demo model is not converted before it is set."""
    event = threading.Event()
    write_deepseek4(tmp_path / "demo.gguf")

    def convert() -> Path:
        assert event.wait(PATIENCE_S)
        return tmp_path / "demo.gguf"

    monkeypatch.setattr("localrun.api.demo.converted", convert)
    return event


async def test_the_demo_model_named_in_the_chooser_is_prepared_while_the_interface_goes_on(
    setup: Setup, converted: threading.Event
) -> None:
    setup.launch, setup.ready = Launch(model_folders=[]), False
    async with setup.start() as talk:
        await talk.until(lambda: isinstance(talk.app.screen, ModelsScreen))
        field = talk.app.screen.query_one(Input)
        await talk.focus(field)
        field.value = "demo"
        await talk.press("enter")
        await talk.until(lambda: talk.app.screen is talk.screen)
        assert talk.screen.model.loading
        assert talk.engine.loads == []
        converted.set()
        await talk.until(lambda: talk.engine.loads)
        assert Path(talk.engine.loads[0][0]) == setup.folder / "demo.gguf"


async def test_the_model_before_stays_until_the_demo_model_is_prepared_or_if_it_cannot_be(
    setup: Setup, converted: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with setup.start() as talk:
        await talk.type("/model demo")
        assert talk.notes == ["preparing the demo model…"]
        await talk.ask("still here?")
        assert talk.shown[-1][1] == "You said: still here?"
        converted.set()
        await talk.until(lambda: len(talk.engine.loads) == 2)
        assert Path(talk.engine.loads[1][0]) == setup.folder / "demo.gguf"
        await talk.until(lambda: talk.screen.model.facts is not None)

        def full() -> Path:
            raise LocalrunError("the drive is full")

        monkeypatch.setattr("localrun.api.demo.converted", full)
        await talk.type("/model demo")
        await talk.until(lambda: talk.errors)
        assert talk.errors == ["the drive is full"]
        assert talk.screen.model.facts is not None


# --- panels and the status line


def experts() -> dict[str, Any]:
    return {
        "n_experts": 16,
        "layers": [
            {"layer": layer, "where": "gr" + "d" * 13 + "l", "types": ["IQ2_XXS", "MXFP4"], "type_of": "11" + "0" * 14}
            for layer in (1, 2, 3)
        ],
    }


async def test_the_engine_panel_shows_tiers_and_map_and_costs_nothing_when_closed(setup: Setup) -> None:
    def prepare(engine: FakeEngine) -> None:
        engine.experts = experts()
        engine.telemetry = {
            "hits": 90, "misses": 10, "tokens": 30, "bytes_read": 10 << 20, "total_s": 2.0, "wait_s": 0.5,
        }  # fmt: skip

    setup.prepare = prepare
    async with setup.start() as talk:
        await talk.ask("q")
        assert talk.engine.n_map_looks == 0
        await talk.press("f3")
        await talk.until(lambda: talk.screen.query_one(EnginePanel).grid is not None)
        shown = str(talk.screen.query_one("#engine-text", Static).render())
        assert re.search(r"RAM +█.* 3 +3.00 MiB", shown)
        assert re.search(r"GPU +█.* 3 +3.00 MiB", shown)
        assert "1.00 MiB per token" in shown
        assert "waiting 25 %" in shown
        picture = talk.app.export_screenshot()
        assert "█▓·············◌".replace("·", "·") in re.sub(r"<[^>]+>|\s|&#160;", "", picture)
        await talk.press("f9")
        assert talk.screen.query_one(EnginePanel).map.view == "precision"
        assert not talk.screen.query_one("#main").region  # narrow: it has the whole screen
        await talk.press("f3")
        assert talk.screen.panels.engine == "off"


async def test_a_wide_screen_shows_panels_beside_the_chat(setup: Setup) -> None:
    setup.size = (160, 50)
    async with setup.start() as talk:
        assert talk.screen.panels.engine == "side"
        await talk.press("f2")
        widths = [talk.screen.query_one(name).size.width for name in ("#conversations", "#main", "#engine")]
        assert all(widths)
        await talk.press("f3")
        assert talk.screen.query_one("#engine").size.width > 100


async def test_panels_that_lose_their_place_are_closed_and_typing_never_goes_to_a_hidden_input(setup: Setup) -> None:
    setup.size = (160, 50)
    async with setup.start() as talk:
        await talk.press("f2", "f3")
        assert talk.screen.panels.engine == "full"
        await talk.press(*"typed")
        assert talk.screen.prompt.text == "typed"
        assert talk.screen.panels.engine == "side"
        await talk.pilot.resize_terminal(80, 24)
        await talk.until(lambda: talk.screen.panels.engine == "off" and not talk.screen.panels.conversations)
        assert talk.screen.query_one("#main").size.width == 80


async def test_the_engine_can_be_restarted(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(held("stuck"))
        await talk.type("q")
        await talk.until(lambda: talk.screen.asking.answering.running)
        await talk.type("/restart ")
        await talk.until(lambda: len(talk.engine.loads) == 2 and talk.screen.model.facts is not None)
        assert talk.engine.closed
        await talk.idle()
        await talk.ask("again")
        assert talk.shown[-1] == ("assistant", "You said: again")


def test_the_status_line_drops_the_least_important_first() -> None:
    status = Status(
        decode_tokens_per_s=6.25, prompt_tokens_per_s=250, context_used=1234, n_ctx=32768, hit_rate=0.87,
        ram_bytes=12 << 30, ram_budget=16 << 30, think="high", activity="writing",
    )  # fmt: skip
    wide = status_line(status, 200)
    assert wide == (
        "writing │ decode 6.2 t/s │ prefill 250 t/s │ ctx 1,234/32k 4% │ hit 87% │ RAM 12.0G/16.0G │ think high"
    )
    narrow = status_line(status, 60)
    assert len(narrow) <= 60
    assert "decode 6.2" in narrow
    assert "think" not in narrow
    assert "decode 6.2 t/s │ planned 5.0 to 7.5 │" in status_line(replace(status, planned=(5.0, 7.5)), 200)
    assert len(status_line(status, 10)) <= 10


async def test_the_status_line_is_always_there(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.ask("q")
        await talk.until(lambda: "decode 1.0 t/s" in str(talk.screen.query_one(StatusBar).render()))
        shown = str(talk.screen.query_one(StatusBar).render())
        for part in ("prefill 20.0 t/s", "ctx", "hit", "RAM"):
            assert part in shown


async def test_the_plan_is_shown_while_loading_and_whole_by_a_command_beside_what_was_measured(setup: Setup) -> None:
    machine = "machine  " + ", ".join(f"part {number} 12.3 GB/s" for number in range(12)) + ", no GPU"
    plan = [
        "model    Fake",
        machine,
        "memory   dense",
        "experts  all",
        "speed    answers 1 to 2 tokens/s",
        "faster   -",
    ]
    async with setup.start() as talk:
        assert "planned" not in str(talk.screen.query_one(StatusBar).render())
        talk.engine.plan, talk.engine.planned = plan, {"low": 0.9, "likely": 1.2, "high": 1.5}
        talk.engine.load_gate = threading.Event()
        await talk.type("/reload")
        lines = talk.screen.query_one("#loading-plan")
        await talk.until(lambda: lines.display and lines.region.height == 6, "six lines at 80x24")
        assert lines.region.right <= 80
        assert talk.screen.query_one("#prompt").region.bottom < 24
        talk.engine.load_gate.set()
        await talk.until(lambda: talk.screen.model.facts is not None)
        await talk.ask("q")
        await talk.type("/plan")
        await talk.until(lambda: isinstance(talk.app.screen, PlanScreen))
        shown = {str(row.children[0].render()): row.children[1] for row in talk.app.screen.query(".plan-row")}
        assert list(shown) == ["model", "machine", "memory", "experts", "speed", "faster", "measured"]
        assert str(shown["machine"].render()) == machine.removeprefix("machine  ")
        assert shown["machine"].region.height > 2, "wrapped, not cut"
        assert "answers 1 tokens/s, prompts 20 tokens/s" in str(shown["measured"].render())
        await talk.press("escape")
        assert talk.screen.monitor.status().planned == (0.9, 1.5)


@pytest.mark.parametrize("size", [(80, 24), (160, 50)])
async def test_the_plan_is_drawn_as_the_command_draws_it_and_fits_the_screen(
    setup: Setup, size: tuple[int, int]
) -> None:
    box = BY_SLUG["gpu-24-ram-64"].hardware
    plan = make_plan(sizes_of("flash"), box)
    setup.size = size

    def prepare(engine: FakeEngine) -> None:
        engine.plan, engine.plan_json = plan.lines(), json.loads(json.dumps(plan.to_json()))

    setup.prepare = prepare
    async with setup.start() as talk:
        await talk.type("/plan")
        await talk.until(lambda: isinstance(talk.app.screen, PlanScreen))
        shown = talk.app.screen.query_one("#plan-bars", Static)
        await talk.until(lambda: "token" in str(shown.render()))
        width = shown.region.width
        assert 70 <= width < size[0]
        lines = str(shown.render()).splitlines()
        assert lines == [line.rstrip() for line in bar_lines(bars(plan), width)]
        assert [line.split()[0] for line in lines if line[:1].strip()] == ["RAM", "GPU", "drive", "token"]
        assert shown.region.height == len(lines), "no line is wrapped"
        body = talk.app.screen.query_one("#plan")
        assert body.has_focus
        await talk.press("end")
        await talk.until(lambda: body.scroll_y == body.max_scroll_y)
        assert body.region.bottom <= size[1]
        await talk.press("escape")
        assert talk.app.screen is talk.screen


# --- beginnings and ends


async def test_damaged_conversations_can_be_rescued_at_the_start(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite3"
    path.write_bytes(b"garbage" * 1000)
    setup.ready = False
    async with setup.start() as talk:
        await talk.until(lambda: isinstance(talk.app.screen, ChoiceDialog))
        await talk.press("enter")
        await talk.until(lambda: talk.app.chat is not None and talk.app.chat.is_mounted)
        assert [p.name for p in tmp_path.glob("c.sqlite3.damaged-*")]
        await talk.until(lambda: talk.screen.model.facts is not None)
        await talk.ask("works")
        assert len(talk.shown) == 2


async def test_without_a_place_for_conversations_one_can_go_on_unsaved(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "c.sqlite3").mkdir()
    setup.ready = False
    async with setup.start() as talk:
        await talk.until(lambda: isinstance(talk.app.screen, ChoiceDialog))
        await talk.click("#choose-memory")
        await talk.until(lambda: talk.app.chat is not None and talk.app.chat.is_mounted and talk.app.chat.model.facts)
        await talk.ask("works")
        assert len(talk.shown) == 2


async def test_quitting_ends_the_engine(setup: Setup) -> None:
    async with setup.start() as talk:
        talk.engine.scripts.put(held("x"))
        await talk.type("go")
        await talk.until(lambda: talk.screen.asking.answering.running)
        await talk.press("ctrl+q")
    assert talk.engine.closed
    with ConversationStore.open(setup.folder / "c.sqlite3") as store:
        assert len(store.branch(store.conversations()[0].id)) == 2


@pytest.mark.parametrize("size", [(80, 24), (160, 50), (40, 12)])
async def test_nothing_is_pushed_off_the_screen(setup: Setup, size: tuple[int, int]) -> None:
    setup.size = size
    async with setup.start() as talk:
        await talk.ask("q " * 200)
        for name in ("#header", "#prompt", "#status", "Footer"):
            region = talk.screen.query_one(name).region
            assert region.height > 0
            assert region.bottom <= size[1]
            assert region.right <= size[0]


@pytest.mark.parametrize("n_layers", [43, 61])
@pytest.mark.parametrize("state", ["side", "full"])
async def test_all_layers_of_a_real_model_are_on_view_at_once(setup: Setup, n_layers: int, state: str) -> None:
    def prepare(engine: FakeEngine) -> None:
        row = {"where": "r" * 100 + "d" * 156, "types": ["MXFP4"]}
        engine.experts = {"n_experts": 256, "layers": [{"layer": n, **row} for n in range(n_layers)]}
        engine.telemetry = {"hits": 90, "misses": 10, "tokens": 30, "bytes_read": 1, "total_s": 2.0, "wait_s": 0.5}

    setup.size, setup.prepare = (160, 50), prepare
    async with setup.start() as talk:
        talk.screen.panels.set(engine=state)  # type: ignore[arg-type]
        panel = talk.screen.query_one(EnginePanel)
        await talk.until(lambda: panel.grid is not None)
        await talk.settled()

        def shown() -> str:
            return "\n".join(strip.text for strip in talk.screen._compositor.render_strips())

        def layers() -> set[int]:
            return {int(number) for number in re.findall(r"(?<!\S) *(\d+) [▓░▒·]", shown())}

        await talk.until(lambda: layers() == set(range(n_layers)) and "F9 map view" in shown(), shown())
        assert panel.map.max_scroll_y == 0
        assert "GPU" not in shown(), "there is none"
        if state == "full":
            text = panel.query_one("#engine-text").region
            assert text.right <= panel.map.region.x, "numbers at the left"


async def test_typing_leaves_an_engine_panel_that_covers_the_input(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.press("f3")
        assert talk.screen.panels.engine == "full"
        await talk.press("H", "i")
        await talk.until(lambda: talk.screen.prompt.text == "Hi")
        assert talk.screen.panels.engine == "off"
        await talk.press("f3")
        talk.app.post_message(events.Paste(" there"))
        await talk.until(lambda: talk.screen.prompt.text == "Hi there")
        assert talk.screen.panels.engine == "off"


async def test_short_notes_leave_status_line_and_keys_alone(setup: Setup) -> None:
    setup.toasts = True
    async with setup.start() as talk:
        for n in range(4):
            talk.screen.notices.note(f"note {n}\nsecond line", timeout_s=PATIENCE_S)
        await talk.until(lambda: len(talk.app.screen.query("Toast")) == 4)
        await talk.settled()
        for toast in talk.app.screen.query("Toast"):
            assert talk.screen.query_one("#header").region.bottom <= toast.region.y
            assert toast.region.bottom <= talk.screen.prompt.region.y


def test_rates_are_written_without_exponents() -> None:
    rates = (0.0123, 0.5, 4.125, 38.46, 1234.5, 123456.0, 0.0)
    assert [format_rate(rate) for rate in rates] == ["0.0123", "0.5", "4.12", "38.5", "1,234", "123,456", "0"]
