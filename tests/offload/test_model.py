"""The expert path end to end: real llama.cpp, real files, our device. Budgets, batches and orders must not change answers."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.engine.measure.stock import StockModel
from localrun.errors import BudgetError, DecodeError, StoppedError, UnsupportedModelError
from localrun.offload.device.device import expert_device
from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.quant.open import open_model
from tests.gguf_models import TinyDeepseek4, write_deepseek4
from tests.offload.models import F32, MODEL, TEXTS, floor_ram, logits, write_model
from tests.paired import compare, median, same_but_for_rounding
from tests.reference import kl
from tests.stock_llama import stock_logits
from tools.make_moe_gguf import write_moe_gguf


def test_f32_experts_agree_with_llama_cpp_to_rounding(tmp_path: Path) -> None:
    path = write_model(tmp_path, TinyDeepseek4(ratios=(0, 4, 128), expert_type=QT.F32, dense_type=QT.F32))
    stock = StockModel(path)
    expected = logits(stock)
    stock.close()
    with open_offloaded(open_model(path), OffloadOptions(n_threads=2, math="f32")) as model:
        found = logits(model)
    assert (expected.argmax(-1) == found.argmax(-1)).mean() >= 0.99
    assert median(kl(expected, found)) < 1e-6


def of_texts(model: Any, texts: list[list[int]] = TEXTS, **options: Any) -> list[F32]:
    return [logits(model, text, **options) for text in texts]


def divergences(reference: list[F32], found: list[F32]) -> npt.NDArray[np.float64]:
    """(texts, positions)"""
    return np.stack([kl(*pair) for pair in zip(reference, found, strict=True)])


def test_eight_bit_experts_are_as_close_as_llama_cpps(model_path: Path, kernel_level: str) -> None:
    """Both round activations to 8 bits, differently; neither strays further from exact arithmetic than the other."""
    source = open_model(model_path)
    stock = StockModel(model_path)
    theirs = of_texts(stock)
    stock.close()
    with open_offloaded(source, OffloadOptions(n_threads=2, math="f32")) as model:
        exact = of_texts(model)
    with open_offloaded(source, OffloadOptions(n_threads=2, math="int8", dense_on_device=False)) as model:
        ours = of_texts(model)
    comparison = compare(divergences(exact, ours), divergences(exact, theirs))
    assert not comparison.is_worse, comparison


@pytest.mark.parametrize("math", ["f32", "int8"])
def test_any_ram_budget_gives_identical_logits(model_path: Path, math: str) -> None:
    source = open_model(model_path)
    with open_offloaded(source, OffloadOptions(n_threads=2, math=math)) as model:  # type: ignore[arg-type]
        expected, floor, everything = logits(model, batch=8), floor_ram(model), model.ram_bytes
    for ram in (floor, (floor + everything) // 2, everything):
        with open_offloaded(source, OffloadOptions(ram_bytes=ram, n_threads=2, math=math)) as model:  # type: ignore[arg-type]
            np.testing.assert_array_equal(logits(model, batch=8), expected)
            model.pool.residency.check()
            assert model.pool.residency.table.arena.size_bytes + model.pool.residency.store.staging_bytes <= ram
            totals = model.telemetry.totals()
            assert (totals.evictions > 0) == (ram < everything)
            assert totals.misses * MODEL_EXPERT_BYTES == totals.bytes_read


MODEL_EXPERT_BYTES = 3 * MODEL.n_embd * MODEL.n_ff // 32 * 17  # MXFP4: 17 bytes per 32 weights


def test_chunks_and_single_tokens_agree_as_far_as_llama_cpps_do(model_path: Path) -> None:
    """llama.cpp's own dense kernels differ between batch sizes, which tips near-ties of the indexer on a random model."""
    stock = StockModel(model_path)
    whole = of_texts(stock, TEXTS[:2], batch=150)
    theirs = [divergences(whole, of_texts(stock, TEXTS[:2], batch=batch)) for batch in (1, 37)]
    stock.close()
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2, math="f32")) as model:
        whole = of_texts(model, TEXTS[:2], batch=150)
        ours = [divergences(whole, of_texts(model, TEXTS[:2], batch=batch)) for batch in (1, 37)]
    for found, noise in zip(ours, theirs, strict=True):
        assert same_but_for_rounding(found, noise)


def test_a_chunk_reads_each_expert_at_most_once(model_path: Path) -> None:
    source = open_model(model_path)
    with open_offloaded(source, OffloadOptions(n_threads=2)) as model:
        floor = floor_ram(model)
    with open_offloaded(source, OffloadOptions(ram_bytes=floor, n_threads=2)) as model:
        logits(model, batch=150)
        for row in model.telemetry.layers():
            assert row["calls"] == 1
            assert row["hits"] + row["misses"] <= MODEL.n_experts


def test_budget_below_one_layers_experts_is_refused_with_the_number_that_works(model_path: Path) -> None:
    source = open_model(model_path)
    with open_offloaded(source, OffloadOptions(n_threads=2)) as model:
        floor = floor_ram(model)
    with pytest.raises(BudgetError) as caught:
        open_offloaded(source, OffloadOptions(ram_bytes=floor - 1, n_threads=2))
    assert caught.value.hint is not None
    assert "--ram to at least" in caught.value.hint


