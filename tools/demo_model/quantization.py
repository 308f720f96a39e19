"""The official checkpoint's number formats for weights: FP4 (E2M1, 32-wide blocks) and FP8 (E4M3, 128x128 blocks).

Both use power-of-two scales (E8M0). Every rounded value is exact in bf16, so that a forward pass with `rounded` weights in
bf16 equals one with the exported checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP4_BLOCK = 32
FP8_BLOCK = 128
FP4_MAX, FP8_MAX = 6.0, 448.0


def format_of(name: str) -> str:
    """`fp4`, `fp8`, `bf16` or `f32`: how the official checkpoint stores the tensor of this (stacked) name."""
    leaf = name.rsplit(".", 1)[-1]
    if ".experts." in name:
        return "fp4"
    if leaf.startswith("hc_") or leaf in ("ape", "attn_sink") or name.endswith("gate.bias"):
        return "f32"
    dense = ("wq_a.weight", "wq_b.weight", "attn.wkv.weight", "wo_a.weight", "wo_b.weight")
    if name.endswith(dense) or ".shared_experts." in name:
        return "fp8"
    return "bf16"


def fp4_parts(w: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds (..., n) to FP4: values in units of their block's scale (same shape), scales (..., n / 32)."""
    blocks = w.unflatten(-1, (-1, FP4_BLOCK))
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-120)
    scale = torch.exp2(torch.ceil(torch.log2(amax / FP4_MAX)))
    v = blocks / scale
    size = v.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (torch.round(v / step) * step).flatten(-2), scale.squeeze(-1)


def fp4_round(w: Tensor) -> Tensor:
    """The values that the FP4 checkpoint will hold for w (rows, columns)."""
    values, scale = fp4_parts(w)
    return values * scale.repeat_interleave(FP4_BLOCK, -1)


def fp8_parts(w: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds (o, i), both multiples of 128, to FP8: E4M3 values (o, i), scales (o / 128, i / 128)."""
    o, i = w.shape
    tiles = w.view(o // FP8_BLOCK, FP8_BLOCK, i // FP8_BLOCK, FP8_BLOCK)
    amax = tiles.abs().amax((1, 3), keepdim=True).clamp(min=1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(amax / FP8_MAX)))
    return (tiles / scale).reshape(o, i).to(torch.float8_e4m3fn), scale[:, 0, :, 0]


def fp8_round(w: Tensor) -> Tensor:
    """The same for FP8."""
    values, scale = fp8_parts(w)
    return values.float() * scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)


def rounded(name: str, w: Tensor) -> Tensor:
    """The value that the official format keeps of the master weight `w`, in f32."""
    kind = format_of(name)
    if kind == "fp4":
        return fp4_round(w)
    if kind == "fp8":
        return fp8_round(w)
    return w.bfloat16().float() if kind == "bf16" else w


def pack_fp4(values: Tensor) -> Tensor:
    """FP4 values in scale units (o, i) -> official bytes I8 (o, i / 2), even column in the low nibble."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    code = torch.searchsorted(table, values.abs().contiguous()).to(torch.uint8)
    code |= (values < 0).to(torch.uint8) << 3
    return (code[:, 0::2] | (code[:, 1::2] << 4)).view(torch.int8).contiguous()


def unpack_fp4(packed: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `pack_fp4` with the scales (o, i / 32) applied; f32 (o, i)."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    code = packed.view(torch.uint8).long()
    values = table[torch.stack([code & 15, code >> 4], -1).flatten(-2)]
    return values * scale.float().repeat_interleave(FP4_BLOCK, -1)
