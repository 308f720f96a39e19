"""Small models and a decoder for the tests of the expert path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localrun.engine.llama import Context
from localrun.engine.options import EngineOptions
from localrun.offload.model import OffloadedModel
from tests.gguf_models import TinyDeepseek4, write_deepseek4

F32 = npt.NDArray[np.float32]

MODEL = TinyDeepseek4(ratios=(0, 4, 128, 4), n_experts=16, n_used=3)
TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, MODEL.vocab, 150)]
TEXTS: list[list[int]] = [TOKENS, *np.random.default_rng(8).integers(0, MODEL.vocab, (5, 150)).tolist()]
"""For comparisons of arithmetics, which one text does not decide (`tests.paired`)."""


def write_model(folder: Path, model: TinyDeepseek4 = MODEL, **options: Any) -> Path:
    """A tiny random model as one GGUF."""
    return write_deepseek4(folder / "model.gguf", model, **options)[0]


def logits(
    model: Any,
    tokens: list[int] = TOKENS,
    *,
    batch: int = 64,
    kv_type: str = "f16",
    n_threads: int = 1,
    attention: bool = True,
) -> F32:
    """(T, n_vocab) logits of a fresh context, `batch` tokens at a time, llama.cpp's own operations on `n_threads`: for so small a
    model they wait for each other longer than they compute. Our kernels have threads of their own. `attention`: on our device if
    the model is `OffloadedModel`.

    Raises:
        BaseException: what our device kept as the cause, if a decode failed.
    """
    options = EngineOptions(n_batch=256, kv_type=kv_type)
    context = Context(model.model, options, n_ctx=512, n_threads=n_threads, all_logits=True)
    context.small_operations = attention and isinstance(model, OffloadedModel)
    try:
        rows = []
        for at in range(0, len(tokens), batch):
            part = tokens[at : at + batch]
            code = context.decode(part, at, all_logits=True)
            if code:
                raise model.take_error() or AssertionError(f"llama_decode gave {code} without a cause")
            rows += [context.logits(i).copy() for i in range(len(part))]
        return np.stack(rows)
    finally:
        context.close()


def floor_ram(model: OffloadedModel) -> int:
    """Smallest `ram_bytes` that the model opens with."""
    pool = model.pool
    return pool.residency.floor_bytes + pool.residency.store.staging_bytes
