"""Real engine processes under everything that could make one wait for the other: megabytes both ways at once, a side that does not
read, a model that is freed while it is looked at, a parent that dies in the middle of anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from localrun.engine.options import SamplingOptions
from localrun.engine.process import connection
from localrun.engine.process.host import Host
from localrun.engine.process.process import EngineProcess
from localrun.engine.process.protocol import Close, CountTokens, Delta, Event, Generate, GetStats, Load
from localrun.engine.process.wire import encode
from localrun.errors import EngineDiedError, LocalrunError
from tests.engine.conftest import OPTIONS

pytestmark = [
    pytest.mark.engine_process,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc"),
]

GREEDY = SamplingOptions(temperature=0)
PATIENCE_S = 300.0
"""Far more than anything here takes; only a hang reaches it."""
MEGABYTES = 1 << 20
"""Far more than a pipe holds (64 KiB)."""


@contextmanager
def hammering(*targets: Callable[[], Any]) -> Iterator[list[int]]:
    """Calls each target again and again in a thread of its own; errors of the engine are fine. Gives the numbers of calls.

    Ending it proves that none of them hangs.
    """
    done = threading.Event()
    counts = [0] * len(targets)

    def run(number: int) -> None:
        while not done.is_set():
            with suppress(LocalrunError, TimeoutError):
                targets[number]()
            counts[number] += 1
            time.sleep(0.005)  # the engine and the test want some of the processor, too

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(targets))]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        done.set()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads), "somebody hangs"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def big_both_ways(engine: EngineProcess) -> list[Callable[[], Any]]:
    """Megabytes to the engine that are answered with megabytes: whoever names a file is told its name in the error."""
    big = "x" * MEGABYTES
    return [
        lambda: engine.snapshot("/" + big),
        lambda: engine.restore("/" + big),
        lambda: engine.count(CountTokens(text="hello", messages=({"content": big},))),
        lambda: list(engine.generate(Generate(messages=({"role": "king", "content": big},)))),
        lambda: engine.stats(expert_map=True),
    ]


def test_megabytes_both_ways_at_once_while_loading_stopping_closing_and_dying(chat_model_path: Path) -> None:
    with EngineProcess() as engine:
        list(engine.load(chat_model_path, OPTIONS))
        with pytest.raises(LocalrunError) as caught:
            engine.snapshot("/" + "x" * MEGABYTES)
        assert len(str(caught.value)) > MEGABYTES, "the answers are as large as the questions"
        with hammering(*big_both_ways(engine)) as counts:
            list(engine.load(chat_model_path, OPTIONS))
            wait_until(lambda: min(counts) >= 2)
            engine.stop()
            killed = engine.pid
            assert killed
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda: engine.pid != killed)
            list(engine.load(chat_model_path, OPTIONS))
            so_far = min(counts)
            wait_until(lambda: min(counts) > so_far)
            engine.close()
            list(engine.load(chat_model_path, OPTIONS))
        assert [type(event) for event in short_answer(engine)].count(Delta) > 0


def short_answer(engine: EngineProcess) -> list[Event]:
    command = Generate(messages=({"role": "user", "content": "Hello"},), sampling=GREEDY, max_tokens=3)
    return list(engine.generate(command))


def test_engine_that_does_not_read_makes_nobody_wait(chat_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CLOSE_TIMEOUT_S", 0.3)
    with EngineProcess() as engine:
        list(engine.load(chat_model_path, OPTIONS))
        assert engine.pid
        os.kill(engine.pid, signal.SIGSTOP)
        text = "x" * MEGABYTES
        command = Generate(messages=({"role": "user", "content": text},))
        raised: list[BaseException] = []

        def answer() -> None:
            try:
                list(engine.generate(command))
            except EngineDiedError as error:
                raised.append(error)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        wait_until(lambda: bool(engine._connection and engine._connection._running))
        for _ in range(3):
            with pytest.raises(TimeoutError):
                engine.count_tokens(text, timeout_s=0.05)
            with pytest.raises(TimeoutError):
                engine.stats(timeout_s=0.05)
            engine.stop()
        engine.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        assert [str(error) for error in raised] == ["the engine was closed"]


def test_parent_that_does_not_read_is_still_heard(chat_model_path: Path) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-m", "localrun.engine.process.worker", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(encode(Load(request=1, path=str(chat_model_path), options=OPTIONS)))
    worker.stdin.flush()
    while b"Ready" not in worker.stdout.readline():  # a load may take longer than what is left after `Close`
        pass
    worker.stdin.write(encode(Generate(request=2, tokens=(1, 2, 3), ignore_eos=True, max_tokens=900)))
    for request in range(3, 6000):  # megabytes of answers that are not read, and an answer that runs meanwhile
        worker.stdin.write(encode(GetStats(request=request, expert_map=True)))
    worker.stdin.write(encode(Close(request=6000)))
    worker.stdin.close()
    try:
        assert worker.wait(PATIENCE_S) == 0
    finally:
        worker.kill()
        worker.stdout.close()


def test_model_that_is_looked_at_is_not_freed(chat_model_path: Path) -> None:
    """Without the engine process: what its threads do to one host, as often as they can."""
    host = Host(lambda event: None)
    load = Load(path=str(chat_model_path), options=OPTIONS)
    count = CountTokens(text="hello world " * 500)
    conversation = CountTokens(messages=({"role": "user", "content": "Hello"},))
    try:
        with hammering(
            lambda: host.count_tokens(count),
            lambda: host.count_tokens(conversation),
            lambda: host.stats(GetStats(expert_map=True), busy=False),
            host.stop,
        ) as counts:
            for _ in range(4):
                host.clear_stop()
                with suppress(LocalrunError):  # it may have been stopped
                    host.load(load)
                so_far = list(counts)
                wait_until(lambda: all(now > before for now, before in zip(counts, so_far, strict=True)))  # noqa: B023
    finally:
        host.close()
    assert not host.has_model


# --- the parent dies -----------------------------------------------------------------------------------------------


def engine_of_a_parent_that(does: str, *, environment: dict[str, str] | None = None) -> int:
    """Runs a parent with an engine process called `engine` that `does` something and is then killed; the engine's pid."""
    return pids_of_a_parent_that(does, environment)[0]


