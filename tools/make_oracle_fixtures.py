"""Makes tests/fixtures/oracle/*.tar.xz: tiny random DeepSeek-V4 models in the official format, with reference logits.

The reference is transformers' DeepseekV4ForCausalLM in F32 on the dequantised weights: code that shares nothing with llama.cpp or
with localrun. Run it in an environment of its own (tests need neither package):

    python -m venv oracle && oracle/bin/pip install torch==2.13.0 'transformers==5.23.*' safetensors numpy
    oracle/bin/python tools/make_oracle_fixtures.py tests/fixtures/oracle

Each archive holds config.json, model.safetensors (FP8 128 x 128, FP4, E8M0, BF16, F32, I64 as in official files), tokens.json, and
logits.npy (T, n_vocab) F32 with 16 bits of mantissa, which moves a KL divergence by less than 1e-8.

Weights that official files keep in BF16 or F32 get three bits of mantissa here, so that the archives stay small.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from safetensors.torch import save
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

N_TOKENS = 200
"""More than one row of ratio 128 and many more rows of ratio 4 than the indexer keeps."""


@dataclass(frozen=True)
class Fixture:
    """Dimensions of one model; every kind of layer is in each."""

    name: str
    seed: int
    ratios: tuple[int, ...]
    route_scale: float
    hidden: int = 64
    heads: int = 4
    head_dim: int = 64
    rope_dim: int = 32
    q_rank: int = 32
    o_groups: int = 2
    o_rank: int = 32
    index_dim: int = 64
    index_topk: int = 8
    window: int = 32
    experts: int = 6
    used: int = 2
    width: int = 64
    hash_layers: int = 1
    vocab: int = 128


_OTHER: dict[str, Any] = {
    "hidden": 160,  # ragged FP8 blocks: 128 + 32
    "heads": 8,
    "q_rank": 48,  # not a multiple of Q8_0's block
    "o_groups": 4,
    "o_rank": 24,
    "index_topk": 6,
    "window": 16,
    "experts": 8,
    "used": 3,
    "width": 32,
    "hash_layers": 1,
    "vocab": 96,
}

FIXTURES = (
    Fixture("flash-1", 101, (0, 4, 128, 4), 1.5),
    Fixture("flash-2", 102, (0, 4, 128, 4), 1.5),
    Fixture("pro-1", 201, (128, 4, 128, 4), 2.5),
    Fixture("pro-2", 202, (128, 4, 128, 4), 2.5),
    Fixture("other-1", 301, (0, 4, 128), 1.5, **_OTHER),
)


def official_config(f: Fixture) -> dict[str, Any]:
    """config.json as the official releases write it."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": f.hidden,
        "num_hidden_layers": len(f.ratios),
        "num_attention_heads": f.heads,
        "num_key_value_heads": 1,
        "head_dim": f.head_dim,
        "qk_rope_head_dim": f.rope_dim,
        "q_lora_rank": f.q_rank,
        "o_lora_rank": f.o_rank,
        "o_groups": f.o_groups,
        "sliding_window": f.window,
        "compress_ratios": list(f.ratios),
        "compress_rope_theta": 160000,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "index_n_heads": 16,
        "index_head_dim": f.index_dim,
        "index_topk": f.index_topk,
        "n_routed_experts": f.experts,
        "num_experts_per_tok": f.used,
        "n_shared_experts": 1,
        "moe_intermediate_size": f.width,
        "num_hash_layers": f.hash_layers,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": f.route_scale,
        "swiglu_limit": 10.0,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "vocab_size": f.vocab,
        "max_position_embeddings": 1048576,
        "num_nextn_predict_layers": 0,
        "expert_dtype": "fp4",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
    }


def build_model(config: dict[str, Any]) -> Any:
    """An empty transformers model for an official config."""
    drop = ("architectures", "model_type", "topk_method", "rope_scaling", "expert_dtype", "quantization_config")
    arguments = {key: value for key, value in config.items() if key not in drop}
    scaling = dict(config["rope_scaling"])
    scaling["rope_type"] = scaling.pop("type")
    parsed = DeepseekV4Config(**arguments, rope_parameters=scaling)
    parsed._attn_implementation = "eager"
    return DeepseekV4ForCausalLM(parsed).float().eval()


