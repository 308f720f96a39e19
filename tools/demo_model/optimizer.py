"""Muon for matrices, Adam for the rest.

Muon (Keller Jordan, 2024; scaled after Moonlight, arXiv 2502.16982) replaces a matrix's momentum by its nearest
semi-orthogonal matrix. Here it steps through the stacked experts in one batched product, in bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(g: Tensor) -> Tensor:
    """Quintic Newton-Schulz iteration on (..., m, n), five rounds; singular values end near 1."""
    tall = g.shape[-2] > g.shape[-1]
    x = (g.mT if tall else g).bfloat16().reshape(-1, min(g.shape[-2:]), max(g.shape[-2:]))
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(g.shape)


def is_matrix(name: str) -> bool:
    """Whether Muon trains this tensor: matrices between hidden spaces, not embeddings, router, mixing or norms."""
    leaf = name.rsplit(".", 1)[-1]
    if name in ("embed.weight", "head.weight") or "norm." in name or "gate.weight" in name:
        return False
    return leaf in ("weight", "w13", "w2") and "weights_proj" not in name


class MixedOptimizer:
    """State and steps for a set of named f32 tensors; the caller supplies each gradient."""

    def __init__(self, matrix_rate: float, other_rate: float, weight_decay: float) -> None:
        self.matrix_rate, self.other_rate, self.weight_decay = matrix_rate, other_rate, weight_decay
        self.state: dict[str, dict[str, Tensor]] = {}

    def step(self, name: str, w: Tensor, gradient: Tensor, scale: float, n_step: int) -> None:
        """Updates `w` in place (matrices: `gradient` in bf16).

        `scale` is the schedule's factor on both rates, `n_step` counts from 1.
        """
        with torch.no_grad():
            if is_matrix(name):
                self._muon(name, w, gradient, scale)
            else:
                self._adam(name, w, gradient, scale, n_step)

    def _muon(self, name: str, w: Tensor, gradient: Tensor, scale: float) -> None:
        state = self.state.setdefault(name, {"momentum": torch.zeros_like(w, dtype=torch.bfloat16)})
        momentum = state["momentum"]
        momentum.lerp_(gradient, 0.05)
        update = gradient.lerp(momentum, 0.95)
        if name.endswith("w13"):
            shape = update.shape
            update = orthogonalise(update.view(2 * shape[0], shape[1] // 2, shape[2])).view(shape)
        else:
            update = orthogonalise(update)
        rate = self.matrix_rate * scale
        rows, columns = w.shape[-2] // (2 if name.endswith("w13") else 1), w.shape[-1]
        w.mul_(1 - rate * self.weight_decay)
        w.add_(update, alpha=-0.2 * max(rows, columns) ** 0.5 * rate)

    def _adam(self, name: str, w: Tensor, gradient: Tensor, scale: float, n_step: int) -> None:
        state = self.state.setdefault(name, {"mean": torch.zeros_like(w), "square": torch.zeros_like(w)})
        gradient = gradient.float()
        state["mean"].lerp_(gradient, 0.1)
        state["square"].lerp_(gradient.square(), 0.05)
        mean = state["mean"] / (1 - 0.9**n_step)
        deviation = (state["square"] / (1 - 0.95**n_step)).sqrt_().add_(1e-8)
        w.addcdiv_(mean, deviation, value=-self.other_rate * scale)
