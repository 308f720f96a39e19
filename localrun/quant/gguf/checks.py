"""Checks that llama.cpp can load a GGUF without crashing the process.

`llama_model_init_from_user`, through which localrun loads models, creates tensors with the shapes that the metadata
implies and never compares them with the file; wrong types and many wrong numbers end in `GGML_ASSERT`, which aborts the
process. So what llama.cpp asserts for every architecture, instead of reporting it, is checked here first; `deepseek4` has
`deepseek4_layout` for the rest. Facts: llama.cpp `src/llama-model.cpp` (load_hparams) and `src/llama-vocab.cpp` (load),
as bundled by llama-cpp-python 0.3.36.

Works on metadata and descriptions only; `GgufSource` checks tensor contents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType, GGUFValueType

from localrun.errors import FormatError, UnsupportedModelError
from localrun.quant.gguf.file import GgufValue
from localrun.quant.model.source import MoeLayer, TensorInfo

MAX_LAYERS = 512
MAX_EXPERTS = 1024
MAX_DIMENSION = 1 << 24
_HINT = "the file is damaged or made for another program: convert the model again"

_NOT_MULTIPLIABLE = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
MATRIX_TYPES = frozenset(t for t in GGMLQuantizationType if t.name not in _NOT_MULTIPLIABLE)
"""ggml types that `mul_mat` and `get_rows` of the CPU backend take as weights; others abort there."""

EXPERT_STACK = re.compile(r"blk\.(0|[1-9][0-9]*)\.ffn_(gate|up|down)_exps\.weight")
_MERGED_STACK = re.compile(r"blk\.[0-9]+\.ffn_gate_up_exps\.(weight|bias|scale)")
_OLD_EXPERT = re.compile(r"blk\.[0-9]+\.ffn_(gate|up|down)\.[0-9]+\.weight")
_BLOCK = re.compile(r"blk\.([0-9]+)\.")

INTEGERS = (GGUFValueType.UINT32, GGUFValueType.INT32)
Metadata = Mapping[str, GgufValue]
Tensors = Mapping[str, TensorInfo]


class KeyReader:
    """Typed reads of required and optional keys; every failure names file and key."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        self.path = path
        self.metadata = metadata

    def error(self, problem: str) -> FormatError:
        return FormatError(f"{self.path}: {problem}", hint=_HINT)

    def _get(self, key: str, value_type: GGUFValueType) -> Any:
        value = self.metadata.get(key)
        if value is None:
            raise self.error(f"no key '{key}'")
        if value.type != value_type:
            raise self.error(f"{key}: expected {value_type.name}, got {value.type.name}")
        return value.value

    def string(self, key: str) -> str:
        return str(self._get(key, GGUFValueType.STRING))

    def integer(self, key: str, low: int, high: int) -> int:
        number = int(self._get(key, GGUFValueType.UINT32))
        if not low <= number <= high:
            raise self.error(f"{key}: {number} is not between {low} and {high}")
        return number

    def real(self, key: str, low: float, high: float) -> float:
        number = float(self._get(key, GGUFValueType.FLOAT32))
        if not (math.isfinite(number) and low <= number <= high):
            raise self.error(f"{key}: {number} is not between {low} and {high}")
        return number

    def boolean(self, key: str) -> bool:
        return bool(self._get(key, GGUFValueType.BOOL))

    def uniform(self, key: str, n_layers: int) -> int:
        """The one positive number that all layers share, written as a scalar or as equal items."""
        values = self.per_layer(key, n_layers, INTEGERS)
        if len(set(values)) != 1 or not 1 <= values[0] <= MAX_DIMENSION:
            raise self.error(f"{key}: expected one positive number for all layers, got {values[:4]}")
        return int(values[0])

    def per_layer(self, key: str, n_layers: int, value_types: tuple[GGUFValueType, ...]) -> list[Any]:
        """One value per layer from an array of exactly that length, or from a scalar for all layers."""
        value = self.metadata.get(key)
        if value is None:
            raise self.error(f"no key '{key}'")
        item_type = value.type if value.item_type is None else value.item_type
        if item_type not in value_types:
            raise self.error(f"{key}: expected {value_types[0].name}, got {item_type.name}")
        if value.type != GGUFValueType.ARRAY:
            return [value.value] * n_layers
        if value.count != n_layers:
            raise self.error(f"{key}: {value.count} values for {n_layers} layers")
        return list(value.value)


@dataclass(frozen=True, slots=True)
class Common:
    """Metadata common to all architectures: `general.architecture`, blocks, vocabulary size."""

    arch: str
    n_layers: int
    n_vocab: int


