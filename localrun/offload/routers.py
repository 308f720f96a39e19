"""Predicts the experts of the next layers by applying their routers to the current layer's input.

Hidden states change little between layers, so this finds most of the experts a layer or two early (`tools/guess_next_layer.py`
measures how many). Looking ahead ranks by a copy of the matrix in int8, which the plan counts (`ModelSizes.ranking_bytes`): [m] 256
experts of 4,096 inputs in 54 us instead of 164 in BF16, the choice included, from memory on one Zen 4 core. Exact scores come from
llama.cpp's matrices in CPU memory. No answer depends on either.
"""

from __future__ import annotations

import ctypes as C
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.kernel_cache import cached_jit
from localrun.offload.device.view import F32, I32
from localrun.offload.kernels.lowlevel import float_of_bits
from localrun.quant.model.source import ModelSource

_SOFTMAX, _SIGMOID, _SQRT_SOFTPLUS = 1, 2, 4
"""llama.cpp's numbers of functions over a router's outputs (`llama_expert_gating_func_type`)."""
_WORDS: Final[Mapping[GGMLQuantizationType, Any]] = {
    GGMLQuantizationType.F32: np.uint32,
    GGMLQuantizationType.BF16: np.uint16,
}
_MAGNITUDE: Final = np.uint32(0x7FFFFFFF)
_INFINITE: Final = np.uint32(0x7F800000)


@cached_jit(nogil=True, fastmath=True)
def _products(matrix: npt.NDArray[Any], shift: int, x: F32, out: F32) -> None:
    """out (E,) = matrix (E, D) @ x (D,), for words that are the upper bits of f32."""
    for e in range(matrix.shape[0]):
        total = np.float32(0)
        for i in range(matrix.shape[1]):
            total += float_of_bits(np.uint32(matrix[e, i]) << np.uint32(shift)) * x[i]
        out[e] = total


@cached_jit(nogil=True)
def _shrink(matrix: npt.NDArray[Any], shift: int, rows: npt.NDArray[np.int8], scales: npt.NDArray[np.float64]) -> None:
    """matrix (E, D), words as in `_products`, is about rows (E, D) * scales (E,). A row with NaN or infinity gets NaN as scale."""
    for e in range(matrix.shape[0]):
        largest = np.uint32(0)
        for i in range(matrix.shape[1]):
            largest = max(largest, np.uint32((np.uint32(matrix[e, i]) << np.uint32(shift)) & _MAGNITUDE))
        scales[e] = np.float64(float_of_bits(largest)) / 127 if largest < _INFINITE else np.nan
        factor = 1 / scales[e] if scales[e] > 0 else 0.0
        for i in range(matrix.shape[1]):
            rows[e, i] = np.int8(np.rint(float_of_bits(np.uint32(matrix[e, i]) << np.uint32(shift)) * factor))


@cached_jit(nogil=True)
def _largest(
    rows: npt.NDArray[np.int8], scales: npt.NDArray[np.float64], bias: F32, gating: int, x: F32, n: int
) -> I32:
    """(n,) experts with the highest scores for an input x (D,), highest first; fewer if there are not as many numbers."""
    n_experts, width = rows.shape
    size = 0.0
    for i in range(width):
        if not np.isfinite(x[i]):
            return np.empty(0, np.int32)
        size = max(size, abs(np.float64(x[i])))
    # Whole numbers so small that no sum of products overflows an int32.
    unit = size / min(32767, (2**31 - 1) // (127 * width))
    factor, values = 1 / unit if unit > 0 else 0.0, np.empty(width, np.int16)
    for i in range(width):
        values[i] = np.int16(np.rint(x[i] * factor))
    scores = np.empty(n_experts)
    for e in range(n_experts):
        total = np.int32(0)
        for i in range(width):
            total = np.int32(
                total + np.int32(rows[e, i]) * np.int32(values[i])
            )  # vectorized, because it stays 32 bits wide
        scores[e] = total * scales[e] * unit
    if gating == _SOFTMAX:
        scores = np.exp(scores - np.nanmax(scores))
        scores /= np.nansum(scores)
    for e in range(n_experts):
        if gating == _SIGMOID:
            scores[e] = 0.5 + 0.5 * math.tanh(0.5 * scores[e])
        elif gating == _SQRT_SOFTPLUS:
            scores[e] = math.sqrt(max(scores[e], 0.0) + math.log1p(math.exp(-abs(scores[e]))))
        scores[e] += bias[e]
    result, n_found = np.empty(n, np.int32), 0
    while n_found < n:
        best = -1
        for e in range(n_experts):
            if scores[e] > (scores[best] if best >= 0 else -np.inf):
                best = e
        if best < 0:
            break
        result[n_found], scores[best], n_found = best, -np.inf, n_found + 1
    return result[:n_found]


@dataclass(slots=True, eq=False)
class Router:
    """One layer's router.

    Attributes:
        matrix: (E, D) words of F32 or BF16 numbers, llama.cpp's memory.
        bias: (E,) added to the scores to choose experts, not to weigh them.
        gating: llama.cpp's number of the gating function.
    """

    matrix: npt.NDArray[Any]
    bias: F32
    gating: int
    _copy: tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]] | None = None  # see `_shrink`

    def largest(self, x: F32, n: int) -> I32:
        """(n,) experts that the layer would choose for an input (D,), likeliest first, nearly as by `scores`; fewer if scores are
        not numbers. Makes the copy when it is first called, after the matrix was read (a millisecond)."""
        if self._copy is None:
            rows, scales = np.empty(self.matrix.shape, np.int8), np.empty(len(self.matrix))
            _shrink(self.matrix, 32 - 8 * self.matrix.itemsize, rows, scales)
            self._copy = rows, scales
        best: I32 = _largest(*self._copy, self.bias, self.gating, np.ascontiguousarray(x), n)
        return best

    def scores(self, x: F32) -> F32:
        """(E,) what the layer would choose by for an input (D,)."""
        products = np.empty(len(self.matrix), np.float32)
        _products(self.matrix, 32 - 8 * self.matrix.itemsize, np.ascontiguousarray(x), products)
        if self.gating == _SOFTMAX:
            products = np.exp(products - products.max())
            products /= products.sum()
        elif self.gating == _SIGMOID:
            products = 0.5 + 0.5 * np.tanh(0.5 * products)
        else:
            products = np.sqrt(np.logaddexp(np.float32(0), products))
        result: F32 = products + self.bias
        return result


