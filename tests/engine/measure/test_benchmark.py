"""Benchmarks: what is counted adds up, given tokens are what is fed, and the report shows it."""

from __future__ import annotations

import json
import time
import xml.etree.ElementTree as ET
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from localrun import cli
from localrun.commands import bench, bench_report
from localrun.engine.engine import Engine
from localrun.engine.measure import benchmark
from localrun.engine.measure.benchmark import Benchmark, BenchOptions, measure, random_tokens
from localrun.engine.measure.stock import open_stock
from localrun.engine.options import EngineOptions
from localrun.engine.session import Session
from localrun.errors import UsageError
from localrun.offload.cache.drive_probe import DiskProfile
from localrun.offload.kernels import attention
from tools.simulator.trace_file import Trace

OPTIONS = BenchOptions(frontiers=(0, 20, 90), new_tokens=4, warm_up_tokens=5)


@pytest.fixture(scope="module")
def result(engine: Engine) -> Benchmark:
    return measure(engine, random_tokens(200, engine.facts.n_vocab, 1), OPTIONS)


def test_phases_follow_the_frontiers(result: Benchmark) -> None:
    assert [(p.kind, p.context, p.n_tokens) for p in result.phases] == [
        ("decode", 0, 4),
        ("prefill", 4, 16),
        ("decode", 20, 4),
        ("prefill", 24, 66),
        ("decode", 90, 4),
    ]
    assert [len(p.step_ms) for p in result.phases] == [4, 1, 4, 2, 4]  # 66 tokens are two batches of 64
    assert result.skipped == ()


def test_split_and_steps_add_up_to_the_time_of_the_phase(result: Benchmark) -> None:
    for phase in result.phases:
        assert phase.split is not None
        split = phase.split
        parts = split.dense_s + split.compute_s + split.wait_s + split.other_s
        assert parts == pytest.approx(phase.seconds)
        assert split.matrices_s + split.attention_s + split.llamacpp_s == pytest.approx(split.dense_s)
        assert (split.attention_s > 0) == attention.is_supported()
        assert split.dense_s > 0
        assert split.compute_s > 0
        assert 0 < sum(phase.step_ms) <= 1e3 * phase.seconds * (1 + 1e-9), "what lies between steps is the phase's, too"
        assert phase.percentile(10) <= phase.percentile(50) <= phase.percentile(99)


def test_counters_are_those_of_the_phase_and_of_nothing_else(engine: Engine, result: Benchmark) -> None:
    for phase in result.phases:
        n_calls = len(phase.step_ms)
        assert [row["calls"] for row in phase.layers] == [n_calls] * engine.facts.n_moe_layers
        assert [row["tokens"] for row in phase.layers] == [phase.n_tokens] * engine.facts.n_moe_layers
        assert phase.hits + phase.misses == sum(row["hits"] + row["misses"] for row in phase.layers)
        if phase.kind == "decode":
            assert phase.hits + phase.misses == phase.n_tokens * engine.facts.n_experts_used * len(phase.layers)
        assert phase.bytes_read == sum(row["bytes_read"] for row in phase.layers)


def test_given_tokens_are_fed_in_order_after_a_forgotten_warm_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = []
    make = engine.session
    monkeypatch.setattr(engine, "session", lambda: sessions.append(make()) or sessions[-1])
    tokens = random_tokens(60, engine.facts.n_vocab, 2)
    seen: list[int] = []
    monkeypatch.setattr(benchmark.memory, "resident_bytes", lambda: seen.extend(sessions[0].tokens[len(seen) :]) or 1)  # type: ignore[attr-defined]
    measure(engine, tokens, BenchOptions(frontiers=(10, 30), new_tokens=3, warm_up_tokens=9))
    assert seen == tokens[:33]


