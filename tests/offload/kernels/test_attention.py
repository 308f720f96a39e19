"""Attention and the indexer against float64, over F16 and Q8_0 rows in two places, and the same bits from any number of threads."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, dequantize, quantize

from localrun.offload.kernels import attention
from localrun.offload.kernels.attention import ATTENTION, INDEXER
from localrun.offload.kernels.cpu import level
from localrun.offload.kernels.threads import pool_for
from localrun.offload.kernels.vectors import scale16
from localrun.options import OWN_KV_TYPES

pytestmark = pytest.mark.skipif(not attention.is_supported(), reason="attention stays llama.cpp's without F16C")

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
KINDS = [GGMLQuantizationType(kind) for kind in attention.ROW_TYPES]


@dataclass(frozen=True)
class Rows:
    """Rows (n, D) of a cache: their bytes, and what they mean."""

    kind: GGMLQuantizationType
    data: npt.NDArray[np.uint8]

    @property
    def values(self) -> F64:
        return dequantize(self.data, self.kind).astype(np.float64)

    @property
    def address(self) -> int:
        return self.data.ctypes.data if len(self.data) else 0

    @classmethod
    def random(cls, kind: GGMLQuantizationType, n: int, n_values: int, rng: np.random.Generator) -> Rows:
        values = rng.standard_normal((n, n_values), np.float32)
        return cls(kind, quantize(values, kind).view(np.uint8))


@nb.njit
def _attend(task: int, call: int, pool: int, n_threads: int) -> None:
    attention.attend(task, call, pool, n_threads)


@nb.njit
def _index(task: int, call: int, pool: int, n_threads: int) -> None:
    attention.index(task, call, pool, n_threads)


def _mask(n_tokens: int, n_rows: int, n_seen: int, rng: np.random.Generator) -> npt.NDArray[np.float16]:
    mask = np.full((n_tokens, n_rows), -np.inf, np.float16)
    for row in mask:
        row[rng.choice(n_rows, min(n_seen, n_rows), replace=False)] = rng.choice([0, -1.5], min(n_seen, n_rows))
    return mask


@dataclass(frozen=True)
class Attention:
    """Queries (T, H, D), rows of the window and others, which rows a token sees, and a sink per head."""

    q: F32
    window: Rows
    others: Rows
    mask: npt.NDArray[np.float16]
    sinks: F32 | None

    def run(self, n_threads: int = 1) -> F32:
        out, (n_tokens, n_heads, n_values) = np.full(self.q.shape, np.nan, np.float32), self.q.shape
        record = ATTENTION.make(
            n_tokens=n_tokens,
            n_heads=n_heads,
            n_values=n_values,
            q=self.q.ctypes.data,
            q_token=self.q.strides[0],
            q_head=self.q.strides[1],
            row_type=int(self.window.kind),
            rows=self.window.address,
            row_stride=self.window.data.strides[0],
            n_first=len(self.window.data),
            others=self.others.address,
            other_stride=self.others.data.strides[0],
            n_rows=self.mask.shape[1],
            mask=self.mask.ctypes.data,
            mask_token=self.mask.strides[0],
            sinks=0 if self.sinks is None else self.sinks.ctypes.data,
            scale_bits=int(np.float32(0.125).view(np.int32)),
            out=out.ctypes.data,
        )
        _attend(attention.attend_address(), record.ctypes.data, pool_for(n_threads), n_threads)
        return out

    def expected(self) -> F64:
        rows = np.concatenate([self.window.values, self.others.values])
        scores = np.einsum("thd,rd->thr", self.q.astype(np.float64), rows) * 0.125 + self.mask[:, None, :]
        if self.sinks is not None:
            scores = np.concatenate(
                [scores, np.broadcast_to(self.sinks[None, :, None], (*self.q.shape[:2], 1))], axis=2
            )
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        result: F64 = np.einsum("thr,rd->thd", weights[:, :, : len(rows)], rows)
        return result

    @classmethod
    def random(
        cls,
        kind: GGMLQuantizationType,
        n_tokens: int,
        n_heads: int,
        n_values: int,
        n_rows: tuple[int, int],
        n_seen: int,
        *,
        sinks: bool,
    ) -> Attention:
        rng = np.random.default_rng(n_heads + n_seen)
        window, others = (Rows.random(kind, n, n_values, rng) for n in n_rows)
        return cls(
            rng.standard_normal((n_tokens, n_heads, n_values), np.float32),
            window,
            others,
            _mask(n_tokens, sum(n_rows), n_seen, rng),
            rng.standard_normal(n_heads, np.float32) if sinks else None,
        )


SHAPES: list[tuple[int, int, int, tuple[int, int], int, bool]] = [
    (1, 64, 512, (128, 700), 640, True),  # a token of DeepSeek-V4-Flash
    (3, 64, 512, (256, 33), 77, True),
    (2, 4, 64, (40, 3), 7, True),  # fewer heads than are computed together
    (5, 20, 128, (1, 0), 1, False),
    (2, 16, 96, (64, 65), 129, True),  # two chunks and one row
]


def test_what_the_kernels_read_has_a_name_as_an_option() -> None:
    assert [kind.name.lower() for kind in KINDS] == list(OWN_KV_TYPES)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_exact_to_f32(kind: GGMLQuantizationType, shape: Any) -> None:
    *sizes, sinks = shape
    call = Attention.random(kind, *sizes, sinks=sinks)
    assert np.abs(call.run() - call.expected()).max() < 2e-5


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_token_that_sees_nothing_gets_zeros(kind: GGMLQuantizationType) -> None:
    call = Attention.random(kind, 2, 16, 64, (8, 8), 0, sinks=True)
    assert np.array_equal(call.run(), np.zeros((2, 16, 64), np.float32))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_that_are_not_seen_are_not_read(kind: GGMLQuantizationType) -> None:
    call = Attention.random(kind, 1, 16, 64, (8, 8), 5, sinks=True)
    expected = call.run()
    seen = call.mask[0] > -np.inf
    call.window.data[~seen[:8]] = 0xFF  # NaN in both types
    call.others.data[~seen[8:]] = 0xFF
    assert np.array_equal(call.run(), expected)


@dataclass(frozen=True)
class Indexer:
    """Queries (T, H, D), keys (K, D), a weight per head, which keys a token may choose."""

    q: F32
    keys: Rows
    weights: F32
    mask: npt.NDArray[np.float16]

    def run(self, n_threads: int = 1) -> F32:
        out, (n_tokens, n_heads, n_values) = np.full(self.mask.shape, np.nan, np.float32), self.q.shape
        record = INDEXER.make(
            n_tokens=n_tokens,
            n_heads=n_heads,
            n_values=n_values,
            q=self.q.ctypes.data,
            q_token=self.q.strides[0],
            q_head=self.q.strides[1],
            weights=self.weights.ctypes.data,
            weight_token=self.weights.strides[0],
            key_type=int(self.keys.kind),
            keys=self.keys.address,
            key_stride=self.keys.data.strides[0],
            n_keys=len(self.keys.data),
            mask=self.mask.ctypes.data,
            mask_token=self.mask.strides[0],
            out=out.ctypes.data,
            out_token=out.strides[0],
        )
        _index(attention.index_address(), record.ctypes.data, pool_for(n_threads), n_threads)
        return out

    def expected(self) -> F64:
        products = np.einsum("thd,kd->thk", self.q.astype(np.float64), self.keys.values)
        result: F64 = np.einsum("thk,th->tk", np.maximum(products, 0), self.weights.astype(np.float64)) + self.mask
        return result

    @classmethod
    def random(
        cls, kind: GGMLQuantizationType, n_tokens: int, n_heads: int, n_values: int, n_keys: int, n_seen: int
    ) -> Indexer:
        rng = np.random.default_rng(n_keys)
        return cls(
            rng.standard_normal((n_tokens, n_heads, n_values), np.float32),
            Rows.random(kind, n_keys, n_values, rng),
            rng.standard_normal((n_tokens, n_heads), np.float32),
            _mask(n_tokens, n_keys, n_seen, rng),
        )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(1, 64, 128, 1500, 1500), (2, 4, 64, 5, 5), (3, 20, 32, 1030, 100)], ids=str)
def test_the_indexer_is_exact_to_f32(kind: GGMLQuantizationType, shape: tuple[int, int, int, int, int]) -> None:
    call = Indexer.random(kind, *shape)
    found, expected = call.run(), call.expected()
    assert np.array_equal(np.isneginf(found), np.isneginf(expected))
    chosen = ~np.isneginf(expected)
    assert np.abs(found[chosen] - expected[chosen]).max() < 1e-5 * np.abs(expected[chosen]).max()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "make",
    [
        lambda kind: Attention.random(kind, 3, 64, 128, (64, 200), 150, sinks=True),
        lambda kind: Indexer.random(kind, 3, 64, 64, 3000, 2500),
    ],
    ids=["attention", "indexer"],
)
def test_threads_change_nothing(
    make: Callable[[GGMLQuantizationType], Attention | Indexer], kind: GGMLQuantizationType
) -> None:
    assert np.array_equal(make(kind).run(1), make(kind).run(3))


def test_what_has_no_f16_conversion_leaves_attention_to_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALRUN_KERNELS", "generic")
    assert level().value == "generic"
    assert not attention.is_supported()


def test_a_level_that_is_forced_limits_the_compiler_too() -> None:
    """What `tests/conftest.py` promises: attention has no levels of its own."""
    function = nb.njit(lambda source, target: scale16(source, np.float32(2), target))
    function.compile("void(intp, intp)")
    registers = set(re.findall(r"%([xyz])mm", "".join(function.inspect_asm().values())))
    assert registers - {"x"} <= ({"y", "z"} if level().value.startswith("avx512") else {"y"})
    assert registers - {"x"}, "vectors at all"
