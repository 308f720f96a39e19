"""The model: loading it, its state, and recovery from failed loads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from textual.screen import Screen

from localrun import __version__, config
from localrun.api import demo, models
from localrun.commands.compiling import USUAL_FUNCTIONS, compiled_here
from localrun.engine.facts import ModelFacts
from localrun.engine.model_look import check
from localrun.engine.options import EngineOptions
from localrun.engine.planner.bars import Bar, read_bars
from localrun.errors import EngineDiedError, LocalrunError, StoppedError, UsageError
from localrun.textsafe import visible_line
from localrun.tui.controllers.notices import Notices
from localrun.tui.controllers.work import Handler, Invocation
from localrun.tui.engine_link import EngineLink
from localrun.tui.faults import as_ours
from localrun.tui.messages import EngineDied, EngineFailed, EngineLoading, EngineReady, ModelChecked
from localrun.tui.screens.models import ModelChosen, ModelsScreen
from localrun.tui.screens.plan import planned
from localrun.tui.widgets.notices import LoadingPanel

DEMO_NAME = "demo"
"""`general.name` of the model that ships."""


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model and how it is loaded."""

    path: Path
    options: EngineOptions


class ModelSwitch:
    """Owns the link to the engine, the loaded model, and the previous one, in case the next load fails.

    Args:
        prepare: returns the first model if none was named (it may have to be converted); None: the chooser opens.
        begun: called when a load takes the model away.
        ready: called when there is a model.
        changed: called when `label` has changed.
        to_input: gives the focus to the input.

    Attributes:
        link: the engine.
        facts: of the model that can answer now; None: there is none.
        loading: a load is running.
        plan_lines: of the current load; empty for models too small for a plan.
        planned: range of decode tokens per second that the plan predicts.
        plan_bars: the plan's bars.
    """

    def __init__(
        self,
        screen: Screen[Any],
        link: EngineLink,
        notices: Notices,
        folders: Sequence[Path],
        options: EngineOptions,
        *,
        begun: Callable[[], None],
        ready: Callable[[], None],
        changed: Callable[[], None],
        to_input: Callable[[], Any],
    ) -> None:
        self._screen, self.link, self._notices, self._folders = screen, link, notices, folders
        self._begun, self._ready, self._changed, self._to_input = begun, ready, changed, to_input
        self.options = options
        self.facts: ModelFacts | None = None
        self.loading = False
        self.plan_lines: tuple[str, ...] = ()
        self.planned: tuple[float, float] | None = None
        self.plan_bars: tuple[Bar, ...] = ()
        self._loading_text, self._loading_progress = "", 0.0
        self._compiled_before = self._compiled = 0
        self._loaded: ModelChoice | None = None
        self._wanted: ModelChoice | None = None

    def commands(self) -> dict[str, Handler]:
        return {"models": self._models, "reload": self._reload}

    @property
    def label(self) -> str:
        """The model in a few words."""
        if self.facts is not None:
            return visible_line(self.facts.name, max_chars=40)
        return "loading…" if self.loading else "no model (Ctrl+L)"

    @property
    def is_demo(self) -> bool:
        """The model is the one that ships, which is a toy."""
        return self.facts is not None and self.facts.name == DEMO_NAME

    @property
    def path(self) -> Path | None:
        """Of the model that is loaded, or being loaded."""
        return None if self._wanted is None else self._wanted.path

    # --- loading

    def begin(self, path: Path | None, prepare: Callable[[], Path] | None) -> None:
        """The first model."""
        if path is not None:
            self.load(path)
        elif prepare is not None:
            self._prepare(prepare)
        else:
            self._changed()
            self._choose()

    def _prepare(self, prepare: Callable[[], Path]) -> None:
        """The first model, when it is there, unless another one was chosen meanwhile."""
        self.loading = True
        self._compiled_before = self._compiled = self._count_compiled()
        self._changed()
        self._screen.post_message(EngineLoading(0.0, "preparing the demo model"))

        def prepared(path: Path) -> None:
            if self._wanted is None:
                self.load(path)

        def failed(error: LocalrunError) -> None:
            if self._wanted is None:
                self.failed(EngineFailed(error))

        def run() -> None:
            try:
                path = prepare()
            except Exception as error:  # on any error: the screen must not keep waiting
                self._screen.call_later(failed, as_ours(error))
            else:
                self._screen.call_later(prepared, path)  # after the end of the screen, nothing happens

        threading.Thread(target=run, name="tui-prepare", daemon=True).start()

    def load(self, path: Path, options: EngineOptions | None = None, *, restart: bool = False) -> None:
        """Replaces the current model; a running answer is stopped first.

        Args:
            options: load options; None: as before.
            restart: in a new process, for an unresponsive engine.
        """
        self.link.stop()
        self.options = options or self.options
        self._wanted = ModelChoice(path, self.options)
        self.facts, self.loading, self.plan_lines, self.planned = None, True, (), None
        self._notices.clear()
        self._begun()
        self._compiled_before = self._compiled = compiled_here() if restart else self._count_compiled()
        self._loading_text, self._loading_progress = f"starting the engine for {visible_line(str(path))}", 0.0
        self._show_progress()
        self._changed()
        self.link.load(path, self.options, restart=restart)

    def switch(self, path: Path | None) -> None:
        """Loads another model if its headers are valid; otherwise keeps the current one.

        Args:
            path: None: the demo model, which is converted first if necessary.
        """
        if path is None and self._wanted is None:
            self._prepare(demo.converted)
            return
        if path is not None and self.facts is None:
            self.load(path.expanduser())
            return
        self._notices.note("preparing the demo model…" if path is None else f"checking {path}…", timeout_s=2)

        def run() -> None:
            try:
                found = demo.converted() if path is None else path.expanduser()
                self._screen.post_message(ModelChecked(found, check(found)))
            except Exception as error:  # the demo can't be converted
                self._screen.post_message(ModelChecked(Path(DEMO_NAME), as_ours(error)))

        threading.Thread(target=run, name="tui-check", daemon=True).start()

    def checked(self, event: ModelChecked) -> None:
        """Its headers were looked at."""
        if event.error is None:
            self.load(event.path)
        else:
            self._notices.error("Can't load this model; keeping the current one", event.error, ("models", "close"))

    def raise_context(self, n_ctx: int) -> None:
        """Loads the model again with more context."""
        assert self._wanted is not None
        self.load(self._wanted.path, replace(self.options, n_ctx=n_ctx))

    def change_options(self, options: EngineOptions) -> None:
        """Loads the model again if they differ."""
        if options != self.options:
            self.options = options
            if self._wanted is not None:
                self.load(self._wanted.path, options)

    # --- what the engine says

    def show_loading(self, event: EngineLoading) -> None:
        if not self.loading:
            self.loading, self.facts, self.plan_lines = True, None, ()
            self._changed()
        self.plan_lines += event.plan
        self._loading_text, self._loading_progress = event.text, event.progress
        self._show_progress()

    def tick_loading(self) -> None:
        """Once a second: the compiler, which a first start on a processor waits for, says nothing itself."""
        if self.loading and (n_compiled := self._count_compiled()) != self._compiled:
            if n_compiled < self._compiled:  # another process
                self._compiled_before = compiled_here()
            self._compiled = n_compiled
            n_new = n_compiled - self._compiled_before
            about = f" of about {USUAL_FUNCTIONS}" if n_new < USUAL_FUNCTIONS else ""
            self._loading_text = f"compiling for this processor, first run only: function {n_new}{about}"
            self._loading_progress = min(1.0, n_new / USUAL_FUNCTIONS)
            self._show_progress()

    def _count_compiled(self) -> int:
        """By the engine, as its log says, and by this process, which may have to convert the demo model."""
        return compiled_here() + sum(line.startswith("compiling ") for line in self.link.engine.log_tail())

    def _show_progress(self) -> None:
        """The last news: what the load says, or how far the compiler is."""
        self._screen.query_one(LoadingPanel).show(self._loading_text, self._loading_progress, self.plan_lines)

    def loaded(self, event: EngineReady) -> None:
        self.loading, self.facts = False, event.facts
        self.planned, self.plan_bars = planned(event.plan), tuple(read_bars(event.plan))
        self._loaded = self._wanted
        if self._wanted is not None:  # writes to the disk, durably
            threading.Thread(target=models.remember, args=(self._wanted.path,), name="tui-remember").start()
        self._screen.query_one(LoadingPanel).display = False
        self._changed()
        self._ready()

    def failed(self, event: EngineFailed) -> None:
        """Says so; the model that worked before is loaded again."""
        self.loading, self.facts = False, None
        self._screen.query_one(LoadingPanel).display = False
        before, failed = self._loaded, self._wanted
        self._changed()
        if isinstance(event.error, StoppedError):
            return
        log = self.link.engine.log_tail() if isinstance(event.error, EngineDiedError) else []
        if before is None or before == failed:
            self._notices.error("Could not load the model", event.error, ("models", "settings", "reload", "close"), log)
            return
        self._loaded = None  # if that fails too, give up
        self.load(before.path, before.options)
        self._notices.error(
            "Could not load the model; reloading the previous one",
            event.error,
            ("models", "settings", "close"),
            log,
        )

    def died(self, event: EngineDied) -> None:
        """Reports the crash and restarts the engine; a crash during a load is reported by the load."""
        if self.loading:
            return
        self.facts = None
        self._notices.error(
            "The engine died; localrun restarts it",
            event.error,
            ("reload", "models", "close"),
            [*self._for_a_report(), *(self.link.engine.log_tail() or ["(the engine's log is empty)"])],
        )
        self.loading = True
        self._begun()
        self._changed()
        self.link.reload()

    def _for_a_report(self) -> list[str]:
        """What was loaded, and how."""
        path = "no model" if self._wanted is None else str(self._wanted.path)
        return [f"localrun {__version__}", path, str(self.options)]

    # --- commands

    def choose_for_a_question(self) -> None:
        """A question was asked and there is no model to answer it."""
        self._notices.note("Your question is kept: choose a model to get an answer.", timeout_s=6)
        self._choose()

    def _models(self, call: Invocation) -> None:
        if call.argument:
            self.switch(models.resolve(call.argument, config.load()))
        else:
            self._choose()

    def _choose(self) -> None:
        if isinstance(self._screen.app.screen, ModelsScreen):
            return

        def chosen(model: ModelChosen | None) -> None:
            if model is not None:
                self.switch(model.path)
            self._to_input()

        names = models.named(config.load())
        folders = dict.fromkeys([*self._folders, *(path.parent for path in names)])
        self._screen.app.push_screen(ModelsScreen([*folders], self.path, names), chosen)

    def _reload(self, call: Invocation) -> None:
        if self._wanted is None:
            raise UsageError("no model was chosen", hint="Ctrl+L chooses one")
        self.load(self._wanted.path, restart=True)
