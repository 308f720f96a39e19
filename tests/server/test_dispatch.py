"""The queue: fair between clients, bounded, and nothing computed for those who have left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from localrun.engine.process.protocol import Generate
from localrun.server.dispatch import Dispatcher, Job
from localrun.server.faults import ApiError
from tests.server.running import wait_until
from tests.server.scripted import ScriptedEngine


class Queue:
    """A dispatcher whose first answer waits until it is let go, so that the others pile up in a known order."""

    def __init__(self, most_waiting: int = 10) -> None:
        self.gate = threading.Event()
        self.engine = ScriptedEngine(self._play)
        self.dispatcher = Dispatcher(self.engine, most_waiting=most_waiting)
        self.loop = asyncio.new_event_loop()
        self.order: list[str] = []
        self.jobs: dict[str, Job] = {}

    def _play(self, command: Generate) -> Iterator[str]:
        self.order.append(str(command.text))
        if command.text == "first":
            self.gate.wait()
        yield "x"

    def submit(self, name: str, client: str) -> Job:
        job = Job((Generate(text=name),), client, self.loop)
        self.dispatcher.submit(job)
        self.jobs[name] = job
        return job

    def close(self) -> None:
        self.gate.set()
        self.dispatcher.close(patience_s=5)
        self.loop.close()


@pytest.fixture
def queue() -> Iterator[Queue]:
    queue = Queue()
    queue.submit("first", "a")
    wait_until(lambda: queue.order == ["first"])
    yield queue
    queue.close()


def test_clients_take_turns(queue: Queue) -> None:
    for name in ("a1", "a2", "a3"):
        queue.submit(name, "a")
    queue.submit("b1", "b")
    queue.submit("c1", "c")
    places = {name: queue.dispatcher.n_ahead(job) for name, job in queue.jobs.items()}
    assert places == {"first": 0, "a1": 1, "b1": 2, "c1": 3, "a2": 4, "a3": 5}
    queue.gate.set()
    wait_until(lambda: len(queue.order) == 6)
    assert queue.order == ["first", "a1", "b1", "c1", "a2", "a3"]


def test_who_has_left_is_not_answered(queue: Queue) -> None:
    queue.submit("a1", "a")
    gone = queue.submit("b1", "b")
    queue.dispatcher.cancel(gone)
    assert queue.dispatcher.n_waiting == 1
    queue.gate.set()
    wait_until(lambda: "a1" in queue.order and not queue.dispatcher.busy)
    assert "b1" not in queue.order


def test_full_queue_refuses_and_says_when_to_come_again() -> None:
    queue = Queue(most_waiting=2)
    try:
        queue.submit("first", "a")
        wait_until(lambda: queue.order == ["first"])
        queue.submit("a1", "a")
        queue.submit("b1", "b")
        with pytest.raises(ApiError) as caught:
            queue.submit("c1", "c")
        assert caught.value.kind == "overloaded"
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s >= 1
    finally:
        queue.close()


def test_fault_of_ours_in_an_answer_does_not_end_the_thread(queue: Queue) -> None:
    failed = threading.Event()

    def broken(command: Generate) -> Iterator[str]:
        failed.set()
        raise ZeroDivisionError("a bug")
        yield ""

    queue.engine.play = broken
    queue.submit("a1", "a")
    queue.gate.set()
    assert failed.wait(300)
    queue.engine.play = queue._play
    queue.submit("a2", "a")
    wait_until(lambda: "a2" in queue.order)
    assert queue.order == ["first", "a2"]


def test_stopping_refuses_what_waits_and_what_comes(queue: Queue) -> None:
    waiting = queue.submit("a1", "a")
    closing = threading.Thread(target=queue.dispatcher.close, kwargs={"patience_s": 30})
    closing.start()
    wait_until(lambda: queue.dispatcher.closing)
    with pytest.raises(ApiError, match="stopping"):
        queue.submit("b1", "b")
    queue.gate.set()
    closing.join(300)
    assert not closing.is_alive()
    assert queue.order == ["first"]
    queue.loop.run_until_complete(asyncio.sleep(0))
    assert waiting.items.get_nowait().error is not None
