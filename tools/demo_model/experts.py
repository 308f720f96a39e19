"""The routed experts' forward and backward pass, grouped by expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tools.demo_model.kernels import Kernels


class RoutedExperts(torch.autograd.Function):  # type: ignore[misc]  # PyTorch is not installed where mypy runs
    """Sum of the chosen experts' outputs: x (N, D), index (N, K), weight (N, K), w13 (E, 2F, D), w2 (E, D, F) -> (N, D) f32.

    Tokens are sorted by expert, so that each expert is three matrix products over contiguous rows. Each expert's rows are
    padded with zeros to a multiple of 32: the matrix library prepares code per shape, and few shapes keep that rare.
    """

    PAD = 32

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weight: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor:
        n_tokens, k = index.shape
        n_experts, pad = w13.shape[0], RoutedExperts.PAD
        chosen = index.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=n_experts)
        padded = (counts + pad - 1) // pad * pad
        shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0]) + shift[chosen[order]]  # row of each (token, choice)
        n_rows = chosen.shape[0] + n_experts * pad
        tokens = torch.zeros(n_rows, dtype=torch.int64)
        tokens[place] = torch.arange(order.shape[0]) // k
        ws = torch.zeros(n_rows)
        ws[place] = weight.flatten()
        xs = x[tokens]
        gate_up, y = x.new_zeros(n_rows, w13.shape[1]), torch.zeros_like(xs)
        bounds = _bounds(padded)
        for e, rows in bounds:
            torch.mm(xs[rows], w13[e].T, out=gate_up[rows])
        h = Kernels.expert_forward(gate_up, ws, limit)
        for e, rows in bounds:
            torch.mm(h[rows], w2[e].T, out=y[rows])
        ctx.save_for_backward(xs, gate_up, h, ws, w13, w2, place, tokens)
        ctx.bounds, ctx.k, ctx.limit = bounds, k, limit
        return y[place].view(n_tokens, k, -1).sum(1, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        xs, gate_up, h, ws, w13, w2, place, tokens = ctx.saved_tensors
        dy = grads[0].to(xs.dtype)[tokens]
        # padding rows carry some token's values; nothing may flow from them
        real = torch.zeros(dy.shape[0], dtype=torch.bool)
        real[place] = True
        dy.masked_fill_(~real[:, None], 0)
        dh, dxs = torch.zeros_like(h), torch.empty_like(xs)
        dw13, dw2 = torch.empty_like(w13), torch.empty_like(w2)
        for e in set(range(w13.shape[0])) - {e for e, _ in ctx.bounds}:
            dw13[e].zero_()
            dw2[e].zero_()
        for e, rows in ctx.bounds:
            torch.mm(dy[rows], w2[e], out=dh[rows])
            torch.mm(dy[rows].T, h[rows], out=dw2[e])
        dgate_up, dws = Kernels.expert_backward(gate_up, ws, ctx.limit, dh)
        for e, rows in ctx.bounds:
            torch.mm(dgate_up[rows], w13[e], out=dxs[rows])
            torch.mm(dgate_up[rows].T, xs[rows], out=dw13[e])
        dx = dxs[place].view(-1, ctx.k, xs.shape[1]).sum(1)
        return dx, None, dws[place].view(-1, ctx.k), dw13, dw2, None


def _bounds(padded: Tensor) -> list[tuple[int, slice]]:
    """Experts that have rows, with their rows."""
    bounds, start = [], 0
    for e, count in enumerate(padded.tolist()):
        if count:
            bounds.append((e, slice(start, start + count)))
        start += count
    return bounds
