"""Measures a loaded model: prefill and decode at several context lengths ("frontiers"), time breakdown, reads, and the machine.

One stream of tokens is fed to one session. The context is filled up to each frontier (a prefill measurement), then tokens are
fed one by one (decode). Tokens are given, not sampled, so that two runs, or two engines, do the same work. Every token's time
includes fetching its logits, which choosing the next token would require.

The breakdown of a token's time comes from our device's counters: dense is everything but calls of experts; parts of it are what our
kernels took for matrices and for attention, the rest is llama.cpp's operations. Compute is time in expert kernels, waiting is when
the decoding thread is idle during a read, other is the rest of our device (routing, bookkeeping, hand-over). A model without our
device has only totals.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from localrun import __version__
from localrun.engine import memory
from localrun.engine.engine import Engine
from localrun.errors import DecodeError, UsageError
from localrun.offload.cache.drive_probe import DiskProfile, probe_disk, probe_memory
from localrun.quant.open import open_model

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the JSON result; rises when a field changes its meaning."""

_GPU_STEP_S, _GPU_WAIT_S = 1.0, 60.0
"""While experts arrive on a GPU at least one per step."""

_WARM_UP_SEED = 0x5EED

Progress = Callable[[str], None]
Counters = dict[int, dict[str, int]]
"""Layer -> counter (lower-case names of `telemetry.Counter`) -> value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """Benchmark options.

    Attributes:
        frontiers: tokens in the context at which decode is measured, rising.
        new_tokens: decoded at each frontier.
        warm_up_tokens: fed first and discarded, to compile kernels and fill caches.
        time_limit_s: frontiers that would exceed it are skipped and reported.
    """

    frontiers: tuple[int, ...] = (0, 512, 2048)
    new_tokens: int = 32
    warm_up_tokens: int = 32
    time_limit_s: float = 600.0

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.frontiers, self.frontiers[1:], strict=False))
        if not self.frontiers or self.frontiers[0] < 0 or not rising or self.new_tokens < 1:
            raise UsageError(
                "frontiers must be ascending and not negative, and at least one token must be decoded at each"
            )

    @property
    def n_tokens(self) -> int:
        """Tokens that are measured, and what the context must hold."""
        return self.frontiers[-1] + self.new_tokens * len(self.frontiers)

    @property
    def n_stream(self) -> int:
        """Tokens of a stream from which the warm-up, too, is taken."""
        return self.n_tokens + self.warm_up_tokens


def default_frontiers(prompt_tokens: int) -> tuple[int, ...]:
    """Nothing, a quarter and all of the prompt: 2048 -> 0, 512, 2048."""
    return tuple(sorted({0, prompt_tokens // 4, prompt_tokens}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Seconds of a phase by what passed them.

    Attributes:
        matrices_s, attention_s: parts of `dense_s` that our kernels took for dense matrices, and for attention and the indexer.
    """

    dense_s: float
    compute_s: float
    wait_s: float
    other_s: float
    matrices_s: float = 0.0
    attention_s: float = 0.0

    @property
    def llamacpp_s(self) -> float:
        """The rest of `dense_s`: llama.cpp's operations, and what it takes to get to them."""
        return max(0.0, self.dense_s - self.matrices_s - self.attention_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """A phase beside its two resources.

    Attributes:
        reading_s: what it read, at the drive's rate.
        computing_s: all but waiting for reads.
    """

    seconds: float
    reading_s: float
    computing_s: float
    drive_bytes_per_s: float

    @property
    def times_slowest(self) -> float:
        """The phase's time, as a multiple of the slower one's."""
        return self.seconds / max(self.reading_s, self.computing_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One measurement.

    Attributes:
        kind: many tokens in batches, or one by one.
        context: tokens in the context before.
        n_tokens: tokens fed.
        seconds: time of all of them.
        step_ms: time of each batch (prefill) or token (decode), in order.
        split: None for a model without our device.
        hits, misses: distinct experts per layer call that were in RAM, or had to be read.
        bytes_read: from files, read-ahead included.
        prefetched: experts read ahead of their call.
        guesses, guesses_used, guesses_wasted: experts among them predicted with later layers' routers, those
            used, and those read in vain; the others were cancelled.
        unused_bytes: read ahead, sometimes in an earlier phase, and given up without having been used.
        reading_s: with at least one read in flight.
        layers: the counters per layer, with `layer`.
        rss_bytes: resident size of the process afterwards.
    """

    kind: Literal["prefill", "decode"]
    context: int
    n_tokens: int
    seconds: float
    step_ms: tuple[float, ...]
    split: Split | None
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    prefetched: int = 0
    guesses: int = 0
    guesses_used: int = 0
    guesses_wasted: int = 0
    unused_bytes: int = 0
    reading_s: float = 0.0
    evictions: int = 0
    layers: tuple[Mapping[str, int], ...] = ()
    rss_bytes: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Mean rate."""
        return self.n_tokens / self.seconds

    @property
    def ms_per_token(self) -> float:
        """Mean time."""
        return 1e3 * self.seconds / self.n_tokens

    @property
    def hit_rate(self) -> float | None:
        """Share of distinct experts per layer call that were in RAM; None if none was asked for."""
        touched = self.hits + self.misses
        return self.hits / touched if touched else None

    @property
    def read_bytes_per_s(self) -> float:
        """Mean rate of reading over the whole phase."""
        return self.bytes_read / self.seconds

    def bounds(self, drive_bytes_per_s: float) -> Bounds | None:
        """What the phase could not be faster than, if reading and computing overlapped perfectly; None for a model without our
        device.

        Args:
            drive_bytes_per_s: measured alone; a phase whose reads were faster, while any was under way, shows that the drive can do
                more.
        """
        if self.split is None:
            return None
        rate = max(drive_bytes_per_s, self.bytes_read / self.reading_s if self.reading_s else 0.0)
        return Bounds(
            seconds=self.seconds,
            reading_s=self.bytes_read / rate if self.bytes_read else 0.0,
            computing_s=self.seconds - self.split.wait_s,
            drive_bytes_per_s=rate,
        )

    def percentile(self, percent: float) -> float:
        """Of `step_ms`."""
        return float(np.percentile(self.step_ms, percent))

    def to_json(self) -> dict[str, Any]:
        """Everything, derived figures included."""
        split = self.split and {
            name: 1e3 * getattr(self.split, f"{name}_s") / self.n_tokens
            for name in ("dense", "compute", "wait", "other")
        }
        return {
            "kind": self.kind,
            "context": self.context,
            "n_tokens": self.n_tokens,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "ms_per_token": self.ms_per_token,
            "step_ms": {
                "median": self.percentile(50),
                "p10": self.percentile(10),
                "p90": self.percentile(90),
                "p99": self.percentile(99),
                "all": [round(ms, 4) for ms in self.step_ms],
            },
            "split_ms_per_token": split,
            "matrices_ms_per_token": self.split and 1e3 * self.split.matrices_s / self.n_tokens,
            "attention_ms_per_token": self.split and 1e3 * self.split.attention_s / self.n_tokens,
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": self.hit_rate,
            "bytes_read": self.bytes_read,
            "read_bytes_per_s": self.read_bytes_per_s,
            "prefetched": self.prefetched,
            "guesses": self.guesses,
            "guesses_used": self.guesses_used,
            "guesses_wasted": self.guesses_wasted,
            "unused_bytes": self.unused_bytes,
            "reading_s": self.reading_s,
            "evictions": self.evictions,
            "rss_bytes": self.rss_bytes,
            "layers": [dict(layer) for layer in self.layers],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """The machine. Unknown values are empty, 0 or None.

    Attributes:
        load_average: runnable threads over the last minute, to identify measurements on a busy machine.
    """

    cpu: str
    n_cores: int
    ram_bytes: int
    system: str
    versions: Mapping[str, str]
    memory_bytes_per_s: float | None = None
    disk: DiskProfile | None = None
    load_average: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """The result of `measure`.

    Attributes:
        phases: in the order of measurement.
        skipped: what was skipped, and why.
        rss_start_bytes: after loading; compare with the last phase's to see growth.
        peak_rss_bytes: peak resident size of the process.
        routing: uses of each layer's experts before the first phase; empty if nothing was counted.
    """

    phases: tuple[Phase, ...]
    skipped: tuple[str, ...]
    rss_start_bytes: int
    peak_rss_bytes: int
    options: BenchOptions = field(default_factory=BenchOptions)
    routing: tuple[np.ndarray[Any, np.dtype[np.float64]], ...] = field(default=(), repr=False)


# --- measuring --------------------------------------------------------------------------------------------------------


def random_tokens(n_tokens: int, n_vocab: int, seed: int) -> list[int]:
    """Ids drawn evenly from the vocabulary: no text is like it, so caches do worse than with text."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, n_vocab, n_tokens)]


def measure(
    engine: Engine, tokens: Sequence[int], options: BenchOptions, progress: Progress = lambda text: None
) -> Benchmark:
    """Runs all phases in a fresh session of `engine`.

    Args:
        tokens: at least `options.n_tokens` ids, which are measured; the warm-up takes the last ones of what follows.

    Raises:
        UsageError: too few tokens.
        ContextFullError, DecodeError: as `Session.feed`.
    """
    if len(tokens) < options.n_tokens:
        raise UsageError(
            f"{len(tokens)} tokens are too few: the benchmark needs {options.n_tokens}",
            hint="use a longer text, or fewer --prompt-tokens and --new-tokens",
        )
    return _Run(engine, tokens, options, progress).run()


class _Ours(NamedTuple):
    """What our device and the store have counted since the model was loaded."""

    matrices_ns: int
    attention_ns: int
    reading_s: float
    unused_bytes: int


class _Run:
    """State of one `measure`."""

    def __init__(self, engine: Engine, tokens: Sequence[int], options: BenchOptions, progress: Progress) -> None:
        self._engine, self._tokens, self._options, self._progress = engine, tokens, options, progress
        self._session = engine.session()
        self._session.follows_company = True  # as most answers
        self._phases: list[Phase] = []
        self._skipped: list[str] = []
        self._deadline = time.monotonic() + options.time_limit_s

    def run(self) -> Benchmark:
        options, session = self._options, self._session
        rss_start = memory.resident_bytes()
        try:
            self._warm_up()
            routing = self._routing()
            for frontier in options.frontiers:
                if session.position < frontier:
                    if not self._affordable(frontier):
                        break
                    self._prefill(frontier)
                self._decode()
            logits = session.logits
        finally:
            session.close()
        if not np.isfinite(logits).all():
            raise DecodeError(
                "the model's logits are not finite: the measurements are meaningless",
                hint="run `localrun verify` on the model",
            )
        return Benchmark(
            phases=tuple(self._phases),
            skipped=tuple(self._skipped),
            rss_start_bytes=rss_start,
            peak_rss_bytes=peak_resident_bytes(),
            options=options,
            routing=routing,
        )

    def _warm_up(self) -> None:
        """A batch and single tokens, because they use different code. None of them is measured, so that what is in memory is what
        other tokens have left there; a stream that ends too soon is continued with made-up ids."""
        n = min(self._options.warm_up_tokens, self._session.n_ctx)
        if n <= 0:
            return
        self._progress("warming up")
        some = list(self._tokens[self._options.n_tokens :][-n:])
        some += random_tokens(n - len(some), self._engine.facts.n_vocab, _WARM_UP_SEED)
        self._session.feed(some[: max(1, n - 2)])
        for token in some[max(1, n - 2) :]:
            self._session.feed([token])
        self._session.reset()
        self._wait_for_gpus()

    def _routing(self) -> tuple[np.ndarray[Any, np.dtype[np.float64]], ...]:
        known = self._engine.expert_map()
        rows: Any = known["layers"] if known is not None else ()
        counts = tuple(np.array(row["heat"], np.float64) for row in rows)
        return counts if any(layer.any() for layer in counts) else ()

    def _wait_for_gpus(self) -> None:
        """Experts are copied to GPUs while the program is already answering; measure the state afterwards."""
        deadline = time.monotonic() + _GPU_WAIT_S
        while self._engine.stats().get("gpu_under_way") and time.monotonic() < deadline:
            self._progress(f"copying experts to the GPU: {self._engine.stats()['gpu_experts']}")
            time.sleep(_GPU_STEP_S)
            self._session.feed([self._tokens[0]])  # between two decodes they are put to use
        self._session.reset()

    def _affordable(self, frontier: int) -> bool:
        """Whether a prefill up to `frontier` and its decode fit into the time, at the rates seen so far."""
        decode = next((p for p in reversed(self._phases) if p.kind == "decode"), None)
        prefill = next((p for p in reversed(self._phases) if p.kind == "prefill"), None)
        known = prefill or decode
        if known is None:
            return True
        need_s = (frontier - self._session.position) * known.seconds / known.n_tokens
        need_s += decode.seconds if decode is not None else 0.0
        left_s = self._deadline - time.monotonic()
        # Before the first prefill the decode rate is all there is, and prefill is never slower.
        if need_s <= left_s or (prefill is None and need_s <= 10 * left_s):
            return True
        self._skipped.append(f"context {frontier}: would take {need_s:.0f} s, only {max(0.0, left_s):.0f} s left")
        return False

    def _prefill(self, frontier: int) -> None:
        session = self._session
        tokens = self._tokens[session.position : frontier]
        steps = [0.0]
        ours = self._ours()
        before, start = self._counters(), time.perf_counter()

        def batch_done(done: int, total: int) -> None:
            steps.append(time.perf_counter() - start)
            self._progress(f"prefill: {done} of {frontier} tokens")

        context = session.position
        session.feed(tokens, progress=batch_done)
        _ = session.logits
        seconds = time.perf_counter() - start
        self._add("prefill", context, len(tokens), seconds, np.diff(steps) * 1e3, before, ours)

    def _decode(self) -> None:
        session, n = self._session, self._options.new_tokens
        context = session.position
        step_ms = []
        ours = self._ours()
        before, spent = self._counters(), self._engine.spent()
        for i in range(n):
            token = self._tokens[session.position]
            start = time.perf_counter()
            session.feed([token])
            _ = session.logits
            step_ms.append(1e3 * (time.perf_counter() - start))
            self._progress(f"decode at {context}: {i + 1} of {n} tokens")
        self._engine.learn_tokens(spent, n_tokens=n, seconds=sum(step_ms) / 1e3, position=context + n // 2)
        self._add("decode", context, n, sum(step_ms) / 1e3, step_ms, before, ours)

    def _ours(self) -> _Ours:
        unused = int(self._engine.stats().get("unused_bytes", 0))
        return _Ours(self._engine.dense_ns, self._engine.attention_ns, self._engine.spent().reading_s, unused)

    def _counters(self) -> Counters:
        return {int(row["layer"]): dict(row) for row in self._engine.stats().get("layers", ())}

    def _add(
        self,
        kind: Literal["prefill", "decode"],
        context: int,
        n_tokens: int,
        seconds: float,
        step_ms: Sequence[float] | np.ndarray[Any, Any],
        before: Counters,
        ours: _Ours,
    ) -> None:
        layers = _difference(before, self._counters())
        now = self._ours()
        total = {name: sum(row.get(name, 0) for row in layers) for name in {key for row in layers for key in row}}
        self._phases.append(
            Phase(
                kind=kind,
                context=context,
                n_tokens=n_tokens,
                seconds=seconds,
                step_ms=tuple(float(ms) for ms in step_ms),
                split=_split(seconds, total, now.matrices_ns - ours.matrices_ns, now.attention_ns - ours.attention_ns)
                if layers
                else None,
                hits=total.get("hits", 0),
                misses=total.get("misses", 0),
                bytes_read=total.get("bytes_read", 0),
                prefetched=total.get("prefetched", 0),
                guesses=total.get("guesses", 0),
                guesses_used=total.get("guesses_used", 0),
                guesses_wasted=total.get("guesses_wasted", 0),
                unused_bytes=now.unused_bytes - ours.unused_bytes,
                reading_s=now.reading_s - ours.reading_s,
                evictions=total.get("evictions", 0),
                layers=tuple(layers),
                rss_bytes=memory.resident_bytes(),
            )
        )


def _difference(before: Counters, after: Counters) -> list[dict[str, int]]:
    return [
        {name: value if name == "layer" else value - before.get(layer, {}).get(name, 0) for name, value in row.items()}
        for layer, row in sorted(after.items())
    ]


def _split(seconds: float, total: Mapping[str, int], matrices_ns: int, attention_ns: int) -> Split:
    ours, compute, wait = (total.get(name, 0) / 1e9 for name in ("total_ns", "compute_ns", "wait_ns"))
    return Split(
        dense_s=max(0.0, seconds - ours),
        compute_s=compute,
        wait_s=wait,
        other_s=max(0.0, ours - compute - wait),
        matrices_s=matrices_ns / 1e9,
        attention_s=attention_ns / 1e9,
    )


# --- the machine ------------------------------------------------------------------------------------------------------


def machine(model: Path | None = None, *, probe: bool = True) -> MachineFacts:
    """Describes this machine; with `probe` the bandwidth of memory and of the model's drive (about a second)."""
    disk = None
    if probe and model is not None:
        disk = probe_disk(list(open_model(model).files))
    return MachineFacts(
        cpu=_cpu_name(),
        n_cores=memory.physical_cores(),
        ram_bytes=memory.total_memory() or 0,
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        versions={"localrun": __version__, **{name: _version(name) for name in ("llama-cpp-python", "numba", "numpy")}},
        memory_bytes_per_s=probe_memory() if probe else None,
        disk=disk,
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def peak_resident_bytes() -> int:
    """Peak resident size of this process; 0 if unknown."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # getrusage(2): KiB on Linux, bytes on macOS


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
