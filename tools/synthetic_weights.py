"""Contents of synthetic checkpoints: which tensors, and bytes for them at memory speed.

Every tensor is a stretch of a pool of random bytes that starts at an offset of its own, so experts differ and nothing is
drawn twice. Sizes of numbers are chosen so that activations stay finite and alive:

* matrices have variance 1/n_in, hence outputs of the size of their inputs;
* the key-value norm's weight is 0.5 and `wo_b` is large: attention becomes a nearly even average over its window (a
  slowly changing vector), as large as an embedding. `synthetic_router` says what that is for.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from localrun.alignment import ceil_div
from tools.synthetic_config import CheckpointSpec
from tools.synthetic_router import CALIBRATED, TARGET_HIT_RATE, calibrate, hash_table, router_bias

ITEM_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I64": 8}
KV_NORM = 0.5
FIRST_ATTENTION_GAIN = 21.0
ATTENTION_GAIN = 2.2
_POOL_BYTES = 16 << 20
_FP8_STD = 32.0
_FP4_RMS = math.sqrt((0.5**2 + 1 + 1.5**2 + 2**2 + 3**2 + 4**2 + 6**2) / 8)
"""Of the eight magnitudes of E2M1, each equally likely."""


class Fill(Enum):
    """How a tensor's bytes are made."""

    FP4 = "random nibbles"
    FP8 = "normal values as E4M3"
    SCALE = "E8M0 exponents around `size`"
    NORMAL = "normal values of standard deviation `size`"
    NEAR = "normal values around `size`, 5 % of it or 0.05 wide"
    BIAS = "router bias"
    TABLE = "token to expert table"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the checkpoint; `size` is the fill's parameter, `like` another tensor's name whose contents it has."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: Fill
    size: float = 0.0
    like: str = ""

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def shards(spec: CheckpointSpec) -> Iterator[list[Tensor]]:
    """Tensors grouped as the official files are: embedding, one per layer, heads, MTP."""
    c = spec.config
    d, vocab = c["hidden_size"], c["vocab_size"]
    yield [Tensor("embed.weight", "BF16", (vocab, d), Fill.NORMAL, 1.0)]
    for layer, ratio in enumerate(spec.ratios):
        yield list(_block(spec, f"layers.{layer}.", ratio, hashed=layer < c["num_hash_layers"]))
    yield [
        Tensor("head.weight", "BF16", (vocab, d), Fill.NORMAL, d**-0.5),
        Tensor("norm.weight", "BF16", (d,), Fill.NEAR, 1.0),
        *_hc_head(spec, ""),
    ]
    if spec.mtp:
        yield list(_mtp(spec, "mtp.0."))


def _hc_head(spec: CheckpointSpec, prefix: str) -> Iterator[Tensor]:
    n, d = spec.config["hc_mult"], spec.config["hidden_size"]
    yield Tensor(prefix + "hc_head_fn", "F32", (n, n * d), Fill.NORMAL, (n * d) ** -0.5)
    yield Tensor(prefix + "hc_head_base", "F32", (n,), Fill.NEAR, 0.0)
    yield Tensor(prefix + "hc_head_scale", "F32", (1,), Fill.NEAR, 1.0)


def _mtp(spec: CheckpointSpec, prefix: str) -> Iterator[Tensor]:
    d = spec.config["hidden_size"]
    yield from _block(spec, prefix, 0, hashed=False)
    for name in ("e_proj", "h_proj"):
        yield from _fp8(f"{prefix}{name}", d, d)
    for name in ("enorm", "hnorm", "norm"):
        yield Tensor(f"{prefix}{name}.weight", "BF16", (d,), Fill.NEAR, 1.0)
    yield from _hc_head(spec, prefix)


def _fp8(name: str, n_out: int, n_in: int, gain: float = 1.0) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", "F8_E4M3", (n_out, n_in), Fill.FP8)
    scale_shape = (ceil_div(n_out, 128), ceil_div(n_in, 128))
    yield Tensor(f"{name}.scale", "F8_E8M0", scale_shape, Fill.SCALE, gain * n_in**-0.5 / _FP8_STD)


