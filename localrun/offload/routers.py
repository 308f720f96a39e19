"""Predicts the experts of the next layers by applying their routers to the current layer's input.

Hidden states change little between layers, so this finds most of the experts a layer or two early (`tools/guess_next_layer.py`
measures how many). It uses llama.cpp's matrices in CPU memory without copying. Scores are only for ranking: no answer depends
on them.
"""

from __future__ import annotations

import ctypes as C
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


@cached_jit(nogil=True, fastmath=True)
def _products(matrix: npt.NDArray[Any], shift: int, x: F32, out: F32) -> None:
    """out (E,) = matrix (E, D) @ x (D,), for words that are the upper bits of f32."""
    for e in range(matrix.shape[0]):
        total = np.float32(0)
        for i in range(matrix.shape[1]):
            total += float_of_bits(np.uint32(matrix[e, i]) << np.uint32(shift)) * x[i]
        out[e] = total


@dataclass(frozen=True, slots=True, eq=False)
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
        """(n,) experts that `layer` will likely choose, likeliest first; None if unknown.

        Args:
            x: (D,) input of an earlier layer's experts.
        """
        router = self._routers.get(layer)
        if router is None:
            return None
        scores = router.scores(x)
        best = np.argpartition(-scores, n - 1)[:n]
        result: I32 = best[np.argsort(-scores[best])].astype(np.int32)
        return result

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
            counts[np.argpartition(-router.scores(row), n - 1)[:n]] += 1
        order = np.argsort(-counts, kind="stable")
        result: I32 = order[: np.count_nonzero(counts)].astype(np.int32)
        return result
