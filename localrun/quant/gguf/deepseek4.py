"""llama.cpp's architecture `deepseek4`: the keys it reads, and the names, shapes and types of the tensors it creates.

Facts: `src/models/deepseek4.cpp` (load_arch_hparams, load_arch_tensors, the graph's assertions) and
`ggml/src/ggml-cpu` for types, as bundled by llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFValueType

from localrun.errors import UnsupportedModelError
from localrun.quant.gguf.checks import (
    MATRIX_TYPES,
    MAX_DIMENSION,
    MAX_EXPERTS,
    MAX_LAYERS,
    Common,
    KeyReader,
    Metadata,
    Tensors,
)
from localrun.quant.model.shape import CSA, DEEPSEEK4, HCA, ModelShape, read_shape
from localrun.quant.model.source import TensorInfo

ARCHITECTURE = DEEPSEEK4


class TensorUse(Enum):
    """What a tensor is used for, and so which types it may have."""

    MATRIX = "matrix"
    VECTOR = "vector"
    IDS = "table of ids"

    def allows(self, ggml_type: GGMLQuantizationType) -> bool:
        # ggml adds and multiplies element by element only by F32 (binary_op), and takes row ids only as I32.
        if self is TensorUse.MATRIX:
            return ggml_type in MATRIX_TYPES
        return bool(ggml_type == (GGMLQuantizationType.F32 if self is TensorUse.VECTOR else GGMLQuantizationType.I32))


@dataclass(frozen=True, slots=True)
class Expected:
    """A tensor that llama.cpp will create: ggml shape and use."""

    shape: tuple[int, ...]
    kind: TensorUse


def read_deepseek4(path: Path, metadata: Metadata, common: Common) -> ModelShape:
    """Checks every key that llama.cpp's deepseek4 loader reads.

    Raises:
        FormatError: a key is missing, or has a wrong type or a value that llama.cpp can't run.
        UnsupportedModelError: layer kinds that crash llama.cpp.
    """
    keys, n_layers = KeyReader(path, metadata), common.n_layers
    prefix = ARCHITECTURE + "."
    _check_scalars(keys, prefix, n_layers)
    for name in ("expert_feed_forward_length", "attention.head_count", "expert_used_count"):
        keys.uniform(prefix + name, n_layers)
    for name in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
        if name == "swiglu_clamp_exp" or prefix + name in metadata:
            limits = keys.per_layer(prefix + name, n_layers, (GGUFValueType.FLOAT32,))
            if not all(math.isfinite(limit) and limit >= 0 for limit in limits):
                raise keys.error(f"{prefix}{name}: {limits[0]} is not a valid limit")
    bounds = {
        "embedding_length": (1, MAX_DIMENSION),
        "attention.key_length": (1, 1 << 14),
        "attention.value_length": (1, 1 << 14),
        "attention.q_lora_rank": (1, MAX_DIMENSION),
        "attention.output_group_count": (1, MAX_DIMENSION),
        "attention.output_lora_rank": (1, MAX_DIMENSION),
        "expert_count": (1, MAX_EXPERTS),
        "expert_shared_count": (1, 64),
        "hash_layer_count": (0, n_layers),
        "attention.indexer.head_count": (1, 1 << 12),
        "attention.indexer.key_length": (1, 1 << 12),
        "hyper_connection.count": (4, 4),
    }
    for name, (low, high) in bounds.items():
        keys.integer(prefix + name, low, high)
    _check_ratios(keys, prefix + "attention.compress_ratios", n_layers)
    own = {key: value.value for key, value in metadata.items() if key.startswith((prefix, "general.architecture"))}
    own.pop(prefix + "vocab_size", None)  # the token list's length counts
    shape = read_shape(
        own,
        moe_layers=range(n_layers),
        n_experts=keys.integer(prefix + "expert_count", 1, MAX_EXPERTS),
        n_ff=keys.uniform(prefix + "expert_feed_forward_length", n_layers),
        n_vocab=common.n_vocab,
    )
    _check_shape(shape, keys, prefix)
    return shape


def _check_shape(shape: ModelShape, keys: KeyReader, prefix: str) -> None:
    """Checks values for consistency."""
    rope = keys.integer(prefix + "rope.dimension_count", 2, shape.head_dim)
    if shape.value_dim != shape.head_dim:
        raise keys.error(f"{prefix}attention.value_length: differs from key_length {shape.head_dim}")
    if rope % 2 or rope > shape.index_dim:
        raise keys.error(
            f"{prefix}rope.dimension_count: {rope}, with heads of {shape.head_dim} and indexer keys of {shape.index_dim}"
        )
    if shape.index_dim % 64:
        raise keys.error(f"{prefix}attention.indexer.key_length: {shape.index_dim} is not a multiple of 64")
    if shape.n_heads % shape.o_groups:
        raise keys.error(f"{prefix}attention.output_group_count: {shape.o_groups} groups of {shape.n_heads} heads")
    # llama.cpp divides by zero for a compressed cache without layers when it rotates keys: always in the indexer's,
    # and in the others where their head size is the indexer's (llama_kv_cache::build_input_k_rot).
    needed = {CSA, HCA} if shape.head_dim == shape.index_dim else {CSA}
    if absent := needed - set(shape.ratios):
        raise UnsupportedModelError(
            f"{keys.path}: {prefix}attention.compress_ratios: no layer of ratio {min(absent)}",
            hint="llama.cpp can only run models that have one",
        )
    if not 1 <= shape.n_used <= shape.n_experts:
        raise keys.error(f"{prefix}expert_used_count: {shape.n_used} of {shape.n_experts} experts")


def expected_tensors(shape: ModelShape) -> dict[str, Expected]:
    """Every tensor that llama.cpp requires, in its order."""
    d, hc_dim = shape.n_embd, shape.n_streams * shape.n_embd
    expected = {
        "token_embd.weight": Expected((d, shape.n_vocab), TensorUse.MATRIX),
        "output_norm.weight": Expected((d,), TensorUse.VECTOR),
        "output.weight": Expected((d, shape.n_vocab), TensorUse.MATRIX),
        "output_hc_fn.weight": Expected((hc_dim, shape.n_streams), TensorUse.MATRIX),
        "output_hc_base.weight": Expected((shape.n_streams,), TensorUse.VECTOR),
        "output_hc_scale.weight": Expected((1,), TensorUse.VECTOR),
    }
    for layer, ratio in enumerate(shape.ratios[: shape.n_layers]):
        parts = _attention(shape) | _compressor(shape, ratio) | _feed_forward(shape, layer)
        expected.update({f"blk.{layer}.{name}": value for name, value in parts.items()})
    return expected


def _attention(shape: ModelShape) -> dict[str, Expected]:
    d, heads, rank = shape.n_embd, shape.n_heads * shape.head_dim, shape.o_groups * shape.o_rank
    mix = (2 + shape.n_streams) * shape.n_streams
    parts = {
        "attn_norm.weight": Expected((d,), TensorUse.VECTOR),
        "attn_sinks.weight": Expected((shape.n_heads,), TensorUse.VECTOR),
        "attn_q_a.weight": Expected((d, shape.q_rank), TensorUse.MATRIX),
        "attn_q_a_norm.weight": Expected((shape.q_rank,), TensorUse.VECTOR),
        "attn_q_b.weight": Expected((shape.q_rank, heads), TensorUse.MATRIX),
        "attn_kv.weight": Expected((d, shape.head_dim), TensorUse.MATRIX),
        "attn_kv_a_norm.weight": Expected((shape.head_dim,), TensorUse.VECTOR),
        "attn_output_a.weight": Expected((heads // shape.o_groups, rank), TensorUse.MATRIX),
        "attn_output_b.weight": Expected((rank, d), TensorUse.MATRIX),
    }
    for sublayer in ("attn", "ffn"):
        parts[f"hc_{sublayer}_fn.weight"] = Expected((shape.n_streams * d, mix), TensorUse.MATRIX)
        parts[f"hc_{sublayer}_base.weight"] = Expected((mix,), TensorUse.VECTOR)
        parts[f"hc_{sublayer}_scale.weight"] = Expected((3,), TensorUse.VECTOR)
    return parts


def _compressor(shape: ModelShape, ratio: int) -> dict[str, Expected]:
    if ratio == 0:
        return {}
    d, width = shape.n_embd, (2 if ratio == CSA else 1) * shape.head_dim
    parts = {
        "attn_compressor_kv.weight": Expected((d, width), TensorUse.MATRIX),
        "attn_compressor_gate.weight": Expected((d, width), TensorUse.MATRIX),
        "attn_compressor_ape.weight": Expected((width, ratio), TensorUse.MATRIX),
        "attn_compressor_norm.weight": Expected((shape.head_dim,), TensorUse.VECTOR),
    }
    if ratio == CSA:
        index = shape.index_dim
        parts |= {
            "indexer.proj.weight": Expected((d, shape.index_heads), TensorUse.MATRIX),
            "indexer.attn_q_b.weight": Expected((shape.q_rank, shape.index_heads * index), TensorUse.MATRIX),
            "indexer_compressor_kv.weight": Expected((d, 2 * index), TensorUse.MATRIX),
            "indexer_compressor_gate.weight": Expected((d, 2 * index), TensorUse.MATRIX),
            "indexer_compressor_ape.weight": Expected((2 * index, ratio), TensorUse.MATRIX),
            "indexer_compressor_norm.weight": Expected((index,), TensorUse.VECTOR),
        }
    return parts


def _feed_forward(shape: ModelShape, layer: int) -> dict[str, Expected]:
    d, ff, shared = shape.n_embd, shape.n_ff, shape.n_ff * shape.n_shared
    parts = {"ffn_gate_inp.weight": Expected((d, shape.n_experts), TensorUse.MATRIX)}
    if layer < shape.n_hash_layers:
        parts["ffn_gate_tid2eid.weight"] = Expected((shape.n_used, shape.n_vocab), TensorUse.IDS)
    else:
        parts["exp_probs_b.bias"] = Expected((shape.n_experts,), TensorUse.VECTOR)
    return parts | {
        "ffn_norm.weight": Expected((d,), TensorUse.VECTOR),
        "ffn_gate_exps.weight": Expected((d, ff, shape.n_experts), TensorUse.MATRIX),
        "ffn_down_exps.weight": Expected((ff, d, shape.n_experts), TensorUse.MATRIX),
        "ffn_up_exps.weight": Expected((d, ff, shape.n_experts), TensorUse.MATRIX),
        "ffn_gate_shexp.weight": Expected((d, shared), TensorUse.MATRIX),
        "ffn_down_shexp.weight": Expected((shared, d), TensorUse.MATRIX),
        "ffn_up_shexp.weight": Expected((d, shared), TensorUse.MATRIX),
    }


def _check_scalars(keys: KeyReader, prefix: str, n_layers: int) -> None:
    """Keys that decide no shape; each bound is what keeps llama.cpp's arithmetic defined."""
    keys.real(prefix + "attention.layer_norm_rms_epsilon", 0.0, 1.0)
    keys.integer(prefix + "attention.sliding_window", 1, 1 << 20)
    keys.integer(prefix + "attention.indexer.top_k", 1, 1 << 20)
    keys.real(prefix + "attention.compress_rope_freq_base", 1.0, 1e12)
    keys.integer(prefix + "hyper_connection.sinkhorn_iterations", 1, 1000)
    keys.real(prefix + "hyper_connection.epsilon", 0.0, 1.0)
    keys.real(prefix + "expert_weights_scale", -1e6, 1e6)
    keys.boolean(prefix + "expert_weights_norm")
    if keys.integer(prefix + "expert_gating_func", 0, 64) != 4:
        raise keys.error(f"{prefix}expert_gating_func: this architecture has only 4 (square root of softplus)")
    n_kv = keys.uniform(prefix + "attention.head_count_kv", n_layers)
    if n_kv != 1:
        raise keys.error(f"{prefix}attention.head_count_kv: {n_kv}, this architecture has 1")
    optional = (("rope.freq_base", 1.0, 1e12), ("rope.scaling.factor", 0.0, 1e6))
    for name, low, high in optional:
        if prefix + name in keys.metadata:
            keys.real(prefix + name, low, high)


