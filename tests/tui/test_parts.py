"""Parts without a screen: the map's arithmetic, the answer's rates, options, model finding, lists and tables."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textual.app import App, ComposeResult
from textual.pilot import Pilot

from localrun.engine.conversations import Attachment, Message
from localrun.engine.conversations.attachments import AttachmentError, read_attachment
from localrun.engine.model_finder import FoundModel, find_models, fit
from localrun.engine.options import SamplingOptions
from localrun.engine.process.protocol import Delta, PromptProgress, Stats
from localrun.errors import UsageError
from localrun.textsafe import visible
from localrun.tui.controllers.answering import Answering
from localrun.tui.engine_link import AnswerFeed
from localrun.tui.expert_grid import bits_of, column_groups, read_grid, tier_rates
from localrun.tui.files import estimate_tokens
from localrun.tui.live_answer import LiveAnswer, last_turns, prompt_messages, prompt_time_left, prompt_tokens_per_s
from localrun.tui.options import ChatOptions, from_json, to_json, with_value
from localrun.tui.widgets.engine_panel import bar_chart
from localrun.tui.widgets.expert_map import map_cells
from localrun.tui.widgets.lean_markdown import LeanMarkdown
from localrun.tui.widgets.message_view import code_blocks
from localrun.tui.widgets.status_bar import short_count, short_size
from tests.gguf_models import write_deepseek4
from tests.tui.fake_engine import facts, finished
from tests.tui.support import PATIENCE_S

# --- the map


def grid_json(where: str, **more: Any) -> dict[str, Any]:
    return {"n_experts": len(where), "layers": [{"layer": 5, "where": where, "types": ["Q2_K"], **more}]}


def test_a_map_row_has_a_glyph_for_every_place() -> None:
    grid = read_grid(grid_json("grld"))
    assert grid is not None
    assert "".join(glyph for glyph, _ in map_cells(grid.layers[0], grid, 10, "residency")) == "█▓◌·"
    assert (grid.count("g"), grid.count("d")) == (1, 1)


def test_cells_of_several_experts_show_the_share_in_memory() -> None:
    grid = read_grid(grid_json("rddd" + "rrdd" + "rrrd" + "rrrr" + "ggdd"))
    assert grid is not None
    assert "".join(glyph for glyph, _ in map_cells(grid.layers[0], grid, 5, "residency")) == "░▒▓▓█"


def test_precision_and_heat_have_glyphs_of_their_own() -> None:
    grid = read_grid(grid_json("rd", types=["IQ2_XXS", "MXFP4"], type_of="01", heat=[0, 100]))
    assert grid is not None
    assert [glyph for glyph, _ in map_cells(grid.layers[0], grid, 2, "precision")] == ["2", "4"]
    assert [glyph for glyph, _ in map_cells(grid.layers[0], grid, 2, "heat")] == [" ", "@"]


@pytest.mark.parametrize(
    ("name", "digit"), [("MXFP4", "4"), ("IQ2_XXS", "2"), ("Q8_0", "8"), ("BF16", "g"), ("F32", "3"), ("Q6_K", "6")]
)
def test_bits_of_a_type(name: str, digit: str) -> None:
    assert bits_of(name) == digit


@pytest.mark.parametrize(
    "broken", [None, {}, {"layers": []}, {"layers": [{}]}, grid_json("rd", heat=[1]), grid_json("rd", type_of="09")]
)
def test_a_map_of_another_shape_is_no_map(broken: Any) -> None:
    assert read_grid(broken) is None


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 300))
def test_every_expert_is_in_exactly_one_cell_and_cells_fit(n_experts: int, width: int) -> None:
    groups = column_groups(n_experts, width)
    assert [expert for group in groups for expert in group] == list(range(n_experts))
    assert len(groups) <= width


def stats(**telemetry: float) -> Stats:
    return Stats(request=1, busy=True, context_used=0, n_ctx=1, rss_bytes=0, telemetry=telemetry)


def test_rates_are_those_between_two_looks() -> None:
    before = stats(hits=100, misses=0, tokens=30, bytes_read=0, total_s=1.0, wait_s=0.0)
    after = stats(hits=190, misses=10, tokens=60, bytes_read=5_000, total_s=3.0, wait_s=0.5)
    rates = tier_rates(before, after, facts())
    assert (rates.hit_rate, rates.bytes_per_token, rates.disk_bytes_per_s, rates.wait_share) == (0.9, 500, 2500, 0.25)
    assert tier_rates(after, after, facts()).hit_rate is None
    assert tier_rates(after, before, facts()).hit_rate == 1.0  # the engine began anew


# --- the answer


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def message(**changes: Any) -> Message:
    values: dict[str, Any] = {"id": 1, "conversation_id": 1, "parent_id": None, "role": "assistant", "content": ""}
    return Message(**(values | changes))


def test_the_hit_rates_chart_draws_what_was_measured_and_nothing_else() -> None:
    assert bar_chart([0.0, 0.25, 0.5, 0.75, 1.0], 2) == ["   ▄█", "▁▄███"]
    assert bar_chart([], 2) == ["", ""]


def test_an_answer_knows_its_rates_and_the_time_of_its_thinking() -> None:
    clock = Clock()
    answer = LiveAnswer(message(), clock)
    answer.apply([PromptProgress(request=1, done=600, total=1000, reused=100, elapsed_s=5.0)])
    assert answer.prompt_tokens_per_s == 100
    answer.apply([Delta(request=1, kind="thinking", text="hm", tokens=(1,))])
    assert answer.is_thinking
    clock.now = 2.0
    answer.apply([Delta(request=1, kind="text", text="so", tokens=(2, 3))])
    assert (answer.thinking_s, answer.is_thinking) == (2.0, False)
    assert answer.decode_tokens_per_s == 1.0
    assert answer.prompt_tokens_per_s == 100  # still shown while the answer is written
    clock.now = 9.0
    answer.apply([finished("length", 3)])
    assert (answer.text, answer.thinking, answer.state) == ("so", "hm", "length")
    assert answer.details["thinking_s"] == 2.0
    assert answer.decode_tokens_per_s == 3.0


def test_prefill_says_how_long_it_will_take() -> None:
    progress = PromptProgress(request=1, done=300, total=500, reused=100, elapsed_s=4.0)
    assert (prompt_tokens_per_s(progress), prompt_time_left(progress)) == (50, 4)
    start = PromptProgress(request=1, done=100, total=500, reused=100, elapsed_s=0.0)
    assert prompt_time_left(start) is None


def test_the_prompt_has_attachments_reasoning_and_no_empty_answers() -> None:
    branch = [
        message(role="user", content="look", attachments=(Attachment("a`.txt", "``` x", 2),)),
        message(content="", reasoning=""),
        message(content="fine", reasoning="because"),
    ]
    assert prompt_messages(branch, "Be kind.") == (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "File `a`.txt`:\n\n````\n``` x\n````\n\nlook"},
        {"role": "assistant", "content": "fine", "reasoning_content": "because"},
    )


def test_the_last_turns_begin_with_a_question() -> None:
    branch = [message(id=i, role="assistant" if i % 2 else "user") for i in range(6)]
    assert [m.id for m in last_turns(branch, 2)] == [2, 3, 4, 5]
    assert last_turns(branch, 0) == []


def test_a_feed_announces_itself_once_until_it_is_read() -> None:
    feed = AnswerFeed()
    assert feed.add(finished())
    assert not feed.add(finished())
    assert len(feed.take()) == 2
    assert feed.end()
    assert feed.ended
    assert feed.take() == []


def test_an_answer_is_drawn_less_often_where_drawing_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    intervals: list[float] = []
    host: Any = SimpleNamespace(set_timer=lambda delay, callback: intervals.append(delay))
    nothing: Any = None
    used = iter((0.0, 0.001, 0.031, 1.031))  # processor time: 1 ms, then 30 ms, then 1 s between two draws
    monkeypatch.setattr("localrun.tui.controllers.answering.time.process_time", lambda: next(used))
    answering = Answering(host, nothing, nothing, nothing, ended=nothing, failed_to_save=nothing)
    for _ in range(3):
        answering._draw_later()
    assert intervals == [0.1, pytest.approx(0.3), 0.5], "a tenth of the time, within bounds"


def test_token_estimate_is_never_zero_for_text() -> None:
    assert estimate_tokens("a") == 1
    assert estimate_tokens("") == 0


# --- options


def test_options_survive_the_store_and_nonsense_is_ignored() -> None:
    options = ChatOptions(SamplingOptions(temperature=0.3, top_k=5, seed=4), "max", "sys", 99)
    assert from_json(to_json(options), ChatOptions()) == options
    assert from_json({"temperature": "hot", "think": 3, "seed": -1}, options) == options
    assert from_json({}, options) == options


@pytest.mark.parametrize(("name", "value"), [("temperature", "101"), ("top_p", "2"), ("seed", "x"), ("colour", "1")])
def test_wrong_sampling_values_are_refused(name: str, value: str) -> None:
    with pytest.raises(UsageError):
        with_value(ChatOptions(), name, value)


def test_short_names_and_empty_values() -> None:
    options = with_value(with_value(ChatOptions(), "temp", "0"), "seed", "5")
    assert (options.sampling.temperature, options.sampling.seed) == (0.0, 5)
    assert with_value(options, "seed", "").sampling.seed is None


# --- models and files


def test_models_are_found_once_each_with_their_sizes(tmp_path: Path) -> None:
    write_deepseek4(tmp_path / "a" / "b" / "one.gguf") if (tmp_path / "a" / "b").mkdir(parents=True) else None
    write_deepseek4(tmp_path / "a" / "b" / "one.gguf")
    write_deepseek4(tmp_path / "split.gguf", split_max_tensors=40)
    (tmp_path / "loop").symlink_to(tmp_path)
    found = list(find_models([tmp_path, tmp_path / "a", tmp_path / "missing"]))
    names = [model.path.name for model in found]
    assert len(names) == 2
    one = next(model for model in found if model.path.name == "one.gguf")
    assert one.problem == ""
    assert 0 < one.expert_bytes < one.n_bytes
    split = next(model for model in found if model.path.name != "one.gguf")
    assert split.n_bytes > (tmp_path / split.path.name).stat().st_size


def test_fit_says_what_memory_means_for_a_model() -> None:
    model = FoundModel(Path("m"), "GGUF", "m", 100 << 30, dense_bytes=10 << 30, expert_bytes=90 << 30, n_experts=256)
    assert fit(model, 200 << 30) == "all in RAM"
    assert fit(model, 56 << 30) == "streams: 50% of experts in RAM"
    assert fit(model, 8 << 30).startswith("too large")


def test_what_can_be_attached(tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "utf16.txt").write_text("hällo", "utf-16")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert read_attachment(tmp_path / "bom.txt").text == "hello"
    assert read_attachment(tmp_path / "utf16.txt").text == "hällo"
    for name in ("latin.txt", "missing", "."):
        with pytest.raises(AttachmentError):
            read_attachment(tmp_path / name)


# --- text


def test_code_blocks_are_found_in_any_fence() -> None:
    assert code_blocks("a\n~~~\none\n~~~\n- x\n\n  ```py\n  two\n  ```\n") == ["one", "two"]


class Document(App[None]):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def compose(self) -> ComposeResult:
        yield LeanMarkdown(self.text)

    def lines(self) -> list[str]:
        return [
            line.rstrip()
            for line in "\n".join(strip.text for strip in self.screen._compositor.render_strips()).split("\n")
        ]

    async def drawn(self, pilot: Pilot[None], is_whole: Callable[[list[str]], bool]) -> list[str]:
        """The lines as soon as all is there and nothing moves any more."""
        end, before = time.monotonic() + PATIENCE_S, [""]
        while (lines := self.lines()) != before or not is_whole(lines):
            assert time.monotonic() < end, lines
            before = lines
            await pilot.pause(0.02)
        return lines


async def test_lists_and_tables_are_drawn_with_hanging_indents() -> None:
    text = "- one two three four five six seven\n  1. inner\n  2. second\n\n| a | bb |\n|---|---|\n| x | **y** z |\n"
    app = Document(text)
    async with app.run_test(size=(30, 14)) as pilot:
        lines = await app.drawn(pilot, lambda lines: any("x │ y z" in line for line in lines))
    shown = [line.strip("\n") for line in lines if line.strip()]
    assert shown == [
        "  • one two three four five",
        "    six seven",
        "    1. inner",
        "    2. second",
        "  a │ bb",
        "  ──┼────",
        "  x │ y z",
    ]


async def test_a_table_too_wide_wraps_its_cells() -> None:
    app = Document("| first | second |\n|---|---|\n| " + "word " * 12 + "| x |\n")
    async with app.run_test(size=(30, 14)) as pilot:
        lines = await app.drawn(pilot, lambda lines: " ".join(lines).count("word") == 12)
    shown = [line for line in lines if line.strip()]
    assert all(len(line) <= 30 for line in shown)
    assert sum(line.count("word") for line in shown) == 12


async def test_streamed_lists_and_tables_end_as_written_at_once() -> None:
    text = "Intro\n\n- a\n- b\n  - c\n\n1. x\n2. y\n\n| h | i |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n\nend\n"
    whole, streamed = Document(text), Document("")
    async with whole.run_test(size=(40, 30)) as pilot:
        expected = await whole.drawn(pilot, lambda lines: any(line.strip() == "end" for line in lines))
    async with streamed.run_test(size=(40, 30)) as pilot:
        markdown = streamed.query_one(LeanMarkdown)
        for char in text:
            await markdown.append(char)
        await streamed.drawn(pilot, lambda lines: lines == expected)


ENTITIES = """evil &#x202e;entity lrm &lrm;a rlm &rlm;b iso &#x2066;c&#x2069; sep &#x2028;d tag &#xE0041;e ff &#12;x cr&#13;over

