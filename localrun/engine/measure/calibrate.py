"""Runs a text through a loaded model and collects expert statistics for quantizers and the precision solver.

These are sums of squared inputs per expert and channel (`Importance`), the router weights that outputs were multiplied by, and,
for a sample of positions, the experts' input rows with the chosen experts, on which output errors are measured.

Positions are sampled, the same ones in all layers: one row serves all experts it was routed to, so memory holds several times
more rows per expert than with separate samples per expert. An expert that no sampled position chose is measured on other
experts' rows (`expert_error`).

Our device does not see router weights; they are computed here from the same input and the router's matrix, as in llama.cpp
(llama-graph.cpp, build_moe_ffn). For unknown routers they are omitted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.engine.engine import Engine
from localrun.engine.measure.calibration_text import CalibrationText
from localrun.errors import DecodeError, UsageError
from localrun.offload.device.device import Weight
from localrun.offload.model import OffloadedModel
from localrun.quant.model.source import ModelSource
from localrun.quant.precision.dense import SAMPLE_ROWS
from localrun.quant.precision.importance import F32, F64, DenseImportance, Importance, LayerImportance
from localrun.quant.precision.samples import ActivationSamples, LayerSamples

log = logging.getLogger(__name__)

I32 = npt.NDArray[np.int32]
LEAST_TOKENS = 256
"""Fewer tokens leave most experts of a real model unseen."""
SAMPLE_BYTES = 512 << 20
_MAX_POSITIONS = 4096

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The result of one run.

    Attributes:
        importance: sums over all tokens.
        samples: rows to measure output errors on.
        dense: (G, R, n_in) rows that dense matrices were multiplied with, by name; of those that our device has.
    """

    importance: Importance
    samples: ActivationSamples
    dense: Mapping[str, F32]


def calibrate(
    engine: Engine,
    text: CalibrationText,
    *,
    window: int = 512,
    max_tokens: int = 0,
    seed: int = 0,
    sample_bytes: int = SAMPLE_BYTES,
    progress: Progress | None = None,
) -> Calibration:
    """Runs `text` through the engine's model, which must have its experts on our device.

    Args:
        window: tokens per window; each starts with an empty context.
        max_tokens: only the first ones; 0: all.
        seed: chooses the sampled positions.
        sample_bytes: maximum memory for sampled rows.
        progress: called with (tokens done, total tokens).

    Raises:
        UsageError: the text has too few tokens, or the engine's experts are not on our device.
        DecodeError: the model's activations are not finite.
    """
    loaded = engine._loaded
    if not isinstance(loaded, OffloadedModel):
        raise UsageError("calibration needs the experts on localrun's device")
    window = min(window, engine.facts.n_ctx, engine.facts.n_batch)
    windows = text.token_windows(engine.tokenizer, engine.chat_encoder, engine.vocab.begin, window)
    windows = _first_tokens(windows, max_tokens) if max_tokens else windows
    n_tokens = sum(map(len, windows))
    if n_tokens < LEAST_TOKENS:
        raise UsageError(
            f"{text.name}: {n_tokens} tokens are too few to calibrate on; at least {LEAST_TOKENS} are needed",
            hint="use a longer text, or leave out --calibrate to use the built-in one",
        )
    sums = ExpertSums(loaded.source, n_tokens, seed=seed, sample_bytes=sample_bytes)
    # All logits: otherwise llama.cpp computes the last layer for a window's last token only.
    with engine.session(all_logits=True) as session:
        loaded.pool.collect(sums)
        loaded.dense.show(sums.dense.collect)
        try:
            for ids in windows:
                sums.begin(len(ids))
                session.reset()
                for _ in session.feed_all_logits(ids):
                    pass
                sums.end()
                if progress is not None:
                    progress(sums.n_done, n_tokens)
        finally:
            loaded.dense.show(None)
            loaded.pool.collect(None)
    importance = sums.importance((text.name,), window, text.digest)
    return Calibration(importance, sums.samples(), sums.dense.samples())


def _first_tokens(windows: list[list[int]], n: int) -> list[list[int]]:
    result = []
    for ids in windows:
        if n <= 0:
            break
        result.append(ids[:n])
        n -= len(ids)
    return result