@pytest.mark.parametrize("n_more", [0, 4, 40])
def test_no_measured_token_warms_anything_up(engine: Engine, monkeypatch: pytest.MonkeyPatch, n_more: int) -> None:
    fed: list[list[int]] = []
    feed = Session.feed

    def note(session: Session, tokens: Sequence[int], **options: Any) -> None:
        fed.append(list(tokens))
        feed(session, tokens, **options)

    monkeypatch.setattr(Session, "feed", note)
    options = BenchOptions(frontiers=(0,), new_tokens=3, warm_up_tokens=9)
    tokens = random_tokens(3 + n_more, engine.facts.n_vocab, 2)
    measure(engine, tokens, options)
    warm_up = fed[0] + fed[1] + fed[2]
    assert fed[3:] == [[token] for token in tokens[:3]]
    assert len(warm_up) == 9
    assert warm_up[: min(9, n_more)] == tokens[3:][-9:]
    assert not set(warm_up) & set(tokens[:3])


def test_the_stream_of_a_benchmark_holds_its_warm_up(engine: Engine) -> None:
    args = Namespace(text=None, seed=0)
    assert len(bench._tokens(args, engine, OPTIONS)) == OPTIONS.n_tokens + OPTIONS.warm_up_tokens


def test_a_small_budget_is_kept_by_giving_experts_away(model_path: Path) -> None:
    options = EngineOptions(n_ctx=512, n_batch=64, n_threads=1, ram_bytes=600_000)
    with Engine.open(model_path, options) as engine:
        start = time.perf_counter()
        result = measure(engine, random_tokens(300, engine.facts.n_vocab, 3), BenchOptions(frontiers=(0, 64, 128)))
        elapsed_s = time.perf_counter() - start
        assert engine.facts.ram_bytes <= 600_000
    assert all(phase.misses and phase.bytes_read for phase in result.phases)
    # Between two steps, and before the store's time is taken, a phase's time stands still and a read may be under way.
    assert all(phase.reading_s > 0 for phase in result.phases)
    assert sum(phase.reading_s for phase in result.phases) <= elapsed_s
    assert all(phase.unused_bytes >= 0 for phase in result.phases)
    assert all(phase.evictions for phase in result.phases[1:])


@pytest.mark.parametrize(
    ("time_limit_s", "phases", "skipped"),
    [
        (56.5, "dpdpd", ()),
        (55.5, "dpd", ("context 90: would take 37 s, only 36 s left",)),
        (9.5, "dpd", ("context 90: would take 37 s, only 0 s left",)),  # at 20 nothing has shown how fast prefill is
        (8.5, "d", ("context 20: would take 20 s, only 1 s left",)),
    ],
)
def test_frontier_that_takes_too_long_is_left_out_and_named(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, time_limit_s: float, phases: str, skipped: tuple[str, ...]
) -> None:
    """Each token takes a second, in a batch half of one."""
    now, feed = 0.0, Session.feed

    def feed_slowly(session: Session, tokens: Sequence[int], **options: Any) -> None:
        nonlocal now
        now += len(tokens) / 2 if len(tokens) > 1 else 1
        feed(session, tokens, **options)

    monkeypatch.setattr(Session, "feed", feed_slowly)
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now))
    tokens = random_tokens(200, engine.facts.n_vocab, 1)
    options = BenchOptions(frontiers=(0, 20, 90), new_tokens=4, warm_up_tokens=5, time_limit_s=time_limit_s)
    result = measure(engine, tokens, options)
    assert "".join(phase.kind[0] for phase in result.phases) == phases
    assert result.skipped == skipped


def test_too_few_tokens_and_senseless_frontiers_are_usage_errors(engine: Engine) -> None:
    with pytest.raises(UsageError, match="too few"):
        measure(engine, [1, 2, 3], OPTIONS)
    for wrong in ((), (5, 5), (-1, 3)):
        with pytest.raises(UsageError):
            BenchOptions(frontiers=wrong)


def test_model_of_llama_cpp_alone_has_totals_only(model_path: Path) -> None:
    with open_stock(model_path, EngineOptions(n_ctx=256, n_batch=64, n_threads=1)) as engine:
        result = measure(
            engine, random_tokens(64, engine.facts.n_vocab, 0), BenchOptions(frontiers=(16,), new_tokens=2)
        )
        report = bench_report.to_json(result, engine.facts, machine(), 1.0)
        picture = bench_report.svg(result, engine.facts, machine())
    assert all(phase.split is None for phase in result.phases)
    assert report["phases"][0]["split_ms_per_token"] is None
    assert bench_report.table(result)
    ET.fromstring(picture)


