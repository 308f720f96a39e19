"""One timeline of tokens on a tiny random model whose experts are on our device."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localrun.engine.engine import Engine
from localrun.engine.measure.stock import open_stock
from localrun.engine.options import SamplingOptions
from localrun.engine.session import Session
from localrun.errors import (
    ChecksumError,
    ContextFullError,
    DecodeError,
    FormatError,
    LocalrunError,
    StoppedError,
    UsageError,
)
from tests.engine.conftest import OPTIONS
from tests.reference import Logits, kl

TOKENS = np.random.default_rng(5).integers(0, 64, 300).tolist()
TEXTS = [TOKENS, *np.random.default_rng(6).integers(0, 64, (2, 300)).tolist()]
GREEDY = SamplingOptions(temperature=0)


def assert_close(found: list[Logits], expected: list[Logits]) -> None:
    """Batches of other sizes and restored states give sums in another order, which a random model's near-ties turn into visible
    noise at some positions: 1e-4 in the median; a wrong token or place in the cache gives a nat everywhere."""
    assert np.median(kl(np.stack(expected), np.stack(found))) < 1e-3


def one_by_one(session: Session, tokens: list[int]) -> list[Logits]:
    """Logits after each token, fed alone."""
    rows = []
    for token in tokens:
        session.feed([token])
        rows.append(session.logits)
    return rows


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with engine.session() as session:
        yield session


def test_chunks_and_single_tokens_agree_with_one_batch(engine: Engine) -> None:
    rows: list[Logits] = []
    of_chunks: list[Logits] = []
    of_single: list[Logits] = []
    for text in TEXTS:
        with engine.session(all_logits=True) as whole:
            rows += list(np.concatenate(list(whole.feed_all_logits(text[:60]))))
        with engine.session(all_logits=True) as chunks:
            of_chunks += list(np.concatenate([next(chunks.feed_all_logits(p)) for p in (text[:23], text[23:60])]))
        with engine.session() as single:
            of_single += one_by_one(single, text[:60])
        assert list(whole.tokens) == list(chunks.tokens) == list(single.tokens) == text[:60]
    assert_close(of_chunks, rows)
    assert_close(of_single, rows)


def test_feeding_more_than_a_batch_reports_progress(session: Session) -> None:
    seen: list[tuple[int, int]] = []
    session.feed(TOKENS[:150], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 150), (128, 150), (150, 150)]


def test_prefill_keeps_what_is_there(engine: Engine, session: Session) -> None:
    assert session.prefill(TOKENS[:100]) == 0
    assert session.prefill(TOKENS[:130]) == 100
    with engine.session() as other:
        for batch in (TOKENS[:64], TOKENS[64:100], TOKENS[100:130]):
            other.feed(batch)
        np.testing.assert_array_equal(session.logits, other.logits, "the same batches")
    assert session.prefill(TOKENS[:130]) == 130, "nothing to do"


def test_prefill_starts_over_when_the_prompt_differs_or_is_shorter(session: Session) -> None:
    session.prefill(TOKENS[:100])
    other = [*TOKENS[:50], 1, *TOKENS[51:100]]
    assert session.prefill(other) == 0
    assert list(session.tokens) == other
    assert session.prefill(TOKENS[:20]) == 0
    assert list(session.tokens) == TOKENS[:20]


def test_greedy_generation_is_the_argmax_of_each_step(engine: Engine, session: Session) -> None:
    answer = session.generate(TOKENS[:40], GREEDY, max_tokens=12)
    tokens = list(answer)
    assert answer.reason == "length"
    with engine.session() as other:
        expected = []
        other.feed(TOKENS[:40])
        for _ in range(12):
            expected.append(int(other.logits.argmax()))
            other.feed(expected[-1:])
    assert tokens == expected
    assert answer.timings.prompt_tokens == 40
    assert answer.timings.new_tokens == 12
    assert answer.timings.context_used == 40 + 11, "the last token was given out, not fed"


def test_next_turn_reuses_prompt_and_answer(session: Session) -> None:
    first = list(session.generate(TOKENS[:40], GREEDY, max_tokens=10))
    second = session.generate([*TOKENS[:40], *first, 7, 8], GREEDY, max_tokens=1)
    assert len(list(second)) == 1
    assert second.timings.reused_tokens == 49


def test_sampled_answers_repeat_with_their_seed(session: Session) -> None:
    answer = session.generate(TOKENS[:30], SamplingOptions(), max_tokens=20)
    tokens = list(answer)
    session.reset()
    again = session.generate(TOKENS[:30], SamplingOptions(seed=answer.seed), max_tokens=20)
    assert list(again) == tokens


def test_end_token_ends_the_answer_and_is_not_part_of_it(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    free = list(session.generate(TOKENS[:30], GREEDY, max_tokens=8))
    place = max(i for i in range(8) if free[i] not in free[:i])
    assert place > 0
    monkeypatch.setattr(session, "_is_end", lambda token: token == free[place])
    answer = session.generate(TOKENS[:30], GREEDY, max_tokens=8)
    assert list(answer) == free[:place]
    assert answer.reason == "eos"
    ignoring = session.generate(TOKENS[:30], GREEDY, max_tokens=8, ignore_eos=True)
    assert list(ignoring) == free


def test_full_context_ends_the_answer(model_path: Path) -> None:
    with Engine.open(model_path, replace(OPTIONS, n_ctx=256)) as engine, engine.session() as session:
        answer = session.generate(TOKENS[:250], GREEDY)
        tokens = list(answer)
        assert answer.reason == "context"
        assert len(tokens) == session.n_ctx - 250 + 1
        assert session.position == session.n_ctx


def test_what_does_not_fit_is_refused_before_anything_changes(session: Session) -> None:
    session.feed(TOKENS[:10])
    with pytest.raises(ContextFullError, match="1014"):
        session.feed([1] * 1100)
    with pytest.raises(UsageError, match="64"):
        session.feed([64])
    with pytest.raises(UsageError, match="-1"):
        session.feed([-1])
    with pytest.raises(UsageError, match="empty"):
        session.prefill([])
    assert list(session.tokens) == TOKENS[:10]
    session.feed([1])


def test_logits_need_a_token(session: Session) -> None:
    with pytest.raises(LocalrunError, match="feed a token"):
        _ = session.logits


def test_stop_ends_a_prefill_and_the_session_goes_on(session: Session) -> None:
    session.feed(TOKENS[:100])
    expected = session.logits
    stopped_at: list[int] = []

    def stop(done: int, total: int) -> None:
        session.stop()
        stopped_at.append(done)

    session.reset()
    with pytest.raises(StoppedError):
        session.feed(TOKENS, progress=stop)
    assert stopped_at == [64], "the next batch did not run"
    session.clear_stop()
    session.prefill(TOKENS[:100])
    np.testing.assert_array_equal(session.logits, expected)


def test_stop_from_another_thread_aborts_a_running_batch(session: Session) -> None:
    session.feed(TOKENS[:64])
    expected = session.logits
    session.reset()
    batch_runs = threading.Event()
    decode = session._context.decode

    def announce(*args: object, **kwargs: object) -> int:
        batch_runs.set()
        return decode(*args, **kwargs)  # type: ignore[arg-type]

    session._context.decode = announce  # type: ignore[method-assign, assignment]

    def stop() -> None:
        batch_runs.wait()
        session.stop()

    stopper = threading.Thread(target=stop)
    stopper.start()

    def feed_for_long() -> None:
        """The other thread may get its turn late."""
        ends = time.monotonic() + 300
        while time.monotonic() < ends:
            session.reset()
            session.feed(TOKENS * 3)

    with pytest.raises(StoppedError):
        feed_for_long()
    stopper.join()
    session.clear_stop()
    session.prefill(TOKENS[:64])
    np.testing.assert_array_equal(session.logits, expected)


def test_a_stop_whose_patience_ends_too_late_does_not_reach_the_next_command(session: Session) -> None:
    runs = threading.Event()

    def patience_ends() -> None:
        runs.set()  # from here on the timer can't be cancelled
        session._patience_ends()

    with session._stop_lock:
        session._stop_timer = timer = threading.Timer(0.0, patience_ends)
        timer.start()
        runs.wait()
        session._forget_timer()
    timer.join()
    assert not session._context.stop
    session.feed([5])
    assert session.position == 1


def test_stopped_answer_says_so(session: Session) -> None:
    answer = session.generate(TOKENS[:20], GREEDY)
    tokens = []
    for token in answer:
        tokens.append(token)
        if len(tokens) == 3:
            session.stop()
    assert answer.reason == "stopped"
    assert len(tokens) == 3
    session.clear_stop()
    assert list(session.tokens) == [*TOKENS[:20], *tokens[:2]], "what was decoded stays"


def test_failed_batch_empties_the_session_and_gives_the_cause(
    engine: Engine, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.feed(TOKENS[:50])
    expected = session.logits
    cause = DecodeError("the disk is on fire")
    causes: list[BaseException | None] = [None, cause]
    monkeypatch.setattr(engine, "take_error", lambda: causes.pop(0))
    session.reset()
    with pytest.raises(DecodeError, match="on fire"):
        session.feed(TOKENS[:100])
    monkeypatch.undo()
    assert session.position == 0
    session.prefill(TOKENS[:50])
    np.testing.assert_array_equal(session.logits, expected)


def test_snapshot_brings_a_session_back(engine: Engine, session: Session) -> None:
    straight: list[Logits] = []
    here: list[Logits] = []
    elsewhere: list[Logits] = []
    for text in TEXTS:
        session.prefill(text[:100])
        snapshot = session.snapshot()
        straight += one_by_one(session, text[100:115])
        session.restore(snapshot)
        assert list(session.tokens) == text[:100]
        with pytest.raises(LocalrunError, match="feed a token"):
            _ = session.logits
        here += one_by_one(session, text[100:115])
        with engine.session() as other:
            other.restore(snapshot)
            elsewhere += one_by_one(other, text[100:115])
    assert_close(here, straight)
    assert_close(elsewhere, straight)


@pytest.mark.parametrize(("saved", "restored"), [(256, 32), (32, 256)])
def test_snapshot_fits_a_context_of_another_batch_size(model_path: Path, saved: int, restored: int) -> None:
    """The window's cache has as many more rows as a batch has tokens."""
    snapshots: list[bytes] = []
    straight: list[Logits] = []
    found: list[Logits] = []
    with Engine.open(model_path, replace(OPTIONS, n_batch=saved)) as engine, engine.session() as session:
        for text in TEXTS:
            session.prefill(text[:150])
            snapshots.append(session.snapshot())
            straight += one_by_one(session, text[150:165])
    with Engine.open(model_path, replace(OPTIONS, n_batch=restored)) as engine, engine.session() as session:
        for text, snapshot in zip(TEXTS, snapshots, strict=True):
            session.restore(snapshot)
            found += one_by_one(session, text[150:165])
    assert_close(found, straight)


