"""The conversation: thousands of messages, of which only those near the viewport are widgets.

Spacers above and below replace the rest, with measured or estimated heights, so that the scrollbar is correct and any position
can be jumped to. The view stays in place when something above it changes height: unless it follows the end, the first visible
message is anchored at every layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from textual import on
from textual.containers import VerticalScroll
from textual.geometry import Size
from textual.layout import DockArrangeResult
from textual.scrollbar import ScrollBar
from textual.widget import Widget
from textual.widgets import Static

from localrun.engine.conversations import Message
from localrun.tui.widgets.message_view import Entry, MessageView

MARGIN_PAGES = 1.5
"""Pages above and below the viewport that are kept as widgets."""

MIN_MARGIN_ROWS = 30


class Spacer(Static):
    """Spacer for messages without widgets."""

    def set_height(self, rows: int) -> None:
        self.styles.height = rows
        self.display = rows > 0


class ChatView(VerticalScroll, can_focus=False):
    """A window of `MessageView`s over a list of entries.

    Widgets exist for `entries[first:last]`. Everything runs on the event loop; the window is moved by one task at a time.
    """

    def __init__(self) -> None:
        super().__init__(id="chat")
        self.entries: list[Entry] = []
        self._index: dict[int, int] = {}
        self._views: dict[int, MessageView] = {}
        self._first = self._last = 0
        self._heights: list[int] = []
        self._measured_width = 0
        self._top, self._bottom = Spacer(classes="spacer"), Spacer(classes="spacer")
        self._held: tuple[MessageView, int] | None = None
        self._jumping = False  # to what is held; the next layout arrives there
        self._placed: list[tuple[MessageView, int, int]] = []
        self._arranging = False
        self._update_pending = False

    # --- what it shows

    async def show(self, entries: Sequence[Entry], *, at: int | None = None) -> None:
        """Shows a branch. Messages shared with the previous one are kept.

        Args:
            at: message to scroll to; None: the end.
        """
        async with self.lock:
            await self._show(entries, at)

    async def _show(self, entries: Sequence[Entry], at: int | None) -> None:
        common = 0
        for old, new in zip(self.entries, entries, strict=False):
            if old.message.id != new.message.id:
                break
            common += 1
        stale = [entry.message.id for entry in self.entries[common:]]
        self.entries = list(entries)
        self._index = {entry.message.id: i for i, entry in enumerate(self.entries)}
        self._heights[common:] = [self._estimate(entry.message) for entry in self.entries[common:]]
        await self._drop(stale)
        self._first, self._last = min(self._first, common), min(self._last, common)
        for view in list(self._views.values()):
            await view.sync(self.entries[self._index[view.message_id]])
        if at is not None and at in self._index:
            await self.scroll_to_message(at)
        else:
            await self.scroll_to_end()

    async def append(self, entry: Entry) -> None:
        """Adds a message at the end and follows it."""
        async with self.lock:
            self.entries.append(entry)
            self._index[entry.message.id] = len(self.entries) - 1
            self._heights.append(self._estimate(entry.message))
            await self.scroll_to_end()

    async def sync(self, entry: Entry, *, thinking_live: bool = False) -> None:
        """New state of a message that is shown (perhaps outside of the window)."""
        index = self._index.get(entry.message.id)
        if index is None:
            return
        self.entries[index] = entry
        view = self._views.get(entry.message.id)
        if view is not None:
            await view.sync(entry, thinking_live)
        else:
            self._heights[index] = self._estimate(entry.message)

    def view(self, message_id: int) -> MessageView | None:
        """The widget of a message; None outside of the window."""
        return self._views.get(message_id)

    @property
    def focused_message(self) -> int | None:
        focused = self.screen.focused
        return focused.message_id if isinstance(focused, MessageView) else None

    # --- going somewhere

    async def scroll_to_end(self) -> None:
        """Shows the end and follows it from now on."""
        async with self.lock:
            end = len(self.entries)
            await self._mount_window(self._reach_up(end, self._margin() + self._page()), end)
            self._held, self._jumping = None, False
            self.anchor()

    async def scroll_to_message(self, message_id: int, *, focus: bool = False) -> None:
        """Puts a message to the top of the viewport."""
        async with self.lock:
            await self._scroll_to_message(message_id, focus)

    async def _scroll_to_message(self, message_id: int, focus: bool) -> None:
        index = self._index[message_id]
        self.release_anchor()
        margin = self._margin()
        first, last = self._reach_up(index, margin), self._reach_down(index, margin + self._page())
        view = self._views.get(message_id)
        if view is None or not (self._first <= first and last <= self._last):
            await self._mount_window(first, last)
            view = self._views[message_id]
        self._held, self._jumping = (view, 0), True
        if focus:
            view.focus(scroll_visible=False)
        self._clear_arrangement_cache()
        self.refresh(layout=True)

    @on(MessageView.Neighbour)
    async def go_to_neighbour(self, event: MessageView.Neighbour) -> None:
        event.stop()
        here = self._index.get(event.view.message_id)
        if here is not None:
            await self.focus_message(min(max(here + event.step, 0), len(self.entries) - 1))

    async def focus_message(self, index: int) -> None:
        """Gives the focus to `entries[index]` and brings it into view."""
        if not self.entries:
            return
        message_id = self.entries[index].message.id
        view = self._views.get(message_id)
        if view is None:
            await self.scroll_to_message(message_id, focus=True)
        elif index == len(self.entries) - 1:
            view.focus(scroll_visible=False)
            await self.scroll_to_end()
        else:
            self.release_anchor()
            view.focus()

    # --- the window

    def _page(self) -> int:
        return max(self.size.height, 10)

    def _margin(self) -> int:
        return max(round(MARGIN_PAGES * self._page()), MIN_MARGIN_ROWS)

    def _reach_up(self, index: int, rows: int) -> int:
        while index > 0 and rows > 0:
            index -= 1
            rows -= self._heights[index]
        return index

    def _reach_down(self, index: int, rows: int) -> int:
        while index < len(self.entries) and rows > 0:
            rows -= self._heights[index]
            index += 1
        return index

    async def _mount_window(self, first: int, last: int) -> None:
        """Makes widgets for exactly `entries[first:last]`, and for the one that is being written."""
        wanted = [entry.message.id for entry in self.entries[first:last]]
        keep = set(wanted)
        async with self.batch():
            await self._drop([i for i in self._views if i not in keep])
            if not self._top.is_attached:
                await self.mount_all([self._top, self._bottom])
            after: Widget = self._top
            run: list[Widget] = []
            for message_id in wanted:
                view = self._views.get(message_id)
                if view is None:
                    view = self._views[message_id] = MessageView(self.entries[self._index[message_id]])
                    run.append(view)
                    continue
                await self._mount_run(run, after)
                after = view
            await self._mount_run(run, after)
            self._first, self._last = first, last
            self._set_spacers()

    async def _mount_run(self, run: list[Widget], after: Widget) -> None:
        if run:
            await self.mount_all(run, after=after)
            run.clear()

    async def _drop(self, message_ids: Sequence[int]) -> None:
        views = [view for i in message_ids if (view := self._views.pop(i, None)) is not None]
        if not views:
            return
        if self._held is not None and self._held[0] in views:
            self._held, self._jumping = None, False
        if self.screen.focused in views:
            self.screen.set_focus(None)
        self._placed = [place for place in self._placed if place[0] not in views]
        await self.remove_children(views)

    def _set_spacers(self) -> None:
        self._top.set_height(sum(self._heights[: self._first]))
        self._bottom.set_height(sum(self._heights[self._last :]))

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        if self._jumping:
            self.release_anchor()  # the place that is left may be the end, which Textual would follow again
        elif not self._arranging:
            self._hold_first_visible()
            self._update_soon()

    def _update_soon(self) -> None:
        if not self._update_pending and self.is_attached:
            self._update_pending = True
            self.call_after_refresh(
                self._update_window
            )  # making messages takes longer than showing those that are there

    async def _update_window(self) -> None:
        """Moves the window if the viewport has come near its end."""
        self._update_pending = False
        async with self.lock:
            if self.entries and self._top.is_attached and not self._jumping:
                await self._follow_viewport()

    async def _follow_viewport(self) -> None:
        tops = [0, *accumulate(self._heights)]
        page, margin, y = self._page(), self._margin(), round(self.scroll_y)
        n = len(self.entries)
        begin = next((i for i in range(n) if tops[i + 1] > y), n - 1)
        end = next((i for i in range(begin, n) if tops[i + 1] >= y + page), n - 1) + 1
        if self._reach_up(begin, page) >= self._first and self._reach_down(end, page) <= self._last:
            return
        if not (self._first <= begin and end <= self._last):  # in the blank: nothing there to hold
            self._held = None
        await self._mount_window(self._reach_up(begin, margin), self._reach_down(end, margin))
        if self._held is None and not self._follows_end and (view := self._views.get(self.entries[begin].message.id)):
            self._held = (view, tops[begin] - y)

    # --- layout

    @property
    def _follows_end(self) -> bool:
        return self._anchored and not self._anchor_released

    def arrange(self, size: Size, optimal: bool = False) -> DockArrangeResult:
        """Lays out as any container, then notes heights and keeps the first visible message where it is."""
        result = super().arrange(size, optimal)
        if size.width != self._measured_width and size.width > 0:
            self._measured_width = size.width
            self._heights = [self._estimate(entry.message) for entry in self.entries]
            self.call_later(self._set_spacers)
        self._placed = [
            (place.widget, place.region.y, place.region.height)
            for place in result.placements
            if isinstance(place.widget, MessageView) and place.widget.message_id in self._index
        ]
        self._measure()
        if not self._follows_end and self._held is not None:
            self._keep_in_place(*self._held)
        return result

    def _measure(self) -> None:
        for (view, top, _), (_, next_top, _) in pairwise(self._placed):
            self._heights[self._index[view.message_id]] = next_top - top
        if self._placed:
            view, _, height = self._placed[-1]
            self._heights[self._index[view.message_id]] = height + 1

    def _keep_in_place(self, held: MessageView, offset: int) -> None:
        for view, top, _ in self._placed:
            if view is held:
                self._jumping = False
                wanted = max(0, top - offset)
                if wanted != round(self.scroll_y):
                    self._arranging = True
                    self.set_reactive(Widget.scroll_y, float(wanted))
                    self.set_reactive(Widget.scroll_target_y, float(wanted))
                    self.vertical_scrollbar.set_reactive(ScrollBar.position, wanted)
                    self._arranging = False
                    self._update_soon()
                return

    def _hold_first_visible(self) -> None:
        """Remembers the message at the top of the viewport, and how far above the edge it begins."""
        y = round(self.scroll_y)
        self._held = next(((view, top - y) for view, top, height in self._placed if top + height > y), None)

    def _estimate(self, message: Message) -> int:
        """Rows of a message at the current width."""
        width = max(20, (self._measured_width or self.size.width or 80) - 6)
        rows = sum(1 + len(line) // width for line in message.content.split("\n"))
        return rows + 2 + len(message.attachments) + (2 if message.role == "assistant" else 0)
