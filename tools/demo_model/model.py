"""A small DeepSeek-V4 in PyTorch, written for training on a CPU with bf16 matrix units.

Knows nothing of data, optimisers or files. Parameters carry the official checkpoint names, except that a layer's routed
experts are stacked (`layers.N.ffn.experts.w13` (E, 2F, D) with gate rows first, `layers.N.ffn.experts.w2` (E, D, F)).

Departures from the released inference code: activations are not quantised, the index scores skip the Hadamard transform
(it cancels without FP4), and several documents may share a row of the batch: `Batch.documents` keeps attention, compressed
rows and the overlap of ratio-4 blocks inside one document. The indexer gets no gradient from the language-model loss (a
top-k passes none); it learns by a KL loss towards the attention that its layer pays to the compressed rows.

Shape legend: B rows, T tokens a row, N = B*T, D hidden, H heads, d head size, R compression ratio, n = T // R, E experts,
F expert width, K experts per token, S = T + n keys.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.demo_model.experts import RoutedExperts
from tools.demo_model.kernels import STREAMS, Kernels, SinkSoftmax


@dataclass(frozen=True)
class ModelConfig:
    """Architecture numbers under the official configuration's names."""

    vocab_size: int = 3840
    hidden_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 8
    head_dim: int = 128
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 128
    o_lora_rank: int = 128
    o_groups: int = 2
    sliding_window: int = 128
    compress_ratios: tuple[int, ...] = (4, 128, 4, 0)
    index_n_heads: int = 16
    index_head_dim: int = 128
    index_topk: int = 32
    n_routed_experts: int = 48
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 256
    num_hash_layers: int = 1
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = STREAMS
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_factor: float = 16.0
    rope_original: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Batch:
    """Token ids and the document that each token belongs to, both (B, T) int64.

    Documents start at multiples of 4, and at multiples of 128 if they are 128 tokens or longer: then a row's documents see
    exactly the compressed rows that they would see alone.
    """

    ids: Tensor
    documents: Tensor


@dataclass
class Statistics:
    """Side outputs of a forward pass."""

    index_loss: Tensor
    expert_counts: list[Tensor] = field(default_factory=list)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x: (..., d) of any type; computed and returned in F32."""
    x = x.float()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def inverse_frequencies(config: ModelConfig, compressed: bool) -> Tensor:
    """Rotation speeds of the rope pairs; layers with compression use the long base with YaRN everywhere."""
    d = config.qk_rope_head_dim
    base = config.compress_rope_theta if compressed else config.rope_theta
    f = base ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
    if not compressed:
        return f

    def dimension_of(rotations: float) -> float:
        return d * math.log(config.rope_original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension_of(config.beta_fast)), 0)
    high = min(math.ceil(dimension_of(config.beta_slow)), d - 1)
    ramp = ((torch.arange(d // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return f * (1 - ramp) + f / config.rope_factor * ramp


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rope on the last dimensions of x (B, T, ..., d) f32, pairs interleaved; `turn` complex, broadcast over x's pairs."""
    width = 2 * turn.shape[-1]
    pairs = torch.view_as_complex(x[..., -width:].unflatten(-1, (-1, 2)).contiguous())
    return torch.cat([x[..., :-width], torch.view_as_real(pairs * turn).flatten(-2)], -1)


