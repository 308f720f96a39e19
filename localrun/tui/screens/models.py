"""The model chooser: models found on this machine, with size and fit, or a path."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.content import Content
from textual.message import Message
from textual.widgets import DataTable, Input, Static

from localrun import config
from localrun.api import models
from localrun.engine.model_finder import FoundModel, find_models, fit
from localrun.errors import LocalrunError
from localrun.textsafe import visible, visible_line
from localrun.tui.screens.dialog import Dialog
from localrun.tui.widgets.status_bar import short_size

NAME_CELLS = 30


@dataclass(frozen=True, slots=True)
class ModelChosen:
    """The path of a model; None: the demo, which may have to be converted first."""

    path: Path | None


class ModelsScreen(Dialog[ModelChosen]):
    """Returns the chosen model. Runnable models come first; details of the highlighted one are below the table.

    Args:
        current: the model that is loaded.
        names: the user's own, by path.
    """

    TITLE_TEXT = "Choose a model"

    @dataclass
    class Found(Message):
        """The search thread found a model; None: it has ended."""

        model: FoundModel | None

    def __init__(self, folders: Sequence[Path], current: Path | None, names: Mapping[Path, str] | None = None) -> None:
        super().__init__()
        self._folders, self._current, self._names = list(folders), current, names or {}
        self._models: dict[str, FoundModel] = {}
        self._has_refused = False  # the note says why, and the search doesn't write over it

    def compose_content(self) -> ComposeResult:
        yield DataTable(id="models", cursor_type="row", zebra_stripes=True)
        yield Static("", id="model-details")
        yield Static("looking for models…", id="models-note")
        yield Input(placeholder="or the path or name of a model", id="model-path")

    def on_mount(self) -> None:
        table = self.query_one(DataTable)
        for label, width in (("Model", NAME_CELLS), ("Experts", 8), ("Size", 7), ("Fit", None)):
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
        if (model := event.model) is None:
            where = ", ".join(visible_line(str(folder)) for folder in self._folders)
            self._note(f"{len(self._models)} found in {where}" if self._models else f"no models in {where}")
            return
        self._models[str(model.path)] = model
        self._fill()
        self._note(f"{len(self._models)} found, still looking…")

    def _note(self, text: str) -> None:
        if not self._has_refused:
            self.query_one("#models-note", Static).update(Content(text))

    def _fill(self) -> None:
        """Rebuilds all rows in order; the highlighted model stays highlighted."""
        table = self.query_one(DataTable)
        found = sorted(
            self._models.values(), key=lambda m: (bool(m.problem), m.path != self._current, m.name.casefold())
        )
        kept = None
        if table.row_count and table.cursor_row > 0:
            kept = str(table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value)
        names = [model.name for model in found]
        table.clear()
        for model in found:
            mark = "● " if model.path == self._current else ""
            # Of two with one name, the file or folder tells which is which.
            name = model.location if names.count(model.name) > 1 else model.name
            name = self._names.get(model.path.resolve(), name)
            fits = "can't be run" if model.problem else fit(model)
            cells = (
                visible_line(mark + name, max_chars=NAME_CELLS),
                model.format or ("–" if model.problem else ""),
                short_size(model.n_bytes),
                visible_line(fits, max_chars=60),
            )
            # A table would read plain strings as markup: a model named `x[/b]` would be an error.
            style = "dim" if model.problem else ""
            table.add_row(*(Text(cell, style) for cell in cells), key=str(model.path))
        keys = [str(model.path) for model in found]
        table.move_cursor(row=keys.index(kept) if kept in keys else 0)

    @on(DataTable.RowHighlighted)
    def show_details(self, event: DataTable.RowHighlighted) -> None:
        model = self._models.get(str(event.row_key.value)) if event.row_key is not None else None
        if model is None:
            return
        path = visible_line(str(model.path))
        details = [f"{visible_line(model.name)} ({model.kind})", path]
        if model.problem:
            details.append(f"✗ {visible(model.problem)}")
        self.query_one("#model-details", Static).update(Content("\n".join(details)))

    @on(DataTable.RowSelected)
    def choose(self, event: DataTable.RowSelected) -> None:
        self.dismiss(ModelChosen(Path(str(event.row_key.value))))

    @on(Input.Submitted)
    def choose_path(self, event: Input.Submitted) -> None:
        if not event.value.strip():
            return
        try:
            path = models.resolve(event.value.strip(), config.load())
        except LocalrunError as error:
            hint = f"\n→ {error.hint}" if error.hint else ""
            self._has_refused = True
            self.query_one("#models-note", Static).update(Content(visible(f"{error}{hint}")))
        else:
            self.dismiss(ModelChosen(path))
