"""Counters in Prometheus' text format: requests, tokens, the queue, and the engine's counters at scrape time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from localrun.errors import LocalrunError
from localrun.server.engine import ServerEngine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

PATIENCE_S = 2.0
"""A scrape does without the engine's counters if they take longer."""

_WAIT_BUCKETS = (0.1, 0.5, 1, 5, 15, 60, 300, 1200)

_COUNTERS = {
    "bytes_read": ("localrun_drive_read_bytes", "Expert bytes read from drives"),
    "hits": ("localrun_expert_hits", "Experts found in memory"),
    "misses": ("localrun_expert_misses", "Experts read for a call"),
}
"""The engine's counters by their names in `offload/cache/telemetry.py`."""


class Metrics:
    """All counters of one server. Any thread."""

    def __init__(self, engine: ServerEngine) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "localrun_requests",
            "Requests for an answer, by outcome",
            ["api", "outcome"],
            registry=self._registry,
        )
        self._prompt = Counter("localrun_prompt_tokens", "Tokens of prompts", registry=self._registry)
        self._cached = Counter(
            "localrun_prompt_cached_tokens", "Of those, taken from a saved state", registry=self._registry
        )
        self._new = Counter("localrun_answer_tokens", "Tokens of answers", registry=self._registry)
        self._wait = Histogram(
            "localrun_queue_wait_seconds", "Time in the queue", buckets=_WAIT_BUCKETS, registry=self._registry
        )
        self._queue = Gauge("localrun_queue_requests", "Requests waiting", registry=self._registry)
        self._busy = Gauge("localrun_busy", "1 while an answer is being generated", registry=self._registry)
        self._registry.register(_EngineCounters(engine))

    def answered(self, api: str, outcome: str, prompt: int, cached: int, new: int) -> None:
        """A request is over."""
        self._requests.labels(api, outcome).inc()
        self._prompt.inc(prompt)
        self._cached.inc(cached)
        self._new.inc(new)

    def refused(self, api: str, kind: str) -> None:
        """A request got an error before it reached the queue."""
        self._requests.labels(api, kind).inc()

    def waited(self, seconds: float) -> None:
        self._wait.observe(max(0.0, seconds))

    def text(self, *, n_waiting: int, busy: bool) -> bytes:
        """All counters. Blocks for the engine's answer."""
        self._queue.set(n_waiting)
        self._busy.set(busy)
        return generate_latest(self._registry)


class _EngineCounters(Collector):
    def __init__(self, engine: ServerEngine) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("localrun_engine_up", "1 if the engine is up")
        try:
            stats = self._engine.stats(timeout_s=PATIENCE_S)
        except (LocalrunError, TimeoutError):
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        yield _gauge("localrun_context_used_tokens", "Tokens in the context", stats.context_used)
        yield _gauge("localrun_context_tokens", "Context size in tokens", stats.n_ctx)
        yield _gauge("localrun_engine_resident_bytes", "Memory of the engine process", stats.rss_bytes)
        telemetry: Mapping[str, Any] = stats.telemetry
        if isinstance(rate := telemetry.get("hit_rate"), int | float):
            yield _gauge("localrun_expert_hit_rate", "Share of experts found in memory since the start", rate)
        for name, (metric, text) in _COUNTERS.items():
            if isinstance(value := telemetry.get(name), int | float):
                yield CounterMetricFamily(metric, text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