class DemoModel(nn.Module):  # type: ignore[misc]  # PyTorch is not installed where mypy runs
    """The trunk. Weights may be f32 or, matrices only, already of the compute type (the trainer keeps f32 masters apart)."""

    def __init__(self, config: ModelConfig, compute: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config, self.compute = config, compute
        self.weights = nn.ParameterDict()
        self.biases: dict[int, Tensor] = {}
        self.token_experts: dict[int, Tensor] = {}
        self.select_rows = True
        """Whether ratio-4 layers see only the indexer's top-k rows (False: all rows, for the indexer's first lessons)."""
        self.use_indexer = True
        """False skips the indexer: ratio-4 layers see all rows, and it learns nothing."""
        self.sinkhorn_rounds: int | None = None
        """Fewer Sinkhorn rounds than the configuration's, to save training time (6 come within 1e-3 of 20)."""
        self.frequencies = {c: inverse_frequencies(config, c) for c in (False, True)}
        self._initialise()

    # ParameterDict keys may not hold dots
    def weight(self, name: str) -> Tensor:
        w: Tensor = self.weights[name.replace(".", "/")]
        return w

    def matrix(self, name: str) -> Tensor:
        return self.weight(name).to(self.compute)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x.to(self.compute), self.matrix(name))

    def _initialise(self) -> None:
        c = self.config
        for name, shape in parameter_shapes(c).items():
            w = torch.empty(shape)
            leaf = name.rsplit(".", 1)[-1]
            if name.endswith("norm.weight"):
                w.fill_(1.0)
            elif "hc_" in leaf and leaf.endswith("_fn"):
                w.normal_(0, 0.02)
            elif "hc_" in leaf and leaf.endswith("_scale"):
                w.fill_(0.1)
            elif leaf == "hc_head_base":
                w.fill_(0.0)
            elif leaf in ("hc_attn_base", "hc_ffn_base"):
                # each sublayer reads mostly one stream, writes to all, and mixes little
                layer = int(name.split(".")[1])
                w.zero_()
                w[:STREAMS] = -1.5
                w[(2 * layer + (leaf == "hc_ffn_base")) % STREAMS] = 1.0
                w[2 * STREAMS :] = 4.0 * torch.eye(STREAMS).flatten()
            elif leaf in ("ape", "attn_sink"):
                w.zero_()
            elif name == "embed.weight":
                w.normal_(0, 0.5)
            elif name == "head.weight":
                w.normal_(0, 0.02)
            else:
                gain = 0.5 if leaf == "w2" or name.endswith(("w2.weight", "wo_b.weight")) else 1.0
                w.normal_(0, gain * shape[-1] ** -0.5)
            self.weights[name.replace(".", "/")] = nn.Parameter(w)
        for layer in range(c.num_hidden_layers):
            if layer < c.num_hash_layers:
                self.token_experts[layer] = torch.zeros(c.vocab_size, c.num_experts_per_tok, dtype=torch.int64)
            else:
                self.biases[layer] = torch.zeros(c.n_routed_experts)

    def forward(self, batch: Batch) -> tuple[Tensor, Statistics]:
        """Returns the normed final hidden state (N, D) f32, ready for `logits`, and side outputs."""
        c = self.config
        n_rows, length = batch.ids.shape
        statistics = Statistics(torch.zeros(()))
        masks = Masks(batch, c)
        x = self.weight("embed.weight")[batch.ids.flatten()][:, None].expand(-1, STREAMS, -1)  # (N, 4, D)
        for layer in range(c.num_hidden_layers):
            p = f"layers.{layer}."
            y, post, mix = self._hc_pre(x, p + "hc_attn_")
            normed = rms_norm(y, self.weight(p + "attn_norm.weight"), c.rms_norm_eps)
            out = self._attention(normed.view(n_rows, length, -1), layer, masks, statistics)
            x = Kernels.hc_post(out.reshape(n_rows * length, -1), x, post, mix)
            y, post, mix = self._hc_pre(x, p + "hc_ffn_")
            normed = rms_norm(y, self.weight(p + "ffn_norm.weight"), c.rms_norm_eps)
            x = Kernels.hc_post(self._ffn(normed, layer, batch.ids.flatten(), statistics), x, post, mix)
        flat = x.flatten(1)
        m = functional.linear(flat, self.weight("hc_head_fn")) * torch.rsqrt(
            flat.square().mean(-1, keepdim=True) + c.rms_norm_eps
        )
        pre = torch.sigmoid(m * self.weight("hc_head_scale") + self.weight("hc_head_base")) + c.hc_eps
        return rms_norm((pre[:, :, None] * x).sum(1), self.weight("norm.weight"), c.rms_norm_eps), statistics

    def logits(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden, "head.weight").float()

    def _hc_pre(self, x: Tensor, prefix: str) -> tuple[Tensor, Tensor, Tensor]:
        fn, scale, base = (self.weight(prefix + part) for part in ("fn", "scale", "base"))
        c = self.config
        rounds = self.sinkhorn_rounds or c.hc_sinkhorn_iters
        result: tuple[Tensor, Tensor, Tensor] = Kernels.hc_pre(x, fn, scale, base, rounds, c.rms_norm_eps, c.hc_eps)
        return result

    def _compress(self, x: Tensor, prefix: str, ratio: int, width: int, masks: Masks) -> Tensor:
        """Pools x (B, T, D) into one row per block of `ratio` tokens: (B, n, width), roped at the block's first position."""
        c = self.config
        n = x.shape[1] // ratio
        x = x[:, : n * ratio]
        both = torch.cat([self.matrix(prefix + "wkv.weight"), self.matrix(prefix + "wgate.weight")])
        kv, gate = functional.linear(x.to(self.compute), both).unflatten(1, (n, ratio)).chunk(2, -1)
        first_block = masks.first_block[:, :n]
        pooled = Kernels.pool(kv, gate, self.weight(prefix + "ape"), first_block, ratio, width)
        rows = rms_norm(pooled, self.weight(prefix + "norm.weight"), c.rms_norm_eps)
        return rotate(rows, self._turns(masks.positions[: n * ratio : ratio], True))

    def _turns(self, positions: Tensor, compressed: bool) -> Tensor:
        """Complex rope factors (T, pairs)."""
        angle = positions.float()[:, None] * self.frequencies[compressed]
        return torch.polar(torch.ones_like(angle), angle)

    def _attention(self, x: Tensor, layer: int, masks: Masks, statistics: Statistics) -> Tensor:
        c, p = self.config, f"layers.{layer}.attn."
        n_rows, length, _ = x.shape
        ratio = c.compress_ratios[layer]
        turn = self._turns(masks.positions, ratio != 0)
        qr = rms_norm(self.linear(x, p + "wq_a.weight"), self.weight(p + "q_norm.weight"), c.rms_norm_eps)
        q = self.linear(qr, p + "wq_b.weight").unflatten(-1, (c.num_attention_heads, c.head_dim))
        q = rotate(Kernels.unit_rows(q, c.rms_norm_eps, c.head_dim**-0.5), turn[:, None])
        kv = rms_norm(self.linear(x, p + "wkv.weight"), self.weight(p + "kv_norm.weight"), c.rms_norm_eps)
        keys, mask = rotate(kv, turn), masks.window
        index_scores = None
        if ratio and length >= ratio:
            keys = torch.cat([keys, self._compress(x, p + "compressor.", ratio, c.head_dim, masks)], 1)
            visible = masks.rows[ratio]
            if ratio == 4 and self.use_indexer:
                index_scores = self._index_scores(x.detach(), qr.detach(), p + "indexer.", masks)
                index_scores = index_scores.masked_fill(visible < 0, -1e30)
                if self.select_rows and index_scores.shape[-1] > c.index_topk:
                    chosen = index_scores.detach().topk(c.index_topk, -1).indices
                    keep = torch.zeros_like(visible, dtype=torch.bool).scatter_(-1, chosen, True)
                    visible = visible.masked_fill(~keep, -1e30)
                    index_scores = index_scores.masked_fill(~keep, -1e30)
            mask = torch.cat([mask, visible], -1)
        keys = keys.to(self.compute)
        flat_q = q.to(self.compute).transpose(1, 2).reshape(n_rows, -1, c.head_dim)  # (B, H*T, d)
        scores = torch.bmm(flat_q, keys.transpose(1, 2)).view(n_rows, c.num_attention_heads, length, -1)
        probabilities = SinkSoftmax.apply(scores, mask, self.weight(p + "attn_sink"))
        if index_scores is not None and torch.is_grad_enabled():
            statistics.index_loss = statistics.index_loss + index_loss(index_scores, probabilities.detach(), length)
        out = torch.bmm(probabilities.flatten(1, 2), keys).view(n_rows, c.num_attention_heads, length, -1)
        out = rotate(out.transpose(1, 2).float(), turn[:, None].conj()).to(self.compute)  # (B, T, H, d)
        grouped = out.reshape(n_rows * length, c.o_groups, -1).transpose(0, 1)  # (G, N, H*d/G)
        wo_a = self.matrix(p + "wo_a.weight").unflatten(0, (c.o_groups, -1))
        mid = torch.bmm(grouped, wo_a.transpose(1, 2)).transpose(0, 1).flatten(1)
        return self.linear(mid, p + "wo_b.weight").float()

    def _index_scores(self, x: Tensor, qr: Tensor, prefix: str, masks: Masks) -> Tensor:
        """The lightning indexer's score of each ratio-4 row for each token: (B, T, n)."""
        c = self.config
        n_rows, length, _ = x.shape
        turn = self._turns(masks.positions, True)
        q = self.linear(qr, prefix + "wq_b.weight").unflatten(-1, (c.index_n_heads, c.index_head_dim))
        q = rotate(q.float(), turn[:, None]).to(self.compute)
        rows = self._compress(x, prefix + "compressor.", 4, c.index_head_dim, masks).to(self.compute)
        dots = torch.bmm(q.flatten(1, 2), rows.transpose(1, 2)).view(n_rows, length, c.index_n_heads, -1)
        weights = self.linear(x, prefix + "weights_proj.weight") * (c.index_head_dim * c.index_n_heads) ** -0.5
        scores: Tensor = Kernels.index_mix(dots, weights)
        return scores

    def _ffn(self, x: Tensor, layer: int, ids: Tensor, statistics: Statistics) -> Tensor:
        c, p = self.config, f"layers.{layer}.ffn."
        scores = functional.softplus(functional.linear(x, self.weight(p + "gate.weight"))).sqrt()
        if layer < c.num_hash_layers:
            index = self.token_experts[layer][ids]
        else:
            index = (scores.detach() + self.biases[layer]).topk(c.num_experts_per_tok, -1).indices
        statistics.expert_counts.append(torch.bincount(index.flatten(), minlength=c.n_routed_experts))
        weight = scores.gather(1, index)
        weight = weight / weight.sum(-1, keepdim=True) * c.routed_scaling_factor
        xc = x.to(self.compute)
        routed = RoutedExperts.apply(
            xc, index, weight, self.matrix(p + "experts.w13"), self.matrix(p + "experts.w2"), c.swiglu_limit
        )
        gate = functional.linear(xc, self.matrix(p + "shared_experts.w1.weight")).float().clamp(max=c.swiglu_limit)
        up = functional.linear(xc, self.matrix(p + "shared_experts.w3.weight")).float()
        h = functional.silu(gate) * up.clamp(-c.swiglu_limit, c.swiglu_limit)
        return routed + self.linear(h, p + "shared_experts.w2.weight").float()