class Routers:
    """A model's routers that support prediction; other kinds of layers are skipped.

    Args:
        source: names, shapes and biases.
    """

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._routers: dict[int, Router] = {}
        self._gating = source.metadata.get(f"{source.metadata.get('general.architecture')}.expert_gating_func")

    def adopt(self, name: str, address: int) -> None:
        """Called at load for each tensor in CPU memory, with its address."""
        parts = name.split(".")
        if len(parts) != 4 or parts[0] != "blk" or parts[2:] != ["ffn_gate_inp", "weight"]:
            return
        layer = int(parts[1])
        info, moe = self._source.tensors[name], self._source.moe_layers.get(layer)
        word = _WORDS.get(info.type)
        known = moe is not None and info.shape[:2] == (moe.n_embd, moe.n_experts) and word is not None
        others = f"blk.{layer}.ffn_gate_inp.bias"
        if not known or self._gating not in (_SOFTMAX, _SIGMOID, _SQRT_SOFTPLUS) or others in self._source.tensors:
            return
        assert moe is not None
        memory: Any = (C.c_uint8 * info.n_bytes).from_address(address)
        matrix = np.frombuffer(memory, word).reshape(moe.n_experts, moe.n_embd)
        bias = self._bias(f"blk.{layer}.exp_probs_b.bias", moe.n_experts)
        self._routers[layer] = Router(matrix, bias, int(self._gating))

    def _bias(self, name: str, size: int) -> F32:
        """Zeros where the model has none."""
        info = self._source.tensors.get(name)
        if info is None or info.type != GGMLQuantizationType.F32:
            return np.zeros(size, np.float32)
        return self._source.read_tensor(name).view(np.float32)

    def scores(self, layer: int, x: F32) -> F32 | None:
        """(T, E) what `layer` chooses experts by; None if unknown.

        Args:
            x: (T, D) inputs of its experts.
        """
        router = self._routers.get(layer)
        return np.stack([router.scores(row) for row in x]) if router is not None else None

    def likely(self, layer: int, x: F32, n: int) -> I32 | None:
        """(n,) experts that `layer` will likely choose, likeliest first, as `Router.largest`; None if unknown.

        Args:
            x: (D,) input of an earlier layer's experts.
        """
        router = self._routers.get(layer)
        if router is None:
            return None
        return router.largest(x, n)

    def popular(self, layer: int, x: F32, n: int) -> I32 | None:
        """Experts that `layer` will likely choose for at least one of several tokens, those of most tokens first; None if unknown.

        Args:
            x: (T, D) inputs of the previous layer's experts.
            n: experts per token.
        """
        router = self._routers.get(layer)
        if router is None:
            return None
        counts = np.zeros(len(router.matrix), np.int64)
        for row in x:
            counts[router.largest(row, n)] += 1
        order = np.argsort(-counts, kind="stable")
        result: I32 = order[: np.count_nonzero(counts)].astype(np.int32)
        return result
