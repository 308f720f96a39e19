"""Element-wise inner loops of the model, each a plain function that torch.compile can fuse.

Shape legend as in `model`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

STREAMS = 4


def _unit_rows(x: Tensor, eps: float, scale: float) -> Tensor:
    """Weightless RMS norm times `scale`, in f32."""
    x = x.float()
    return x * (torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale)


def _index_mix(dots: Tensor, weights: Tensor) -> Tensor:
    """Index scores (B, T, n) f32 from the heads' dot products (B, T, heads, n) and weights (B, T, heads)."""
    return (dots.float().relu() * weights.float()[..., None]).sum(2)


def _pool(kv: Tensor, gate: Tensor, ape: Tensor, first_block: Tensor, ratio: int, width: int) -> Tensor:
    """Blocks of gated tokens (B, n, R, c*width) -> pooled rows (B, n, width); ratio 4 joins the previous block's a-halves."""
    kv, gate = kv.float(), gate.float() + ape
    if ratio == 4:
        previous_kv = functional.pad(kv[:, :-1, :, :width], (0, 0, 0, 0, 1, 0))
        previous_gate = functional.pad(gate[:, :-1, :, :width], (0, 0, 0, 0, 1, 0))
        previous_gate = torch.where(first_block[:, :, None, None], -1e30, previous_gate)
        kv = torch.cat([previous_kv, kv[..., width:]], 2)
        gate = torch.cat([previous_gate, gate[..., width:]], 2)
    return (kv * gate.softmax(2)).sum(2)


def _softmax_forward(scores: Tensor, mask: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    logits = scores.float() + mask[:, None]
    top = torch.maximum(logits.amax(-1, keepdim=True), sink[None, :, None, None])
    e = torch.exp(logits - top)
    e_sink = torch.exp(sink[None, :, None, None] - top)
    total = e.sum(-1, keepdim=True) + e_sink
    return (e / total).to(scores.dtype), e_sink / total


def _softmax_backward(p: Tensor, p_sink: Tensor, dp: Tensor) -> tuple[Tensor, Tensor]:
    pf, dpf = p.float(), dp.float()
    along = (pf * dpf).sum(-1, keepdim=True)
    return (pf * (dpf - along)).to(p.dtype), -(p_sink * along).sum((0, 2, 3))


def _expert_forward(gate_up: Tensor, weight: Tensor, limit: float) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return (functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * weight[:, None]).to(gate_up.dtype)


def _expert_backward(gate_up: Tensor, weight: Tensor, limit: float, dh: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.float().chunk(2, -1)
    g, u, d = gate.clamp(max=limit), up.clamp(-limit, limit), dh.float()
    s = torch.sigmoid(g)
    silu = g * s
    dw = (d * silu * u).sum(-1)
    d = d * weight[:, None]
    dg = d * u * (s + silu * (1 - s)) * (gate < limit)
    du = d * silu * (up.abs() < limit)
    return torch.cat([dg, du], -1).to(gate_up.dtype), dw


def _hc_pre(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, rounds: int, rms_eps: float, hc_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams (N, 4, D) -> sublayer input (N, D), write weights (N, 4), mixing matrix (4, 4, N) [source, target]."""
    flat = x.flatten(1)
    m = functional.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + rms_eps)
    pre = torch.sigmoid(m[:, :STREAMS] * scale[0] + base[:STREAMS]) + hc_eps
    post = 2 * torch.sigmoid(m[:, STREAMS : 2 * STREAMS] * scale[1] + base[STREAMS : 2 * STREAMS])
    a = (m[:, 2 * STREAMS :] * scale[2] + base[2 * STREAMS :]).T.reshape(STREAMS, STREAMS, -1)  # token innermost
    a = torch.softmax(a, 1) + hc_eps
    a = a / (a.sum(0, keepdim=True) + hc_eps)
    for _ in range(rounds - 1):
        a = a / (a.sum(1, keepdim=True) + hc_eps)
        a = a / (a.sum(0, keepdim=True) + hc_eps)
    y = pre[:, 0, None] * x[:, 0]
    for i in range(1, STREAMS):
        y = y + pre[:, i, None] * x[:, i]
    return y, post, a


def _hc_post(out: Tensor, x: Tensor, post: Tensor, mix: Tensor) -> Tensor:
    """Writes a sublayer's output (N, D) into the streams (N, 4, D): new_j = post_j out + sum_i mix_ij x_i."""
    streams = []
    for j in range(STREAMS):
        new = post[:, j, None] * out
        for i in range(STREAMS):
            new = new + mix[i, j, :, None] * x[:, i]
        streams.append(new)
    return torch.stack(streams, 1)


class Kernels:
    """The element-wise inner loops; `compile()` fuses them with torch.compile (needs a C++ compiler)."""

    softmax_forward: Callable[..., Any] = staticmethod(_softmax_forward)
    softmax_backward: Callable[..., Any] = staticmethod(_softmax_backward)
    expert_forward: Callable[..., Any] = staticmethod(_expert_forward)
    expert_backward: Callable[..., Any] = staticmethod(_expert_backward)
    unit_rows: Callable[..., Any] = staticmethod(_unit_rows)
    index_mix: Callable[..., Any] = staticmethod(_index_mix)
    pool: Callable[..., Any] = staticmethod(_pool)
    hc_pre: Callable[..., Any] = staticmethod(_hc_pre)
    hc_post: Callable[..., Any] = staticmethod(_hc_post)

    @classmethod
    def compile(cls) -> None:
        for name in [name for name in vars(cls) if "_" + name in globals()]:
            setattr(cls, name, staticmethod(torch.compile(globals()["_" + name], dynamic=False)))


class SinkSoftmax(torch.autograd.Function):  # type: ignore[misc]  # PyTorch is not installed where mypy runs
    """Softmax over keys with one extra logit per head that takes probability and gives nothing."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor, sink: Tensor) -> Tensor:
        p, p_sink = Kernels.softmax_forward(scores, mask, sink)
        ctx.save_for_backward(p, p_sink)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        p, p_sink = ctx.saved_tensors
        ds, dsink = Kernels.softmax_backward(p, p_sink, grads[0])
        return ds, None, dsink