class Masks:
    """Additive masks (0 or -1e30) of a batch: window (B, T, T), rows[R] (B, T, n); and what blocks start a document."""

    def __init__(self, batch: Batch, config: ModelConfig) -> None:
        documents = batch.documents
        length = documents.shape[1]
        self.positions = torch.arange(length)
        t = self.positions
        distance = t[:, None] - t[None]
        near = (distance >= 0) & (distance < config.sliding_window)
        same = documents[:, :, None] == documents[:, None]
        self.window = torch.where(near & same, 0.0, -1e30)
        self.rows: dict[int, Tensor] = {}
        for ratio in {r for r in config.compress_ratios if r and length >= r}:
            n = length // ratio
            first, last = documents[:, : n * ratio : ratio], documents[:, ratio - 1 : n * ratio : ratio]
            done = torch.arange(1, n + 1)[None] * ratio <= t[:, None] + 1
            inside = (documents[:, :, None] == first[:, None]) & (first == last)[:, None]
            self.rows[ratio] = torch.where(done & inside, 0.0, -1e30)
        starts = documents[:, ::4]
        self.first_block = torch.ones_like(starts, dtype=torch.bool)
        self.first_block[:, 1:] = starts[:, 1:] != starts[:, :-1]


def index_loss(scores: Tensor, probabilities: Tensor, length: int) -> Tensor:
    """KL from the heads' mean attention to compressed rows (B, H, T, S)[..., T:] to the softmax of the index scores."""
    target = probabilities[..., length:].float().sum(1)
    mass = target.sum(-1, keepdim=True)
    target = target / mass.clamp(min=1e-6)
    kl = (target * (torch.log(target.clamp(min=1e-9)) - functional.log_softmax(scores, -1))).sum(-1)
    seen = (mass.squeeze(-1) > 1e-6).float()
    return (kl * seen).sum() / seen.sum().clamp(min=1)


