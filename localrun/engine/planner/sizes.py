"""A model's sizes in bytes: dense model, KV cache, llama.cpp's buffers, and experts by format.

Everything is derived from a config.json or a model's headers; no weights are read. The KV cache and its frontiers are counted
as llama.cpp allocates them (`llama-kv-cache-dsv4.cpp`), which is more than a sequence needs: rows are padded to 256, and the
window holds a whole batch in addition to its 128 rows. For models other than `deepseek4` a plain cache is assumed, as an
estimate.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from localrun.alignment import PAGE_BYTES, align_up, ceil_div
from localrun.errors import FormatError, UsageError
from localrun.offload.cache.staging import staging_bytes, staging_bytes_aligned
from localrun.offload.kernels.layout import ExpertLayout, expert_layout
from localrun.quant.checkpoint.mapping import (
    BASE_TYPES,
    ROUTER,
    SMALL_TYPES,
    ConversionOptions,
    is_read_whole,
    target_type,
)
from localrun.quant.checkpoint.model_config import ModelConfig, parse_config
from localrun.quant.checkpoint.official import BUILT_IN, NAMES
from localrun.quant.checkpoint.schema import Role, TensorSpec, trunk_tensors
from localrun.quant.gguf.file import tensor_bytes
from localrun.quant.model.shape import CSA, HCA, ModelShape, shape_of
from localrun.quant.model.source import ExpertTypes, ModelSource
from localrun.quant.open import open_model

if TYPE_CHECKING:
    from localrun.offload.kernels import FfnSpec

_T = GGMLQuantizationType

LLAMA_PAD = 256
"""llama.cpp rounds contexts and caches up to this many rows."""

_COMPONENTS = (
    ("embedding", ("token_embd",)),
    ("output head", ("output.weight", "output_norm", "output_hc")),
    ("indexer", ("indexer",)),
    ("compressor", ("attn_compressor",)),
    ("router", ("ffn_gate_inp", "exp_probs_b")),
    ("hash tables", ("ffn_gate_tid2eid",)),
    ("shared expert", ("_shexp",)),
    ("mHC", ("hc_attn", "hc_ffn")),
    ("attention", ("attn",)),
)
"""Parts of the dense model, the first whose mark occurs in a tensor's name; the rest is "other"."""