def check_common(path: Path, metadata: Metadata, tensors: Tensors) -> Common:
    """Checks what llama.cpp asserts for every architecture.

    Raises:
        FormatError: names the key.
        UnsupportedModelError: not a mixture-of-experts model.
    """
    keys = KeyReader(path, metadata)
    arch = keys.string("general.architecture")
    n_layers = keys.integer(f"{arch}.block_count", 1, MAX_LAYERS)
    keys.integer(f"{arch}.embedding_length", 1, MAX_DIMENSION)
    keys.integer(f"{arch}.context_length", 1, (1 << 31) - 1)
    heads = keys.per_layer(f"{arch}.attention.head_count", n_layers, INTEGERS)
    # Hybrid models have layers without attention, with a value of 0.
    if not all(0 <= n <= 1 << 16 for n in heads) or max(heads) < 1:
        raise keys.error(f"{arch}.attention.head_count: {max(heads)} heads")
    if (count := metadata.get(f"{arch}.expert_count")) is None or count == GgufValue.uint32(0):
        raise _no_experts(path, arch)
    n_experts = keys.integer(f"{arch}.expert_count", 1, MAX_EXPERTS)
    used = keys.per_layer(f"{arch}.expert_used_count", n_layers, INTEGERS)
    if not all(0 <= n <= n_experts for n in used) or max(used) < 1:
        raise keys.error(f"{arch}.expert_used_count: {max(used)} of {n_experts} experts")
    _check_expert_groups(keys, arch, n_experts)
    scaling = f"{arch}.rope.scaling.type"
    if scaling in metadata and keys.string(scaling) not in ("none", "linear", "yarn", "longrope"):
        raise keys.error(f"{scaling}: unknown scaling '{keys.string(scaling)}'")
    n_vocab = _check_vocabulary(keys, arch)
    embedding = tensors.get("token_embd.weight")
    if embedding is not None and (len(embedding.shape) != 2 or embedding.shape[1] != n_vocab):
        raise keys.error(f"token_embd.weight: shape {embedding.shape} for a vocabulary of {n_vocab}")
    return Common(arch, n_layers, n_vocab)


def _no_experts(path: Path, arch: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path}: architecture '{arch}' without routed experts", hint="localrun runs mixture-of-experts models"
    )


def _check_expert_groups(keys: KeyReader, arch: str, n_experts: int) -> None:
    count_key, used_key = f"{arch}.expert_group_count", f"{arch}.expert_group_used_count"
    if count_key not in keys.metadata:
        return
    groups = keys.integer(count_key, 0, n_experts - 1)
    if groups > 1 and (n_experts % groups or not 0 < keys.integer(used_key, 0, MAX_EXPERTS) < groups):
        raise keys.error(f"{count_key}: {groups} groups of {n_experts} experts")


def _check_vocabulary(keys: KeyReader, arch: str) -> int:
    """Checks the token lists' types and lengths and that no token occurs twice; returns the vocabulary's size."""
    if keys.string("tokenizer.ggml.model") in ("none", "no_vocab"):
        return keys.integer(f"{arch}.vocab_size", 1, MAX_DIMENSION)
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    if tokens is None or tokens.item_type != GGUFValueType.STRING or tokens.count < 1:
        raise keys.error("tokenizer.ggml.tokens: expected a list of strings")
    # llama.cpp writes "[EMPTY_i]" for an empty token and asserts that all are different.
    distinct = {item or b"[EMPTY_%d]" % index for index, item in enumerate(tokens.string_items())}
    if len(distinct) != tokens.count:
        raise keys.error(f"tokenizer.ggml.tokens: {tokens.count - len(distinct)} tokens occur twice")
    lists = (
        ("scores", (GGUFValueType.FLOAT32, GGUFValueType.INT32)),
        ("token_type", (GGUFValueType.INT32,)),
    )
    for name, item_types in lists:
        value = keys.metadata.get(f"tokenizer.ggml.{name}")
        if value is not None and (value.item_type not in item_types or value.count < tokens.count):
            raise keys.error(f"tokenizer.ggml.{name}: expected {tokens.count} {item_types[0].name} values")
    return tokens.count


def check_dense_types(path: Path, tensors: Tensors) -> None:
    """For architectures whose tensors are not known here: types that no operation on weights takes."""
    for name, tensor in tensors.items():
        # Vectors are added or multiplied element by element, which ggml does only with F32.
        vector = len(tensor.shape) == 1 or tensor.shape[1:] == (1,) * (len(tensor.shape) - 1)
        allowed = {GGMLQuantizationType.F32} if vector else MATRIX_TYPES | {GGMLQuantizationType.I32}
        if tensor.type not in allowed:
            raise FormatError(f"{path}: {name}: type {tensor.type.name} can't be used", hint=_HINT)


