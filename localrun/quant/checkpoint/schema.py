"""Every tensor of an official DeepSeek-V4 checkpoint, derived from its config.

Names, shapes and dtypes are those of the official files (`layers.N.attn.wq_a.weight`, sizes `[out, in]`); the GGUF names are
llama.cpp's for the architecture `deepseek4`. This module is the only place that knows both.

The first release's config does not tell how experts are stored (FP4 or FP8): callers check the actual dtype and ask
`TensorSpec.stored` what goes with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from localrun.alignment import ceil_div
from localrun.quant.checkpoint.model_config import FP4_BLOCK, FP8_BLOCK, ModelConfig


class Role(Enum):
    """What a tensor is to the converter; decides the dtypes it may have and the type it gets."""

    MATRIX = "matrix"
    """Attention or shared-expert matrix: FP8 in official files."""
    EXPERT = "expert"
    """A routed expert's matrix: FP4, or FP8 in Base checkpoints."""
    WIDE = "wide"
    """A matrix that official files keep in BF16: embeddings, router, compressors."""
    VECTOR = "vector"
    """Norms, biases, sinks, mHC parameters: small, F32 in a GGUF."""
    TABLE = "table"
    """The hash layers' token -> experts table: integers."""


ROLE_DTYPES: Mapping[Role, tuple[str, ...]] = {
    Role.MATRIX: ("F8_E4M3", "BF16", "F32"),
    Role.EXPERT: ("I8", "F8_E4M3", "BF16", "F32"),
    Role.WIDE: ("BF16", "F32"),
    Role.VECTOR: ("F32", "BF16"),
    Role.TABLE: ("I64", "I32"),
}
"""Dtypes a role may have in a file; research checkpoints store everything in F32 or BF16."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One expected tensor.

    Attributes:
        name: official name; a matrix's ends in `.weight`.
        shape: logical shape `(out, in)` or `(n,)`, whatever the storage.
        role: see `Role`.
        dtype: the dtype in official FP4 checkpoints.
        gguf: name in the GGUF; experts of a layer share one stacked tensor. None: not part of a GGUF (MTP).
        expert: number of a routed expert, None for all else.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    dtype: str
    gguf: str | None = None
    expert: int | None = None

    def stored(self, dtype: str) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Shape in the file, and the scale's shape if there must be a `.scale`, when stored as `dtype`."""
        if dtype == "I8" and self.role is Role.EXPERT:
            n_out, n_in = self.shape
            return (n_out, n_in // 2), (n_out, n_in // FP4_BLOCK)
        if dtype == "F8_E4M3":
            n_out, n_in = self.shape
            return self.shape, (ceil_div(n_out, FP8_BLOCK), ceil_div(n_in, FP8_BLOCK))
        return self.shape, None

    @property
    def scale_name(self) -> str:
        return self.name.removesuffix(".weight") + ".scale"


def trunk_tensors(config: ModelConfig, *, n_experts: int | None = None) -> Iterator[TensorSpec]:
    """Every tensor of the language model, scales aside, in file order.

    Args:
        n_experts: only the first ones of each block, for who needs to know their shapes alone; None: all.
    """
    D, V = config.hidden_size, config.vocab_size
    yield TensorSpec("embed.weight", (V, D), Role.WIDE, "BF16", "token_embd.weight")
    yield TensorSpec("norm.weight", (D,), Role.VECTOR, "BF16", "output_norm.weight")
    yield TensorSpec("head.weight", (V, D), Role.WIDE, "BF16", "output.weight")
    yield from _head_streams(config, "", "output_")
    for layer in range(config.num_hidden_layers):
        ratio, hashed = config.compress_ratios[layer], layer < config.num_hash_layers
        yield from block_tensors(config, f"layers.{layer}.", ratio, hashed, f"blk.{layer}.", n_experts=n_experts)


def mtp_tensors(config: ModelConfig, n_blocks: int, *, dspark: bool) -> Iterator[TensorSpec]:
    """Tensors of the `mtp.*` blocks: the first release's drafting block, or DSpark's stages."""
    for i in range(n_blocks):
        at = config.num_hidden_layers + i
        ratio = config.compress_ratios[at] if at < len(config.compress_ratios) else 0
        yield from block_tensors(config, f"mtp.{i}.", ratio, hashed=False, gguf=None)
        yield from _dspark_extras(config, i, n_blocks) if dspark else _mtp_extras(config, f"mtp.{i}.")


def _mtp_extras(config: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    D = config.hidden_size
    for name in ("e_proj", "h_proj"):
        yield TensorSpec(f"{prefix}{name}.weight", (D, D), Role.MATRIX, "F8_E4M3")
    for name in ("enorm", "hnorm", "norm"):
        yield TensorSpec(f"{prefix}{name}.weight", (D,), Role.VECTOR, "BF16")
    yield from _head_streams(config, prefix, None)


def _dspark_extras(config: ModelConfig, stage: int, n_stages: int) -> Iterator[TensorSpec]:
    D, V, rank, prefix = config.hidden_size, config.vocab_size, config.dspark_markov_rank, f"mtp.{stage}."
    if stage == 0:
        n_taps = len(config.dspark_target_layer_ids)
        yield TensorSpec(f"{prefix}main_proj.weight", (D, n_taps * D), Role.MATRIX, "F8_E4M3")
        yield TensorSpec(f"{prefix}main_norm.weight", (D,), Role.VECTOR, "BF16")
    if stage == n_stages - 1:
        yield TensorSpec(f"{prefix}norm.weight", (D,), Role.VECTOR, "BF16")
        yield from _head_streams(config, prefix, None)
        for name in ("markov_w1", "markov_w2"):
            yield TensorSpec(f"{prefix}markov_head.{name}.weight", (V, rank), Role.WIDE, "BF16")
        yield TensorSpec(f"{prefix}confidence_head.proj.weight", (1, D + rank), Role.WIDE, "BF16")


def _head_streams(config: ModelConfig, prefix: str, gguf: str | None) -> Iterator[TensorSpec]:
    n = config.hc_mult
    for part, shape in (("fn", (n, n * config.hidden_size)), ("base", (n,)), ("scale", (1,))):
        target = None if gguf is None else f"{gguf}hc_{part}.weight"
        yield TensorSpec(f"{prefix}hc_head_{part}", shape, Role.VECTOR, "F32", target)


def block_tensors(
    config: ModelConfig, prefix: str, ratio: int, hashed: bool, gguf: str | None, *, n_experts: int | None = None
) -> Iterator[TensorSpec]:
    """Tensors of one block.

    Args:
        prefix: official prefix, `layers.3.` or `mtp.0.`.
        ratio: the block's compression ratio.
        hashed: routed by token id instead of the router's bias.
        gguf: GGUF prefix `blk.3.`, or None for blocks that stay out of the GGUF.
        n_experts: as in `trunk_tensors`.
    """

    def spec(name: str, shape: tuple[int, ...], role: Role, target: str, dtype: str = "") -> TensorSpec:
        full = None if gguf is None else gguf + target
        return TensorSpec(prefix + name, shape, role, dtype or _OFFICIAL_DTYPE[role], full)

    D, F, E, Q = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts, config.q_lora_rank
    heads, grouped = config.num_attention_heads * config.head_dim, config.o_groups * config.o_lora_rank
    shared = F * config.n_shared_experts
    matrix, wide, vector = Role.MATRIX, Role.WIDE, Role.VECTOR
    yield spec("attn_norm.weight", (D,), vector, "attn_norm.weight")
    yield spec("ffn_norm.weight", (D,), vector, "ffn_norm.weight")
    yield spec("attn.wq_a.weight", (Q, D), matrix, "attn_q_a.weight")
    yield spec("attn.q_norm.weight", (Q,), vector, "attn_q_a_norm.weight")
    yield spec("attn.wq_b.weight", (heads, Q), matrix, "attn_q_b.weight")
    yield spec("attn.wkv.weight", (config.head_dim, D), matrix, "attn_kv.weight")
    yield spec("attn.kv_norm.weight", (config.head_dim,), vector, "attn_kv_a_norm.weight")
    yield spec("attn.attn_sink", (config.num_attention_heads,), vector, "attn_sinks.weight", "F32")
    yield spec("attn.wo_a.weight", (grouped, heads // config.o_groups), matrix, "attn_output_a.weight")
    yield spec("attn.wo_b.weight", (D, grouped), matrix, "attn_output_b.weight")
    if ratio:
        width = config.head_dim * (2 if ratio == 4 else 1)
        yield spec("attn.compressor.wkv.weight", (width, D), wide, "attn_compressor_kv.weight")
        yield spec("attn.compressor.wgate.weight", (width, D), wide, "attn_compressor_gate.weight")
        yield spec("attn.compressor.ape", (ratio, width), vector, "attn_compressor_ape.weight", "F32")
        yield spec("attn.compressor.norm.weight", (config.head_dim,), vector, "attn_compressor_norm.weight")
    if ratio == 4:
        H, d, p = config.index_n_heads, config.index_head_dim, "attn.indexer."
        yield spec(p + "wq_b.weight", (H * d, Q), matrix, "indexer.attn_q_b.weight")
        yield spec(p + "weights_proj.weight", (H, D), wide, "indexer.proj.weight")
        yield spec(p + "compressor.wkv.weight", (2 * d, D), wide, "indexer_compressor_kv.weight")
        yield spec(p + "compressor.wgate.weight", (2 * d, D), wide, "indexer_compressor_gate.weight")
        yield spec(p + "compressor.ape", (ratio, 2 * d), vector, "indexer_compressor_ape.weight", "F32")
        yield spec(p + "compressor.norm.weight", (d,), vector, "indexer_compressor_norm.weight")
    yield spec("ffn.gate.weight", (E, D), wide, "ffn_gate_inp.weight")
    if hashed:
        table = (config.vocab_size, config.num_experts_per_tok)
        yield spec("ffn.gate.tid2eid", table, Role.TABLE, "ffn_gate_tid2eid.weight")
    else:
        yield spec("ffn.gate.bias", (E,), vector, "exp_probs_b.bias", "F32")
    for w, name, n_out, n_in in (("w1", "gate", shared, D), ("w3", "up", shared, D), ("w2", "down", D, shared)):
        yield spec(f"ffn.shared_experts.{w}.weight", (n_out, n_in), matrix, f"ffn_{name}_shexp.weight")
    for kind in ("attn", "ffn"):
        n = config.hc_mult
        mixes = (2 + n) * n
        for part, shape in (("fn", (mixes, n * D)), ("base", (mixes,)), ("scale", (3,))):
            yield spec(f"hc_{kind}_{part}", shape, vector, f"hc_{kind}_{part}.weight", "F32")
    for expert in range(E if n_experts is None else n_experts):
        for w, name, n_out, n_in in (("w1", "gate", F, D), ("w3", "up", F, D), ("w2", "down", D, F)):
            target = None if gguf is None else f"{gguf}ffn_{name}_exps.weight"
            full = f"{prefix}ffn.experts.{expert}.{w}.weight"
            yield TensorSpec(full, (n_out, n_in), Role.EXPERT, "I8", target, expert)


_OFFICIAL_DTYPE: Mapping[Role, str] = {
    Role.MATRIX: "F8_E4M3",
    Role.EXPERT: "I8",
    Role.WIDE: "BF16",
    Role.VECTOR: "BF16",
    Role.TABLE: "I64",
}
