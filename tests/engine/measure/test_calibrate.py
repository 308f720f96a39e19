"""Calibration: texts that are refused, and sums and samples against what the model's own weights say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localrun.engine.engine import Engine
from localrun.engine.measure.calibrate import ObservedRouter, calibrate
from localrun.engine.measure.calibration_text import CalibrationText, default_text, read_calibration_text
from localrun.engine.measure.choose import PrecisionRequest, check_precision_request, choose_precision
from localrun.errors import UsageError
from localrun.quant.formats.quantize import dequantize_rows, quantize_rows
from localrun.quant.model.activation import swiglu
from localrun.quant.model.shape import shape_of
from localrun.quant.open import open_model
from localrun.quant.precision.copies import EXPERT_TYPES
from localrun.quant.precision.error import exact_weights, measure_errors, rounded
from localrun.quant.precision.samples import drawn_samples
from localrun.quant.precision.solver import HotBudget, Target, expert_bytes
from tests.engine.conftest import OPTIONS

CHAT = [{"role": "user", "content": "Hello there, how are you?"}, {"role": "assistant", "content": "Fine." * 100}]


def test_sums_samples_and_routing_are_those_of_the_model(chat_model_path: Path) -> None:
    source = open_model(chat_model_path)
    text = CalibrationText("test", "digest", "The quick brown fox jumps over the lazy dog; 0123456789. " * 8)
    # So little RAM that a batch's experts come in several parts.
    options = replace(OPTIONS, math="f32", ram_bytes=16 << 20)
    with Engine.open(chat_model_path, options, learn=False) as engine:
        n_used = engine.facts.n_experts_used
        result = calibrate(engine, text, max_tokens=300)
        with pytest.raises(UsageError, match="200 tokens are too few"):
            calibrate(engine, text, max_tokens=200)
    importance = result.importance
    assert (importance.n_tokens, importance.datasets, importance.text_digest) == (300, ("test",), "digest")
    importance.check_fits(source.moe_layers, "calibration")
    for number, layer in importance.layers.items():
        sampled = result.samples.layers[number]
        assert sampled.rows.shape[0] == 300, "all positions, because they fit"
        np.testing.assert_array_equal(sampled.chosen.sum(1), n_used)
        np.testing.assert_array_equal(sampled.chosen.sum(0), layer.counts)
        router = ObservedRouter.of(source, number)
        assert router is not None
        bias = source.read_tensor(f"blk.{number}.exp_probs_b.bias").view(np.float32)
        probabilities = router.probabilities(sampled.rows)
        best = np.argsort(-(probabilities + bias), axis=1)[:, :n_used]
        agreed = np.take_along_axis(sampled.chosen, best, 1)
        assert agreed.mean() > 0.99, "the router's arithmetic is llama.cpp's"
        power = np.square(router.weights(probabilities, sampled.chosen)).sum(0)
        assert layer.route_power is not None
        np.testing.assert_allclose(layer.route_power, power, rtol=1e-3)
        for expert in np.flatnonzero(layer.counts)[:3]:
            rows = sampled.rows[sampled.chosen[:, expert]]
            np.testing.assert_allclose(layer.x[expert], np.square(rows).sum(0), rtol=1e-4)
            gate, up, _ = (exact_weights(source, recipe) for recipe in source.base_expert(number, int(expert)))
            activated = swiglu(rows @ gate.T, rows @ up.T, shape_of(source).clamp_limits[number])
            np.testing.assert_allclose(layer.activated[expert], np.square(activated).sum(0), rtol=2e-3, atol=1e-6)


def test_output_errors_are_those_of_quantized_experts(chat_model_path: Path) -> None:
    source = open_model(chat_model_path)
    with Engine.open(chat_model_path, OPTIONS, learn=False) as engine:
        result = calibrate(engine, default_text(), max_tokens=300)
    q8, mx = EXPERT_TYPES["q8_0"], EXPERT_TYPES["mxfp4"]
    table = measure_errors(source, (mx, q8), result.importance, result.samples, n_threads=2, n_rows=16)
    assert table.n_measured == table.n_experts
    layer, expert = 1, int(np.argmax(result.importance.layers[1].counts))
    assert (table.errors(layer, mx) == 0).all(), "the model's own format"
    x, n_own = result.samples.rows(layer, expert, 16)
    assert table.layers[layer].n_own_rows[expert] == n_own == 16
    outputs = []
    for kind in (None, q8):
        gate, up, down = (exact_weights(source, recipe) for recipe in source.base_expert(layer, expert))
        if kind is not None:
            gate, up, down = (
                dequantize_rows(quantize_rows(w, kind).reshape(len(w), -1), kind).reshape(w.shape)
                for w in (gate, up, down)
            )
        outputs.append(swiglu(x @ gate.T, x @ up.T, shape_of(source).clamp_limits[layer]) @ down.T)
    error = np.square(outputs[1] - outputs[0]).mean() / table.layers[layer].power
    assert table.errors(layer, q8)[expert] == pytest.approx(error, rel=1e-3)
    drawn = measure_errors(source, (q8,), result.importance, drawn_samples(result.importance), n_rows=16)
    assert not drawn.real_rows
    assert 0.2 < drawn.errors(layer, q8)[expert] / table.errors(layer, q8)[expert] < 5


def test_bf16_rounds_to_the_nearest_even() -> None:
    values = np.array([[1.0, 1.00390625, 1.01171875, -3.14159265]], np.float32)
    kept = rounded(values, EXPERT_TYPES["bf16"], None)
    np.testing.assert_array_equal(kept, np.array([[1.0, 1.0, 1.015625, -3.140625]], np.float32))


def test_conversations_are_rendered_and_long_ones_cut(tmp_path: Path, chat_model_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join([json.dumps(CHAT), "", json.dumps({"messages": CHAT})]))
    text = read_calibration_text(path)
    assert len(text.conversations) == 2
    with Engine.open(chat_model_path, OPTIONS, learn=False) as engine:
        windows = text.token_windows(engine.tokenizer, engine.chat_encoder, engine.vocab.begin, 128)
        begin, user = engine.vocab.begin, engine.tokenizer.specials["<｜User｜>"]
    assert max(map(len, windows)) == 128
    assert windows[0][0] == begin
    assert windows[0][1] == user
    assert windows[: len(windows) // 2] == windows[len(windows) // 2 :]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n" * 2000, "is empty"),
        (b"short", "5 bytes are too few"),
        (b"a" * 2000 + b"\xff\xfe", "not UTF-8 text .* at byte 2000"),
        (json.dumps(CHAT).encode() + b"\n{nonsense" + b" " * 1000, r":2: not JSON"),
        (json.dumps(CHAT).encode() + b'\n{"text": "x"}' + b" " * 1000, r":2: expected a list of messages"),
        (json.dumps([{"role": "wizard", "content": "x" * 1000}]).encode(), r":1: message 1"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_calibration_text(path)


def test_prose_in_brackets_is_no_conversation(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("[1] A footnote.\n" + "Text. " * 200)
    assert read_calibration_text(path).text.startswith("[1]")
    assert len(default_text().text) > 30_000


def test_tiers_are_chosen_and_a_second_run_decides_the_same_without_the_text(
    chat_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_model(chat_model_path)
    one = expert_bytes(source.moe_layers[0], EXPERT_TYPES["q8_0"])
    request = PrecisionRequest(hot=(HotBudget(EXPERT_TYPES["q8_0"], 5 * one),), max_tokens=300)
    seen: list[str] = []
    first = choose_precision(
        chat_model_path, request, OPTIONS, work_folder=tmp_path, report=lambda what, done, total: seen.append(what)
    )
    assert {"calibrating", "measuring formats"} <= set(seen)
    assert first.solution is not None
    assert first.solution.base == EXPERT_TYPES["mxfp4"], "the source's own"
    assert first.solution.plan.n_experts == 0, "nothing is better than exact"

    request = replace(request, base=EXPERT_TYPES["mxfp4"], hot=(), target=Target(ram_bytes=1 << 30))
    target = choose_precision(chat_model_path, request, OPTIONS, work_folder=tmp_path)
    assert target.solution is not None
    assert target.solution.chosen.error == 0
    monkeypatch.setattr("localrun.engine.measure.choose.calibrate", None)
    again = choose_precision(chat_model_path, request, OPTIONS, work_folder=tmp_path)
    assert again.solution == target.solution
    assert again.importance.digest == target.importance.digest
    from_file = choose_precision(chat_model_path, replace(request, imatrix=tmp_path / "imatrix.gguf"), OPTIONS)
    assert from_file.errors is not None
    assert not from_file.errors.real_rows
    with pytest.raises(UsageError, match="can't be combined"):
        check_precision_request(source, replace(request, imatrix=tmp_path / "imatrix.gguf", text=default_text()))