def parameter_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every trained tensor's name and shape; experts stacked as the module's docstring says."""
    d, hd, qr = c.hidden_size, c.head_dim, c.q_lora_rank
    mixes = (2 + STREAMS) * STREAMS
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (c.vocab_size, d)}
    for layer in range(c.num_hidden_layers):
        p, ratio = f"layers.{layer}.", c.compress_ratios[layer]
        shapes[p + "attn_norm.weight"] = shapes[p + "ffn_norm.weight"] = (d,)
        for k in ("attn", "ffn"):
            shapes |= {p + f"hc_{k}_fn": (mixes, STREAMS * d), p + f"hc_{k}_base": (mixes,), p + f"hc_{k}_scale": (3,)}
        a = p + "attn."
        shapes |= {a + "wq_a.weight": (qr, d), a + "q_norm.weight": (qr,)}
        shapes |= {a + "wq_b.weight": (c.num_attention_heads * hd, qr)}
        shapes |= {a + "wkv.weight": (hd, d), a + "kv_norm.weight": (hd,), a + "attn_sink": (c.num_attention_heads,)}
        shapes |= {a + "wo_a.weight": (c.o_groups * c.o_lora_rank, c.num_attention_heads * hd // c.o_groups)}
        shapes |= {a + "wo_b.weight": (d, c.o_groups * c.o_lora_rank)}
        if ratio:
            shapes |= _compressor_shapes(a + "compressor.", ratio, hd, d)
        if ratio == 4:
            i = a + "indexer."
            shapes |= {i + "wq_b.weight": (c.index_n_heads * c.index_head_dim, qr)}
            shapes |= {i + "weights_proj.weight": (c.index_n_heads, d)}
            shapes |= _compressor_shapes(i + "compressor.", 4, c.index_head_dim, d)
        f, width = p + "ffn.", c.moe_intermediate_size
        shapes |= {f + "gate.weight": (c.n_routed_experts, d), f + "experts.w13": (c.n_routed_experts, 2 * width, d)}
        shapes |= {f + "experts.w2": (c.n_routed_experts, d, width), f + "shared_experts.w1.weight": (width, d)}
        shapes |= {f + "shared_experts.w3.weight": (width, d), f + "shared_experts.w2.weight": (d, width)}
    shapes |= {"hc_head_fn": (STREAMS, STREAMS * d), "hc_head_base": (STREAMS,), "hc_head_scale": (1,)}
    return shapes | {"norm.weight": (d,), "head.weight": (c.vocab_size, d)}


def _compressor_shapes(prefix: str, ratio: int, width: int, d: int) -> dict[str, tuple[int, ...]]:
    channels = (2 if ratio == 4 else 1) * width
    projections = {prefix + "wkv.weight": (channels, d), prefix + "wgate.weight": (channels, d)}
    return {**projections, prefix + "ape": (ratio, channels), prefix + "norm.weight": (width,)}
