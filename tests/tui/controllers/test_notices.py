"""Errors become panels, wrong arguments notes; foreign text is harmless; the same error is shown once."""

from __future__ import annotations

from textual.app import App, ComposeResult
from textual.containers import VerticalScroll

from localrun.errors import LocalrunError, StoreError, UsageError
from localrun.tui.controllers.notices import Notices
from localrun.tui.widgets.notices import ErrorPanel


class Screen(App[None]):
    def compose(self) -> ComposeResult:
        yield VerticalScroll(id="notices")

    def on_mount(self) -> None:
        self.notices = Notices(self.screen)
        self.told: list[tuple[str, str, bool]] = []
        self.notify = self.keep  # type: ignore[assignment, method-assign]

    def keep(self, message: str, *, severity: str, markup: bool, **rest: object) -> None:
        self.told.append((message, severity, markup))

    @property
    def panels(self) -> list[ErrorPanel]:
        return list(self.screen.query(ErrorPanel))


async def test_a_wrong_argument_is_a_note_with_its_way_out() -> None:
    app = Screen()
    async with app.run_test():
        app.notices.tell(UsageError("no such preset", hint="known: a, b"))
        app.notices.note("evil \x1b[31m[red]text")
        assert app.told == [
            ("no such preset\n→ known: a, b", "warning", False),
            ("evil ␛[31m[red]text", "information", False),
        ]
        assert app.panels == []


async def test_an_error_is_a_panel_and_the_same_one_is_shown_once() -> None:
    app = Screen()
    async with app.run_test() as pilot:
        for error in (StoreError("the drive is gone"), LocalrunError("another"), StoreError("the drive is gone")):
            app.notices.tell(error)
            await pilot.pause()
        assert [str(panel.error) for panel in app.panels] == ["another", "the drive is gone"]
        assert app.told == []
        app.notices.clear()
        await pilot.pause()
        assert app.panels == []


async def test_work_that_fails_is_told_and_a_fault_of_ours_is_not_hidden() -> None:
    async def fail(error: Exception) -> None:
        raise error

    app = Screen()
    async with app.run_test() as pilot:
        await app.notices.guard(fail(StoreError("the drive is gone")))
        await pilot.pause()
        assert len(app.panels) == 1
        try:
            await app.notices.guard(fail(ZeroDivisionError()))
        except ZeroDivisionError:
            pass
        else:
            raise AssertionError("a bug must end the program with its traceback")
