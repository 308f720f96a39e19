"""Writing a message: files that it names, long pastes, an editor, suggestions of the demo, and the bell at the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from textual import events
from textual.widgets import OptionList, Static

from localrun.engine.process.process import GenerateEvent
from localrun.engine.process.protocol import Delta, Generate
from localrun.errors import UsageError
from localrun.tui import attention, presets
from localrun.tui.app import LocalrunApp
from localrun.tui.demo_words import DEMO_NOTE, DEMO_NOTE_AGAIN, DEMO_QUESTIONS
from localrun.tui.files import completions, is_long_paste, mentioned_files
from localrun.tui.options import ChatOptions
from localrun.tui.screens.dialog import ChoiceDialog
from tests.tui.fake_engine import FakeEngine, facts, finished
from tests.tui.support import Setup, Talk


def test_files_are_those_that_exist_each_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "folder").mkdir()
    text = f"see @a.txt, and @{tmp_path}/a2.txt; mail me@a.txt @nobody @folder @a.txt."
    assert [file.text for file in mentioned_files(text)] == ["A"]


def test_completions_continue_the_word_at_the_cursor(tmp_path: Path) -> None:
    for name in ("alpha.txt", "alps.txt", "beta.txt", ".hidden", "two words"):
        (tmp_path / name).write_text("")
    (tmp_path / "alphabet").mkdir()
    (tmp_path / "alphabet" / "x.py").write_text("")
    assert completions("look at @al") == ["alpha.txt", "alphabet/", "alps.txt"]
    assert completions("@alphabet/") == ["alphabet/x.py"]
    assert completions("@.h") == [".hidden"]
    assert completions("@") == ["alpha.txt", "alphabet/", "alps.txt", "beta.txt"]
    assert completions("mail@al") == completions("nothing") == completions("@nosuch/") == []


async def test_a_file_is_completed_in_the_input_and_goes_with_the_message(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("one two")
    async with setup.start() as talk:
        await talk.press(*"see @no")
        suggestions = talk.screen.query_one("#suggestions", OptionList)
        assert suggestions.display
        await talk.press("enter")
        assert talk.screen.prompt.text == "see @notes.txt "
        assert not suggestions.display
        await talk.press("enter")
        await talk.idle()
        assert talk.engine.commands[0].messages[-1]["content"] == (
            "File `notes.txt`:\n\n```\none two\n```\n\nsee @notes.txt "
        )


async def test_a_file_that_takes_much_of_the_context_is_asked_about(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "large.txt").write_text("words " * 400)
    async with setup.start() as talk:
        await talk.type("see @large.txt now")
        await talk.until(lambda: isinstance(talk.app.screen, ChoiceDialog))
        await talk.press("enter")
        assert talk.shown == []
        assert talk.screen.prompt.text == "see @large.txt now"
        await talk.press("enter")
        await talk.until(lambda: isinstance(talk.app.screen, ChoiceDialog))
        await talk.click("#choose-send")
        await talk.until(lambda: talk.shown)
        await talk.idle()
        assert talk.screen.chat.entries[0].message.attachments[0].name == "large.txt"


async def test_a_file_that_is_no_text_is_refused_and_the_message_stays(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    async with setup.start() as talk:
        await talk.type("see @image.png")
        assert "not a text file" in talk.errors[0]
        assert talk.screen.prompt.text == "see @image.png"
        assert talk.shown == []


async def test_a_long_paste_is_folded_and_sent_whole(setup: Setup) -> None:
    pasted = "\n".join(f"line {n} \x1b[1m" for n in range(2500))
    assert is_long_paste(pasted)
    async with setup.start() as talk:
        talk.app.post_message(events.Paste(pasted))
        await talk.until(lambda: talk.screen.prompt.attachments)
        assert talk.screen.prompt.text == ""
        assert "pasted text 1" in str(talk.screen.query_one("#chips", Static).render())
        await talk.ask("why?")
        content = talk.engine.commands[0].messages[-1]["content"]
        assert pasted in content
        assert content.endswith("why?")


async def test_an_editor_gets_the_input_and_gives_it_back(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def suspend(app: LocalrunApp) -> Iterator[None]:
        yield

    monkeypatch.setattr(LocalrunApp, "suspend", suspend)
    monkeypatch.setenv("VISUAL", "sed -i s/short/long/")
    async with setup.start() as talk:
        await talk.type("a short text", send=False)
        await talk.press("alt+e")
        assert talk.screen.prompt.text == "a long text"
        monkeypatch.setenv("VISUAL", "false")
        await talk.press("alt+e")
        assert any("ended with exit code 1" in note for note in talk.notes)
        assert talk.screen.prompt.text == "a long text"
        monkeypatch.setenv("VISUAL", "no-such-editor-here")
        await talk.press("alt+e")
        assert any("set EDITOR" in note for note in talk.notes)


async def test_the_demo_says_what_it_is_and_tab_offers_questions(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.tui.fake_engine.facts", lambda path, **more: facts(path, name="demo", **more))
    async with setup.start() as talk:
        words = str(talk.screen.query_one("#welcome", Static).render())
        assert "33 million" in words
        assert all(question in words for question in DEMO_QUESTIONS)
        await talk.press("tab")
        assert talk.screen.prompt.text == DEMO_QUESTIONS[0]
        await talk.press("tab")
        assert talk.screen.prompt.text == DEMO_QUESTIONS[1]
        await talk.press("enter")
        await talk.idle()
        assert talk.shown[0] == ("user", DEMO_QUESTIONS[1])


async def test_other_models_offer_nothing(setup: Setup) -> None:
    async with setup.start() as talk:
        assert "33 million" not in str(talk.screen.query_one("#welcome", Static).render())
        assert talk.screen.prompt.offers == ()


@pytest.mark.parametrize(
    ("seconds", "notify", "told"),
    [
        (1.0, "bell", []),
        (60.0, "bell", ["\x07"]),
        (60.0, "desktop", ["\x1b]9;localrun: the answer is ready\x07\x07"]),
        (60.0, "off", [""]),
    ],
)
async def test_the_end_of_a_long_answer_is_told(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, seconds: float, notify: str, told: list[str]
) -> None:
    written: list[str] = []
    monkeypatch.setattr(LocalrunApp, "tell_terminal", lambda app, sequence: written.append(sequence))
    for name, value in (("TERM", "xterm"), ("TMUX", ""), ("VTE_VERSION", None)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    setup.launch = replace(setup.launch, notify=notify)

    def script(engine: FakeEngine, command: Generate) -> Iterator[GenerateEvent]:
        yield Delta(request=1, kind="text", text="done", tokens=(1,))
        end = finished()
        yield type(end)(request=1, reason="eos", timings=replace(end.timings, decode_s=seconds), seed=1)

    async with setup.start() as talk:
        talk.engine.scripts.put(script)
        await talk.ask("q")
        await talk.until(lambda: written == told)


def test_notifications_have_the_form_that_the_terminal_knows() -> None:
    osc_777 = "\x1b]777;notify;localrun;done\x07\x07"
    assert attention.sequence("desktop", "done", {"TERM": "foot"}) == osc_777
    assert attention.sequence("desktop", "done", {"TERM": "xterm", "VTE_VERSION": "7006"}) == osc_777
    inside = attention.sequence("desktop", "done", {"TERM": "tmux-256color", "TMUX": "/tmp/tmux"})
    assert inside == "\x1bPtmux;\x1b\x1b]9;localrun: done\x07\x1b\\\x07"


async def test_the_demo_says_below_its_first_answer_that_it_is_a_toy(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endings(talk: Talk) -> list[str]:
        return [str(line.render()) for line in talk.screen.query(".message-ending").results(Static)]

    monkeypatch.setattr("tests.tui.fake_engine.facts", lambda path, **more: facts(path, name="demo", **more))
    async with setup.start() as talk:
        await talk.ask("Who won the match?")
        await talk.ask("And then?")
        await talk.until(lambda: len(endings(talk)) == 2)
        assert [DEMO_NOTE in ending for ending in endings(talk)] == [True, False]
        assert DEMO_NOTE_AGAIN in endings(talk)[1]
        await talk.type("/new")
        await talk.ask(DEMO_QUESTIONS[0])
        await talk.until(lambda: len(endings(talk)) == 1)
        assert DEMO_NOTE not in endings(talk)[0]


async def test_a_first_start_says_how_far_the_compiler_is(setup: Setup) -> None:
    def words(talk: Talk) -> str:
        return str(talk.screen.query_one("#loading-text", Static).render())

    held = threading.Event()

    def prepare() -> Path:
        assert held.wait(300)
        return Path("/m")

    setup.launch, setup.ready = replace(setup.launch, model=None, prepare=prepare), False
    async with setup.start() as talk:
        await talk.until(lambda: talk.screen.model.loading)
        talk.engine.log = ["compiling one", "something else", "compiling two"]
        await talk.until(lambda: "function 2 of about" in words(talk))
        talk.engine.log = ["compiling three"]  # another process
        await talk.until(lambda: "function 1 of about" in words(talk))
        held.set()


async def test_a_preparation_that_ends_after_the_screen_has_gone_disturbs_nobody(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, failures = threading.Event(), list[threading.ExceptHookArgs]()
    monkeypatch.setattr(threading, "excepthook", failures.append)

    def prepare() -> Path:
        assert held.wait(300)
        return Path("/m")

    setup.launch, setup.ready = replace(setup.launch, model=None, prepare=prepare), False
    async with setup.start() as talk:
        await talk.until(lambda: talk.screen.model.loading)
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "tui-prepare"]
    held.set()
    thread.join(300)
    assert not thread.is_alive()
    assert failures == []


async def test_a_preset_is_kept_listed_completed_and_used_in_another_conversation(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.type('/system You are brief, "quoted" and \x7f odd.')
        await talk.type("/set temperature 0.25")
        await talk.type("/think high")
        await talk.type("/preset save brief")
        assert any("/preset brief" in note for note in talk.notes)
        kept = talk.screen.current.options
        await talk.type("/new")
        assert talk.screen.current.options != kept
        await talk.type("/preset b", send=False)
        suggestions = talk.screen.query_one("#suggestions", OptionList)
        assert [option.id for option in suggestions.options] == ["preset brief"]
        await talk.press("enter", "enter")
        assert talk.screen.current.options == kept
        await talk.ask("hello")
        assert talk.engine.commands[-1].sampling.temperature == 0.25
        assert talk.engine.commands[-1].think == "high"
        assert str(talk.engine.commands[-1].messages[0]["content"]).startswith("You are brief")
        await talk.type("/preset delete brief")
        await talk.type("/preset brief")
        assert any("there is no preset 'brief'" in note for note in talk.notes)


def test_presets_that_were_edited_by_hand_are_checked_by_name(setup: Setup) -> None:
    presets.save("one", ChatOptions(system="s"))
    with presets.path().open("a") as file:
        file.write("[two]\ntemprature = 1\n[three]\ntemperature = -1\n")
    assert presets.names() == ["one", "three", "two"]
    assert presets.load("one").system == "s"
    for name, fault in (("two", "temprature"), ("three", "temperature -1")):
        with pytest.raises(UsageError, match=rf"presets.toml: \[{name}\] .*{fault}"):
            presets.load(name)
    for name in ("save", "", "a b", "../x" * 20):
        with pytest.raises(UsageError, match="not a valid preset name"):
            presets.save(name, ChatOptions())
    presets.path().write_text("broken")
    with pytest.raises(UsageError, match=r"presets\.toml"):
        presets.save("one", ChatOptions())
    assert presets.path().read_text() == "broken"