class ExpertSums:
    """Collects from the expert path (`localrun.offload.pool.Collector`). One batch at a time: `begin`, decode, `end`.

    Args:
        n_tokens: total tokens to run; sampled positions are chosen among them in advance.
    """

    def __init__(self, source: ModelSource, n_tokens: int, *, seed: int = 0, sample_bytes: int = SAMPLE_BYTES) -> None:
        self._layers = source.moe_layers
        self._routers = {layer: ObservedRouter.of(source, layer) for layer in self._layers}
        self._counts = {n: np.zeros(moe.n_experts) for n, moe in self._layers.items()}
        self._x = {n: np.zeros((moe.n_experts, moe.n_embd), np.float32) for n, moe in self._layers.items()}
        self._activated = {n: np.zeros((moe.n_experts, moe.n_ff), np.float32) for n, moe in self._layers.items()}
        self._route_power = {n: np.zeros(moe.n_experts) for n, moe in self._layers.items()}
        row_bytes = sum(4 * moe.n_embd + moe.n_experts for moe in self._layers.values())
        n_positions = max(1, min(n_tokens, _MAX_POSITIONS, sample_bytes // row_bytes))
        positions = np.sort(np.random.default_rng(seed).choice(n_tokens, n_positions, replace=False))
        self._slot = np.full(n_tokens, -1, np.int64)  # of each position in the samples
        self._slot[positions] = np.arange(n_positions)
        self._rows = {n: np.zeros((n_positions, moe.n_embd), np.float32) for n, moe in self._layers.items()}
        self._chosen = {n: np.zeros((n_positions, moe.n_experts), bool) for n, moe in self._layers.items()}
        self._probabilities: dict[int, F32] = {}
        self._selected: dict[int, npt.NDArray[np.bool_]] = {}
        self.n_done = 0
        self._n_batch = 0
        self.dense = DenseSums(n_tokens)

    def begin(self, n_tokens: int) -> None:
        """A batch of so many tokens follows."""
        self._n_batch = n_tokens
        self._probabilities.clear()
        self._selected.clear()

    def collect(self, weight: Weight, experts: I32, starts: I32, rows: I32, x: F32) -> None:
        """See `Collector`. One call of the model may come in several parts, each with other experts."""
        layer = weight.layer
        if weight.projection == 0:
            if x.shape[0] != self._n_batch:
                raise DecodeError(f"blk.{layer}: {x.shape[0]} rows of a batch of {self._n_batch} tokens")
            self._counts[layer][experts] += np.diff(starts)
            self._sample(layer, experts, starts, rows, x)
            self._note_routing(layer, experts, starts, rows, x)
        sums = self._x if weight.projection == 0 else self._activated
        for i, expert in enumerate(experts):
            part = x[rows[starts[i] : starts[i + 1]]]
            sums[layer][expert] += np.einsum("ij,ij->j", part, part)

    def _sample(self, layer: int, experts: I32, starts: I32, rows: I32, x: F32) -> None:
        slots = self._slot[self.n_done : self.n_done + self._n_batch]
        kept = np.flatnonzero(slots >= 0)
        self._rows[layer][slots[kept]] = x[kept]
        by_pair = slots[rows]
        pairs = np.flatnonzero(by_pair >= 0)
        self._chosen[layer][by_pair[pairs], np.repeat(experts, np.diff(starts))[pairs]] = True

    def _note_routing(self, layer: int, experts: I32, starts: I32, rows: I32, x: F32) -> None:
        router = self._routers[layer]
        if router is None:
            return
        if layer not in self._probabilities:
            self._probabilities[layer] = router.probabilities(x)
            self._selected[layer] = np.zeros((x.shape[0], self._layers[layer].n_experts), bool)
        self._selected[layer][rows, np.repeat(experts, np.diff(starts))] = True

    def end(self) -> None:
        """The batch is done."""
        for layer, probabilities in self._probabilities.items():
            router = self._routers[layer]
            assert router is not None
            weights = router.weights(probabilities, self._selected[layer])
            self._route_power[layer] += np.square(weights, dtype=np.float64).sum(0)
        self.n_done += self._n_batch

    def importance(self, datasets: tuple[str, ...], chunk_tokens: int, digest: str) -> Importance:
        """The sums of all batches.

        Raises:
            DecodeError: some are not finite.
        """
        for layer in self._layers:
            for name, sums in (("gate", self._x[layer]), ("down", self._activated[layer])):
                if not np.isfinite(sums).all():
                    raise DecodeError(
                        f"blk.{layer}.ffn_{name}_exps: inputs are not finite", hint="run `localrun verify` on the model"
                    )
        layers = {
            n: LayerImportance(
                self._counts[n],
                self._x[n],
                self._activated[n],
                self._route_power[n] if self._routers[n] is not None else None,
            )
            for n in self._layers
        }
        return Importance(
            layers,
            n_tokens=self.n_done,
            datasets=datasets,
            chunk_tokens=chunk_tokens,
            text_digest=digest,
            dense=self.dense.importance(),
        )

    def samples(self) -> ActivationSamples:
        """The sampled positions."""
        return ActivationSamples({n: LayerSamples(self._rows[n], self._chosen[n]) for n in self._layers})


class DenseSums:
    """Collects what dense matrices are multiplied with: sums of squares of all rows, and `SAMPLE_ROWS` rows spread over the text.

    Args:
        n_tokens: tokens that will be run in all.
    """

    def __init__(self, n_tokens: int) -> None:
        self._step = max(1, n_tokens // SAMPLE_ROWS)
        self._sums: dict[str, F64] = {}
        self._seen: dict[str, int] = {}
        self._rows: dict[str, list[F32]] = {}

    def collect(self, name: str, x: F32) -> None:
        """Rows (G, T, n_in) of one call."""
        _, n_rows, n_in = x.shape
        sums = self._sums.setdefault(name, np.zeros(n_in))
        for group in x:
            sums += np.einsum("ij,ij->j", group, group)
        seen = self._seen.get(name, 0)
        rows = self._rows.setdefault(name, [])
        for at in range(-seen % self._step, n_rows, self._step):
            if len(rows) < SAMPLE_ROWS:
                rows.append(x[:, at].copy())
        self._seen[name] = seen + n_rows

    def samples(self) -> dict[str, F32]:
        """(G, R, n_in) of every matrix that was used."""
        return {name: np.stack(rows, axis=1) for name, rows in self._rows.items()}

    def importance(self) -> dict[str, DenseImportance]:
        """Sums of every matrix that was used."""
        return {
            name: DenseImportance(sums.astype(np.float32), float(self._seen[name] * len(self._rows[name][0])))
            for name, sums in self._sums.items()
            if np.isfinite(sums).all()
        }


# --- router weights ---------------------------------------------------------------------------------------------------

_SOFTMAX, _SIGMOID, _SQRT_SOFTPLUS = 1, 2, 4  # llama-hparams.h, llama_expert_gating_func_type


@dataclass(frozen=True, slots=True)
class ObservedRouter:
    """One layer's router, only for weights: the chosen experts are observed, not computed.

    Attributes:
        matrix: (E, D).
        gating: llama.cpp's number of the gating function.
        normalized: weights of the chosen experts are divided by their sum.
        scale: factor of all weights.
    """

    matrix: F32
    gating: int
    normalized: bool
    scale: float

    @classmethod
    def of(cls, source: ModelSource, layer: int) -> ObservedRouter | None:
        """The layer's router; None if it is of another kind than those known here."""
        name, moe = f"blk.{layer}.ffn_gate_inp.weight", source.moe_layers[layer]
        gating = _key(source.metadata, "expert_gating_func")
        info = source.tensors.get(name)
        known = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
        if (
            gating not in (_SOFTMAX, _SIGMOID, _SQRT_SOFTPLUS)
            or info is None
            or info.shape[:2] != (moe.n_embd, moe.n_experts)
        ):
            return None
        if f"blk.{layer}.ffn_gate_inp.bias" in source.tensors:
            return None
        data = source.read_tensor(name)
        if info.type == GGMLQuantizationType.BF16:
            matrix = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif info.type in known:
            matrix = data.view(known[info.type]).astype(np.float32)
        else:
            return None
        normalized, scale = _key(source.metadata, "expert_weights_norm"), _key(source.metadata, "expert_weights_scale")
        return cls(
            matrix.reshape(moe.n_experts, moe.n_embd),
            int(gating),
            bool(normalized),
            float(scale) if isinstance(scale, (int, float)) and scale else 1.0,
        )

    def probabilities(self, x: F32) -> F32:
        """(T, E) for inputs (T, D)."""
        logits = x @ self.matrix.T
        if self.gating == _SOFTMAX:
            values = np.exp(logits - logits.max(1, keepdims=True))
            values /= values.sum(1, keepdims=True)
        elif self.gating == _SIGMOID:
            values = 0.5 + 0.5 * np.tanh(0.5 * logits)
        else:
            values = np.sqrt(np.logaddexp(0, logits))
        result: F32 = values.astype(np.float32)
        return result

    def weights(self, probabilities: F32, selected: npt.NDArray[np.bool_]) -> F64:
        """(T, E) factors of the experts' outputs, 0 where an expert was not chosen."""
        values = np.where(selected, probabilities, 0).astype(np.float64)
        if self.normalized:
            values /= np.maximum(values.sum(1, keepdims=True), 6.103515625e-5)
        result: F64 = values * self.scale
        return result


def _key(metadata: Mapping[str, object], key: str) -> object:
    return metadata.get(f"{metadata.get('general.architecture')}.{key}")