# transformers' module names -> official names; applied in order to what follows `model.layers.N.`
_RENAMES = (
    (r"^input_layernorm\.", "attn_norm."),
    (r"^post_attention_layernorm\.", "ffn_norm."),
    (r"^(attn|ffn)_hc\.(fn|base|scale)$", r"hc_\1_\2"),
    (r"^self_attn\.sinks$", "attn.attn_sink"),
    (r"^self_attn\.compressor\.indexer\.scorer\.weights_proj\.", "attn.indexer.weights_proj."),
    (r"^self_attn\.compressor\.indexer\.q_b_proj\.", "attn.indexer.wq_b."),
    (r"^self_attn\.compressor\.indexer\.", "attn.indexer.compressor."),
    (r"^self_attn\.", "attn."),
    (r"^mlp\.", "ffn."),
    (r"compressor\.kv_norm\.", "compressor.norm."),
    (r"compressor\.position_bias$", "compressor.ape"),
    (r"compressor\.kv_proj\.", "compressor.wkv."),
    (r"compressor\.gate_proj\.", "compressor.wgate."),
    (r"^attn\.kv_proj\.", "attn.wkv."),
    (r"\.q_a_proj\.", ".wq_a."),
    (r"\.q_b_proj\.", ".wq_b."),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.o_a_proj\.", ".wo_a."),
    (r"\.o_b_proj\.", ".wo_b."),
    (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
    (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
    (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
    (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
)
_ROOT = {
    "model.embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "model.norm.weight": "norm.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}


def official_name(name: str) -> str:
    """The official name of a transformers parameter (stacked experts excepted)."""
    if name in _ROOT:
        return _ROOT[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    assert match is not None, name
    rest = match[2]
    for pattern, replacement in _RENAMES:
        rest = re.sub(pattern, replacement, rest)
    return f"layers.{match[1]}.{rest}"


_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_FP8_MATRICES = re.compile(r"\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|attn\.indexer\.wq_b|shared_experts\.w[123])\.weight$")
_FULL_PRECISION = re.compile(r"hc_|\.ape$|attn_sink$|gate\.bias$")


def power_of_two_scale(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """Smallest power of two that brings amax to `largest` or below."""
    return torch.exp2(torch.ceil(torch.log2(amax.clamp(min=2.0**-100) / largest)))


def quantize_fp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(E4M3, E8M0 per 128 x 128, dequantised F32)."""
    n_out, n_in = w.shape
    padded = torch.nn.functional.pad(w, (0, -n_in % 128, 0, -n_out % 128))
    blocks = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))  # (o, 128, i, 128)
    scale = power_of_two_scale(blocks.abs().amax((1, 3)), 448)
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n_out, :n_in]
    codes = (w / spread).to(torch.float8_e4m3fn)
    return codes, scale.to(torch.float8_e8m0fnu), codes.float() * spread


def quantize_fp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(packed codes, E8M0 per 32 inputs, dequantised F32)."""
    blocks = w.unflatten(1, (-1, 32))
    scale = power_of_two_scale(blocks.abs().amax(-1, keepdim=True), 6)
    scaled = blocks / scale
    magnitude = (scaled.abs()[..., None] - _FP4).abs().argmin(-1)
    codes = (magnitude + 8 * (scaled < 0)).to(torch.uint8).flatten(1)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int8)
    values = _FP4[magnitude] * torch.where(scaled < 0, -1.0, 1.0) * scale
    return packed.contiguous(), scale.squeeze(-1).to(torch.float8_e8m0fnu), values.flatten(1)


def randomize(model: Any, f: Fixture, rng: torch.Generator) -> None:
    """Random weights of sizes that keep activations near one and every branch busy."""
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in name:
            continue
        noise: Any = torch.randn(p.shape, generator=rng) if p.is_floating_point() else None
        if name.endswith("tid2eid"):
            for row in p:
                row.copy_(torch.randperm(f.experts, generator=rng)[: f.used])
        elif name.endswith("norm.weight") or "layernorm" in name:
            p.copy_(1 + 0.2 * noise)
        elif name.endswith("e_score_correction_bias"):
            p.copy_(0.3 * noise)
        elif name.endswith(("hc.base", "hc_base")):
            p.copy_(0.5 * noise)
        elif name.endswith(("hc.scale", "hc_scale")):
            p.copy_(0.5 + torch.rand(p.shape, generator=rng))
        elif name.endswith(("sinks", "position_bias")) or "embed_tokens" in name:
            p.copy_(noise)
        elif name.endswith(("hc.fn", "hc_fn")):
            p.copy_(noise / p.shape[-1] ** 0.5)
        else:
            p.copy_(1.7 * noise / p.shape[-1] ** 0.5)


def store_official(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors in official dtypes; the model itself gets the values that these stand for."""
    stored: dict[str, torch.Tensor] = {}
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in name:
            continue
        if ".experts." in name and "shared" not in name:
            stacked = name.endswith("gate_up_proj")
            base = official_name(name[: name.rindex(".")] + ".x").removesuffix("x")
            for e in range(p.shape[0]):
                half = p.shape[1] // 2
                parts = {"w1": slice(0, half), "w3": slice(half, None)} if stacked else {"w2": slice(None)}
                for w, rows in parts.items():
                    packed, scale, p[e][rows] = quantize_fp4(p[e][rows].clone())
                    stored[f"{base}{e}.{w}.weight"], stored[f"{base}{e}.{w}.scale"] = packed, scale
            continue
        official = official_name(name)
        if _FP8_MATRICES.search(official):
            codes, scale, values = quantize_fp8(p.clone())
            p.copy_(values)
            stored[official], stored[official.removesuffix(".weight") + ".scale"] = codes, scale
        elif official.endswith("tid2eid"):
            stored[official] = p.clone()
        else:
            p.copy_(coarsen(p))
            stored[official] = p.clone() if _FULL_PRECISION.search(official) else p.to(torch.bfloat16)
    return stored


def coarsen(w: torch.Tensor) -> torch.Tensor:
    """Rounded to three bits of mantissa."""
    bits = w.contiguous().view(torch.int32)
    return ((bits + (1 << 19)) & ~((1 << 20) - 1)).view(torch.float32)


def trim(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """F32 rounded to 16 bits of mantissa."""
    bits = logits.view(np.uint32)
    trimmed: np.ndarray[Any, Any] = ((bits + 64) & np.uint32(0xFFFFFF80)).view(np.float32)
    return trimmed


def make(f: Fixture, folder: Path) -> None:
    """Writes one archive."""
    config = official_config(f)
    torch.manual_seed(f.seed)
    rng = torch.Generator().manual_seed(f.seed)
    model = build_model(config)
    with torch.no_grad():
        randomize(model, f, rng)
        stored = store_official(model)
        tokens = torch.randint(0, f.vocab, (1, N_TOKENS), generator=rng)
        logits = model(input_ids=tokens, use_cache=False).logits[0].numpy()
    array = io.BytesIO()
    np.save(array, trim(logits))
    members = {
        "config.json": json.dumps(config, indent=1).encode(),
        "model.safetensors": save({name: t.contiguous() for name, t in sorted(stored.items())}, {"format": "pt"}),
        "tokens.json": json.dumps(tokens[0].tolist()).encode(),
        "logits.npy": array.getvalue(),
    }
    path = folder / f"{f.name}.tar.xz"
    with tarfile.open(path, "w:xz", preset=9) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    print(f"{path}: {path.stat().st_size:,} bytes, {len(stored)} tensors, logits' deviation {logits.std():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for fixture in FIXTURES:
        make(fixture, folder)


if __name__ == "__main__":
    main()