def _fp4(name: str, n_out: int, n_in: int) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", "I8", (n_out, n_in // 2), Fill.FP4)
    yield Tensor(f"{name}.scale", "F8_E8M0", (n_out, n_in // 32), Fill.SCALE, n_in**-0.5 / _FP4_RMS)


def _block(spec: CheckpointSpec, prefix: str, ratio: int, *, hashed: bool) -> Iterator[Tensor]:
    c = spec.config
    d, f, n_experts, vocab = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"], c["vocab_size"]
    yield from _attention(spec, f"{prefix}attn.", ratio)
    for name in ("attn_norm", "ffn_norm"):
        yield Tensor(f"{prefix}{name}.weight", "BF16", (d,), Fill.NEAR, 1.0)
    yield Tensor(f"{prefix}ffn.gate.weight", "BF16", (n_experts, d), Fill.NORMAL, d**-0.5)
    if hashed:
        yield Tensor(f"{prefix}ffn.gate.tid2eid", "I64", (vocab, c["num_experts_per_tok"]), Fill.TABLE)
    else:
        yield Tensor(f"{prefix}ffn.gate.bias", "F32", (n_experts,), Fill.BIAS)
    for expert in range(n_experts):
        for name, n_out, n_in in (("w1", f, d), ("w2", d, f), ("w3", f, d)):
            matrix = _fp8 if spec.fp8_experts else _fp4
            yield from matrix(f"{prefix}ffn.experts.{expert}.{name}", n_out, n_in)
    shared = f * c["n_shared_experts"]
    for name, n_out, n_in in (("w1", shared, d), ("w2", d, shared), ("w3", shared, d)):
        yield from _fp8(f"{prefix}ffn.shared_experts.{name}", n_out, n_in)
    n = c["hc_mult"]
    for sublayer in ("attn", "ffn"):
        yield Tensor(f"{prefix}hc_{sublayer}_fn", "F32", ((2 + n) * n, n * d), Fill.NORMAL, (n * d) ** -0.5)
        yield Tensor(f"{prefix}hc_{sublayer}_base", "F32", ((2 + n) * n,), Fill.NEAR, 0.0)
        yield Tensor(f"{prefix}hc_{sublayer}_scale", "F32", (3,), Fill.NEAR, 1.0)


def _attention(spec: CheckpointSpec, prefix: str, ratio: int) -> Iterator[Tensor]:
    c = spec.config
    d, q_rank, head_dim, heads = c["hidden_size"], c["q_lora_rank"], c["head_dim"], c["num_attention_heads"]
    groups, o_rank = c["o_groups"], c["o_lora_rank"]
    yield from _fp8(f"{prefix}wq_a", q_rank, d)
    yield Tensor(f"{prefix}q_norm.weight", "BF16", (q_rank,), Fill.NEAR, 1.0)
    yield from _fp8(f"{prefix}wq_b", heads * head_dim, q_rank)
    yield from _fp8(f"{prefix}wkv", head_dim, d)
    yield Tensor(f"{prefix}kv_norm.weight", "BF16", (head_dim,), Fill.NEAR, KV_NORM)
    yield Tensor(f"{prefix}attn_sink", "F32", (heads,), Fill.NEAR, 0.0)
    yield from _fp8(f"{prefix}wo_a", groups * o_rank, heads * head_dim // groups)
    gain = FIRST_ATTENTION_GAIN if prefix == "layers.0.attn." else ATTENTION_GAIN
    yield from _fp8(f"{prefix}wo_b", d, groups * o_rank, gain)
    if ratio:
        yield from _compressor(f"{prefix}compressor.", d, head_dim, ratio, KV_NORM)
    if ratio == 4:
        index_heads, index_dim = c["index_n_heads"], c["index_head_dim"]
        yield from _fp8(f"{prefix}indexer.wq_b", index_heads * index_dim, q_rank)
        yield Tensor(f"{prefix}indexer.weights_proj.weight", "BF16", (index_heads, d), Fill.NORMAL, d**-0.5)
        yield from _compressor(f"{prefix}indexer.compressor.", d, index_dim, ratio, 1.0)


def _compressor(prefix: str, d: int, head_dim: int, ratio: int, norm: float) -> Iterator[Tensor]:
    width = head_dim * (2 if ratio == 4 else 1)
    for name in ("wkv", "wgate"):
        yield Tensor(f"{prefix}{name}.weight", "BF16", (width, d), Fill.NORMAL, d**-0.5)
    yield Tensor(f"{prefix}ape", "F32", (ratio, width), Fill.NORMAL, 0.1)
    yield Tensor(f"{prefix}norm.weight", "BF16", (head_dim,), Fill.NEAR, norm)


class Weights:
    """Bytes of every tensor of one spec; the same spec gives the same bytes.

    Owns pools of at most 16 MiB per kind of fill, made when first needed.
    """

    def __init__(self, spec: CheckpointSpec) -> None:
        self._spec = spec
        self._pools: dict[tuple[Fill, str, float], memoryview] = {}
        c = spec.config
        largest = max(c["vocab_size"], c["num_attention_heads"] * c["head_dim"]) * c["hidden_size"]
        self._pool_bytes = min(_POOL_BYTES, max(1 << 16, largest))
        self._calibrated: dict[bool, float] = {}

    def chunks(self, tensor: Tensor) -> Iterator[memoryview]:
        """The tensor's bytes, piece by piece; where they start in the pool depends on its name."""
        if tensor.fill in (Fill.BIAS, Fill.TABLE):
            yield memoryview(self._routing(tensor).tobytes())
            return
        pool = self._pool(tensor)
        item, rng = ITEM_BYTES[tensor.dtype], self._rng(tensor.like or tensor.name)
        left = tensor.n_bytes
        while left:
            # Each piece of a tensor larger than the pool starts elsewhere, so that no two of its rows are the same.
            start = int(rng.integers(len(pool) // item)) * item
            piece = pool[start : start + left]
            yield piece
            left -= len(piece)

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self._spec.seed, zlib.crc32(name.encode())])

    def _routing(self, tensor: Tensor) -> npt.NDArray[np.generic]:
        rng, n_used = self._rng(tensor.name), self._spec.config["num_experts_per_tok"]
        if tensor.fill is Fill.BIAS:
            return router_bias(self.skew(hashed=False), tensor.shape[0], rng)
        n_experts = self._spec.config["n_routed_experts"]
        return hash_table(self.skew(hashed=True), tensor.shape[0], n_experts, n_used, rng)

    def skew(self, *, hashed: bool) -> float:
        """Popularity skew of router layers or of hash layers."""
        c = self._spec.config
        n_experts, n_used = c["n_routed_experts"], c["num_experts_per_tok"]
        if (known := CALIBRATED.get((n_experts, n_used))) is not None:
            return self._spec.router_skew * known[hashed]
        if hashed not in self._calibrated:
            self._calibrated[hashed] = calibrate(TARGET_HIT_RATE, n_experts, n_used, hashed=hashed)
        return self._spec.router_skew * self._calibrated[hashed]

    def _pool(self, tensor: Tensor) -> memoryview:
        key = (tensor.fill, tensor.dtype, tensor.size)
        if key not in self._pools:
            rng = np.random.default_rng([self._spec.seed, zlib.crc32(repr(key).encode())])
            n = self._pool_bytes // ITEM_BYTES[tensor.dtype]
            self._pools[key] = memoryview(_make_pool(tensor, n, rng).tobytes())
        return self._pools[key]


def _make_pool(tensor: Tensor, n: int, rng: np.random.Generator) -> npt.NDArray[np.generic]:
    if tensor.fill is Fill.FP4:
        return rng.integers(0, 256, n, dtype=np.uint8)
    if tensor.fill is Fill.SCALE:
        return _scale_bytes(tensor.size, n, rng)
    values = rng.standard_normal(n, dtype=np.float32)
    if tensor.fill is Fill.FP8:
        return to_e4m3(values * np.float32(_FP8_STD))
    if tensor.fill is Fill.NORMAL:
        values *= np.float32(tensor.size)
    else:
        values = np.float32(tensor.size) + values * np.float32(0.05 * (tensor.size or 1.0))
    return to_bf16(values) if tensor.dtype == "BF16" else values


def _scale_bytes(size: float, n: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Powers of two above and below `size`, mixed so that their mean square is that of `size`."""
    below = math.floor(math.log2(size))
    share_above = ((size / 2.0**below) ** 2 - 1) / 3
    return (127 + below + (rng.random(n) < share_above)).astype(np.uint8)


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest even; finite values only."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def e4m3_values() -> npt.NDArray[np.float32]:
    """Value of each E4M3FN byte from 0x00 to 0x7E (0x7F is NaN); the sign is bit 7."""
    codes = np.arange(0x7F)
    exponent, mantissa = codes >> 3, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal).astype(np.float32)


def to_e4m3(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Nearest E4M3FN byte, saturating; ties go up."""
    table = e4m3_values()
    codes = np.searchsorted((table[1:] + table[:-1]) / 2, np.abs(values), side="right").astype(np.uint8)
    return codes | np.where(np.signbit(values), np.uint8(0x80), np.uint8(0))
