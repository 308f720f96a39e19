"""Load test of the server: `python -m tools.serve_load [--minutes 10] [--clients 100]`.

Clients of all APIs ask at random, leave at random, read slowly or not at all, and open connections that they never finish. At the
end, memory, descriptors and threads of the server's process are compared with what they were after the first tenth of the time:
they must be flat. The engine plays scripts, so that it is the server that is under load; `--model` serves a real one. The crowd is
a process of its own.

Says how long the first sign of life took, whether any answer was somebody else's, and what stayed behind. Exit code 1 if any of it
is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from localrun.engine.options import EngineOptions
from localrun.engine.process.process import EngineProcess
from localrun.server.limits import ServerLimits
from tests.server.raw import post
from tests.server.running import Running, serving
from tests.server.scripted import ScriptedEngine
from tests.server.test_malformed import GOOD, spoil

FIRST_SIGN_S = 1.0
"""What every client may wait for headers and a first event."""

SHORT = {
    "/v1/chat/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
}
"""Where an answer's bound is added to requests that have none, so that a real model does not write until the context is full."""

SETTLE_S = 8.0
"""Until what was left has been noticed."""


@dataclass
class Tally:
    """What the crowd saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    first_signs_s: list[float] = field(default_factory=list)
    mixed_up: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    rss_bytes: int
    descriptors: int
    threads: int

    @classmethod
    def now(cls) -> Footprint:
        status = Path("/proc/self/status").read_text()
        values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        rss = int(values["VmRSS"].split()[0]) * 1024
        return cls(rss, len(os.listdir("/proc/self/fd")), int(values["Threads"]))


def request_of(i: int, draw: random.Random) -> tuple[str, dict[str, object], str]:
    """(path, body, the word that the answer must hold)."""
    word = f"n{i}x"
    message = [{"role": "user", "content": word}]
    requests: list[tuple[str, dict[str, object]]] = [
        ("/v1/chat/completions", {"messages": message}),
        ("/v1/messages", {"messages": message, "max_tokens": 100}),
        ("/v1/responses", {"input": word, "store": draw.random() < 0.5}),
    ]
    path, body = draw.choice(requests)
    return path, {**body, "stream": draw.random() < 0.7}, word


async def one_request(port: int, i: int, draw: random.Random, tally: Tally) -> None:
    """One client's request, in one of its moods."""
    path, body, word = request_of(i, draw)
    mood = draw.choices(["polite", "leaves", "slow", "half"], [60, 25, 10, 5])[0]
    start = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        if mood == "half":
            writer.write((head.encode() + data)[: draw.randrange(len(head) + len(data))])
            await asyncio.sleep(draw.random() * 3)
            tally.outcomes["half"] += 1
            return
        writer.write(head.encode() + data)
        await writer.drain()
        if mood == "leaves":
            await asyncio.sleep(draw.random() * 0.5)
            tally.outcomes["left"] += 1
            return
        text = b""
        while chunk := await reader.read(200 if mood == "slow" else 65536):
            if not text and body["stream"]:
                tally.first_signs_s.append(time.monotonic() - start)
            text += chunk
            if mood == "slow":
                await asyncio.sleep(0.02)
        judge(text.decode("utf-8", "replace"), word, tally)
    except ConnectionError:
        tally.outcomes["reset"] += 1
    finally:
        writer.close()


def judge(text: str, word: str, tally: Tally) -> None:
    """Counts a response's status, and takes down an answer that is another client's."""
    status = text.split(" ", 2)[1] if text.startswith("HTTP/1.1 ") else "none"
    tally.outcomes[status] += 1
    if status == "200" and word not in text:
        tally.mixed_up.append(f"{word}: {text[-200:]!r}")


async def crowd(port: int, n_clients: int, seconds: float, seed: int) -> Tally:
    """All clients, one request after the other, until the time is over."""
    tally = Tally()
    end = time.monotonic() + seconds
    counter = iter(range(10**9))

    async def client(k: int) -> None:
        draw = random.Random(seed * 1000 + k)
        while time.monotonic() < end:
            await one_request(port, next(counter), draw, tally)
            await asyncio.sleep(draw.random() * 0.1)

    await asyncio.gather(*(client(k) for k in range(n_clients)))
    return tally