LOOKED_UP = ("embedding", "hash tables")
"""Parts of which each token reads one row."""


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Experts of one size.

    Attributes:
        types: of gate, up and down.
        count: number over all layers.
        file_bytes: of one as ggml rows, which a miss reads.
        slot_bytes: of one in RAM.
    """

    types: ExpertTypes
    count: int
    file_bytes: int
    slot_bytes: int

    @property
    def name(self) -> str:
        """`MXFP4`, or `IQ2_XXS/IQ2_XXS/Q2_K` where the projections differ."""
        names = [kind.name for kind in self.types]
        return names[0] if len(set(names)) == 1 else "/".join(names)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of one model in its actual or planned formats, in bytes.

    Attributes:
        identity: of the weights, for their routing profile; empty if there are none.
        files: of the model, to measure the drive; empty if there are none.
        shape: dimensions.
        dense: by part, see `_COMPONENTS`.
        dense_weights: number of weights that every token is multiplied by.
        experts: the copies used, by format.
        staging_bytes: RAM for reading experts (`offload/cache/staging.py`).
        base_bytes: all experts in the base's copies, if an overlay has better ones; else 0.
        convertible: other expert formats are possible by converting again.
        eight_bit_bytes: of `dense`, by part, matrices in Q8_0, as FP8 ones become by default.
        exact_bytes: likewise those in BF16 that smaller dense types make Q8_0.
        dense_format: of most of the dense matrices that are quantized.
    """

    name: str
    identity: str
    files: tuple[Path, ...]
    shape: ModelShape
    dense: Mapping[str, int]
    dense_weights: int
    experts: tuple[ExpertGroup, ...]
    staging_bytes: int
    base_bytes: int = 0
    convertible: bool = False
    eight_bit_bytes: Mapping[str, int] = field(default_factory=dict)
    exact_bytes: Mapping[str, int] = field(default_factory=dict)
    dense_format: GGMLQuantizationType = _T.Q8_0

    @property
    def from_checkpoint(self) -> bool:
        """There is an official checkpoint that could be converted again, here or elsewhere."""
        return self.convertible or self.shape.architecture == "deepseek4"

    @property
    def dense_bytes(self) -> int:
        """The dense model."""
        return sum(self.dense.values())

    @property
    def ranking_bytes(self) -> int:
        """Copies of routers, one byte a weight, that looking ahead ranks by (`offload/routers.py`)."""
        n_layers = max(0, len(self.shape.moe_layers) - self.shape.n_hash_layers)
        return n_layers * self.shape.n_experts * self.shape.n_embd

    def with_dense(self, kind: GGMLQuantizationType) -> ModelSizes:
        """The same model with `--dense kind`; itself if its dense matrices are smaller than 8 bits already."""
        if self.dense_format in SMALL_TYPES or kind not in SMALL_TYPES:
            return self
        eight, sixteen = _bytes_per_weight(_T.Q8_0), _bytes_per_weight(_T.BF16)
        dense = dict(self.dense)
        for part, n_bytes in self.eight_bit_bytes.items():
            dense[part] -= round(n_bytes * (1 - _bytes_per_weight(kind) / eight))
        for part, n_bytes in self.exact_bytes.items():
            dense[part] -= round(n_bytes * (1 - eight / sixteen))
        return replace(self, dense=dense, eight_bit_bytes={}, exact_bytes={}, dense_format=kind)

    @property
    def embedding_bytes(self) -> int:
        """The input embedding, which llama.cpp leaves in RAM whatever goes to a GPU (llama-model.cpp, load_tensors)."""
        return self.dense.get("embedding", 0)

    @property
    def dense_token_bytes(self) -> int:
        """What every token reads of it."""
        return sum(size for part, size in self.dense.items() if part not in LOOKED_UP)

    @property
    def n_copies(self) -> int:
        """Experts of all layers."""
        return sum(group.count for group in self.experts)

    @property
    def expert_file_bytes(self) -> int:
        """All experts in the file."""
        return sum(group.count * group.file_bytes for group in self.experts)

    @property
    def expert_slot_bytes(self) -> int:
        """All experts in RAM."""
        return sum(group.count * page_rounded(group.slot_bytes) for group in self.experts)

    @property
    def mean_file_bytes(self) -> float:
        """A miss on average."""
        return self.expert_file_bytes / max(1, self.n_copies)

    def miss_bytes(self, *, adaptive: bool) -> float:
        """What a miss on average waits for; in adaptive mode the base's copy, unless it is the larger one."""
        mean = self.mean_file_bytes
        return min(mean, self.base_bytes / self.n_copies) if adaptive and self.base_bytes else mean

    @property
    def mean_slot_bytes(self) -> float:
        """A slot on average."""
        return self.expert_slot_bytes / max(1, self.n_copies)

    @property
    def floor_bytes(self) -> int:
        """Least RAM for experts: one token's experts of one layer, and the reads."""
        largest = max((page_rounded(group.slot_bytes) for group in self.experts), default=0)
        return self.shape.n_used * largest + self.staging_bytes

    @property
    def formats(self) -> str:
        """Of experts and dense matrices, in a few words: models with the same run at the same rates."""
        names = "+".join(sorted({group.name for group in self.experts})) or "no"
        bits = 8 * self.dense_token_bytes / max(1, self.dense_weights)
        return f"{names} experts and {bits:.1f} bits"

    @property
    def used_weights(self) -> int:
        """Number of expert weights that a token is multiplied by."""
        return len(self.shape.moe_layers) * self.shape.n_used * self.shape.expert_weights

    @property
    def specs(self) -> tuple[FfnSpec, ...]:
        """Shapes of the experts, by format, for measuring kernels; the clamp costs nothing."""
        from localrun.offload.kernels import FfnSpec

        return tuple(FfnSpec(group.types, self.shape.n_embd, self.shape.n_ff, 10.0) for group in self.experts)

    def kv(self, n_ctx: int, kv_type: str, n_batch: int) -> dict[str, int]:
        """The KV cache as llama.cpp allocates it, by part: window, CSA rows, HCA rows, indexer rows, frontiers."""
        at, n_ctx = self.shape, padded(n_ctx)
        if not at.ratios:
            return {"rows": at.n_layers * row_bytes(kv_type, at.kv_row) * n_ctx}
        n_csa, n_hca = at.n_layers_of(CSA), at.n_layers_of(HCA)
        window = padded(min(n_ctx, at.window + min(n_batch, n_ctx)))
        csa_rows, hca_rows = padded(ceil_div(n_ctx, CSA)), padded(ceil_div(n_ctx, HCA))
        row, index_row = row_bytes(kv_type, at.head_dim), row_bytes(kv_type, at.index_dim)
        # F32 keys and gates: CSA's blocks overlap, so it keeps two of them, of doubled rows.
        frontiers = 2 * 4 * (n_csa * 2 * CSA * 2 * (at.head_dim + at.index_dim) + n_hca * HCA * at.head_dim)
        return {
            "window": at.n_layers * window * row,
            "CSA rows": n_csa * csa_rows * row,
            "HCA rows": n_hca * hca_rows * row,
            "indexer rows": n_csa * csa_rows * index_row,
            "frontiers": frontiers,
        }

    def kv_bytes(self, n_ctx: int, kv_type: str, n_batch: int) -> int:
        """All of `kv`."""
        return sum(self.kv(n_ctx, kv_type, n_batch).values())

    def kv_read_bytes(self, position: int, kv_type: str) -> int:
        """What attention reads for one token at a position: the window, the chosen rows, all indexer rows."""
        at = self.shape
        if not at.ratios:
            return at.n_layers * row_bytes(kv_type, at.kv_row) * position
        row, index_row = row_bytes(kv_type, at.head_dim), row_bytes(kv_type, at.index_dim)
        csa = position // CSA
        return (
            at.n_layers * min(position, at.window) * row
            + at.n_layers_of(CSA) * (min(csa, at.index_top_k) * row + csa * index_row)
            + at.n_layers_of(HCA) * (position // HCA) * row
        )

    def with_experts(self, kind: GGMLQuantizationType) -> ModelSizes:
        """The same model converted with all experts in another format."""
        layout = expert_layout((kind, kind, kind), self.shape.n_embd, self.shape.n_ff)
        group = ExpertGroup((kind, kind, kind), self.n_copies, sum(layout.raw_bytes), layout.slot_bytes)
        return replace(self, experts=(group,), staging_bytes=_staging_bytes(layout, self.shape))


# --- where sizes come from --------------------------------------------------------------------------------------------


def sizes_of(
    model: str | Path, *, base: GGMLQuantizationType | None = None, dense: GGMLQuantizationType | None = None
) -> ModelSizes:
    """Sizes of a converted directory, a GGUF, an official checkpoint, a config.json alone, or `flash` or `pro`.

    Args:
        base: format of the experts, for unconverted models (default: MXFP4, as for an FP4 checkpoint).
        dense: format of the dense matrices, likewise (default: Q8_0), also for an official checkpoint loaded unconverted.

    Raises:
        UsageError: `base` or `dense` for a model whose formats are fixed.
        FormatError, UnsupportedModelError: as `open_model`.
    """
    options = ConversionOptions(dense or _T.Q8_0, base)
    if str(model) in BUILT_IN and not Path(model).exists():
        config = parse_config(Path(str(model)), BUILT_IN[str(model)])
        return sizes_of_config(config, NAMES[str(model)], options)
    path = Path(model).expanduser()
    config_path = path if path.name == "config.json" else path / "config.json"
    if config_path.is_file() and not _has_shards(config_path.parent):
        return sizes_of_config(_read_config(config_path), config_path.parent.name or str(path), options)
    source = open_model(path, dense=dense)
    sizes = sizes_of_source(source)
    if base is None:
        return sizes
    if not sizes.convertible:
        raise UsageError(f"{path}: this model is already converted", hint="plan without --base, or pass its checkpoint")
    return sizes.with_experts(base)


def sizes_of_config(config: ModelConfig, name: str, options: ConversionOptions | None = None) -> ModelSizes:
    """Sizes of a conversion of the official FP4 checkpoint with this config."""
    options = options or ConversionOptions()
    dense: Counter[str] = Counter()
    formats: Counter[GGMLQuantizationType] = Counter()
    eight_bit_bytes: Counter[str] = Counter()
    exact_bytes: Counter[str] = Counter()
    weights = 0
    expert_types: list[GGMLQuantizationType] = []
    for spec in trunk_tensors(config, n_experts=1):
        if spec.expert is None:
            part, kind, n_bytes = (
                _part(spec.gguf or ""),
                target_type(spec, spec.dtype, options),
                _tensor_bytes(spec, options),
            )
            dense[part] += n_bytes
            weights += _weights(spec)
            formats[kind] += _weights(spec)
            if kind is _T.Q8_0:
                eight_bit_bytes[part] += n_bytes
            elif kind is _T.BF16 and is_read_whole(spec):
                exact_bytes[part] += n_bytes
        elif len(expert_types) < 3:
            expert_types.append(target_type(spec, spec.dtype, options))
    shape = config.shape
    gate, up, down = expert_types
    layout = expert_layout((gate, up, down), shape.n_embd, shape.n_ff)
    n_copies = len(shape.moe_layers) * shape.n_experts
    return ModelSizes(
        name=name,
        identity="",
        files=(),
        shape=shape,
        dense=dict(dense),
        dense_weights=weights,
        experts=(ExpertGroup((gate, up, down), n_copies, sum(layout.raw_bytes), layout.slot_bytes),),
        staging_bytes=_staging_bytes(layout, shape),
        convertible=True,
        eight_bit_bytes=dict(eight_bit_bytes),
        exact_bytes=dict(exact_bytes),
        dense_format=_most_used(formats),
    )


def sizes_of_source(source: ModelSource) -> ModelSizes:
    """Sizes of a model on disk, each expert in the copy that the engine would read."""
    dense: Counter[str] = Counter()
    formats: Counter[GGMLQuantizationType] = Counter()
    eight_bit_bytes: Counter[str] = Counter()
    exact_bytes: Counter[str] = Counter()
    weights = 0
    for tensor, info in source.tensors.items():
        if "_exps." not in tensor:
            part = _part(tensor)
            dense[part] += info.n_bytes
            if info.type is _T.Q8_0:
                eight_bit_bytes[part] += info.n_bytes
            elif info.type is _T.BF16 and len(info.shape) > 1 and not tensor.endswith(ROUTER):
                exact_bytes[part] += info.n_bytes
            if len(info.shape) > 1 and part not in LOOKED_UP:
                weights += info.shape[0] * info.shape[1]
                formats[info.type] += info.n_bytes
    if "output.weight" not in source.tensors:  # tied: the embeddings are the output head, too
        for sizes in (dense, eight_bit_bytes, exact_bytes):
            sizes["output head"] += sizes.pop("embedding", 0)
    moe = source.moe_layers.values()
    has_better = any(layer.better for layer in moe)
    return ModelSizes(
        name=str(source.metadata.get("general.name") or source.path.stem),
        identity=source.identity,
        files=tuple(source.files),
        shape=shape_of(source),
        dense=dict(dense),
        dense_weights=weights,
        experts=tuple(
            ExpertGroup(types, count, size, expert_layout(types, n_embd, n_ff).slot_bytes)
            for (types, n_embd, n_ff, size), count in sorted(_expert_kinds(source).items(), key=str)
        ),
        staging_bytes=staging_bytes(source),
        base_bytes=sum(layer.n_experts * layer.expert_bytes for layer in moe) if has_better else 0,
        convertible=(source.path / "config.json").is_file(),
        eight_bit_bytes=dict(eight_bit_bytes),
        exact_bytes=dict(exact_bytes),
        dense_format=_most_used(formats),
    )


def format_of(name: str) -> GGMLQuantizationType:
    """`q2_k` -> its type.

    Raises:
        UsageError: not an expert format.
    """
    kind = BASE_TYPES.get(name.lower())
    if kind is None:
        raise UsageError(f"unknown expert type '{name}'", hint=f"one of {', '.join(BASE_TYPES)}")
    return kind


def row_bytes(kv_type: str, n: int) -> int:
    """A row of n values of the KV cache."""
    block, size = GGML_QUANT_SIZES[_T[kv_type.upper()]]
    return int(ceil_div(n, block) * size)


def _bytes_per_weight(kind: GGMLQuantizationType) -> float:
    block, size = GGML_QUANT_SIZES[kind]
    return float(size / block)


def padded(n: int) -> int:
    """Rows as llama.cpp allocates them."""
    return align_up(max(1, n), LLAMA_PAD)


def page_rounded(n_bytes: int) -> int:
    """Slots start at pages."""
    return align_up(n_bytes, PAGE_BYTES)


def _expert_kinds(source: ModelSource) -> Counter[tuple[ExpertTypes, int, int, int]]:
    kinds: Counter[tuple[ExpertTypes, int, int, int]] = Counter()
    for layer, moe in source.moe_layers.items():
        if not moe.better:
            kinds[moe.types, moe.n_embd, moe.n_ff, moe.expert_bytes] += moe.n_experts
            continue
        for expert in range(moe.n_experts):
            gate, up, down = source.expert(layer, expert)
            size = gate.n_bytes + up.n_bytes + down.n_bytes
            kinds[(gate.type, up.type, down.type), moe.n_embd, moe.n_ff, size] += 1
    return kinds


def _staging_bytes(layout: ExpertLayout, shape: ModelShape) -> int:
    """For a conversion's experts."""
    return staging_bytes_aligned(layout.raw_bytes, shape.moe_layers, shape.n_experts)


def _most_used(formats: Counter[GGMLQuantizationType]) -> GGMLQuantizationType:
    """The quantized format that most of the dense matrices have; Q8_0 if none is."""
    quantized = {kind: amount for kind, amount in formats.items() if GGML_QUANT_SIZES[kind][0] > 1 and amount}
    return max(quantized, key=lambda kind: quantized[kind], default=_T.Q8_0)


def _part(name: str) -> str:
    return next((part for part, marks in _COMPONENTS if any(mark in name for mark in marks)), "other")


def _tensor_bytes(spec: TensorSpec, options: ConversionOptions) -> int:
    return tensor_bytes(target_type(spec, spec.dtype, options), tuple(reversed(spec.shape)))


def _weights(spec: TensorSpec) -> int:
    is_product = len(spec.shape) == 2 and spec.role is not Role.TABLE and spec.gguf != "token_embd.weight"
    return spec.shape[0] * spec.shape[1] if is_product else 0


def _has_shards(folder: Path) -> bool:
    names: Iterable[str] = ("model.safetensors.index.json", "model.safetensors", "model.gguf")
    return any((folder / name).exists() for name in names)


def _read_config(path: Path) -> ModelConfig:
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise FormatError(f"{path}: not a JSON object")
    return parse_config(path, raw)
