"""Attention of a real model on our device: that it is ours, what it computes, and that a join nobody reads is an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from localrun.errors import DecodeError
from localrun.offload.device.device import expert_device
from localrun.offload.device.layouts import PROCESS
from localrun.offload.kernels import attention
from localrun.offload.model import OffloadedModel, OffloadOptions, open_offloaded
from localrun.options import OWN_KV_TYPES
from localrun.quant.open import open_model
from tests.offload.models import TEXTS, TOKENS, logits
from tests.reference import kl

pytestmark = pytest.mark.skipif(not attention.is_supported(), reason="attention stays llama.cpp's without F16C")


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[OffloadedModel]:
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2)) as model:
        yield model


def _attention_ns() -> int:
    return int(expert_device().process.fields[PROCESS.attention_ns])


@pytest.mark.parametrize("kv_type", OWN_KV_TYPES)
def test_window_compressed_rows_and_indexer_are_ours_and_agree_with_llamacpp(
    model: OffloadedModel, kv_type: str
) -> None:
    before = _attention_ns()
    ours = [logits(model, text, kv_type=kv_type) for text in TEXTS]
    assert _attention_ns() > before
    assert model.take_error() is None
    before = _attention_ns()
    ggmls = [logits(model, text, kv_type=kv_type, attention=False) for text in TEXTS]
    assert _attention_ns() == before
    assert np.median(kl(np.concatenate(ggmls), np.concatenate(ours))) < 1e-3


def test_batches_of_any_size_give_the_same_bits(model: OffloadedModel) -> None:
    assert np.array_equal(
        logits(model, TOKENS[:40], batch=40, n_threads=1), logits(model, TOKENS[:40], batch=40, n_threads=2)
    )


def test_a_cache_of_another_type_stays_llamacpps(model: OffloadedModel) -> None:
    before = _attention_ns()
    logits(model, TOKENS[:20], kv_type="q4_0")
    assert _attention_ns() == before


def test_a_join_that_nobody_reads_is_an_error_and_forgotten(model: OffloadedModel) -> None:
    logits(model, TOKENS[:8])
    expert_device().process.fields[PROCESS.unread_joins] += 1
    assert isinstance(model.take_error(), DecodeError)
    assert model.take_error() is None
