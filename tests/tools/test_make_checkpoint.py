"""Synthetic checkpoints: official names and sizes, readable by others, the same for the same seed, alive when run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from localrun.quant.convert.converter import convert
from tests.stock_llama import stock_logits
from tools import make_checkpoint
from tools.make_checkpoint import INDEX_NAME, write_checkpoint
from tools.synthetic_config import FLASH, PRO, TINY, CheckpointSpec, scaled_config
from tools.synthetic_router import (
    CALIBRATED,
    TARGET_HIT_RATE,
    calibrate,
    hash_table,
    lru_hit_rate,
    popularity,
    route,
    router_bias,
    simulate_hash_hit_rate,
    simulate_hit_rate,
)
from tools.synthetic_weights import e4m3_values, shards, to_bf16, to_e4m3


def small_config(**changes: Any) -> dict[str, Any]:
    """A tiny model with one layer of each kind."""
    overrides = {"compress_ratios": [0, 4, 128, 0], "num_hidden_layers": 3, "vocab_size": 64} | changes
    return scaled_config("tiny", overrides=overrides)


def write(folder: Path, **options: Any) -> Path:
    spec = CheckpointSpec(small_config(), **options)
    write_checkpoint(folder, spec)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# Published: tensor counts and bytes of the official indexes and of the listing of Pro (deepseek-ai, first releases).
@pytest.mark.parametrize(
    ("preset", "n_files", "n_tensors", "n_bytes"),
    [("flash", 46, 69_187, 159_609_485_896), ("pro", 64, 145_116, 864_704_792_696)],
)
def test_full_size_is_the_official_one_to_the_byte(preset: str, n_files: int, n_tensors: int, n_bytes: int) -> None:
    groups = list(shards(CheckpointSpec(scaled_config(preset, mtp=True), mtp=True)))
    assert len(groups) == n_files
    assert sum(map(len, groups)) == n_tensors
    assert sum(tensor.n_bytes for group in groups for tensor in group) == n_bytes


def test_pro_differs_from_flash_in_the_published_keys_only() -> None:
    different = {key for key in FLASH if FLASH[key] != PRO[key]}
    assert different == {
        "compress_ratios",
        "hidden_size",
        "index_topk",
        "moe_intermediate_size",
        "n_routed_experts",
        "num_attention_heads",
        "num_hidden_layers",
        "o_groups",
        "q_lora_rank",
        "routed_scaling_factor",
    }


@pytest.mark.parametrize(
    ("preset", "layers", "ratios", "hashed"),
    [
        ("flash", 3, [0, 4, 128], 1),
        ("flash", 6, [0, 4, 128, 4, 128, 4], 1),
        ("flash", 1, [4], 0),
        ("pro", 3, [128, 4, 128], 1),
        ("flash", 43, FLASH["compress_ratios"][:43], 3),
    ],
)
def test_shortened_models_have_every_kind_of_layer(preset: str, layers: int, ratios: list[int], hashed: int) -> None:
    config = scaled_config(preset, layers=layers)
    assert config["compress_ratios"][:layers] == ratios
    assert (config["num_hidden_layers"], config["num_hash_layers"]) == (layers, hashed)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_size": 200}, "hidden_size 200 is not a positive multiple of 128"),
        ({"num_experts_per_tok": 17}, "17 of 16 experts"),
        ({"o_groups": 3}, "4 heads in 3 groups"),
        ({"compress_ratios": [0, 4, 4]}, "no layer of ratio 128"),
        ({"compress_ratios": [4, 128]}, "2 ratios for 3 layers"),
    ],
)
def test_impossible_dimensions_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        small_config(**changes)


def test_safetensors_reads_every_tensor_under_its_official_shape(tmp_path: Path) -> None:
    write(tmp_path / "c")
    index = json.loads((tmp_path / "c" / INDEX_NAME).read_text())
    seen = {}
    for path in (tmp_path / "c").glob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118, a safe_open is no mapping
                seen[name] = (path.name, file.get_slice(name).get_dtype(), file.get_slice(name).get_shape())
    assert {name: file for name, (file, _, _) in seen.items()} == index["weight_map"]
    d, f = TINY["hidden_size"], TINY["moe_intermediate_size"]
    for name, dtype, shape in (
        ("embed.weight", "BF16", [64, d]),
        ("layers.0.ffn.gate.tid2eid", "I64", [64, 3]),
        ("layers.1.ffn.gate.bias", "F32", [16]),
        ("layers.2.ffn.experts.15.w1.weight", "I8", [f, d // 2]),
        ("layers.2.ffn.experts.15.w2.scale", "F8_E8M0", [d, f // 32]),
        ("layers.1.attn.indexer.wq_b.weight", "F8_E4M3", [16 * 128, 128]),
        ("layers.1.attn.wo_a.scale", "F8_E8M0", [2, 2]),
        ("layers.2.attn.compressor.ape", "F32", [128, 128]),
        ("hc_head_fn", "F32", [4, 4 * d]),
    ):
        assert seen[name][1:] == (dtype, shape), name
    assert index["metadata"]["total_size"] == sum(
        path.stat().st_size - header_bytes(path) for path in (tmp_path / "c").glob("*.safetensors")
    )


def header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    first, again, other = (contents(write(tmp_path / n, seed=s)) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert first == again
    assert all(first[name] != other[name] for name in first if name.endswith(".safetensors"))


def test_experts_differ(tmp_path: Path) -> None:
    write(tmp_path / "c")
    with safe_open(tmp_path / "c" / "model-00003-of-00005.safetensors", "np") as file:
        seen = {
            file.get_tensor(f"layers.1.ffn.experts.{e}.{w}.weight").tobytes()
            for e in range(16)
            for w in ("w1", "w2", "w3")
        }
    assert len(seen) == 16 * 3


def test_shard_size_and_single_file(tmp_path: Path) -> None:
    spec = CheckpointSpec(small_config())
    total = write_checkpoint(tmp_path / "single", spec, single_file=True)
    assert not (tmp_path / "single" / INDEX_NAME).exists()
    assert write_checkpoint(tmp_path / "packed", spec, shard_bytes=1_000_000) == total
    files = sorted((tmp_path / "packed").glob("*.safetensors"))
    assert len(files) > total // 1_000_000
    assert max(path.stat().st_size - header_bytes(path) for path in files) <= 1_000_000


@pytest.mark.parametrize(
    "options", [{}, {"fp8_experts": True}, {"mtp": True}], ids=["fp4 experts", "fp8 experts", "with mtp"]
)
def test_models_are_alive_in_llama_cpp_after_conversion(tmp_path: Path, options: dict[str, Any]) -> None:
    write(tmp_path / "c", **options)
    convert(tmp_path / "c", tmp_path / "out", jobs=1)
    rows = [stock_logits(tmp_path / "out" / "model.gguf", tokens) for tokens in ([5], range(40), range(1, 41))]
    assert all(np.isfinite(row).all() for row in rows)
    # A head of variance 1/n on a normalized state gives logits of standard deviation 1.
    assert all(0.5 < row.std() < 2.0 for row in rows)
    assert abs(np.corrcoef(rows[1], rows[2])[0, 1]) < 0.9


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "tiny",
        str(tmp_path / "c"),
        "--layers",
        "2",
        "--vocab",
        "32",
        "--no-expert-dtype",
        "--set",
        "index_topk=4",
    ]
    assert make_checkpoint.main(arguments) == 0
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert "expert_dtype" not in config
    assert (config["num_hidden_layers"], config["vocab_size"], config["index_topk"]) == (2, 32, 4)
    assert make_checkpoint.main(["tiny", str(tmp_path / "d"), "--layers", "0"]) == 2
    assert "0 layers" in capsys.readouterr().err


# Number formats


def test_e4m3_rounds_to_the_nearest_value() -> None:
    values = e4m3_values()
    assert (values[0x01], values[0x08], values[0x38], values[0x7E]) == (2.0**-9, 2.0**-6, 1.0, 448.0)
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(2000) * np.exp2(rng.integers(-12, 9, 2000))).astype(np.float32)
    codes = to_e4m3(x)
    got = np.where(codes & 0x80, -1, 1) * values[codes & 0x7F]
    nearest = np.abs(np.abs(x)[:, None] - values[None, :]).min(1)
    assert np.allclose(np.abs(np.abs(x) - np.abs(got)), nearest)
    assert ((got == 0) | (np.sign(got) == np.sign(x))).all()


def test_bf16_rounds_to_nearest_even() -> None:
    exact = np.array([1.0, -2.5, 0.0, 3.0e38], np.float32)
    assert ((to_bf16(exact).astype(np.uint32) << 16).view(np.float32)[:3] == exact[:3]).all()
    # Half way between two neighbours (bit 15 set alone): the even one.
    halves = np.array([0x3F808000, 0x3F818000], np.uint32).view(np.float32)
    assert to_bf16(halves).tolist() == [0x3F80, 0x3F82]


# Routing


def test_lru_hit_rate_of_a_hand_made_trace() -> None:
    # Two slots: 1 miss, 2 miss, 1 hit, 3 miss (drops 2), 2 miss (drops 1), 3 hit.
    assert lru_hit_rate([[1], [2], [1], [3], [2], [3]], 2) == pytest.approx(2 / 6)
    assert lru_hit_rate([[1], [2], [1], [3], [2], [3]], 2, warm_up=2) == pytest.approx(2 / 4)


def test_route_takes_the_best_scores_with_bias() -> None:
    logits = np.array([[3.0, 0.0, 1.0, -5.0], [3.0, 0.0, 1.0, -5.0]])
    assert set(route(logits[:1], np.zeros(4), 2)[0]) == {0, 2}
    assert set(route(logits[:1], np.array([-9.0, 0.0, 0.0, 9.0]), 2)[0]) == {3, 2}


def test_hash_tables_hold_distinct_experts_and_follow_the_skew() -> None:
    rng = np.random.default_rng(0)
    table = hash_table(1.2, 5000, 32, 4, rng)
    assert all(len(set(row)) == 4 for row in table.tolist())
    even = hash_table(0.0, 5000, 32, 4, rng)
    shares = [np.sort(np.bincount(t.ravel(), minlength=32))[::-1][:8].sum() / t.size for t in (table, even)]
    assert shares[0] > 0.5
    assert shares[1] < 0.3


def test_bias_is_a_shuffled_popularity() -> None:
    bias = router_bias(0.5, 64, np.random.default_rng(0))
    assert np.allclose(np.sort(bias), np.sort(0.5 * popularity(64)), atol=1e-6)
    assert bias.std() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("sizes", CALIBRATED, ids=str)
def test_stored_calibration_gives_the_published_hit_rate(sizes: tuple[int, int]) -> None:
    router, hashed = CALIBRATED[sizes]
    assert simulate_hash_hit_rate(hashed, *sizes) == pytest.approx(TARGET_HIT_RATE, abs=0.02)
    simulated = np.mean([simulate_hit_rate(router, *sizes, seed=seed) for seed in range(2)])
    assert simulated == pytest.approx(TARGET_HIT_RATE, abs=0.03)
    assert simulate_hit_rate(0.0, *sizes) < simulated - 0.04


def test_other_sizes_are_calibrated_when_needed() -> None:
    skew = calibrate(0.6, 12, 2)
    assert simulate_hit_rate(skew, 12, 2, seed=1) == pytest.approx(0.6, abs=0.04)
