"""The cost of HTTP: `python -m tools.serve_cost [--model MODEL] [--pairs 15] [--tokens 100]`.

Asks the same question in turn directly (`EngineProcess.generate`) and over HTTP as a stream, and compares in pairs: the time to the
first token, the time from the first token to the last, and the processor time of this process, which other programs don't change.
Prints medians.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrun.api import demo
from localrun.engine.options import EngineOptions, SamplingOptions
from localrun.engine.process.process import EngineProcess
from localrun.engine.process.protocol import Delta, Generate
from tests.server.running import Running, serving

QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "Tell me a story about the sea."}]
GREEDY = SamplingOptions(temperature=0, seed=1)


@dataclass(frozen=True)
class Times:
    """Of one answer.

    Attributes:
        cpu_s: of this process: the server, and whoever reads from it.
    """

    first_s: float
    rest_s: float
    cpu_s: float


def direct(engine: EngineProcess, n_tokens: int) -> Times:
    """Seconds as the engine's own user sees them."""
    start, cpu = time.perf_counter(), time.process_time()
    first = None
    command = Generate(messages=tuple(QUESTION), sampling=GREEDY, max_tokens=n_tokens, min_tokens=n_tokens)
    for event in engine.generate(command):
        if first is None and isinstance(event, Delta) and event.text:
            first = time.perf_counter()
    assert first is not None
    return Times(first - start, time.perf_counter() - first, time.process_time() - cpu)


def over_http(running: Running, n_tokens: int) -> Times:
    """Seconds as a client sees them, connection included."""
    body = {"messages": QUESTION, "max_tokens": n_tokens, "min_tokens": n_tokens, "stream": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    start, cpu = time.perf_counter(), time.process_time()
    first = None
    with socket.create_connection(("127.0.0.1", running.port)) as sock:
        sock.sendall(head + data)
        text = b""
        while b"[DONE]" not in text[-100:]:
            text += sock.recv(65536)
            if first is None and b'"content":"' in text.replace(b'"content":""', b""):
                first = time.perf_counter()
    assert first is not None
    return Times(first - start, time.perf_counter() - first, time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=100)
    args = parser.parse_args()
    with EngineProcess() as engine:
        list(engine.load(args.model or demo.converted(), EngineOptions(n_ctx=2048)))
        with serving(engine, sampling=GREEDY, keep_alive_s=2.0) as running:
            direct(engine, args.tokens)
            over_http(running, args.tokens)
            pairs = []
            for i in range(args.pairs):
                if i % 2:
                    web = over_http(running, args.tokens)
                    own = direct(engine, args.tokens)
                else:
                    own = direct(engine, args.tokens)
                    web = over_http(running, args.tokens)
                pairs.append((own, web))
    own_first = statistics.median(own.first_s for own, _ in pairs)
    later = statistics.median(web.first_s - own.first_s for own, web in pairs)
    rate = statistics.median(args.tokens / own.rest_s for own, _ in pairs)
    ratio = statistics.median(web.rest_s / own.rest_s for own, web in pairs)
    per_token_us = statistics.median((web.rest_s - own.rest_s) / args.tokens for own, web in pairs) * 1e6
    print(
        f"first token: {own_first * 1e3:.1f} ms, over HTTP {later * 1e3:+.1f} ms later (median of {len(pairs)} pairs)"
    )
    cpu_us = statistics.median(web.cpu_s - own.cpu_s for own, web in pairs) / args.tokens * 1e6
    print(f"processor time: {cpu_us:+.0f} us per token")
    print(f"decode: {rate:.0f} tokens/s, over HTTP {100 * (ratio - 1):+.1f} % time, {per_token_us:+.0f} us per token")


if __name__ == "__main__":
    main()
