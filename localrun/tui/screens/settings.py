"""Model and sampling: what is loaded, how answers are chosen, how much memory and context there is, the theme."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.widgets import Button, Input, Select, Static, TextArea

from localrun.engine.facts import ModelFacts
from localrun.engine.options import EngineOptions
from localrun.errors import UsageError
from localrun.textsafe import visible, visible_line
from localrun.tui.options import NAMES, ChatOptions, describe, value_of, with_value
from localrun.tui.screens.dialog import Dialog
from localrun.units import format_size, parse_size

KvType = Literal["f16", "bf16", "q8_0", "q4_0", "f32"]
KV_TYPES = get_args(KvType)


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
        modes = self._facts.think_modes if self._facts else ("off", "high", "max")
        with VerticalScroll(id="settings"):
            yield Static("Model", classes="help-group")
            yield Static(Content("\n".join(_facts_lines(self._facts))), id="facts")
            yield Static("This conversation", classes="help-group")
            yield from _row(
                "thinking", Select([(m, m) for m in modes], value=_known(self._chat.think, modes), id="think")
            )
            for name in NAMES:
                value = value_of(self._chat, name)
                yield from _row(
                    name, Input("" if value is None else f"{value:g}", id=name, compact=True), describe(name)
                )
            yield Static("system prompt", classes="setting-name")
            yield TextArea(self._chat.system, id="system")
            yield Static("Engine (changes load the model again)", classes="help-group")
            yield from _row(
                "RAM for experts", Input(_size(self._engine.ram_bytes), id="ram", compact=True), "empty: what is free"
            )
            yield from _row(
                "context", Input(str(self._engine.n_ctx or ""), id="n_ctx", compact=True), "tokens; empty: the model's"
            )
            yield from _row(
                "threads", Input(str(self._engine.n_threads or ""), id="n_threads", compact=True), "empty: cores"
            )
            yield from _row("KV cache", Select([(t, t) for t in KV_TYPES], value=self._engine.kv_type, id="kv_type"))
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
        ram = self._typed("ram")
        before = _size(self._engine.ram_bytes)
        engine = replace(
            self._engine,
            # The text is rounded: unchanged means the same number of bytes.
            ram_bytes=self._engine.ram_bytes if ram == before else parse_size(ram) if ram else None,
            n_ctx=_count("context", self._typed("n_ctx")),
            n_threads=_count("threads", self._typed("n_threads")),
            kv_type=cast(KvType, self.query_one("#kv_type", Select).value),
        )
        return SettingsResult(chat, engine, str(self.query_one("#theme", Select).value))

    def _typed(self, name: str) -> str:
        return self.query_one(f"#{name}", Input).value.strip()


def _row(name: str, field: Input | Select[str], meaning: str = "") -> ComposeResult:
    with Horizontal(classes="setting"):
        yield Static(name, classes="setting-name")
        yield field
        yield Static(meaning, classes="setting-meaning")


def _known(value: str, values: Sequence[str]) -> str:
    return value if value in values else values[0]


def _size(n_bytes: int | None) -> str:
    return "" if n_bytes is None else format_size(n_bytes).replace(" ", "")


def _count(name: str, text: str) -> int:
    if not text:
        return 0
    if not text.isdecimal():
        raise UsageError(f"{name} {text!r}: expected a whole number")
    return int(text)


def _facts_lines(facts: ModelFacts | None) -> Iterator[str]:
    if facts is None:
        yield "none is loaded"
        return
    yield f"{visible_line(facts.name)} ({facts.architecture}), {format_size(facts.file_bytes)}"
    yield visible_line(facts.path)
    experts = f"{facts.n_experts} experts of {format_size(facts.expert_bytes)}"
    yield f"{facts.n_layers} layers, {facts.n_moe_layers} of them with {experts}"
    yield f"context {facts.n_ctx:,} of at most {facts.n_ctx_train:,} tokens, {facts.n_threads} threads"
