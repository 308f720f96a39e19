"""The engine in a process of its own: answers, stopping, dying and coming back. Real processes, a tiny random model."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from localrun.engine.engine import Engine
from localrun.engine.options import SamplingOptions
from localrun.engine.process import connection
from localrun.engine.process.connection import _cause_of_death, out_of_memory_kills
from localrun.engine.process.process import EngineProcess
from localrun.engine.process.protocol import (
    CountTokens,
    Delta,
    EvalText,
    EvalTextResult,
    Event,
    Finished,
    Generate,
    Loading,
    PromptProgress,
    Ready,
)
from localrun.errors import ContextFullError, EngineDiedError, LocalrunError, UsageError
from tests.engine.conftest import OPTIONS
from tests.engine.models import CHAT_TOKENS
from tools.memory_limit import MemoryLimit

pytestmark = pytest.mark.engine_process

GREEDY = SamplingOptions(temperature=0)
HELLO: tuple[dict[str, Any], ...] = ({"role": "user", "content": "Hello"},)
ROOMY = dataclasses.replace(OPTIONS, n_ctx=32768)
"""Answers without an end are far from over when a test that was not scheduled for a while stops them or kills the engine."""

PATIENCE_S = 300.0
"""Far more than anything here takes; only a hang reaches it."""


@pytest.fixture(scope="module")
def deaths() -> list[EngineDiedError]:
    """Of `running`, so far."""
    return []


@pytest.fixture(scope="module")
def running(chat_model_path: Path, deaths: list[EngineDiedError]) -> Iterator[EngineProcess]:
    """A process with the model that understands text; tests may kill it."""
    with EngineProcess(on_death=deaths.append) as engine:
        list(engine.load(chat_model_path, ROOMY))
        yield engine


@pytest.fixture
def engine(running: EngineProcess) -> EngineProcess:
    if running.facts is None:
        list(running.reload())
    return running


def ask(engine: EngineProcess, **options: Any) -> list[Event]:
    options = {"messages": HELLO, "sampling": GREEDY, "max_tokens": 6, **options}
    return list(engine.generate(Generate(**options)))


def tokens_of(events: list[Event]) -> list[int]:
    return [token for event in events for token in getattr(event, "tokens", ())]


def finished(events: list[Event]) -> Finished:
    (event,) = (event for event in events if isinstance(event, Finished))
    assert events[-1] is event
    return event


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def test_loading_reports_progress_and_facts(engine: EngineProcess, chat_model_path: Path) -> None:
    events = list(engine.load(chat_model_path, ROOMY))
    loading, ready = events[:-1], events[-1]
    assert loading
    assert all(isinstance(event, Loading) for event in loading)
    fractions = [event.progress for event in loading if isinstance(event, Loading)]
    assert fractions == sorted(fractions)
    assert isinstance(ready, Ready)
    assert ready.facts == engine.facts
    assert ready.facts.n_vocab == len(CHAT_TOKENS)
    assert ready.facts.has_tokenizer
    assert ready.facts.think_modes == ("off", "high", "max")
    assert ready.facts.n_moe_layers == 3


def test_answer_is_the_one_that_the_engine_gives_in_process(engine: EngineProcess, chat_model_path: Path) -> None:
    events = ask(engine)
    with Engine.open(chat_model_path, ROOMY) as inside, inside.session() as session:
        from localrun.engine.chat.format import ENCODERS
        from localrun.engine.chat.messages import messages_from_json

        parts = ENCODERS["v4"].encode_prompt(messages_from_json(list(HELLO)), mode="off").parts
        prompt = inside.tokenizer.encode_parts(parts)
        expected = list(session.generate(prompt, GREEDY, max_tokens=6))
        text = inside.tokenizer.decode(expected)
    assert tokens_of(events) == expected
    assert "".join(event.text for event in events if isinstance(event, Delta)) == text
    end = finished(events)
    assert end.reason == "length"
    assert end.timings.prompt_tokens == len(prompt)
    assert end.timings.new_tokens == 6


def test_thinking_arrives_as_thinking(engine: EngineProcess) -> None:
    events = ask(engine, think="high")
    assert {event.kind for event in events if isinstance(event, Delta)} == {"thinking"}
    assert finished(events).problems == ("unclosed_think",)


def test_seed_is_reported_and_repeats_the_answer(engine: EngineProcess) -> None:
    first = ask(engine, sampling=SamplingOptions())
    again = ask(engine, sampling=SamplingOptions(seed=finished(first).seed))
    assert tokens_of(again) == tokens_of(first)


def test_prompt_progress_counts_up_to_the_prompt(engine: EngineProcess) -> None:
    events = ask(engine, tokens=tuple(range(159, 9, -1)), messages=())  # no other test's prompt begins so
    done = [event.done for event in events if isinstance(event, PromptProgress)]
    assert done == [0, 64, 128, 150]
    assert finished(events).timings.prompt_tokens == 150


def progress_of(events: list[Event]) -> list[PromptProgress]:
    return [event for event in events if isinstance(event, PromptProgress)]


def test_progress_says_what_need_not_be_computed(engine: EngineProcess, tmp_path: Path) -> None:
    prompt = tuple(range(109, 9, -1))  # no other test's prompt begins so
    new = ask(engine, tokens=prompt, messages=(), max_tokens=1)
    assert [(event.done, event.reused) for event in progress_of(new)] == [(0, 0), (64, 0), (100, 0)]
    engine.snapshot(tmp_path / "state")
    longer = ask(engine, tokens=(*prompt, *range(10, 60)), messages=(), max_tokens=1)
    assert [(event.done, event.reused) for event in progress_of(longer)] == [(100, 100), (150, 100)]
    assert finished(longer).timings.reused_tokens == 100
    again = ask(engine, tokens=(*prompt, *range(10, 60)), messages=(), max_tokens=1)
    assert [(event.done, event.reused) for event in progress_of(again)] == [(150, 150)]
    engine.restore(tmp_path / "state")
    restored = ask(engine, tokens=(*prompt, 5, 6), messages=(), max_tokens=1)
    assert [(event.done, event.reused) for event in progress_of(restored)] == [(100, 100), (102, 100)]


def test_what_a_saved_state_spares_counts_as_reused(engine: EngineProcess) -> None:
    """The conversation goes back to a place whose state was saved, not to what the context holds."""
    first = ({"role": "user", "content": "One two three. " * 5},)
    then = (*first, {"role": "assistant", "content": "Four"}, {"role": "user", "content": "Five"})
    ask(engine, messages=first, max_tokens=4)
    ask(engine, messages=then, max_tokens=4)
    ask(engine, messages=({"role": "user", "content": "Something else"},), max_tokens=1)
    events = ask(engine, messages=(*then[:-1], {"role": "user", "content": "Six"}), max_tokens=1)
    reused = finished(events).timings.reused_tokens
    assert reused > 75, "a saved state holds the first message at least"
    progress = progress_of(events)
    assert {event.reused for event in progress} == {reused}
    assert progress[0].done == reused
    assert progress[0].elapsed_s == 0
    timings = finished(events).timings
    read = timings.prompt_tokens - reused
    assert timings.prompt_tokens_per_s == pytest.approx(read / timings.prompt_s)
    assert 0 < progress[-1].elapsed_s <= timings.prompt_s, "the same clock, within the same two moments"


def test_next_question_reuses_the_conversation_so_far(engine: EngineProcess) -> None:
    prompt = tuple(range(10, 60))
    first = tokens_of(ask(engine, tokens=prompt, messages=()))
    second = ask(engine, tokens=(*prompt, *first, 9), messages=())
    assert finished(second).timings.reused_tokens == len(prompt) + len(first) - 1


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"tokens": (1, 10**6)}, UsageError, "1000000"),
        ({"tokens": ()}, UsageError, "empty"),
        ({"tokens": (1,) * 40000}, ContextFullError, "40000"),
        ({"messages": ({"role": "king", "content": ""},)}, LocalrunError, "king"),
        ({"messages": ()}, LocalrunError, "turn|empty|no messages"),
        ({"think": "hard"}, UsageError, "hard"),
        ({"sampling": SamplingOptions(top_p=7)}, UsageError, "top_p"),
    ],
)
def test_refused_questions_leave_the_engine_usable(
    engine: EngineProcess, options: dict[str, Any], error: type[LocalrunError], says: str
) -> None:
    with pytest.raises(error, match=says):
        ask(engine, **options)
    assert finished(ask(engine)).reason == "length"


def test_stop_ends_the_running_answer_only(engine: EngineProcess) -> None:
    events: list[Event] = []
    for event in engine.generate(Generate(messages=HELLO, sampling=GREEDY, ignore_eos=True)):
        events.append(event)
        if isinstance(event, Delta) and len(events) == 5:
            engine.stop()
    assert finished(events).reason == "stopped"
    assert finished(ask(engine)).reason == "length"


def test_stop_reaches_a_long_prefill(engine: EngineProcess) -> None:
    events: list[Event] = []
    for event in engine.generate(Generate(tokens=tuple(range(10, 110)) * 300, sampling=GREEDY)):
        events.append(event)
        if isinstance(event, PromptProgress) and event.done:
            engine.stop()
    assert finished(events).reason == "stopped"
    done = [event.done for event in events if isinstance(event, PromptProgress)]
    assert done[-1] < 30_000


def test_stop_without_anything_running_does_nothing(engine: EngineProcess) -> None:
    engine.stop()
    assert finished(ask(engine)).reason == "length"


def test_leaving_the_iterator_stops_the_answer(engine: EngineProcess) -> None:
    events = engine.generate(Generate(messages=HELLO, sampling=GREEDY, ignore_eos=True))
    while not isinstance(next(events), Delta):
        pass
    events.close()  # type: ignore[attr-defined]
    wait_until(lambda: not engine.stats().busy)
    assert finished(ask(engine)).reason == "length"


def test_statistics_and_token_counts_come_in_the_middle_of_an_answer(engine: EngineProcess) -> None:
    asked = None
    for event in engine.generate(Generate(messages=HELLO, sampling=GREEDY, ignore_eos=True)):
        if isinstance(event, Delta) and asked is None:
            stats = engine.stats()
            assert stats.busy
            assert stats.context_used > 0
            assert stats.telemetry["hits"] + stats.telemetry["misses"] > 0
            assert stats.rss_bytes > 0
            assert engine.count_tokens("Hello, world!") == 13
            asked = engine.count(CountTokens(messages=HELLO))
            engine.stop()
    assert isinstance(event, Finished)
    assert event.reason == "stopped"
    assert asked == event.timings.prompt_tokens
    wait_until(lambda: not engine.stats().busy)  # the last event is sent a moment before the engine is free


def test_commands_from_several_threads_run_one_after_another(engine: EngineProcess) -> None:
    expected = tokens_of(ask(engine))
    results: list[list[int]] = []
    threads = [threading.Thread(target=lambda: results.append(tokens_of(ask(engine)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert results == [expected] * 3


def test_session_state_survives_in_a_file(engine: EngineProcess, tmp_path: Path) -> None:
    prompt = tuple(range(10, 60))
    ask(engine, tokens=prompt, messages=(), max_tokens=1)
    saved = engine.snapshot(tmp_path / "state")
    assert saved.n_tokens == 50
    assert saved.n_bytes == (tmp_path / "state").stat().st_size
    ask(engine)
    assert engine.restore(tmp_path / "state").n_tokens == 50
    events = ask(engine, tokens=(*prompt, 5), messages=())
    assert finished(events).timings.reused_tokens == 50
    (tmp_path / "state").write_bytes(b"nonsense")
    with pytest.raises(LocalrunError, match="snapshot"):
        engine.restore(tmp_path / "state")


def test_logits_of_all_positions_equal_the_engine_in_process(
    engine: EngineProcess, chat_model_path: Path, tmp_path: Path
) -> None:
    tokens = tuple(range(100, 180))
    list(engine.evaluate(tokens, tmp_path / "logits.npy"))
    logits = np.load(tmp_path / "logits.npy")
    assert logits.shape == (80, len(CHAT_TOKENS))
    assert logits.dtype == np.float32
    with Engine.open(chat_model_path, ROOMY) as inside, inside.session(all_logits=True) as session:
        np.testing.assert_array_equal(logits, np.concatenate(list(session.feed_all_logits(tokens))))
    assert list(tmp_path.iterdir()) == [tmp_path / "logits.npy"], "no partial file is left"


def test_text_is_compared_with_a_saved_reference(engine: EngineProcess, tmp_path: Path) -> None:
    command = EvalText(text="One two three four five. " * 9, window=16, max_tokens=40, save_folder=str(tmp_path))
    *_, plain = engine.evaluate_text(command)
    assert isinstance(plain, EvalTextResult)
    assert plain.n_tokens == 40
    assert plain.n_windows == 3
    assert plain.kl_mean is None
    *_, compared = engine.evaluate_text(replace(command, save_folder=None, reference_folder=str(tmp_path)))
    assert isinstance(compared, EvalTextResult)
    assert compared.perplexity == plain.perplexity
    assert compared.reference_perplexity == plain.perplexity
    assert (compared.kl_mean, compared.kl_median, compared.kl_p99, compared.kl_max) == (0, 0, 0, 0)
    assert compared.top1_agreement == 1


def test_failed_load_is_reported_and_the_process_goes_on(
    engine: EngineProcess, chat_model_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    pid = engine.pid
    with pytest.raises(LocalrunError, match=r"bad\.gguf"):
        list(engine.load(tmp_path / "bad.gguf", ROOMY))
    assert engine.facts is None
    list(engine.load(chat_model_path, ROOMY))
    assert engine.pid == pid
    assert finished(ask(engine)).reason == "length"


# --- death ---------------------------------------------------------------------------------------------------------


def test_killed_engine_costs_the_running_answer_only(
    engine: EngineProcess, deaths: list[EngineDiedError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "out_of_memory_kills", lambda: 0)  # the kernel may end other programs meanwhile
    n_deaths = len(deaths)
    expected = tokens_of(ask(engine))

    def answer_and_kill() -> None:
        for event in engine.generate(Generate(messages=HELLO, sampling=GREEDY, ignore_eos=True)):
            if isinstance(event, Delta):
                assert engine.pid
                os.kill(engine.pid, signal.SIGKILL)

    with pytest.raises(EngineDiedError, match="SIGKILL") as caught:
        answer_and_kill()
    assert caught.value.hint is not None
    assert "memory" in caught.value.hint
    assert not engine.alive
    with pytest.raises(EngineDiedError):
        engine.stats()
    events = ask(engine)
    assert [type(event) for event in events].count(Ready) == 1, "the model was loaded again"
    assert tokens_of(events) == expected
    wait_until(lambda: len(deaths) == n_deaths + 1)
    assert "SIGKILL" in str(deaths[-1])


@pytest.fixture
def small_group() -> Iterator[MemoryLimit]:
    """32 MiB of memory."""
    try:
        limit = MemoryLimit(32 << 20)
        limit.__enter__()
    except LocalrunError as error:
        pytest.skip(str(error))
    yield limit
    limit.__exit__(None, None, None)


def test_if_memory_runs_out_the_kernel_ends_the_engine_first_and_the_error_says_why(
    small_group: MemoryLimit, chat_model_path: Path
) -> None:
    """The engine has taken nothing in this group; the other program has nearly all of it."""
    hog = "import sys; from pathlib import Path; from tools.memory_limit import join; join(Path(sys.argv[1])); b'x' * (1 << 26)"
    with EngineProcess() as engine:
        list(engine.load(chat_model_path, ROOMY))
        expected = tokens_of(ask(engine))
        link = engine._connection
        assert link is not None
        assert engine.pid
        small_group.add(engine.pid)
        subprocess.run([sys.executable, "-c", hog, str(small_group.folder)], timeout=PATIENCE_S, check=False)
        wait_until(lambda: not engine.alive)
        with pytest.raises(EngineDiedError, match="run out of memory") as caught:
            link.post(CountTokens(text="x"), long=False)
        assert "close other programs" in str(caught.value.hint)
        assert tokens_of(ask(engine)) == expected


@pytest.mark.parametrize(("counts", "says"), [((5, 6, 6), "was killed by SIGKILL"), ((5, 6, 7), "run out of memory")])
def test_what_the_kernel_ended_before_the_last_command_was_another_program(
    monkeypatch: pytest.MonkeyPatch, counts: tuple[int, int, int], says: str
) -> None:
    """The kernel's count when the engine starts, when it gets a command, and when it has died."""
    *alive, dead = counts
    left = iter(alive)

    def counted() -> int:  # another test's engine may end meanwhile, and its thread asks, too
        return dead if threading.current_thread().name == "engine-events" else next(left)

    monkeypatch.setattr(connection, "out_of_memory_kills", counted)
    with EngineProcess() as engine:
        engine.start()
        assert engine.pid
        os.kill(engine.pid, signal.SIGSTOP)
        link = engine._connection
        assert link is not None
        _, inbox = link.post(CountTokens(text="x"), long=False)
        os.kill(engine.pid, signal.SIGKILL)
        error = inbox.get(timeout=PATIENCE_S)
    assert isinstance(error, EngineDiedError)
    assert says in str(error)


