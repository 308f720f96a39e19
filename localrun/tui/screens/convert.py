"""Converting a checkpoint: start it, watch it, leave it running."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import Button, Input, ProgressBar, RichLog, Select, Static

from localrun.textsafe import visible, visible_line
from localrun.tui.conversion import Conversion, ConversionNews
from localrun.tui.screens.attach import PathSuggester
from localrun.tui.screens.dialog import Dialog
from localrun.units import format_duration, format_size

Start = Callable[[Path, Path, list[str]], Conversion]


class ConvertScreen(Dialog[Path]):
    """Gives the finished model's folder when the user wants to load it. The conversion belongs to the chat screen."""

    TITLE_TEXT = "Convert a checkpoint"

    def __init__(
        self, start: Start, running: Conversion | None, log: list[str], source: str = "", target: str = ""
    ) -> None:
        super().__init__()
        self._start, self._conversion, self._log = start, running, log
        self._source = str(running.source) if running else source
        self._target = str(running.target) if running else target

    def compose_content(self) -> ComposeResult:
        yield Input(
            self._source,
            placeholder="checkpoint folder (config.json, safetensors)",
            suggester=PathSuggester(),
            id="source",
        )
        yield Input(self._target, placeholder="folder to write", suggester=PathSuggester(), id="target")
        with Horizontal(classes="setting"):
            yield Static("experts", classes="setting-name")
            yield Select([(t, t) for t in ("mxfp4", "q8_0", "bf16", "f32")], prompt="as the source", id="base")
            yield Static("dense", classes="setting-name")
            yield Select([(t, t) for t in ("q8_0", "bf16", "f32")], value="q8_0", allow_blank=False, id="dense")
        yield ProgressBar(total=1.0, show_eta=False, id="convert-bar")
        yield Static("", id="convert-rate")
        yield RichLog(id="convert-log", wrap=True, markup=False, max_lines=500)
        with Horizontal(classes="buttons"):
            yield Button("Start", id="convert-start", variant="primary", compact=True)
            yield Button("Stop", id="convert-stop", compact=True)
            yield Button("Load the result", id="convert-load", compact=True)
            yield Button("Hide", id="convert-hide", compact=True)

    def on_mount(self) -> None:
        for line in self._log:
            self.query_one(RichLog).write(visible(line))
        self.show(self._conversion.last if self._conversion else ConversionNews())

    def show(self, news: ConversionNews) -> None:
        """News of the running conversion, passed on by the chat screen."""
        running = self._conversion is not None and self._conversion.running
        if news.note:
            self.query_one(RichLog).write(visible(news.note))
        if news.error:
            self.query_one(RichLog).write(
                visible(f"error: {news.error}" + (f"\nhint: {news.hint}" if news.hint else ""))
            )
        if news.total:
            self.query_one(ProgressBar).update(progress=news.done / news.total)
            left = "" if news.remaining_s is None else f", {format_duration(news.remaining_s)} left"
            rate = f", {news.bytes_per_s / 1e9:.2f} GB/s{left}" if news.bytes_per_s else ""
            self.query_one("#convert-rate", Static).update(
                Content(f"{format_size(news.done)} of {format_size(news.total)}{rate}")
            )
        done = self._conversion is not None and news.ended and not news.error
        self.query_one("#convert-start", Button).disabled = running
        self.query_one("#convert-stop", Button).disabled = not running
        self.query_one("#convert-load", Button).disabled = not done

    @on(Button.Pressed, "#convert-start")
    def start(self) -> None:
        source, target = (self.query_one(f"#{name}", Input).value.strip() for name in ("source", "target"))
        if not source or not target:
            self.query_one("#convert-rate", Static).update("name the checkpoint's folder and the one to write")
            return
        options = []
        for name in ("base", "dense"):
            value = self.query_one(f"#{name}", Select).value
            if isinstance(value, str):
                options += [f"--{name}", value]
        self._conversion = self._start(Path(source).expanduser(), Path(target).expanduser(), options)
        self.query_one("#convert-rate", Static).update(Content(f"started: {visible_line(source)}"))
        self.show(self._conversion.last)

    @on(Button.Pressed, "#convert-stop")
    def stop(self) -> None:
        if self._conversion is not None:
            self._conversion.stop()

    @on(Button.Pressed, "#convert-load")
    def load(self) -> None:
        self.dismiss(self._conversion.target if self._conversion else None)

    @on(Button.Pressed, "#convert-hide")
    def hide(self) -> None:
        self.dismiss(None)
