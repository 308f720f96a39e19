"""Compiling ahead: every type that models come in, and every quantizer, each told as it begins."""

from __future__ import annotations

import pytest
from gguf import GGMLQuantizationType

from localrun.commands import warm
from localrun.offload.kernels.interleaved.formats import FORMATS
from localrun.quant.formats import k_quantize


def test_all_types_and_quantizers_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[GGMLQuantizationType] = []
    quantizers: list[GGMLQuantizationType] = []
    told: list[str] = []
    monkeypatch.setattr(warm, "warm_up", compiled.extend)
    monkeypatch.setattr(warm, "quantize_rows", lambda rows, type_, weights: quantizers.append(type_))
    assert warm.warm_kernels(told.append) == len(warm.TYPES) == len(set(compiled))
    assert compiled == list(warm.TYPES)
    assert set(FORMATS) <= set(compiled), "a type with vector code is compiled ahead"
    assert set(quantizers) == k_quantize.TYPES
    assert told[0] == f"compiling kernels: {warm.TYPES[0].name} (1 of {len(warm.TYPES)})"
    assert told[-1].endswith(f"({len(quantizers)} of {len(quantizers)})")
