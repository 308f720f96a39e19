"""Commands about the model and the engine: choose, load, settings, panel, conversion, and more context."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

from localrun.engine.options import EngineOptions
from localrun.errors import LocalrunError, UsageError
from localrun.textsafe import visible
from localrun.tui.chat_state import ChatState
from localrun.tui.conversion import Conversion, ConversionNews
from localrun.tui.engine_link import as_ours
from localrun.tui.messages import EngineFailed, EngineLoading
from localrun.tui.screens.convert import ConvertScreen
from localrun.tui.screens.models import ModelsScreen
from localrun.tui.screens.settings import SettingsResult, SettingsScreen
from localrun.tui.widgets.notices import LoadingPanel

MAX_LOG_LINES = 500


class ModelCommands(ChatState):
    """Part of `ChatScreen`."""

    def start_first_model(self) -> None:
        """The model that the program was started with."""
        prepare = self.launch.prepare
        if self.model_path is not None:
            self.load_model(self.model_path, self.engine_options)
        elif prepare is not None:
            self.model_loading = True
            self.show_header()

            def run() -> None:
                self.post_message(EngineLoading(0.0, "preparing the demo model"))
                try:
                    path = prepare()
                except Exception as error:  # whatever it is, the screen must not go on waiting
                    self.post_message(EngineFailed(as_ours(error)))
                else:
                    self.app.call_from_thread(self.load_model, path, self.engine_options)

            threading.Thread(target=run, name="tui-prepare", daemon=True).start()
        else:
            self.show_header()
            self.do_models("")

    def load_model(self, path: Path, options: EngineOptions, *, restart: bool = False) -> None:
        """Loads in the background; a running answer is stopped first.

        Args:
            restart: in a new process, for an engine that does not react any more.
        """
        if self.answering.running:
            self.link.stop()
        self.model_path, self.engine_options = path, options
        self.facts, self.model_loading, self.plan_lines, self.planned = None, True, (), None
        self.last_stats = None
        self.clear_errors()
        self.engine_panel.forget()
        self.query_one(LoadingPanel).show(f"starting the engine for {visible(str(path))}", 0.0)
        self.show_header()
        self.link.load(path, options, restart=restart)

    def do_models(self, argument: str) -> None:
        if argument:
            self.load_model(Path(argument).expanduser(), self.engine_options)
            return

        def chosen(path: Path | None) -> None:
            if path is not None:
                self.load_model(path, self.engine_options)

        self.app.push_screen(ModelsScreen(self.launch.model_folders, self.model_path), chosen)

    def do_reload(self, argument: str) -> None:
        if self.model_path is None:
            raise UsageError("no model was chosen", hint="Ctrl+L chooses one")
        self.load_model(self.model_path, self.engine_options, restart=True)

    def no_model(self) -> None:
        self.app.notify("Choose a model; your question is answered then.", timeout=6)
        self.do_models("")

    # --- settings

    def do_settings(self, argument: str) -> None:
        self.open_settings()

    def open_settings(self) -> None:
        screen = SettingsScreen(
            self.options, self.engine_options, self.facts, self.app.theme, list(self.app.available_themes)
        )
        self.app.push_screen(screen, self._apply_settings)

    def _apply_settings(self, result: SettingsResult | None) -> None:
        if result is None:
            return
        self.set_options(result.chat)
        self.app.theme = result.theme
        if result.engine != self.engine_options:
            self.engine_options = result.engine
            if self.model_path is not None:
                self.load_model(self.model_path, result.engine)

    def raise_context(self, n_ctx: int) -> None:
        """Loads the model again with more context."""
        assert self.model_path is not None
        self.load_model(self.model_path, replace(self.engine_options, n_ctx=n_ctx))

    # --- the engine panel

    def do_engine_panel(self, argument: str) -> None:
        if self.has_class("-narrow"):
            self.set_panels(engine="full" if self.panel_engine == "off" else "off")
        else:
            self.set_panels(engine={"off": "side", "side": "full", "full": "off"}[self.panel_engine])  # type: ignore[arg-type]
        if self.panel_engine != "off":
            self.link.ask_stats(expert_map=True)
        if self.panel_engine == "full":  # the input can't be seen: what is typed must not go there
            self.engine_panel.map.focus()
        else:
            self.prompt.area.focus()

    def do_map_view(self, argument: str) -> None:
        if self.panel_engine == "off":
            self.do_engine_panel("")
        self.engine_panel.map.next_view()
        self.engine_panel.show_legend()

    # --- conversion

    def do_convert(self, argument: str) -> None:
        source, _, target = argument.partition(" ")

        def done(path: Path | None) -> None:
            if path is not None:
                self.load_model(path, self.engine_options)

        screen = ConvertScreen(
            self.start_conversion, self.conversion, self.conversion_log, source.strip(), target.strip()
        )
        self.app.push_screen(screen, done)

    def start_conversion(self, source: Path, target: Path, options: list[str]) -> Conversion:
        """One at a time; goes on when the dialog is closed."""
        self.conversion_log.clear()
        self.conversion = Conversion(
            source, target, options, lambda news: self.app.call_from_thread(self.conversion_news, news)
        )
        return self.conversion

    def conversion_news(self, news: ConversionNews) -> None:
        """News from the converter, shown in the dialog if it is open, in the status line anyway."""
        lines = [news.note, f"error: {news.error}" if news.error else ""]
        self.conversion_log.extend(line for line in lines if line)
        del self.conversion_log[:-MAX_LOG_LINES]
        screen = self.app.screen
        if isinstance(screen, ConvertScreen):
            screen.show(news)
        elif news.ended and self.conversion is not None:
            if news.error:
                self.show_error("The conversion ended", LocalrunError(news.error, hint=news.hint))
            else:
                where = visible(str(self.conversion.target))
                self.app.notify(where, title="The conversion is finished", markup=False, timeout=20)

    def conversion_status(self) -> str:
        """For the status line."""
        if self.conversion is None or not self.conversion.running:
            return ""
        last = self.conversion.last
        return f"converting {100 * last.done / last.total:.0f}%" if last.total else "converting"
