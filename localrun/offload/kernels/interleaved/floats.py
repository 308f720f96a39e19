"""BF16, F16 and F32 weights: no quantization of activations, F32 sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from gguf import GGMLQuantizationType
from llvmlite import ir

from localrun.offload.kernels.interleaved.layout import Field, Format, Step, Tile
from localrun.offload.kernels.panels import FLOAT32, Panel
from localrun.offload.kernels.simd import FLOATS, I16, INTS, Simd


def _read_bf16(s: Simd, body: Any, i: int) -> Any:
    return s.b.bitcast(s.shift_left(s.b.zext(s.load(body, 32 * i, ir.VectorType(I16, 16)), INTS), 16), FLOATS)


def _read_f16(s: Simd, body: Any, i: int) -> Any:
    return s.halves(body, 32 * i)


def _read_f32(s: Simd, body: Any, i: int) -> Any:
    return s.load(body, 64 * i, FLOATS)


def _step(read: Callable[[Simd, Any, int], Any]) -> Step:
    def step(s: Simd, _meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
        # Several sums per token break the chain of dependent additions.
        n_chains = max(1, 8 // len(totals))
        sums = [[total] + [s.floats(0.0)] * (n_chains - 1) for total in totals]
        for i in range(32):
            weights = read(s, body, i)
            for t, chains in enumerate(sums):
                chains[i % n_chains] = s.fma(weights, tile.f32(t, i), chains[i % n_chains])
        results = []
        for chains in sums:
            while len(chains) > 1:
                chains = [s.b.fadd(a, b) for a, b in zip(chains[::2], chains[1::2], strict=True)]
            results.append(chains[0])
        return results

    return step


def _format(type_: GGMLQuantizationType, width: int, read: Callable[[Simd, Any, int], Any]) -> Format:
    return Format(type_, 32, 32 * width, 0, 512 * width, Panel(FLOAT32), (Field(0, width, 32, 0),), _step(read))


FORMATS: Final = (
    _format(GGMLQuantizationType.BF16, 2, _read_bf16),
    _format(GGMLQuantizationType.F16, 2, _read_f16),
    _format(GGMLQuantizationType.F32, 4, _read_f32),
)
