"""Writes and reads the demo model in DeepSeek-V4's official checkpoint format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tools.demo_model.model import DemoModel, ModelConfig
from tools.demo_model.quantization import FP8_BLOCK, format_of, fp4_parts, fp8_parts, pack_fp4, unpack_fp4


def official_config(c: ModelConfig) -> dict[str, Any]:
    """config.json under the official keys."""
    own = c.to_dict()
    rope = {name: own.pop(name) for name in ("rope_factor", "rope_original", "beta_fast", "beta_slow")}
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "expert_dtype": "fp4",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "model_type": "deepseek_v4",
        "norm_topk_prob": True,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 0,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        },
        "rope_scaling": {
            "beta_fast": int(rope["beta_fast"]),
            "beta_slow": int(rope["beta_slow"]),
            "factor": int(rope["rope_factor"]),
            "original_max_position_embeddings": rope["rope_original"],
            "type": "yarn",
        },
        "scoring_func": "sqrtsoftplus",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **own,
        "compress_ratios": list(c.compress_ratios),
    }


def model_config(official: dict[str, Any]) -> ModelConfig:
    """Inverse of `official_config`."""
    values = {k: official[k] for k in ModelConfig.__dataclass_fields__ if k in official}
    scaling = official["rope_scaling"]
    values |= {"rope_factor": scaling["factor"], "rope_original": scaling["original_max_position_embeddings"]}
    values |= {"beta_fast": scaling["beta_fast"], "beta_slow": scaling["beta_slow"]}
    values["compress_ratios"] = tuple(official["compress_ratios"])
    return ModelConfig(**values)


def official_tensors(model: DemoModel) -> dict[str, Tensor]:
    """All tensors as the official checkpoint stores them, masters rounded to FP4, FP8 and BF16."""
    tensors: dict[str, Tensor] = {}
    for key, parameter in model.weights.items():
        name, w = key.replace("/", "."), parameter.detach()
        kind = format_of(name)
        if kind == "fp4":
            _add_experts(tensors, name, w)
        elif kind == "fp8":
            values, scale = fp8_parts(w)
            tensors[name] = values.contiguous()
            tensors[name.removesuffix("weight") + "scale"] = scale.to(torch.float8_e8m0fnu).contiguous()
        else:
            tensors[name] = w.to(torch.bfloat16 if kind == "bf16" else torch.float32).contiguous()
    for layer, bias in model.biases.items():
        tensors[f"layers.{layer}.ffn.gate.bias"] = bias.float()
    for layer, table in model.token_experts.items():
        tensors[f"layers.{layer}.ffn.gate.tid2eid"] = table.long().contiguous()
    return tensors


def _add_experts(tensors: dict[str, Tensor], name: str, stacked: Tensor) -> None:
    prefix, kind = name.rsplit(".", 1)
    for e, w in enumerate(stacked):
        halves = dict(zip(("w1", "w3"), w.chunk(2), strict=True)) if kind == "w13" else {"w2": w}
        for projection, matrix in halves.items():
            values, scale = fp4_parts(matrix)
            tensors[f"{prefix}.{e}.{projection}.weight"] = pack_fp4(values)
            tensors[f"{prefix}.{e}.{projection}.scale"] = scale.to(torch.float8_e8m0fnu).contiguous()


def save(model: DemoModel, directory: Path) -> None:
    """Writes config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / "model.safetensors.partial"
    save_file(official_tensors(model), partial, metadata={"format": "pt"})
    partial.rename(directory / "model.safetensors")
    text = json.dumps(official_config(model.config), indent=2, sort_keys=True)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def load(directory: Path, compute: torch.dtype = torch.float32) -> DemoModel:
    """Reads a checkpoint of `save` back; weights become the f32 values that the stored bytes stand for."""
    config = model_config(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    model = DemoModel(config, compute)
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        names = set(file.keys())

        def value(name: str) -> Tensor:
            w: Tensor = file.get_tensor(name)
            scale_name = name.removesuffix("weight") + "scale"
            if name == scale_name or scale_name not in names:
                return w
            scale = file.get_tensor(scale_name).float()
            if w.dtype == torch.int8:
                return unpack_fp4(w, scale)
            return w.float() * scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)

        with torch.no_grad():
            for key, parameter in model.weights.items():
                name = key.replace("/", ".")
                prefix, _, leaf = name.rpartition(".")
                if leaf in ("w13", "w2"):
                    projections = ("w1", "w3") if leaf == "w13" else ("w2",)
                    for e in range(config.n_routed_experts):
                        parts = [value(f"{prefix}.{e}.{projection}.weight") for projection in projections]
                        parameter[e].copy_(torch.cat(parts))
                else:
                    parameter.copy_(value(name))
            for layer in model.biases:
                model.biases[layer] = value(f"layers.{layer}.ffn.gate.bias")
            for layer in model.token_experts:
                model.token_experts[layer] = value(f"layers.{layer}.ffn.gate.tid2eid")
    return model
