"""The shipped demo checkpoint: official names, types and shapes, sound values, size, tokenizer, notices."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer

from localrun.demo import checkpoint_dir
from localrun.quant.checkpoint.tokenizer_json import PRE_TOKENIZERS

MAX_BYTES = 24_000_000
ITEM_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I64": 8}
REPORT = Path(__file__).resolve().parents[2] / "docs" / "demo-model.md"


class Header:
    """The checkpoint's tensor table and raw bytes, read with nothing but the format's definition."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            table = json.loads(file.read(size))
        self._start = 8 + size
        table.pop("__metadata__", None)
        self.tensors: dict[str, dict[str, Any]] = table

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        begin, end = self.tensors[name]["data_offsets"]
        return np.fromfile(self._path, np.uint8, end - begin, offset=self._start + begin)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((checkpoint_dir() / "config.json").read_text(encoding="utf-8"))
    return result


@pytest.fixture(scope="module")
def header() -> Header:
    return Header(checkpoint_dir() / "model.safetensors")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint_dir() / "tokenizer.json"))


def fp8(name: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    scale = (math.ceil(rows / 128), math.ceil(columns / 128))
    return {name + ".weight": ("F8_E4M3", (rows, columns)), name + ".scale": ("F8_E8M0", scale)}


def compressor(prefix: str, ratio: int, width: int, hidden: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    channels = (2 if ratio == 4 else 1) * width
    return {
        prefix + "wkv.weight": ("BF16", (channels, hidden)),
        prefix + "wgate.weight": ("BF16", (channels, hidden)),
        prefix + "ape": ("F32", (ratio, channels)),
        prefix + "norm.weight": ("BF16", (width,)),
    }


def layer_tensors(c: dict[str, Any], layer: int) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    d, heads, width, rank = c["hidden_size"], c["num_attention_heads"], c["head_dim"], c["q_lora_rank"]
    groups, out_rank, ratio = c["o_groups"], c["o_lora_rank"], c["compress_ratios"][layer]
    n_experts, f = c["n_routed_experts"], c["moe_intermediate_size"]
    a = "attn."
    yield from fp8(a + "wq_a", rank, d).items()
    yield from fp8(a + "wq_b", heads * width, rank).items()
    yield from fp8(a + "wkv", width, d).items()
    yield from fp8(a + "wo_a", groups * out_rank, heads * width // groups).items()
    yield from fp8(a + "wo_b", d, groups * out_rank).items()
    yield a + "q_norm.weight", ("BF16", (rank,))
    yield a + "kv_norm.weight", ("BF16", (width,))
    yield a + "attn_sink", ("F32", (heads,))
    if ratio:
        yield from compressor(a + "compressor.", ratio, width, d).items()
    if ratio == 4:
        i = a + "indexer."
        yield from fp8(i + "wq_b", c["index_n_heads"] * c["index_head_dim"], rank).items()
        yield i + "weights_proj.weight", ("BF16", (c["index_n_heads"], d))
        yield from compressor(i + "compressor.", 4, c["index_head_dim"], d).items()
    for norm in ("attn_norm", "ffn_norm"):
        yield norm + ".weight", ("BF16", (d,))
    for part in ("attn", "ffn"):
        yield f"hc_{part}_fn", ("F32", (24, 4 * d))
        yield f"hc_{part}_base", ("F32", (24,))
        yield f"hc_{part}_scale", ("F32", (3,))
    yield "ffn.gate.weight", ("BF16", (n_experts, d))
    if layer < c["num_hash_layers"]:
        yield "ffn.gate.tid2eid", ("I64", (c["vocab_size"], c["num_experts_per_tok"]))
    else:
        yield "ffn.gate.bias", ("F32", (n_experts,))
    yield from fp8("ffn.shared_experts.w1", f, d).items()
    yield from fp8("ffn.shared_experts.w3", f, d).items()
    yield from fp8("ffn.shared_experts.w2", d, f).items()
    for e in range(n_experts):
        for name, rows, columns in (("w1", f, d), ("w3", f, d), ("w2", d, f)):
            yield f"ffn.experts.{e}.{name}.weight", ("I8", (rows, columns // 2))
            yield f"ffn.experts.{e}.{name}.scale", ("F8_E8M0", (rows, columns // 32))


def expected_tensors(c: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    d, vocab = c["hidden_size"], c["vocab_size"]
    expected = {
        "embed.weight": ("BF16", (vocab, d)),
        "head.weight": ("BF16", (vocab, d)),
        "norm.weight": ("BF16", (d,)),
        "hc_head_fn": ("F32", (4, 4 * d)),
        "hc_head_base": ("F32", (4,)),
        "hc_head_scale": ("F32", (1,)),
    }
    for layer in range(c["num_hidden_layers"]):
        expected |= {f"layers.{layer}.{name}": kind for name, kind in layer_tensors(c, layer)}
    return expected


def test_tensors_have_official_names_types_and_shapes(config: dict[str, Any], header: Header) -> None:
    found = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.tensors.items()}
    assert found == expected_tensors(config)


def test_byte_counts_follow_from_types_and_shapes(header: Header) -> None:
    for name, entry in header.tensors.items():
        begin, end = entry["data_offsets"]
        assert end - begin == ITEM_BYTES[entry["dtype"]] * math.prod(entry["shape"]), name


def test_config_has_every_part_of_the_architecture(config: dict[str, Any]) -> None:
    ratios = config["compress_ratios"][: config["num_hidden_layers"]]
    assert ratios.count(4) >= 2
    assert ratios.count(128) >= 1
    assert config["hc_mult"] == 4
    assert config["sliding_window"] == 128
    assert config["index_n_heads"] >= 16
    assert config["num_hash_layers"] >= 1
    assert config["num_experts_per_tok"] == 6
    assert config["scoring_func"] == "sqrtsoftplus"
    assert config["swiglu_limit"] == 10.0
    assert config["model_type"] == "deepseek_v4"
    assert len(config["compress_ratios"]) > config["num_hidden_layers"]


def test_dimensions_divide_into_fp8_blocks_and_k_quant_rows(config: dict[str, Any]) -> None:
    assert config["hidden_size"] % 256 == 0
    assert config["moe_intermediate_size"] % 256 == 0
    assert config["q_lora_rank"] % 128 == 0
    assert config["head_dim"] % 128 == 0


def test_whole_checkpoint_is_within_its_size_limit() -> None:
    total = sum(path.stat().st_size for path in checkpoint_dir().iterdir() if path.is_file())
    assert total <= MAX_BYTES


def test_no_stored_number_is_nan_or_infinite(header: Header) -> None:
    for name, entry in header.tensors.items():
        raw = header.raw(name)
        if entry["dtype"] == "F8_E4M3":
            assert not ((raw & 0x7F) == 0x7F).any(), name
        elif entry["dtype"] == "F8_E8M0":
            assert not (raw == 0xFF).any(), name
        elif entry["dtype"] == "BF16":
            assert not ((raw.view(np.uint16) & 0x7F80) == 0x7F80).any(), name
        elif entry["dtype"] == "F32":
            assert np.isfinite(raw.view(np.float32)).all(), name


def test_hash_layer_sends_every_token_to_distinct_experts_and_uses_all(config: dict[str, Any], header: Header) -> None:
    k, n_experts = config["num_experts_per_tok"], config["n_routed_experts"]
    for layer in range(config["num_hash_layers"]):
        table = header.raw(f"layers.{layer}.ffn.gate.tid2eid").view(np.int64).reshape(-1, k)
        assert (np.diff(np.sort(table, axis=1), axis=1) > 0).all()
        assert set(np.unique(table)) == set(range(n_experts))


def test_experts_differ_from_each_other_and_are_not_empty(config: dict[str, Any], header: Header) -> None:
    for layer in range(config["num_hidden_layers"]):
        digests = set()
        for e in range(config["n_routed_experts"]):
            raw = header.raw(f"layers.{layer}.ffn.experts.{e}.w2.weight")
            assert (raw & 0x77).any()
            digests.add(raw.tobytes())
        assert len(digests) == config["n_routed_experts"]


def test_tokenizer_has_v4s_special_tokens(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    assert tokenizer.token_to_id("<｜begin▁of▁sentence｜>") == config["bos_token_id"] == 0
    assert tokenizer.token_to_id("<｜end▁of▁sentence｜>") == config["eos_token_id"] == 1
    assert tokenizer.token_to_id("<｜▁pad▁｜>") == 2
    for role in (
        "<｜User｜>",
        "<｜Assistant｜>",
        "<think>",
        "</think>",
        "｜DSML｜",
        "<｜latest_reminder｜>",
        "<｜title｜>",
    ):
        assert tokenizer.token_to_id(role) is not None, role
    assert tokenizer.get_vocab_size() == config["vocab_size"]


def test_tokenizer_cuts_text_as_v4_does() -> None:
    document = json.loads((checkpoint_dir() / "tokenizer.json").read_text(encoding="utf-8"))
    steps = document["pre_tokenizer"]["pretokenizers"]
    assert PRE_TOKENIZERS[tuple(step["pattern"]["Regex"] for step in steps if step["type"] == "Split")] == "joyai-llm"


def test_digits_are_tokens_of_their_own(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("128", add_special_tokens=False).tokens == ["1", "2", "8"]


@pytest.mark.parametrize("text", ["Hello, world!", "  two  spaces\n\n\tand a tab", "Ünïcödé 中文 🙂", "1 + 2 = 3"])
def test_tokenizer_gives_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_prompt_is_tokenised_with_role_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>", add_special_tokens=False).ids
    assert ids[0] == 0
    assert ids[1] == tokenizer.token_to_id("<｜User｜>")
    assert ids[-2:] == [tokenizer.token_to_id("<｜Assistant｜>"), tokenizer.token_to_id("</think>")]


@pytest.mark.parametrize("source", ["WordNet 3.1", "mendeleev", "countryinfo", "bsdgames", "Conan Doyle", "Austen"])
def test_notice_names_every_source(source: str) -> None:
    assert source in (checkpoint_dir() / "NOTICE").read_text(encoding="utf-8")


def test_evaluation_text_is_the_held_out_story() -> None:
    text = (checkpoint_dir() / "evaluation.txt").read_text(encoding="utf-8")
    assert "Copper Beeches" in text
    assert "Gutenberg" not in text
    assert len(text) > 50_000


def test_report_describes_this_very_checkpoint() -> None:
    digest = hashlib.sha256((checkpoint_dir() / "model.safetensors").read_bytes()).hexdigest()
    assert digest in REPORT.read_text(encoding="utf-8")
