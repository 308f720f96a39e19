"""What a format does to a dense matrix's output: attention, shared experts, compressors, output head, embeddings.

As `error.py` for experts: matrices are quantized and dequantized and multiplied with rows that the model really gave them. Two
slices of a matrix's rows are measured, which is enough: every output row is a sample of the same kind. Where no text was run, the
inputs are taken as white, which leaves the error of the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from localrun.errors import FormatError
from localrun.quant.precision.error import rounded
from localrun.quant.precision.importance import F32, Importance

_T = GGMLQuantizationType

EMBEDDING, HEAD = "token_embd", "output"

KINDS = (
    *("attn_q_a", "attn_q_b", "attn_kv", "attn_output_a", "attn_output_b"),
    *("attn_compressor_kv", "attn_compressor_gate", "indexer_compressor_kv", "indexer_compressor_gate", "indexer.attn_q_b"),
    *("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp", HEAD, EMBEDDING),
)  # fmt: skip
"""Matrices whose format can be chosen. The router is not: near-ties decide which experts are used."""

TYPES = (_T.Q4_K, _T.Q5_K, _T.Q6_K, _T.Q8_0, _T.BF16)
"""What they may become: formats that our kernels multiply without unpacking first, from small to exact."""

SAMPLE_ROWS = 32
"""Inputs that a matrix is measured on."""
MEASURED_ROWS = 128
"""Consecutive rows that an error is measured on; FP8's scales change every 128."""


def kind_of(name: str) -> str | None:
    """`blk.3.attn_q_a.weight` -> `attn_q_a`; None for what has no choice."""
    stem = name.removesuffix(".weight")
    kind = stem.split(".", 2)[2] if stem.startswith("blk.") else stem
    return kind if kind in KINDS else None


def possible_types(n_in: int) -> tuple[GGMLQuantizationType, ...]:
    """Of `TYPES`, those whose blocks divide a row."""
    return tuple(kind for kind in TYPES if n_in % GGML_QUANT_SIZES[kind][0] == 0)


class Matrices(Protocol):
    """Where exact weights come from: a checkpoint."""

    def shape(self, name: str) -> tuple[int, int]:
        """n_out, n_in."""
        ...

    def rows(self, name: str, first: int, count: int) -> F32:
        """(count, n_in); `first` is a multiple of `MEASURED_ROWS`."""
        ...


@dataclass(frozen=True, slots=True)
class DenseErrors:
    """Squared error of every matrix's output, relative to the output's power, by name and format."""

    relative: Mapping[str, Mapping[GGMLQuantizationType, float]]

    def to_json(self) -> dict[str, dict[str, float]]:
        """For a conversion that goes on after a kill, and for the report."""
        return {name: {kind.name.lower(): error for kind, error in row.items()} for name, row in self.relative.items()}

    @classmethod
    def from_json(cls, value: Any) -> DenseErrors:
        """Reads what `to_json` wrote. Raises FormatError if it is something else."""
        try:
            return cls(
                {name: {_T[kind.upper()]: float(error) for kind, error in row.items()} for name, row in value.items()}
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"no errors of dense matrices: {error}") from None


def measure_dense(
    matrices: Matrices,
    names: Sequence[str],
    inputs: Mapping[str, F32],
    importance: Importance,
    *,
    n_threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> DenseErrors:
    """Measures each matrix in all formats that hold its rows.

    Args:
        inputs: (G, R, n_in) rows by name; a matrix without is taken as getting white ones.
        progress: called with (matrices measured, in all).
    """
    result = {}
    with ThreadPoolExecutor(max(1, n_threads)) as pool:
        measured = pool.map(
            lambda name: _measure(matrices, name, inputs.get(name), importance.dense_weights(name)), names
        )
        for name, errors in zip(names, measured, strict=True):
            result[name] = errors
            if progress is not None:
                progress(len(result), len(names))
    return DenseErrors(result)


def _measure(
    matrices: Matrices, name: str, inputs: F32 | None, weights: F32 | None
) -> dict[GGMLQuantizationType, float]:
    n_out, n_in = matrices.shape(name)
    n_groups = 1 if inputs is None else len(inputs)
    kinds = possible_types(n_in)
    power, errors = 0.0, dict.fromkeys(kinds, 0.0)
    for first in sorted({0, n_out // 2 // MEASURED_ROWS * MEASURED_ROWS}):
        group = first * n_groups // n_out
        count = min(MEASURED_ROWS, (group + 1) * n_out // n_groups - first)
        exact = matrices.rows(name, first, count)
        x = None if inputs is None else inputs[group]
        power += _power(exact, x)
        for kind in kinds:
            errors[kind] += _power(rounded(exact, kind, weights, name) - exact, x)
    return {kind: error / power if power > 0 else 0.0 for kind, error in errors.items()}


def _power(weights: F32, x: F32 | None) -> float:
    return float(np.square(weights if x is None else x @ weights.T, dtype=np.float64).sum())
