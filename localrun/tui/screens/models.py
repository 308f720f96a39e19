"""The model chooser: what was found on this machine, with size and fit, or a path."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.content import Content
from textual.message import Message
from textual.widgets import DataTable, Input, Static

from localrun.engine.model_finder import FoundModel, find_models, fit
from localrun.textsafe import visible_line
from localrun.tui.screens.dialog import Dialog
from localrun.tui.widgets.status_bar import short_size


class ModelsScreen(Dialog[Path]):
    """Gives the path of the chosen model."""

    TITLE_TEXT = "Choose a model"

    @dataclass
    class Found(Message):
        """The search thread found a model; None: it has ended."""

        model: FoundModel | None

    def __init__(self, folders: Sequence[Path], current: Path | None) -> None:
        super().__init__()
        self._folders, self._current = list(folders), current
        self._models: dict[str, FoundModel] = {}

    def compose_content(self) -> ComposeResult:
        yield DataTable(id="models", cursor_type="row", zebra_stripes=True)
        yield Static("looking for models…", id="models-note")
        yield Input(placeholder="or the path of a converted folder, a GGUF or a checkpoint", id="model-path")

    def on_mount(self) -> None:
        table = self.query_one(DataTable)
        for label, width in (("Model", 28), ("Kind", 10), ("Size", 7), ("Fit", None)):
            table.add_column(label, width=width)
        table.focus()
        threading.Thread(target=self._search, name="tui-models", daemon=True).start()

    def _search(self) -> None:
        for model in find_models(self._folders):
            if not self.is_attached:
                return
            self.post_message(self.Found(model))
        self.post_message(self.Found(None))

    @on(Found)
    def show(self, event: Found) -> None:
        note, model = self.query_one("#models-note", Static), event.model
        if model is None:
            where = ", ".join(visible_line(str(folder)) for folder in self._folders)
            note.update(Content(f"{len(self._models)} found in {where}" if self._models else f"no models in {where}"))
            return
        key = str(model.path)
        self._models[key] = model
        mark = "● " if self._current is not None and model.path == self._current else ""
        name, fits = visible_line(mark + model.name, max_chars=28), visible_line(fit(model), max_chars=80)
        # A table would read plain strings as markup: a model named `x[/b]` would be an error.
        cells = [Text(cell) for cell in (name, model.kind, short_size(model.n_bytes), fits)]
        self.query_one(DataTable).add_row(*cells, key=key)
        note.update(f"{len(self._models)} found, still looking…")

    @on(DataTable.RowHighlighted)
    def show_path(self, event: DataTable.RowHighlighted) -> None:
        if event.row_key.value:
            path = visible_line(str(event.row_key.value))
            # Of a long path the end tells models apart.
            self.query_one("#dialog").border_subtitle = Content(path if len(path) <= 70 else f"…{path[-69:]}")

    @on(DataTable.RowSelected)
    def choose(self, event: DataTable.RowSelected) -> None:
        self.dismiss(Path(str(event.row_key.value)))

    @on(Input.Submitted)
    def choose_path(self, event: Input.Submitted) -> None:
        if event.value.strip():
            self.dismiss(Path(event.value.strip()).expanduser())
