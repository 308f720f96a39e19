"""Writes a tiny random GGUF of another mixture-of-experts architecture of llama.cpp.

    python -m tools.make_moe_gguf olmoe /tmp/olmoe.gguf --expert-type Q4_0

For tests of "any llama.cpp MoE model": used by token ids (no tokenizer), a few hundred KB.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

ARCHITECTURES = ("olmoe", "qwen3moe")


@dataclass(frozen=True)
class MoeDims:
    """Sizes of the model; the head size is n_embd / n_heads."""

    n_layers: int = 2
    n_embd: int = 128
    n_heads: int = 4
    n_kv_heads: int = 4
    n_experts: int = 8
    n_used: int = 2
    n_ff: int = 64
    vocab: int = 64


def write_moe_gguf(
    path: Path,
    architecture: str,
    dims: MoeDims | None = None,
    *,
    expert_type: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
    tied: bool = False,
    seed: int = 0,
    extra: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> None:
    """Writes the model; `tied` leaves out the output matrix (qwen3moe only: olmoe always has one); `extra`: further tensors."""
    dims = dims or MoeDims()
    writer = gguf.GGUFWriter(path, architecture)
    _add_keys(writer, architecture, dims)
    rng = np.random.default_rng(seed)

    def matrix(name: str, kind: GGMLQuantizationType, *shape: int) -> None:
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5)
        data: npt.NDArray[np.generic] = values
        if kind != GGMLQuantizationType.F32:
            data = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    def vector(name: str, n: int) -> None:
        writer.add_tensor(name, (1 + 0.05 * rng.standard_normal(n)).astype(np.float32))

    d, head = dims.n_embd, dims.n_embd // dims.n_heads
    f16, f32 = GGMLQuantizationType.F16, GGMLQuantizationType.F32
    matrix("token_embd.weight", f16, dims.vocab, d)
    vector("output_norm.weight", d)
    if not tied:
        matrix("output.weight", f16, dims.vocab, d)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    for layer in range(dims.n_layers):
        block = f"blk.{layer}."
        vector(block + "attn_norm.weight", d)
        matrix(block + "attn_q.weight", f16, d, d)
        matrix(block + "attn_k.weight", f16, dims.n_kv_heads * head, d)
        matrix(block + "attn_v.weight", f16, dims.n_kv_heads * head, d)
        matrix(block + "attn_output.weight", f16, d, d)
        # OLMoE normalizes all heads together, Qwen3 each for itself.
        for name in ("attn_q_norm", "attn_k_norm"):
            vector(f"{block}{name}.weight", d if architecture == "olmoe" else head)
        vector(block + "ffn_norm.weight", d)
        matrix(block + "ffn_gate_inp.weight", f32, dims.n_experts, d)
        for name, n_out, n_in in (("gate", dims.n_ff, d), ("down", d, dims.n_ff), ("up", dims.n_ff, d)):
            matrix(f"{block}ffn_{name}_exps.weight", expert_type, dims.n_experts, n_out, n_in)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_keys(writer: gguf.GGUFWriter, architecture: str, dims: MoeDims) -> None:
    writer.add_block_count(dims.n_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(dims.n_embd)
    writer.add_feed_forward_length(dims.n_ff)
    writer.add_expert_feed_forward_length(dims.n_ff)
    writer.add_head_count(dims.n_heads)
    writer.add_head_count_kv(dims.n_kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(dims.n_experts)
    writer.add_expert_used_count(dims.n_used)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("none")
    writer.add_uint32(f"{architecture}.vocab_size", dims.vocab)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make_moe_gguf", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--expert-type", default="Q8_0", help="ggml type of the experts that gguf-py can quantize to")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.expert_type not in GGMLQuantizationType.__members__:
        parser.error(f"unknown type {options.expert_type}")
    write_moe_gguf(
        options.path,
        options.architecture,
        MoeDims(n_layers=options.layers, n_experts=options.experts),
        expert_type=GGMLQuantizationType[options.expert_type],
        seed=options.seed,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
