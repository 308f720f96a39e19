"""Tiny random GGUF models for tests, written with gguf-py: an independent writer to read against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as QT


@dataclass(frozen=True)
class TinyDeepseek4:
    """Dimensions of a deepseek4 model: every layer kind, a few hundred KB."""

    ratios: tuple[int, ...] = (0, 4, 128)
    n_embd: int = 128
    n_heads: int = 4
    head_dim: int = 128
    rope_dims: int = 64
    q_rank: int = 64
    o_groups: int = 2
    o_rank: int = 32
    index_heads: int = 16
    index_dim: int = 128
    top_k: int = 8
    n_experts: int = 8
    n_used: int = 2
    n_ff: int = 64
    n_hash: int = 1
    vocab: int = 64
    expert_type: QT = QT.MXFP4
    dense_type: QT = QT.Q8_0


SMALLEST = TinyDeepseek4(
    n_embd=32,
    n_heads=2,
    head_dim=64,
    rope_dims=32,
    q_rank=32,
    o_rank=16,
    index_heads=2,
    index_dim=64,
    n_experts=4,
    n_ff=32,
    vocab=8,
)
"""As little of everything as llama.cpp takes: for files that are damaged by the thousand."""


def deepseek4_tensors(m: TinyDeepseek4, seed: int = 0) -> dict[str, tuple[npt.NDArray[np.generic], QT]]:
    """Name -> (values as the writer takes them, type)."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, tuple[npt.NDArray[np.generic], QT]] = {}

    def matrix(name: str, n_in: int, n_out: int, kind: QT = m.dense_type, *stack: int, scale: float = 0.0) -> None:
        values = rng.standard_normal((*stack, n_out, n_in), dtype=np.float32) * np.float32(scale or n_in**-0.5)
        if kind != QT.F32:
            values = gguf.quants.quantize(values, kind)
        tensors[name] = (values, kind)

    def vector(name: str, n: int, mean: float = 1.0) -> None:
        tensors[name] = ((mean + 0.05 * rng.standard_normal(n)).astype(np.float32), QT.F32)

    d, hc = m.n_embd, 4
    matrix("token_embd.weight", d, m.vocab, scale=1.0)
    vector("output_norm.weight", d)
    matrix("output.weight", d, m.vocab)
    matrix("output_hc_fn.weight", hc * d, hc, QT.F32)
    vector("output_hc_base.weight", hc, 0)
    vector("output_hc_scale.weight", 1)
    for layer, ratio in enumerate(m.ratios):
        b = f"blk.{layer}."
        vector(b + "attn_norm.weight", d)
        vector(b + "attn_sinks.weight", m.n_heads, 0)
        matrix(b + "attn_q_a.weight", d, m.q_rank)
        vector(b + "attn_q_a_norm.weight", m.q_rank)
        matrix(b + "attn_q_b.weight", m.q_rank, m.n_heads * m.head_dim)
        matrix(b + "attn_kv.weight", d, m.head_dim)
        vector(b + "attn_kv_a_norm.weight", m.head_dim)
        matrix(b + "attn_output_a.weight", m.n_heads * m.head_dim // m.o_groups, m.o_rank * m.o_groups)
        matrix(b + "attn_output_b.weight", m.o_groups * m.o_rank, d)
        for sublayer in ("attn", "ffn"):
            matrix(b + f"hc_{sublayer}_fn.weight", hc * d, (2 + hc) * hc, QT.F32)
            vector(b + f"hc_{sublayer}_base.weight", (2 + hc) * hc, 0)
            vector(b + f"hc_{sublayer}_scale.weight", 3)
        if ratio:
            width = m.head_dim * (2 if ratio == 4 else 1)
            matrix(b + "attn_compressor_kv.weight", d, width)
            matrix(b + "attn_compressor_gate.weight", d, width)
            matrix(b + "attn_compressor_ape.weight", width, ratio, QT.F32, scale=0.1)
            vector(b + "attn_compressor_norm.weight", m.head_dim)
        if ratio == 4:
            matrix(b + "indexer.proj.weight", d, m.index_heads)
            matrix(b + "indexer.attn_q_b.weight", m.q_rank, m.index_heads * m.index_dim)
            matrix(b + "indexer_compressor_kv.weight", d, 2 * m.index_dim)
            matrix(b + "indexer_compressor_gate.weight", d, 2 * m.index_dim)
            matrix(b + "indexer_compressor_ape.weight", 2 * m.index_dim, ratio, QT.F32, scale=0.1)
            vector(b + "indexer_compressor_norm.weight", m.index_dim)
        matrix(b + "ffn_gate_inp.weight", d, m.n_experts, QT.F32)
        if layer < m.n_hash:
            table = np.stack([rng.permutation(m.n_experts)[: m.n_used] for _ in range(m.vocab)])
            tensors[b + "ffn_gate_tid2eid.weight"] = (table.astype(np.int32), QT.I32)
        else:
            vector(b + "exp_probs_b.bias", m.n_experts, 0)
        vector(b + "ffn_norm.weight", d)
        matrix(b + "ffn_gate_exps.weight", d, m.n_ff, m.expert_type, m.n_experts)
        matrix(b + "ffn_up_exps.weight", d, m.n_ff, m.expert_type, m.n_experts)
        matrix(b + "ffn_down_exps.weight", m.n_ff, d, m.expert_type, m.n_experts)
        matrix(b + "ffn_gate_shexp.weight", d, m.n_ff)
        matrix(b + "ffn_up_shexp.weight", d, m.n_ff)
        matrix(b + "ffn_down_shexp.weight", m.n_ff, d)
    return tensors


def add_deepseek4_keys(writer: gguf.GGUFWriter, m: TinyDeepseek4) -> None:
    prefix, n_layers = "deepseek4.", len(m.ratios)
    integers = {
        "block_count": n_layers,
        "context_length": 65536,
        "embedding_length": m.n_embd,
        "feed_forward_length": m.n_ff,
        "attention.head_count": m.n_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": m.head_dim,
        "attention.value_length": m.head_dim,
        "attention.q_lora_rank": m.q_rank,
        "attention.sliding_window": 128,
        "attention.output_group_count": m.o_groups,
        "attention.output_lora_rank": m.o_rank,
        "attention.indexer.head_count": m.index_heads,
        "attention.indexer.key_length": m.index_dim,
        "attention.indexer.top_k": m.top_k,
        "rope.dimension_count": m.rope_dims,
        "rope.scaling.original_context_length": 65536,
        "expert_count": m.n_experts,
        "expert_used_count": m.n_used,
        "expert_feed_forward_length": m.n_ff,
        "expert_shared_count": 1,
        "expert_gating_func": 4,
        "hash_layer_count": m.n_hash,
        "hyper_connection.count": 4,
        "hyper_connection.sinkhorn_iterations": 20,
        "embedding_length_out": 4 * m.n_embd,
        "vocab_size": m.vocab,
    }
    reals = {
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.compress_rope_freq_base": 160000.0,
        "rope.freq_base": 10000.0,
        "rope.scaling.factor": 16.0,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
        "expert_weights_scale": 1.5,
        "hyper_connection.epsilon": 1e-6,
    }
    for key, integer in integers.items():
        writer.add_uint32(prefix + key, integer)
    for key, real in reals.items():
        writer.add_float32(prefix + key, real)
    writer.add_string(prefix + "rope.scaling.type", "yarn")
    writer.add_bool(prefix + "expert_weights_norm", True)
    writer.add_array(prefix + "attention.compress_ratios", list(m.ratios))
    writer.add_array(prefix + "swiglu_clamp_exp", [10.0] * n_layers)
    writer.add_array(prefix + "swiglu_clamp_shexp", [10.0] * n_layers)
    writer.add_string("tokenizer.ggml.model", "none")


def write_gguf(
    path: Path,
    architecture: str,
    tensors: Mapping[str, tuple[npt.NDArray[np.generic], QT]],
    add_keys: object,
    *,
    alignment: int | None = None,
    split_max_tensors: int = 0,
) -> list[Path]:
    """Writes one file, or with `split_max_tensors` parts named as llama.cpp does; returns the files."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    assert callable(add_keys)
    add_keys(writer)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if not split_max_tensors:
        return [path]
    return sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))


def write_deepseek4(
    path: Path,
    model: TinyDeepseek4 | None = None,
    *,
    seed: int = 0,
    alignment: int | None = None,
    split_max_tensors: int = 0,
    replace_tensors: Mapping[str, tuple[npt.NDArray[np.generic], QT] | None] | None = None,
) -> list[Path]:
    """A whole tiny model; `replace_tensors` changes, adds or (None) leaves out single tensors."""
    model = model or TinyDeepseek4()
    tensors = deepseek4_tensors(model, seed)
    for name, replacement in (replace_tensors or {}).items():
        if replacement is None:
            del tensors[name]
        else:
            tensors[name] = replacement
    return write_gguf(
        path,
        "deepseek4",
        tensors,
        lambda writer: add_deepseek4_keys(writer, model),
        alignment=alignment,
        split_max_tensors=split_max_tensors,
    )