[link &#x202e;text](http://a.b/%E2%80%AE&#x202e; "t&#x202e;t") and `code &#x202e;` and **b&#8238;old** ![im&#x202e;g](x "y&#x202e;")

| h&#x202e;1 | h2 |
|---|---|
| c&#13;ell | x |

# head&#x202e;ing

- item &#x202e;
  1. inner &#xE0041;

> quote &#x2067;

```p&#x202e;y
a &#x202e;
```
"""


async def test_what_entities_hide_from_the_filter_is_visible_too() -> None:
    """HTML entities are decoded by the parser of Markdown, after the text itself was made harmless."""
    app = Document(ENTITIES)
    async with app.run_test(size=(120, 60)) as pilot:
        shown = "\n".join(await app.drawn(pilot, lambda lines: any("a &#x202e;" in line for line in lines)))
        links = [
            str(span.style)
            for content in app.query("MarkdownParagraph")
            for span in content._content.spans  # type: ignore[attr-defined]
        ]
    assert shown == visible(shown)
    for word in ("evil <U+202E>entity", "h<U+202E>1", "c␍ell", "head<U+202E>ing", "tag <U+E0041>e", "quote <U+2067>"):
        assert word in shown, word
    assert not any("\u202e" in link for link in links)
    assert "a &#x202e;" in shown, "code is not decoded"


def test_short_numbers() -> None:
    assert [short_count(n) for n in (0, 999, 4096, 12_345, 123_456)] == ["0", "999", "4k", "12.3k", "123k"]
    assert [short_size(n) for n in (None, 10, 3 << 20, 150 << 30)] == ["–", "10B", "3.0M", "150G"]