def test_empty_session_can_be_saved(session: Session) -> None:
    snapshot = session.snapshot()
    session.feed(TOKENS[:10])
    session.restore(snapshot)
    assert session.position == 0
    session.feed(TOKENS[:10])


def test_damaged_or_foreign_snapshots_change_nothing(engine: Engine, session: Session, model_path: Path) -> None:
    session.feed(TOKENS[:70])
    snapshot = bytearray(session.snapshot())
    for position in (20, len(snapshot) // 2, len(snapshot) - 1):
        damaged = bytearray(snapshot)
        damaged[position] ^= 1
        with pytest.raises(ChecksumError):
            session.restore(bytes(damaged))
    for wrong in (b"", b"x" * 100, bytes(snapshot[:30])):
        with pytest.raises(FormatError):
            session.restore(wrong)
    with (
        Engine.open(model_path, replace(OPTIONS, kv_type="q8_0")) as other,
        other.session() as other_session,
        pytest.raises(FormatError, match="another model"),
    ):
        other_session.restore(bytes(snapshot))
    assert list(session.tokens) == TOKENS[:70]
    session.feed([1])


def test_stock_llama_cpp_agrees_with_the_experts_on_our_device(model_path: Path) -> None:
    options = replace(OPTIONS, math="f32")
    rows = []
    for open_engine in (Engine.open, open_stock):
        with open_engine(model_path, options) as engine, engine.session(all_logits=True) as session:
            rows.append(np.concatenate(list(session.feed_all_logits(TOKENS[:120]))))
    ours, stock = rows
    # llama.cpp rounds activations to 8 bits, ours are exact here: close, not equal.
    assert_close(list(ours), list(stock))


def test_closed_engine_frees_sessions_that_were_left_open(model_path: Path) -> None:
    engine = Engine.open(model_path, OPTIONS)
    session = engine.session()
    session.feed(TOKENS[:10])
    engine.close()
    engine.close()
    session.close()
    with pytest.raises(LocalrunError, match="the session is closed"):
        session.feed(TOKENS[:1])


def test_what_was_closed_says_so_instead_of_touching_freed_memory(chat_model_path: Path) -> None:
    engine = Engine.open(chat_model_path, OPTIONS)
    session, tokenizer = engine.session(), engine.tokenizer
    session.feed([5, 6])
    engine.close()
    for use in (
        lambda: session.feed([7]),
        lambda: session.logits,
        lambda: session.snapshot(),
        lambda: session.reset(),
        lambda: list(session.generate([5, 6, 7], GREEDY)),
    ):
        with pytest.raises(LocalrunError, match="the session is closed"):
            use()
    for ask in (lambda: tokenizer.encode("Hello"), lambda: tokenizer.decode([5]), lambda: engine.vocab.is_end(1)):
        with pytest.raises(LocalrunError, match="the model is closed"):
            ask()
    with pytest.raises(LocalrunError, match="context"):
        engine.session()
    session.stop()
    session.clear_stop()