def test_an_exception_in_the_device_becomes_a_failed_decode_and_the_model_goes_on(model_path: Path) -> None:
    source = open_model(model_path)
    with open_offloaded(source, OffloadOptions(n_threads=2)) as model:
        expected = logits(model)
    with open_offloaded(source, OffloadOptions(n_threads=2)) as model:
        kernel = model.pool.residency.kernels(1)[0]
        original = kernel.run

        def broken(*args: object) -> None:
            raise ZeroDivisionError("kernel broke")

        kernel.run = broken  # type: ignore[method-assign,assignment]
        try:
            with pytest.raises(ZeroDivisionError, match="kernel broke"):
                logits(model)  # experts must be read, so the call comes to Python
        finally:
            kernel.run = original  # type: ignore[method-assign]
        np.testing.assert_array_equal(logits(model), expected)


def test_dense_matrices_on_our_device_give_the_same_answers(model_path: Path, kernel_level: str) -> None:
    source = open_model(model_path)
    with open_offloaded(source, OffloadOptions(n_threads=2, dense_on_device=False)) as model:
        theirs = logits(model)
        assert model.dense.n_bytes == 0
    with open_offloaded(source, OffloadOptions(n_threads=2)) as model:
        ours = logits(model)
        assert (model.dense.n_bytes > 0) == (kernel_level != "generic"), "where our kernels are faster"
    with open_offloaded(source, OffloadOptions(n_threads=2, math="f32")) as model:
        exact_experts = logits(model)
    assert same_but_for_rounding(kl(exact_experts, ours), kl(exact_experts, theirs))


def test_stop_request_ends_the_decode_and_can_be_cleared(model_path: Path) -> None:
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2)) as model:
        model.request_stop()
        with pytest.raises(StoppedError):
            logits(model)
        model.clear_stop()
        assert logits(model).shape == (150, MODEL.vocab)


def test_models_open_one_after_another_and_leave_nothing(model_path: Path) -> None:
    device = expert_device()
    before = len(device._memory)  # weights buffers; other tests' models may be open
    source = open_model(model_path)
    for _ in range(3):
        model = open_offloaded(source, OffloadOptions(n_threads=2))
        logits(model, batch=150, n_threads=2)
        model.close()
    gc.collect()
    assert len(device._memory) == before


def test_two_open_models_do_not_mix_up_their_experts(model_path: Path, tmp_path: Path) -> None:
    other_path = write_model(tmp_path, seed=5)
    options = OffloadOptions(n_threads=2)
    with (
        open_offloaded(open_model(model_path), options) as first,
        open_offloaded(open_model(other_path), options) as other,
    ):
        alone = logits(first, n_threads=2)
        assert np.abs(logits(other, n_threads=2) - alone).max() > 1e-3
        np.testing.assert_array_equal(logits(first, n_threads=2), alone)


def test_routing_table_out_of_range_is_an_error_not_a_crash(tmp_path: Path) -> None:
    from localrun.offload.device.routing import route

    with pytest.raises(DecodeError, match="outside"):
        route(np.array([[0, 99]], np.int32), 16)


@pytest.mark.parametrize("architecture", ["olmoe", "qwen3moe"])
def test_other_architectures_give_llama_cpps_answers(tmp_path: Path, architecture: str) -> None:
    """Experts of any mixture-of-experts graph, here without clamps, and for one of them with another gating."""
    path = tmp_path / "model.gguf"
    write_moe_gguf(path, architecture, expert_type=QT.F16)
    stock = StockModel(path)
    expected = logits(stock)
    stock.close()
    with open_offloaded(open_model(path), OffloadOptions(n_threads=2, math="f32")) as model:
        found = logits(model)
        assert model.telemetry.totals().requests > 0
    assert (expected.argmax(-1) == found.argmax(-1)).mean() >= 0.99
    assert median(kl(expected, found)) < 1e-6


def test_tensors_that_llama_cpp_leaves_unused_are_a_refusal(tmp_path: Path) -> None:
    """As llama.cpp's own loader does: a scale that its graph does not know would be a wrong answer in silence."""
    path = tmp_path / "m.gguf"
    write_moe_gguf(path, "qwen3moe", extra={"blk.0.attn_norm.scale": np.full(1, 2.0, np.float32)})
    with pytest.raises(UnsupportedModelError, match=r"no use for 1 of its tensors, such as blk.0.attn_norm.scale"):
        open_offloaded(open_model(path), OffloadOptions(n_threads=1))


def test_experts_and_matrices_of_type_42_are_computed_as_llama_cpp_computes_them(tmp_path: Path) -> None:
    """Q2_0, which the bundled llama.cpp knows and the gguf package does not."""
    rng, q2_0 = np.random.default_rng(0), QT(42)

    def rows(*shape: int) -> tuple[np.ndarray[Any, Any], QT]:
        blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // 64, 18), dtype=np.uint8)
        blocks[..., :2] = np.float16(0.1).reshape(1).view(np.uint8)  # the block's scale
        return blocks.reshape(*shape[:-1], -1), q2_0

    changes = {"blk.1.attn_q_a.weight": rows(64, 128)}
    for layer in range(3):
        changes |= {f"blk.{layer}.ffn_{name}_exps.weight": rows(8, 64, 128) for name in ("gate", "up")}
        changes[f"blk.{layer}.ffn_down_exps.weight"] = rows(8, 128, 64)
    (path,) = write_deepseek4(tmp_path / "m.gguf", replace_tensors=changes)
    expected = stock_logits(path, range(8))
    for math in ("f32", "int8"):
        with open_offloaded(open_model(path), OffloadOptions(n_threads=1, math=math)) as model:
            found = logits(model, list(range(8)))[-1]
        # They differ by the rounding of activations; other weights would have nothing in common.
        assert np.corrcoef(expected, found)[0, 1] > 0.99