def test_the_kernels_count_of_what_it_ended(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("oom_kill 7\nnr_free_pages 1\n")
    assert out_of_memory_kills(tmp_path / "vmstat") == 7
    assert out_of_memory_kills(tmp_path / "none") == 0


def test_question_during_a_load_waits_for_it_and_loads_nothing_again(
    engine: EngineProcess, chat_model_path: Path
) -> None:
    loading = engine.load(chat_model_path, ROOMY)
    next(loading)
    answers: list[list[Event]] = []
    thread = threading.Thread(target=lambda: answers.append(ask(engine)))
    thread.start()
    *_, ready = loading
    assert isinstance(ready, Ready)
    thread.join(PATIENCE_S)
    (events,) = answers
    assert finished(events).reason == "length"
    assert not any(isinstance(event, Ready) for event in events)


def test_process_that_can_not_be_started_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with EngineProcess() as engine, pytest.raises(EngineDiedError, match="can't be started: Resource temp") as caught:
        engine.start()
    assert "ulimit" in str(caught.value.hint)
    assert "ulimit" in str(_cause_of_death(1, ["RuntimeError: can't start new thread"]).hint)


@pytest.mark.parametrize("refused", ["engine-commands", "engine-log", "engine-events"])
def test_no_process_is_left_where_there_is_no_thread_for_it(monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    children: list[subprocess.Popen[bytes]] = []
    start_process, start_thread = connection._start, threading.Thread.start

    def start_and_note() -> subprocess.Popen[bytes]:
        children.append(start_process())
        return children[-1]

    def refuse(thread: threading.Thread) -> None:
        if thread.name == refused:
            raise RuntimeError("can't start new thread")
        start_thread(thread)

    monkeypatch.setattr(connection, "_start", start_and_note)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with EngineProcess() as engine, pytest.raises(EngineDiedError, match="can't start new thread") as caught:
        engine.start()
    assert "ulimit" in str(caught.value.hint)
    (child,) = children
    assert child.returncode == -signal.SIGKILL
    assert all(pipe.closed for pipe in (child.stdin, child.stdout, child.stderr) if pipe is not None)


def test_each_of_those_who_wait_gets_an_error_of_its_own(chat_model_path: Path) -> None:
    with EngineProcess() as engine:
        list(engine.load(chat_model_path, ROOMY))
        link = engine._connection
        assert link is not None
        assert engine.pid
        os.kill(engine.pid, signal.SIGSTOP)
        inboxes = [link.post(CountTokens(text="x"), long=False)[1] for _ in range(2)]
        os.kill(engine.pid, signal.SIGKILL)
        errors = [inbox.get(timeout=PATIENCE_S) for inbox in inboxes]
        for _ in range(2):
            with pytest.raises(EngineDiedError) as caught:
                link.post(CountTokens(text="x"), long=False)
            errors.append(caught.value)
    assert {(type(error), str(error), getattr(error, "hint", None)) for error in errors} == {
        (EngineDiedError, str(errors[0]), getattr(errors[0], "hint", None))
    }
    assert len({id(error) for error in errors}) == 4


def test_death_while_idle_is_told_at_once(engine: EngineProcess, deaths: list[EngineDiedError]) -> None:
    n_deaths = len(deaths)
    assert engine.pid
    os.kill(engine.pid, signal.SIGKILL)
    wait_until(lambda: len(deaths) > n_deaths)
    assert engine.facts is None
    *_, ready = engine.reload()
    assert isinstance(ready, Ready)
    assert finished(ask(engine)).reason == "length"


def test_death_while_loading_is_reported(chat_model_path: Path) -> None:
    with EngineProcess() as engine:
        engine.start()
        pid = engine.pid
        assert pid
        os.kill(pid, signal.SIGSTOP)  # the load must not be over before it dies

        def abort() -> None:
            wait_until(lambda: engine._connection and engine._connection.loading)
            os.kill(pid, signal.SIGABRT)
            os.kill(pid, signal.SIGCONT)

        thread = threading.Thread(target=abort)
        thread.start()
        with pytest.raises(EngineDiedError, match="SIGABRT"):
            list(engine.load(chat_model_path, ROOMY))
        thread.join()


def test_the_cause_of_an_abort_is_what_the_library_said_last() -> None:
    log = ["llama_decode: error", "/src/ggml/ggml.c:123: GGML_ASSERT(a == b) failed", "Fatal Python error: Aborted"]
    error = _cause_of_death(-signal.SIGABRT, log)
    assert str(error) == f"the engine process was killed by SIGABRT: {log[1]}"
    assert str(_cause_of_death(3, [])) == "the engine process ended with exit code 3"
    traceback = ["Traceback (most recent call last):", "ImportError: no module"]
    assert str(_cause_of_death(1, traceback)) == f"the engine process ended with exit code 1: {traceback[1]}"
    driver = "RuntimeError: Failed to load shared library 'libllama.so': libcuda.so.1: cannot open shared object file"
    assert "localrun doctor" in str(_cause_of_death(1, [driver]).hint)


def test_what_c_code_prints_goes_to_the_log_not_into_the_protocol(chat_model_path: Path) -> None:
    with EngineProcess() as engine:
        list(engine.load(chat_model_path, ROOMY))
        assert engine.pid
        # faulthandler prints every thread's stack to the C level standard error and lets the process go on dying.
        os.kill(engine.pid, signal.SIGSEGV)
        wait_until(lambda: not engine.alive)
        wait_until(lambda: any("Segmentation fault" in line for line in engine.log_tail()))


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_engine_ends_with_a_parent_that_just_exits(chat_model_path: Path) -> None:
    """`test_hangs.py` has those that are killed."""
    script = f"""
        import os
        from localrun.engine.process.process import EngineProcess
        from localrun.engine.process.protocol import Delta, EngineOptions, Generate
        engine = EngineProcess()
        list(engine.load({str(chat_model_path)!r}, EngineOptions(n_ctx=32768, n_batch=64, n_threads=1, ram_bytes=2**26)))
        print(engine.pid, flush=True)
        for event in engine.generate(Generate(tokens=(1, 2, 3), ignore_eos=True)):
            if isinstance(event, Delta):
                os._exit(0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, timeout=PATIENCE_S
    )
    pid = int(done.stdout)
    wait_until(lambda: not is_running(pid))


def test_close_ends_the_process_and_can_be_repeated(chat_model_path: Path) -> None:
    engine = EngineProcess()
    list(engine.load(chat_model_path, ROOMY))
    pid = engine.pid
    assert pid is not None
    engine.close()
    engine.close()
    assert not is_running(pid)
    assert not engine.alive


def test_close_in_the_middle_of_an_answer_ends_its_iterator(chat_model_path: Path) -> None:
    engine = EngineProcess()
    list(engine.load(chat_model_path, ROOMY))
    events = engine.generate(Generate(messages=HELLO, sampling=GREEDY, ignore_eos=True))
    while not isinstance(next(events), Delta):
        pass
    engine.close()
    try:
        last = list(events)[-1]
    except EngineDiedError:
        return  # the process was gone before it could say more
    assert isinstance(last, Finished)
    assert last.reason == "stopped"
