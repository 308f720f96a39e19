"""Converts a checkpoint: configure, start, watch, leave running."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Button, Input, ProgressBar, RichLog, Select, Static

from localrun.commands.convert import BASE_CHOICES
from localrun.options import DENSE_CHOICES
from localrun.textsafe import visible, visible_line
from localrun.tui.converter_process import ConversionNews, ConverterProcess
from localrun.tui.screens.attach import PathSuggester
from localrun.tui.screens.dialog import Dialog
from localrun.units import format_bytes_rate, format_duration, format_size

Start = Callable[[Path, Path, list[str]], ConverterProcess]


class ConvertScreen(Dialog[Path]):
    """Returns the finished model's folder when the user wants to load it. The owner of `start` owns the conversion.

    Args:
        log: output of the running or last conversion.
    """

    TITLE_TEXT = "Convert a checkpoint"

    def __init__(
        self, start: Start, running: ConverterProcess | None, log: list[str], source: str = "", target: str = ""
    ) -> None:
        super().__init__()
        self._start, self._conversion, self._log = start, running, log
        self._source = str(running.source) if running and not source else source
        self._target = str(running.target) if running and not target else target

    def compose_content(self) -> ComposeResult:
        paths = PathSuggester()
        with VerticalScroll(id="convert-form") as form:
            form.can_focus = False
            source = Input(
                self._source, placeholder="config.json, safetensors", suggester=paths, id="source", compact=True
            )
            yield from _row("checkpoint", source)
            yield from _row(
                "write to", Input(self._target, placeholder="a folder", suggester=paths, id="target", compact=True)
            )
            recipes = [(f"{name}: {text}" if text else name, name) for name, text in _recipes()]
            yield from _row("recipe", Select(recipes, prompt="none: use the choices below", id="recipe", compact=True))
            yield from _row("experts", Select(_choices(BASE_CHOICES), prompt="as the source", id="base", compact=True))
            yield from _row("better copies", Input(placeholder="e.g. mxfp4:12GiB", id="hot", compact=True))
            yield from _row(
                "target machine", Input(placeholder="e.g. 24GiB-vram,64GiB-ram", id="for-box", compact=True)
            )
            yield from _row(
                "dense", Select(_choices(DENSE_CHOICES), prompt="q8_0, or the recipe's", id="dense", compact=True)
            )
            yield RichLog(id="convert-log", wrap=True, markup=False, max_lines=500, min_width=20)
        yield Static("", id="convert-rate")
        yield ProgressBar(total=1.0, show_eta=False, id="convert-bar")
        with Horizontal(classes="buttons docked"):
            yield Button("Start", id="convert-start", variant="primary", compact=True)
            yield Button("Stop", id="convert-stop", compact=True)
            yield Button("Load the result", id="convert-load", compact=True)
            yield Button("Hide", id="convert-hide", compact=True)

    def on_mount(self) -> None:
        for line in self._log:
            self.query_one(RichLog).write(visible(line))
        self.show(self._conversion.last if self._conversion else ConversionNews())
        first = "#target" if self._source and not self._target else "#source"
        self.query_one("#convert-start" if self._source and self._target else first).focus()

    def show(self, news: ConversionNews) -> None:
        """News of the conversion."""
        log = self.query_one(RichLog)
        log.display = bool(self._log) or self._conversion is not None
        if news.note:
            log.write(visible(news.note))
        if news.error:
            log.write(visible(f"error: {news.error}" + (f"\nhint: {news.hint}" if news.hint else "")))
        bar = self.query_one(ProgressBar)
        bar.display = bool(news.total)
        if news.total:
            bar.update(progress=news.done / news.total)
            self._say(_progress_line(news))
        running = self._conversion is not None and self._conversion.running
        finished = self._conversion is not None and news.ended and not news.error
        if news.ended:
            self._say(f"ended: {news.error}" if news.error else "finished")
        self.query_one("#convert-start", Button).disabled = running
        self.query_one("#convert-stop", Button).disabled = not running
        self.query_one("#convert-load", Button).disabled = not finished

    def _say(self, text: str) -> None:
        self.query_one("#convert-rate", Static).update(Content(visible_line(text)))

    @on(Input.Submitted)
    @on(Button.Pressed, "#convert-start")
    def start(self) -> None:
        if self._conversion is not None and self._conversion.running:
            return
        source, target = self._typed("source"), self._typed("target")
        if not source or not target:
            self._say("enter the checkpoint's folder and the folder to write")
            self.query_one("#target" if source else "#source").focus()
            return
        self.query_one(RichLog).clear()
        self._conversion = self._start(Path(source).expanduser(), Path(target).expanduser(), self._options())
        self._say(f"started: {source}")
        self.show(self._conversion.last)
        self.query_one("#convert-form").scroll_end(animate=False)
        self.query_one("#convert-hide").focus()

    def _options(self) -> list[str]:
        """The choices as arguments of `localrun convert`."""
        options: list[str] = []
        for name in ("recipe", "base", "dense"):
            value = self.query_one(f"#{name}", Select).value
            if isinstance(value, str):
                options += [f"--{name}", value]
        for word in self._typed("hot").replace(",", " ").split():
            options += ["--hot", word]
        if box := self._typed("for-box"):
            options += ["--target", box]
        return options

    def _typed(self, name: str) -> str:
        return self.query_one(f"#{name}", Input).value.strip()

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


def _row(name: str, field: Widget) -> ComposeResult:
    with Horizontal(classes="setting"):
        yield Static(name, classes="setting-name")
        yield field


def _choices(names: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(name, name) for name in names]


def _recipes() -> list[tuple[str, str]]:
    """Name and description of those that ship."""
    import tomllib
    from importlib import resources

    files = resources.files("localrun").joinpath("recipes").iterdir()
    found = [(file.name.removesuffix(".toml"), file) for file in files if file.name.endswith(".toml")]
    return [(name, str(tomllib.loads(file.read_text()).get("description", ""))) for name, file in sorted(found)]


def _progress_line(news: ConversionNews) -> str:
    if not news.is_bytes:
        return f"{news.step}: {100 * news.done / news.total:.0f}%"
    left = "" if news.remaining_s is None else f", {format_duration(news.remaining_s)} left"
    rate = f", {format_bytes_rate(news.bytes_per_s)}{left}" if news.bytes_per_s else ""
    return f"{news.step}: {format_size(news.done)} of {format_size(news.total)}{rate}"
