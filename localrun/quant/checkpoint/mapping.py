"""A checkpoint as a GGUF: metadata, and for every output tensor a recipe that builds it from ranges of the shards.

The converter writes a plan to a file, `CheckpointSource` serves it on demand; both produce the same bytes. A plan depends only
on the checkpoint and the options, so the same input gives the same file. Types are chosen per tensor.

Order in the file: all dense tensors first (llama.cpp reads them sequentially at start), then the experts layer by layer, each
projection's experts consecutively. `general.alignment` is 4096: at Flash's and Pro's sizes every expert then starts on a page,
so O_DIRECT can read it directly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType

from localrun.alignment import align_up, ceil_div
from localrun.errors import UsageError
from localrun.quant.checkpoint.directory import Checkpoint, SourceTensor
from localrun.quant.checkpoint.model_config import FP4_BLOCK, FP8_BLOCK, ModelConfig
from localrun.quant.checkpoint.schema import Role, TensorSpec
from localrun.quant.checkpoint.tokenizer_json import tokenizer_metadata
from localrun.quant.formats.transcode import Bytes, Loss, Rows, can_convert, convert_rows, row_bytes
from localrun.quant.gguf.checks import check_common
from localrun.quant.gguf.deepseek4 import check_deepseek4
from localrun.quant.gguf.file import GgufValue, build_header, tensor_bytes, tensor_offsets
from localrun.quant.model.source import PROJECTIONS, Extent, TensorInfo
from localrun.quant.precision.copies import EXPERT_TYPES
from localrun.quant.zeros import refuse_torn, refuse_zero_norm, refuse_zero_scales

ALIGNMENT = 4096

_T = GGMLQuantizationType

DENSE_TYPES: Mapping[str, GGMLQuantizationType] = {
    kind.name.lower(): kind for kind in (_T.Q8_0, _T.Q6_K, _T.Q5_K, _T.Q4_K, _T.BF16, _T.F32)
}
"""What FP8 dense matrices may become; bf16 and f32 are exact."""

BASE_TYPES = EXPERT_TYPES
"""What `ConversionOptions.base` may be, by name."""

EXACT_OR_EIGHT_BIT = frozenset({_T.MXFP4, _T.Q8_0, _T.BF16, _T.F32})
"""Types of experts that lose nothing, or too little for importance to matter."""

SMALL_TYPES = frozenset({_T.Q4_K, _T.Q5_K, _T.Q6_K})
"""Dense types below 8 bits."""
ROUTER = ".ffn_gate_inp.weight"
_DEFAULT_BASE = {"I8": _T.MXFP4, "F8_E4M3": _T.Q8_0, "BF16": _T.BF16, "F32": _T.F32}
_FILE_TYPES = {
    _T.MXFP4: LlamaFileType.MOSTLY_MXFP4_MOE,
    _T.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    _T.Q6_K: LlamaFileType.MOSTLY_Q6_K,
    _T.Q5_K: LlamaFileType.MOSTLY_Q5_K_S,
    _T.Q4_K: LlamaFileType.MOSTLY_Q4_K_S,
    _T.IQ4_XS: LlamaFileType.MOSTLY_IQ4_XS,
    _T.Q3_K: LlamaFileType.MOSTLY_Q3_K_S,
    _T.IQ3_S: LlamaFileType.MOSTLY_IQ3_S,
    _T.IQ3_XXS: LlamaFileType.MOSTLY_IQ3_XXS,
    _T.Q2_K: LlamaFileType.MOSTLY_Q2_K,
    _T.IQ2_S: LlamaFileType.MOSTLY_IQ2_S,
    _T.IQ2_XS: LlamaFileType.MOSTLY_IQ2_XS,
    _T.IQ2_XXS: LlamaFileType.MOSTLY_IQ2_XXS,
    _T.BF16: LlamaFileType.MOSTLY_BF16,
    _T.F32: LlamaFileType.ALL_F32,
}
_PROJECTION_OF_TENSOR = {f"ffn_{name}_exps.weight": number for number, name in enumerate(PROJECTIONS)}


class ImportanceLookup(Protocol):
    """How much each input channel of an expert's matrix matters: quantizers weigh squared errors with it. Thread-safe."""

    @property
    def digest(self) -> str:
        """Names all weights: same digest, same weights. Shown to users when a conversion is resumed with others."""
        ...

    def weights(self, layer: int, expert: int, projection: int) -> npt.NDArray[np.float32] | None:
        """Weights `(n_in,)`, finite and not negative, of projection 0 gate, 1 up, 2 down; None: nothing is known."""
        ...

    def dense_weights(self, name: str) -> npt.NDArray[np.float32] | None:
        """The same of a dense matrix by its GGUF name."""
        ...


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """What the user may choose.

    Attributes:
        dense: type of FP8 attention and shared-expert matrices. Below 8 bits, BF16 matrices other than routers (output head,
            embeddings, compressors) become Q8_0, because they are a third of what a token reads then; otherwise they are
            unchanged. F32 tensors always are.
        base: type of all experts; None: MXFP4 for FP4, Q8_0 for FP8, otherwise unchanged.
        importance: of the input channels, for types that round; None: uniform.
        keep_experts: the file holds only the dense part; experts stay in the checkpoint, unchanged.
        dense_types: types of single dense matrices by GGUF name, whatever `dense` says; also of BF16 and F32 ones.
    """

    dense: GGMLQuantizationType = GGMLQuantizationType.Q8_0
    base: GGMLQuantizationType | None = None
    importance: ImportanceLookup | None = None
    keep_experts: bool = False
    dense_types: Mapping[str, GGMLQuantizationType] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TensorPart:
    """Some consecutive rows of an output tensor, made from one source tensor: all of a dense tensor, or one expert.

    Attributes:
        source: origin of the rows.
        target: ggml type.
        n_out, n_in: rows and row length.
        offset: first byte inside the output tensor.
        n_bytes: size in the output.
        limit: exclusive upper bound of integers (expert numbers).
        expert: layer, expert and projection, to look up importance; None for dense tensors.
    """

    source: SourceTensor
    target: GGMLQuantizationType
    n_out: int
    n_in: int
    offset: int
    n_bytes: int
    limit: int
    expert: tuple[int, int, int] | None = None

    def extents(self, first: int, count: int) -> tuple[Extent, Extent | None]:
        """Byte ranges of rows `first..first + count` in the shards: weights and scales.

        `first` must be a multiple of 128 for FP8.
        """
        source = self.source
        size = row_bytes(source.dtype, self.n_in)
        weight = Extent(source.weight.file, source.weight.offset + first * size, count * size)
        if source.scale is None:
            return weight, None
        if source.dtype == "I8":
            width, begin, end = self.n_in // FP4_BLOCK, first, first + count
        else:
            width = ceil_div(self.n_in, FP8_BLOCK)
            begin, end = first // FP8_BLOCK, ceil_div(first + count, FP8_BLOCK)
        return weight, Extent(source.scale.file, source.scale.offset + begin * width, (end - begin) * width)

    def convert(
        self,
        count: int,
        weight: Bytes,
        scale: Bytes,
        out: Bytes,
        where: str,
        importance: npt.NDArray[np.float32] | None = None,
    ) -> Loss | None:
        """Converts `count` rows from the bytes of `extents`.

        Raises:
            FormatError: a NaN, a value that the type can't hold, or zeros where weights were lost.
        """
        refuse_torn(where, weight, weight.size // count)
        refuse_zero_scales(where, scale)
        if self.source.spec.name.endswith("norm.weight"):
            refuse_zero_norm(where, weight)
        rows = Rows(self.source.dtype, weight, scale, count, self.n_in, where, self.limit, importance)
        return convert_rows(rows, self.target, out)

    def output_bytes(self, count: int) -> int:
        """Size of `count` rows in the output."""
        return self.n_bytes // self.n_out * count

    def importance(self, lookup: ImportanceLookup | None) -> npt.NDArray[np.float32] | None:
        """The columns' importance, if known."""
        if lookup is None:
            return None
        if self.expert is None:
            return lookup.dense_weights(self.source.spec.gguf or "")
        return lookup.weights(*self.expert)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the GGUF.

    Attributes:
        info: name, ggml shape, type, size.
        offset: first byte in the file.
        parts: its parts, in order, without gaps.
        layer, projection: for stacked experts (0 gate, 1 up, 2 down), -1 for dense tensors.
    """

    info: TensorInfo
    offset: int
    parts: tuple[TensorPart, ...]
    layer: int = -1
    projection: int = -1

    @property
    def is_experts(self) -> bool:
        return self.layer >= 0


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """Everything about the GGUF except its weights. Immutable.

    Attributes:
        checkpoint: the source.
        options: the options used.
        metadata: typed GGUF keys.
        tensors: by name, in file order.
        header: the file's bytes before the first tensor.
        file_size: total, including the last tensor's padding.
        warnings: for the user.
    """

    checkpoint: Checkpoint
    options: ConversionOptions
    metadata: Mapping[str, GgufValue]
    tensors: Mapping[str, PlannedTensor]
    header: bytes
    file_size: int
    warnings: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Names this plan: same digest, same output bytes (as far as the source's identity goes)."""
        importance = "" if self.options.importance is None else self.options.importance.digest
        return xxhash.xxh3_128_hexdigest(self.header + (self.checkpoint.identity + importance).encode())


def make_plan(checkpoint: Checkpoint, options: ConversionOptions | None = None) -> ConversionPlan:
    """Plans a GGUF.

    Raises:
        UsageError: the options request an unsupported conversion.
        FormatError: a damaged tokenizer.
        UnsupportedModelError: llama.cpp could not run the result.
    """
    options = options or ConversionOptions()
    config = checkpoint.config
    tokenizer = tokenizer_metadata(checkpoint.path, config)
    shaped = [
        shape_tensor(*key, sources, config.n_routed_experts)
        for key, sources in _outputs(checkpoint.tensors, options).items()
    ]
    infos = [info for info, _ in shaped]
    metadata = model_metadata(config, checkpoint.path, infos) | tokenizer.values
    by_name = {info.name: info for info in infos}
    check_deepseek4(checkpoint.path, metadata, by_name, check_common(checkpoint.path, metadata, by_name))
    if options.keep_experts:
        shaped = [(info, parts) for info, parts in shaped if parts[0].expert is None]
        infos = [info for info, _ in shaped]
    header = build_header(metadata, infos, ALIGNMENT)
    tensors = {
        info.name: PlannedTensor(info, len(header) + offset, parts, *_layer_and_projection(info.name))
        for (info, parts), offset in zip(shaped, tensor_offsets(infos, ALIGNMENT), strict=True)
    }
    last = tensors[infos[-1].name]
    warnings = checkpoint.warnings + tokenizer.warnings
    file_size = align_up(last.offset + last.info.n_bytes, ALIGNMENT)
    return ConversionPlan(checkpoint, options, metadata, tensors, header, file_size, warnings)


def _outputs(
    tensors: Iterable[SourceTensor], options: ConversionOptions
) -> dict[tuple[str, GGMLQuantizationType], list[SourceTensor]]:
    """Source tensors by the output tensor that they become part of, in file order: dense first."""
    dense: dict[tuple[str, GGMLQuantizationType], list[SourceTensor]] = {}
    experts: dict[tuple[str, GGMLQuantizationType], list[SourceTensor]] = {}
    for tensor in tensors:
        group = dense if tensor.spec.expert is None else experts
        assert tensor.spec.gguf is not None
        group.setdefault((tensor.spec.gguf, target_type(tensor.spec, tensor.dtype, options)), []).append(tensor)
    return dense | experts


def target_type(spec: TensorSpec, dtype: str, options: ConversionOptions) -> GGMLQuantizationType:
    """ggml type that a tensor stored as `dtype` becomes.

    Raises:
        UsageError: there is no such conversion.
    """
    if spec.role is Role.VECTOR:
        return _T.F32
    if spec.role is Role.TABLE:
        return _T.I32
    if spec.role is Role.EXPERT:
        target = options.base if options.base is not None else _DEFAULT_BASE[dtype]
    elif spec.gguf in options.dense_types:
        target = options.dense_types[spec.gguf or ""]
    elif dtype == "F8_E4M3":
        # Rows that the type's blocks do not divide get the next better one: Q8_0 in blocks of 32, or exact BF16.
        target = next(kind for kind in (options.dense, _T.Q8_0, _T.BF16) if _fits(spec, kind))
    elif dtype == "BF16" and options.dense in SMALL_TYPES and is_read_whole(spec) and _fits(spec, _T.Q8_0):
        target = _T.Q8_0
    else:
        target = _T.F32 if dtype == "F32" else _T.BF16
    check_type(spec, dtype, target, "--base" if spec.role is Role.EXPERT else "--dense")
    return target


def is_read_whole(spec: TensorSpec) -> bool:
    """A large matrix that is no router: those choose experts, and are small."""
    return spec.role is Role.WIDE and not (spec.gguf or "").endswith(ROUTER)


def _fits(spec: TensorSpec, kind: GGMLQuantizationType) -> bool:
    return bool(spec.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0)


def check_type(spec: TensorSpec, dtype: str, target: GGMLQuantizationType, option: str) -> None:
    """Rejects a type that a tensor's rows can't have.

    Raises:
        UsageError: names the tensor; the hint lists possible values of `option`.
    """
    if _fits(spec, target) and can_convert(dtype, target):
        return
    possible = " or ".join(name for name, kind in BASE_TYPES.items() if _fits(spec, kind) and can_convert(dtype, kind))
    if not _fits(spec, target):
        raise UsageError(
            f"{spec.name}: rows of {spec.shape[-1]} values are not a multiple of {target.name}'s block size"
            f" {GGML_QUANT_SIZES[target][0]}",
            hint=f"{option} {possible}",
        )
    raise UsageError(
        f"{spec.name} is stored as {dtype}, which localrun does not convert to {target.name}",
        hint=f"{option} {possible}",
    )


def shape_tensor(
    name: str, target: GGMLQuantizationType, sources: Sequence[SourceTensor], n_experts: int
) -> tuple[TensorInfo, tuple[TensorPart, ...]]:
    """An output tensor and its parts: one source tensor, or experts to stack in the given order.

    Args:
        n_experts: of the model; limits the entries of expert number tables.
    """
    spec = sources[0].spec
    n_in = spec.shape[-1]
    n_out = spec.shape[0] if len(spec.shape) == 2 else 1
    n_bytes = tensor_bytes(target, (n_in, n_out))
    shape = tuple(reversed(spec.shape)) if spec.expert is None else (n_in, n_out, len(sources))
    parts = tuple(
        TensorPart(source, target, n_out, n_in, i * n_bytes, n_bytes, n_experts, _expert_of(source.spec))
        for i, source in enumerate(sources)
    )
    return TensorInfo(name, shape, target, n_bytes * len(sources)), parts


def _expert_of(spec: TensorSpec) -> tuple[int, int, int] | None:
    """Layer, expert and projection."""
    if spec.expert is None or spec.gguf is None:
        return None
    layer, projection = _layer_and_projection(spec.gguf)
    return layer, spec.expert, projection


def _layer_and_projection(name: str) -> tuple[int, int]:
    _, number, *rest = name.split(".", 2) if name.startswith("blk.") else ("", "-1", "")
    projection = _PROJECTION_OF_TENSOR.get(rest[0], -1)
    return (int(number), projection) if projection >= 0 else (-1, -1)


def model_metadata(config: ModelConfig, path: Path, infos: Iterable[TensorInfo]) -> dict[str, GgufValue]:
    """All keys but the tokenizer's, as llama.cpp's `deepseek4` reads them (src/models/deepseek4.cpp)."""
    n_layers = config.num_hidden_layers
    values: dict[str, GgufValue] = {}

    def integers(**keys: int) -> None:
        values.update({_key(name): GgufValue.uint32(value) for name, value in keys.items()})

    def reals(**keys: float) -> None:
        values.update({_key(name): GgufValue.float32(value) for name, value in keys.items()})

    values["general.architecture"] = GgufValue.string("deepseek4")
    values["general.type"] = GgufValue.string("model")
    values["general.name"] = GgufValue.string(_model_name(config, path))
    values["general.quantization_version"] = GgufValue.uint32(2)
    values["general.file_type"] = GgufValue.uint32(_file_type(infos))
    values["general.sampling.temp"] = GgufValue.float32(1.0)
    values["general.sampling.top_p"] = GgufValue.float32(1.0)
    values["localrun.chat_encoder"] = GgufValue.string("v4-0731" if config.has_dspark else "v4")
    integers(
        block_count=n_layers,
        context_length=config.max_position_embeddings,
        embedding_length=config.hidden_size,
        embedding_length_out=config.hidden_size * config.hc_mult,
        feed_forward_length=config.moe_intermediate_size,
        vocab_size=config.vocab_size,
        attention__head_count=config.num_attention_heads,
        attention__head_count_kv=1,
        attention__key_length=config.head_dim,
        attention__value_length=config.head_dim,
        attention__q_lora_rank=config.q_lora_rank,
        attention__sliding_window=config.sliding_window,
        attention__output_group_count=config.o_groups,
        attention__output_lora_rank=config.o_lora_rank,
        attention__indexer__head_count=config.index_n_heads,
        attention__indexer__key_length=config.index_head_dim,
        attention__indexer__top_k=config.index_topk,
        rope__dimension_count=config.qk_rope_head_dim,
        expert_count=config.n_routed_experts,
        expert_used_count=config.num_experts_per_tok,
        expert_shared_count=config.n_shared_experts,
        expert_feed_forward_length=config.moe_intermediate_size,
        expert_gating_func=4,  # square root of softplus
        hash_layer_count=config.num_hash_layers,
        hyper_connection__count=config.hc_mult,
        hyper_connection__sinkhorn_iterations=config.hc_sinkhorn_iters,
    )
    reals(
        attention__layer_norm_rms_epsilon=config.rms_norm_eps,
        attention__compress_rope_freq_base=config.compress_rope_theta,
        rope__freq_base=config.rope_theta,
        expert_weights_scale=config.routed_scaling_factor,
        hyper_connection__epsilon=config.hc_eps,
    )
    values[_key("expert_weights_norm")] = GgufValue.boolean(config.norm_topk_prob)
    # Entries after the trunk's layers belong to the MTP blocks, which are not in this file.
    ratios = config.compress_ratios[:n_layers]
    values[_key("attention__compress_ratios")] = GgufValue.array(GGUFValueType.INT32, ratios)
    limits = GgufValue.array(GGUFValueType.FLOAT32, [config.swiglu_limit] * n_layers)
    values[_key("swiglu_clamp_exp")] = values[_key("swiglu_clamp_shexp")] = limits
    scaling = config.rope_scaling
    values[_key("rope__scaling__type")] = GgufValue.string("none" if scaling is None else "yarn")
    if scaling is not None:
        reals(rope__scaling__factor=scaling.factor)
        integers(rope__scaling__original_context_length=scaling.original_context)
        reals(rope__scaling__yarn_beta_fast=scaling.beta_fast, rope__scaling__yarn_beta_slow=scaling.beta_slow)
    return values


def _key(name: str) -> str:
    """`attention__key_length` -> `deepseek4.attention.key_length`."""
    return "deepseek4." + name.replace("__", ".")


def _model_name(config: ModelConfig, path: Path) -> str:
    sizes = (config.hidden_size, config.num_hidden_layers, config.n_routed_experts)
    official = {(4096, 43, 256): "DeepSeek-V4-Flash", (7168, 61, 384): "DeepSeek-V4-Pro"}
    return official.get(sizes) or path.resolve().name


def _file_type(infos: Iterable[TensorInfo]) -> int:
    """llama.cpp's name for the whole, by the experts' type; shown to users only."""
    types = {info.type for info in infos if _layer_and_projection(info.name)[0] >= 0}
    return int(_FILE_TYPES.get(min(types), LlamaFileType.GUESSED))