def machine() -> benchmark.MachineFacts:
    return benchmark.machine(probe=False)


def test_tables_fit_100_columns_and_the_parts_have_their_own(result: Benchmark) -> None:
    lines = bench_report.table(result)
    assert max(map(len, lines)) <= 100
    split = lines.index("") + 1
    assert lines[split].split() == [
        "ms",
        "per",
        "token",
        *["matrices", "attention", "llama.cpp", "experts", "waiting", "other"],
    ]
    for line, phase in zip(lines[split + 1 :], result.phases, strict=False):
        assert line.startswith(f"{phase.kind} at {phase.context} ")
        assert sum(map(float, line.split()[3:])) == pytest.approx(phase.ms_per_token, abs=0.05)


def test_each_phase_stands_beside_its_slower_resource(engine: Engine, result: Benchmark) -> None:
    split = benchmark.Split(dense_s=3.0, compute_s=2.0, wait_s=4.0, other_s=1.0)
    phase = benchmark.Phase(
        kind="prefill",
        context=0,
        n_tokens=464,
        seconds=10.0,
        step_ms=(1e4,),
        split=split,
        misses=1,
        bytes_read=8 * 10**9,
    )
    from_drive = phase.bounds(1e9)
    assert from_drive is not None
    assert (from_drive.reading_s, from_drive.computing_s, from_drive.times_slowest) == (8.0, 6.0, 1.25)
    computed = phase.bounds(2e9)
    assert computed is not None
    assert (computed.reading_s, computed.times_slowest) == (4.0, pytest.approx(10 / 6))
    faster_than_probed = replace(phase, reading_s=7.5, split=replace(split, wait_s=9.0)).bounds(1e6)
    assert faster_than_probed is not None
    assert faster_than_probed.drive_bytes_per_s == pytest.approx(8e9 / 7.5), "while it read, not over the whole phase"
    assert faster_than_probed.times_slowest == pytest.approx(10 / 7.5)
    here = replace(machine(), disk=DiskProfile(bytes_per_s=1e9))
    one = replace(result, phases=(phase,))
    assert bench_report.bound_lines(one, here) == [
        "prefill at 0: 1.25 x its slowest resource (reading 8.00 s at 1.00 GB/s, computing 6.00 s)"
    ]
    assert bench_report.bound_lines(one, machine()) == [], "an unknown drive"
    assert bench_report.to_json(one, engine.facts, here, 1.0)["phases"][0]["bounds"]["times_slowest"] == 1.25
    assert bench_report.to_json(one, engine.facts, machine(), 1.0)["phases"][0]["bounds"] is None
    assert replace(phase, split=None).bounds(1e9) is None


def test_json_is_complete_and_plain(engine: Engine, result: Benchmark) -> None:
    value = json.loads(json.dumps(bench_report.to_json(result, engine.facts, machine(), 1.5), allow_nan=False))
    assert value["machine"]["cpu"]
    assert value["machine"]["versions"]["llama-cpp-python"] == "0.3.36"
    assert value["model"]["n_experts"] == engine.facts.n_experts
    assert value["options"]["new_tokens"] == 4
    phase = value["phases"][-1]
    assert phase["ms_per_token"] == pytest.approx(1e3 / phase["tokens_per_s"])
    assert sum(phase["split_ms_per_token"].values()) == pytest.approx(phase["ms_per_token"])
    ours = phase["matrices_ms_per_token"] + phase["attention_ms_per_token"]
    assert 0 <= ours <= phase["split_ms_per_token"]["dense"]
    assert len(phase["step_ms"]["all"]) == 4
    assert {"layer", "calls", "hits", "misses", "bytes_read", "wait_ns"} <= set(phase["layers"][0])