def drop_next_token_layers(
    path: Path, metadata: dict[str, GgufValue], tensors: dict[str, TensorInfo]
) -> tuple[dict[str, GgufValue], dict[str, TensorInfo]]:
    """The trunk of a file that also holds next-token-prediction (MTP) blocks.

    llama.cpp, given metadata instead of a file, can't see that these blocks are extra (it looks for a tensor in the
    file) and would run them as ordinary layers, so they are removed from both.
    """
    arch = metadata["general.architecture"].value if "general.architecture" in metadata else ""
    key, count_key = f"{arch}.nextn_predict_layers", f"{arch}.block_count"
    if key not in metadata or count_key not in metadata:
        return metadata, tensors
    keys = KeyReader(path, metadata)
    n_layers = keys.integer(count_key, 1, MAX_LAYERS)
    n_extra = keys.integer(key, 0, n_layers)
    n_trunk = n_layers - n_extra
    if n_extra == 0 or not any(name.startswith(f"blk.{n_trunk}.nextn.") for name in tensors):
        return {k: v for k, v in metadata.items() if k != key}, tensors
    if n_trunk == 0 or "blk.0.attn_norm.weight" not in tensors:
        raise UnsupportedModelError(
            f"{path}: holds only the next-token-prediction block of a model", hint="open the main model's file"
        )
    trunk = {k: v for k, v in metadata.items() if k != key}
    trunk[count_key] = GgufValue.uint32(n_trunk)
    for name, value in metadata.items():
        per_layer = name.startswith(f"{arch}.") and value.item_type is not None and value.count == n_layers
        if per_layer and value.item_type != GGUFValueType.STRING:
            trunk[name] = GgufValue.array(value.item_type, value.value[:n_trunk])
    kept = {n: t for n, t in tensors.items() if (m := _BLOCK.match(n)) is None or int(m[1]) < n_trunk}
    return trunk, kept


def moe_layers(path: Path, metadata: Metadata, tensors: Tensors, arch: str) -> dict[int, MoeLayer]:
    """Layers with routed experts, from the shapes of the stacked expert tensors.

    Raises:
        FormatError: stacks of one layer are inconsistent with each other or with the metadata.
        UnsupportedModelError: no routed experts, or a layout other than three stacks per layer.
    """
    keys = KeyReader(path, metadata)
    n_layers = keys.integer(f"{arch}.block_count", 1, MAX_LAYERS)
    n_experts = keys.integer(f"{arch}.expert_count", 1, MAX_EXPERTS)
    stacks: dict[int, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        if _MERGED_STACK.fullmatch(name):
            raise UnsupportedModelError(
                f"{path}: {name}: gate and up of the experts in one tensor of this form are not supported",
                hint="convert the model with separate ffn_gate_exps and ffn_up_exps",
            )
        if _OLD_EXPERT.fullmatch(name):
            raise UnsupportedModelError(
                f"{path}: {name}: one tensor per expert is llama.cpp's layout of 2023",
                hint="convert the model with a current llama.cpp",
            )
        if match := EXPERT_STACK.fullmatch(name):
            stacks.setdefault(int(match[1]), {})[match[2]] = tensor
    if not stacks:
        raise _no_experts(path, arch)
    layers = {}
    for layer in sorted(stacks):
        if layer >= n_layers:
            raise keys.error(f"blk.{layer}: the model has {n_layers} layers")
        layers[layer] = _moe_layer(keys, layer, stacks[layer], n_experts)
    return layers


def _moe_layer(keys: KeyReader, layer: int, stack: Mapping[str, TensorInfo], n_experts: int) -> MoeLayer:
    missing = {"gate", "up", "down"} - stack.keys()
    if missing:
        raise UnsupportedModelError(f"{keys.path}: blk.{layer}: experts without ffn_{min(missing)}_exps")
    gate, up, down = (stack[name] for name in ("gate", "up", "down"))
    if len(gate.shape) != 3:
        raise keys.error(f"{gate.name}: shape {gate.shape} is not (n_embd, n_ff, n_experts)")
    n_embd, n_ff, _ = gate.shape
    for tensor, shape in ((gate, (n_embd, n_ff)), (up, (n_embd, n_ff)), (down, (n_ff, n_embd))):
        if tensor.shape != (*shape, n_experts):
            raise keys.error(f"{tensor.name}: shape {tensor.shape}, expected {(*shape, n_experts)}")
        if tensor.type not in MATRIX_TYPES:
            raise keys.error(f"{tensor.name}: type {tensor.type.name} is not a weight type")
    return MoeLayer(
        layer=layer,
        n_experts=n_experts,
        n_embd=n_embd,
        n_ff=n_ff,
        types=(gate.type, up.type, down.type),
        expert_bytes=(gate.n_bytes + up.n_bytes + down.n_bytes) // n_experts,
    )