def _check_ratios(keys: KeyReader, key: str, n_layers: int) -> None:
    value = keys.metadata.get(key)
    if value is None or value.item_type not in (GGUFValueType.INT32, GGUFValueType.UINT32):
        raise keys.error(f"{key}: expected a list of INT32")
    if not n_layers <= value.count <= MAX_LAYERS:
        raise keys.error(f"{key}: {value.count} values for {n_layers} layers")
    if unknown := set(value.value[:n_layers]) - {0, CSA, HCA}:
        raise keys.error(f"{key}: {min(unknown)} is not 0, 4 or 128")


def check_deepseek4(path: Path, metadata: Metadata, tensors: Tensors, common: Common) -> ModelShape:
    """Every tensor that llama.cpp will create exists with exactly its shape and a type that can be computed with.

    Raises:
        FormatError: names the key or tensor.
    """
    shape = read_deepseek4(path, metadata, common)
    keys = KeyReader(path, metadata)
    expected = expected_tensors(shape)
    for name, want in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise keys.error(f"no tensor '{name}'")
        # llama.cpp views attn_output_a as (in, rank, groups); files hold it with the last two folded, or so.
        split_groups = (want.shape[0], shape.o_rank, shape.o_groups)
        if _squeeze(tensor.shape) != _squeeze(want.shape) and not (
            name.endswith(".attn_output_a.weight") and _squeeze(tensor.shape) == _squeeze(split_groups)
        ):
            raise keys.error(f"{name}: shape {tensor.shape}, expected {want.shape}")
        if not want.kind.allows(tensor.type):
            raise keys.error(f"{name}: type {tensor.type.name} can't be used for a {want.kind.value}")
    for name, tensor in tensors.items():
        if name not in expected:
            _check_optional(keys, shape, name, tensor)
    return shape


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without trailing ones: ggml does not distinguish them."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


_IMAGE_BIAS = re.compile(r"blk\.([0-9]+)\.exp_probs_b_vl\.bias")


def _check_optional(keys: KeyReader, shape: ModelShape, name: str, tensor: TensorInfo) -> None:
    """The one tensor that llama.cpp takes if it is there: the router's bias for images."""
    match = _IMAGE_BIAS.fullmatch(name)
    if match is None or int(match[1]) >= shape.n_layers:
        raise keys.error(f"unexpected tensor '{name}'")
    if _squeeze(tensor.shape) != (shape.n_experts,) or tensor.type != GGMLQuantizationType.F32:
        raise keys.error(f"{name}: {tensor.type.name} {tensor.shape}, expected F32 ({shape.n_experts},)")
