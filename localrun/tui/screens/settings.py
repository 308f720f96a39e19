"""Settings: the loaded model, sampling, memory and context, the theme."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.widgets import Button, Input, Select, Static, TextArea

from localrun.engine import memory
from localrun.engine.facts import ModelFacts
from localrun.engine.options import EngineOptions, check_answer, check_lengths
from localrun.errors import UsageError
from localrun.option import Option, OptionKind, Where
from localrun.options import THINK_MODES, those
from localrun.textsafe import visible, visible_line
from localrun.tui.options import NAMES, ChatOptions, describe, option_of, value_of, with_value
from localrun.tui.screens.dialog import Dialog
from localrun.units import format_size

ENGINE_OPTIONS = those("engine", Where.DIALOG)


@dataclass(frozen=True, slots=True)
class SettingsResult:
    """What the user set. `engine` differs from before only if the model must be loaded again."""

    chat: ChatOptions
    engine: EngineOptions
    theme: str


class SettingsScreen(Dialog[SettingsResult]):
    """Gives the new settings; nothing is changed before they are all sound."""

    TITLE_TEXT = "Settings"

    def __init__(
        self, chat: ChatOptions, engine: EngineOptions, facts: ModelFacts | None, theme: str, themes: Sequence[str]
    ) -> None:
        super().__init__()
        self._chat, self._engine, self._facts = chat, engine, facts
        self._theme, self._themes = theme, sorted(themes)

    def compose_content(self) -> ComposeResult:
        modes = self._facts.think_modes if self._facts else THINK_MODES
        with VerticalScroll(id="settings"):
            yield Static("Model", classes="help-group")
            yield Static(Content("\n".join(_facts_lines(self._facts))), id="facts")
            yield Static("This conversation", classes="help-group")
            yield from _row(
                "thinking", Select([(m, m) for m in modes], value=_known(self._chat.think, modes), id="think")
            )
            for name in NAMES:
                value = value_of(self._chat, name)
                yield from _row(name, Input(option_of(name).show(value), id=name, compact=True), describe(name))
            yield Static("system prompt", classes="setting-name")
            yield TextArea(self._chat.system, id="system")
            yield Static("Engine (changes reload the model)", classes="help-group")
            for option in ENGINE_OPTIONS:
                yield from _row(option.name, _field(option, getattr(self._engine, option.field)), _meaning(option))
            yield Static("Program", classes="help-group")
            yield from _row("theme", Select([(t, t) for t in self._themes], value=self._theme, id="theme"))
        yield Static("", id="settings-error")
        with Horizontal(classes="buttons"):
            yield Button("Apply", id="apply", variant="primary", compact=True)
            yield Button("Cancel", id="cancel", compact=True)

    @on(Button.Pressed, "#cancel")
    def cancel(self) -> None:
        self.dismiss(None)

    @on(Input.Submitted)
    @on(Button.Pressed, "#apply")
    def apply(self) -> None:
        try:
            result = self._read()
        except UsageError as error:
            text = f"{error}" + (f"  → {error.hint}" if error.hint else "")
            self.query_one("#settings-error", Static).update(Content(visible(text)))
            return
        self.dismiss(result)

    def _read(self) -> SettingsResult:
        chat = replace(
            self._chat,
            think=str(self.query_one("#think", Select).value),
            system=self.query_one("#system", TextArea).text.strip(),
        )
        for name in NAMES:
            chat = with_value(chat, name, self._typed(name))
        engine = replace(self._engine, **{option.field: self._engine_value(option) for option in ENGINE_OPTIONS})
        memory.check_threads(engine.n_threads)
        memory.check_ram(engine.ram_bytes)
        if self._facts is not None:
            check_lengths(self._facts.n_ctx_train, n_ctx=engine.n_ctx, n_batch=engine.n_batch)
            check_answer(chat.max_tokens, engine.n_ctx or self._facts.n_ctx)
        return SettingsResult(chat, engine, str(self.query_one("#theme", Select).value))

    def _engine_value(self, option: Option) -> Any:
        before = getattr(self._engine, option.field)
        if option.kind in (OptionKind.CHOICE, OptionKind.SWITCH):
            return option.parse(self.query_one(f"#{option.field}", Select).value)
        text = self._typed(option.field)
        if text == _shown(option, before):  # a size is rounded: unchanged means the same number of bytes
            return before
        return option.parse(text) if text else option.default

    def _typed(self, name: str) -> str:
        return self.query_one(f"#{name}", Input).value.strip()


def _row(name: str, field: Input | Select[str], meaning: str = "") -> ComposeResult:
    with Horizontal(classes="setting"):
        yield Static(name, classes="setting-name")
        yield field
        yield Static(meaning, classes="setting-meaning")


def _known(value: str, values: Sequence[str]) -> str:
    return value if value in values else values[0]


def _field(option: Option, value: Any) -> Input | Select[str]:
    if option.kind in (OptionKind.CHOICE, OptionKind.SWITCH):
        words = option.choices or ("false", "true")
        return Select([(w, w) for w in words], value=option.show(value), allow_blank=False, id=option.field)
    return Input(_shown(option, value), id=option.field, compact=True)


def _shown(option: Option, value: Any) -> str:
    """The default is an empty field."""
    return "" if value == option.default else option.show(value)


def _meaning(option: Option) -> str:
    if option.default is None:
        return option.unset.replace("without it", "empty")
    if option.kind is OptionKind.COUNT and option.default:
        return f"{option.unit}; empty: {option.default}"
    return option.help.replace("; 0: ", "; empty: ")


def _facts_lines(facts: ModelFacts | None) -> Iterator[str]:
    if facts is None:
        yield "none is loaded"
        return
    yield f"{visible_line(facts.name)} ({facts.architecture}), {format_size(facts.file_bytes)}"
    yield visible_line(facts.path)
    experts = f"{facts.n_experts} experts of {format_size(facts.expert_bytes)}"
    yield f"{facts.n_layers} layers, {facts.n_moe_layers} of them with {experts}"
    yield f"context {facts.n_ctx:,} of at most {facts.n_ctx_train:,} tokens, {facts.n_threads} threads"