def test_picture_is_xml_whose_bars_have_the_parts_widths(engine: Engine, result: Benchmark) -> None:
    root = ET.fromstring(bench_report.svg(result, engine.facts, machine()))
    space = "{http://www.w3.org/2000/svg}"
    bars = [rect for rect in root.iter(f"{space}rect") if rect.find(f"{space}title") is not None]
    assert len(bars) == len(bench_report.PARTS) * len(result.phases)
    decodes = [phase for phase in result.phases if phase.kind == "decode"]
    n = len(bench_report.PARTS)
    widths = [sum(float(bar.get("width", 0)) for bar in bars[n * i : n * i + n]) for i in range(len(decodes))]
    times = [phase.ms_per_token for phase in decodes]
    np.testing.assert_allclose(np.array(widths) / max(widths), np.array(times) / max(times), atol=0.002)
    assert max(float(bar.get("x", 0)) + float(bar.get("width", 0)) for bar in bars) < 900


def test_model_names_cannot_break_the_picture(engine: Engine, result: Benchmark) -> None:
    from dataclasses import replace

    facts = replace(engine.facts, name="<script>&'\"")
    assert "<script>" not in bench_report.svg(result, facts, machine())
    ET.fromstring(bench_report.svg(result, facts, machine()))


def parse(*arguments: str) -> Namespace:
    parser = ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


def test_options_from_the_command_line() -> None:
    assert bench.bench_options(parse("m")).frontiers == (0, 512, 2048)
    assert bench.bench_options(parse("m", "--prompt-tokens", "0")).frontiers == (0,)
    assert bench.bench_options(parse("m", "--frontiers", "5,100", "--new-tokens", "7")).n_tokens == 114
    for wrong in (["--frontiers", "a"], ["--frontiers", "9,3"]):
        with pytest.raises(UsageError):
            bench.bench_options(parse("m", *wrong))
    for wrong in (["--new-tokens", "0"], ["--prompt-tokens", "-1"]):
        with pytest.raises(SystemExit):
            parse("m", *wrong)


def test_recorded_routing_is_what_ran(engine: Engine, tmp_path: Path) -> None:
    with engine.recording(tmp_path / "t"):
        result = measure(
            engine, random_tokens(40, engine.facts.n_vocab, 4), BenchOptions(frontiers=(0, 20), new_tokens=2)
        )
    after = engine.session()
    after.feed([1, 2, 3])  # not recorded any more
    after.close()
    trace = Trace(tmp_path / "t")
    calls = list(trace)
    assert trace.header.identity == engine.facts.identity
    measured = [sum(phase.n_tokens for phase in result.phases), 32]  # and the warm-up
    assert sum(len(call.ids) for call in calls if call.layer == 0) == sum(measured)
    assert {call.layer for call in calls} == set(trace.header.layers)


def test_benchmark_leaves_the_routing_profile_alone(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALRUN_CACHE_DIR", str(tmp_path))
    arguments = [str(model_path), "--prompt-tokens", "0", "--new-tokens", "1", "--ram", "8MiB", "--threads", "1"]
    assert bench.run(parse(*arguments, "--no-probe")) == 0
    assert not (tmp_path / "profiles").exists()


def test_command_prints_json_on_stdout_and_writes_the_picture(
    model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, trace = tmp_path / "p.svg", tmp_path / "t"
    options = ["--prompt-tokens", "16", "--new-tokens", "2", "--ram", "8MiB", "--threads", "1", "--json"]
    assert cli.main(["bench", str(model_path), *options, "--svg", str(picture), "--record", str(trace)]) == 0
    captured = capsys.readouterr()
    value = json.loads(captured.out)
    assert [phase["kind"] for phase in value["phases"]] == ["decode", "prefill", "decode", "prefill", "decode"]
    assert value["machine"]["memory_bytes_per_s"] > 0
    assert value["machine"]["disk"]["n_reads"] > 0  # measured or not: the model is small, the drive may be known
    assert picture.read_text().startswith("<svg")
    assert "include the recording" in captured.err
    assert list(Trace(trace))