def pids_of_a_parent_that(does: str, environment: dict[str, str] | None = None) -> list[int]:
    """The same for the engine's pid and those that `does` prints."""
    script = f"""
        import os, signal, sys, threading, time
        from localrun.engine.process.process import EngineProcess
        from localrun.engine.process.protocol import CountTokens, Delta, EngineOptions, Generate, PromptProgress
        options = EngineOptions(n_ctx=32768, n_batch=512, n_threads=1, ram_bytes=2**26)
        engine = EngineProcess()
        engine.start()
        print(engine.pid, flush=True)
        def die():
            os.kill(os.getpid(), signal.SIGKILL)
{textwrap.indent(textwrap.dedent(does), " " * 8)}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, **(environment or {})},
    )
    assert done.returncode == -signal.SIGKILL
    return list(map(int, done.stdout.split()))


def test_engine_ends_with_its_parent_while_it_answers_reads_a_prompt_or_counts(chat_model_path: Path) -> None:
    pids = [
        engine_of_a_parent_that(f"""
            list(engine.load({str(chat_model_path)!r}, options))
            {does}
        """)
        for does in (
            "[die() for e in engine.generate(Generate(tokens=(1, 2, 3), ignore_eos=True)) if isinstance(e, Delta)]",
            "[die() for e in engine.generate(Generate(tokens=tuple(range(2, 202)) * 150)) if isinstance(e, PromptProgress)]",
            "count = CountTokens(text='hello world ' * 10**5);"
            "inboxes = [engine._connection.post(count, long=False)[1] for _ in range(20)]; inboxes[0].get(); die()",
        )
    ]
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def test_engine_ends_with_its_parent_while_it_compiles_kernels_for_a_load(
    chat_model_path: Path, tmp_path: Path
) -> None:
    pid = engine_of_a_parent_that(
        f"""
        events = engine.load({str(chat_model_path)!r}, options)
        threading.Thread(target=list, args=(events,), daemon=True).start()
        while not any("compiling" in line for line in engine.log_tail()):
            time.sleep(0.01)
        die()
        """,
        environment={"LOCALRUN_KERNEL_DIR": str(tmp_path)},
    )
    wait_until(lambda: not is_running(pid))


def test_engine_ends_though_a_child_of_its_parent_holds_the_pipes(chat_model_path: Path) -> None:
    """What a parent forks keeps its ends of the pipes open, so they say nothing."""
    engine, child = pids_of_a_parent_that(f"""
        list(engine.load({str(chat_model_path)!r}, options))
        if (child := os.fork()) == 0:
            os.close(1)
            time.sleep(600)
        print(child, flush=True)
        die()
    """)
    try:
        wait_until(lambda: not is_running(engine))
        assert is_running(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_engine_that_hangs_ends_all_the_same(tmp_path: Path) -> None:
    """A load that waits for ever, for a dead drive, say."""
    fifo = tmp_path / "worker.py"
    fifo.write_text(
        textwrap.dedent("""
            import time
            from localrun.engine.process import host, worker
            worker.ORPHAN_EMPTY_S = 0.5
            host.Host.load = lambda self, command: (self._send(worker.Stats(request=command.request, busy=True,
                context_used=0, n_ctx=0, rss_bytes=0, telemetry={})), time.sleep(1000))
            worker.main()
        """)
    )
    worker = subprocess.Popen(
        [sys.executable, str(fifo), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(encode(Load(request=1, path="x")))
    worker.stdin.flush()
    assert b"Stats" in worker.stdout.readline(), "it is in the load"
    _, log = worker.communicate(timeout=PATIENCE_S)
    assert worker.returncode == 1
    assert b"worker.py" in log, "where it was"