def crowd_process(port: int, n_clients: int, seconds: float, seed: int) -> Tally:
    """`crowd` as the whole work of a process."""
    return asyncio.run(crowd(port, n_clients, seconds, seed))


def rest(running: Running) -> Footprint:
    """What is held when everybody has gone."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline and (running.dispatcher.busy or running.dispatcher.n_waiting):
        time.sleep(0.1)
    time.sleep(2)
    return Footprint.now()


def run(running: Running, args: argparse.Namespace) -> list[str]:
    """What is wrong; prints what was seen."""
    seconds = args.minutes * 60
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        first = pool.submit(crowd_process, running.port, args.clients, seconds / 10, 1).result()
        warm = rest(running)
        tally = pool.submit(crowd_process, running.port, args.clients, seconds * 9 / 10, 2).result()
        end = rest(running)
    signs = sorted(tally.first_signs_s)
    tally.mixed_up += first.mixed_up
    print(f"requests: {dict(first.outcomes + tally.outcomes)}")
    shown = [signs[int(share * (len(signs) - 1))] for share in (0.5, 0.99, 1.0)]
    print("first sign of life: median {:.3f} s, 99 % {:.3f} s, worst {:.3f} s".format(*shown), f"of {len(signs)}")
    print(f"after a tenth: {warm}")
    print(f"at the end:    {end}")
    faults = [f"an answer was somebody else's: {text}" for text in tally.mixed_up[:5]]
    if signs[-1] > FIRST_SIGN_S:
        faults.append(f"a client waited {signs[-1]:.2f} s for a first sign")
    if end.descriptors > warm.descriptors + 3 or end.threads > warm.threads + 2:
        faults.append("descriptors or threads have grown")
    if end.rss_bytes > warm.rss_bytes * 1.1 + (8 << 20):
        faults.append("memory has grown")
    faults += [
        f"{n} answers with status {status}"
        for status, n in tally.outcomes.items()
        if status[:1] == "5" and status != "529"
    ]
    return faults


def malformed(running: Running, n_requests: int) -> list[str]:
    """What is wrong after so many requests that are spoiled at one to three places."""
    statuses: Counter[int] = Counter()
    faults = []
    draw = random.Random(n_requests)
    for i in range(n_requests):
        path, good = GOOD[i % len(GOOD)]
        body = {**good, SHORT[path]: 8} if path in SHORT else good
        for _ in range(draw.choice((1, 1, 2, 3))):
            body = spoil(body, draw) if body else body
        reply = post(running, path, body)
        statuses[reply.status] += 1
        if reply.status >= 500:
            faults.append(f"{path}: {reply.status} {reply.body[:200]!r} for {json.dumps(body)[:2000]}")
    print(f"malformed: {dict(statuses)}")
    after = post(running, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8})
    if after.status != 200:
        faults.append(f"a good request behind them: {after.status} {after.body[:200]!r}")
    return faults[:5]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--malformed", type=int, metavar="N", help="so many wrong requests instead of a crowd")
    parser.add_argument(
        "--model", type=Path, help="a model that answers instead of the scripts; answers are then not compared"
    )
    args = parser.parse_args()
    limits = ServerLimits(queue=2 * args.clients, read_s=2.0, write_s=5.0)
    if args.model is None:
        engine = ScriptedEngine(lambda command: [str(command.messages[-1]["content"]), *[" word"] * 20], delay_s=0.0005)
        if args.malformed:
            engine = ScriptedEngine()
        with serving(engine, limits=limits, keep_alive_s=0.4) as running:
            faults = malformed(running, args.malformed) if args.malformed else run(running, args)
    else:
        with EngineProcess() as process:
            list(process.load(args.model, EngineOptions(n_ctx=1024 if args.malformed else 4096)))
            pid = process.pid
            with serving(process, limits=limits, keep_alive_s=0.4) as running:
                if args.malformed:
                    faults = malformed(running, args.malformed)
                else:
                    faults = [fault for fault in run(running, args) if "somebody else's" not in fault]
            if process.pid != pid:
                faults.append("the engine's process has died on the way")
    for fault in faults:
        print(f"FAULT: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
