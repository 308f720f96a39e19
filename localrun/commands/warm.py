"""Compiles this processor's kernels ahead of time, so chats and conversions don't wait for the compiler."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType as Type

from localrun.api import demo
from localrun.engine.facts import Timings
from localrun.engine.options import EngineOptions
from localrun.engine.process.process import EngineProcess
from localrun.engine.process.protocol import Finished, Generate
from localrun.offload.kernels import warm_up
from localrun.quant.formats import k_quantize
from localrun.quant.formats.quantize import quantize_rows

TYPES = (
    *(Type.MXFP4, Type.Q8_0, Type.BF16, Type.F16, Type.F32),
    *(Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q4_0, Type.Q5_0),
    *(Type.IQ1_S, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S, Type.IQ4_XS, Type.IQ4_NL),
)
"""What models of this kind are stored in; kernels of other types are compiled when such a model is opened."""


def warm_kernels(status: Callable[[str], None]) -> int:
    """Compiles the kernels of all common types, and what conversion to K types needs, unless they are cached.

    Returns:
        How many types models may be stored in.
    """
    for number, type_ in enumerate(TYPES):
        status(f"compiling kernels: {type_.name} ({number + 1} of {len(TYPES)})")
        warm_up([type_])
    quantizers = sorted(k_quantize.TYPES)
    for number, type_ in enumerate(quantizers):
        status(f"compiling quantizers: {type_.name} ({number + 1} of {len(quantizers)})")
        quantize_rows(np.zeros((1, 256), np.float32), type_, np.ones(256, np.float32))
    return len(TYPES)


def try_demo_model(status: Callable[[str], None]) -> Timings:
    """Converts the demo model if needed and generates an answer in an engine process, which compiles the rest and tests the
    installation.

    Raises:
        LocalrunError: any failure.
    """
    status("the demo model answers")
    command = Generate(messages=({"role": "user", "content": "Hello"},), max_tokens=16)
    with EngineProcess() as engine:
        for _ in engine.load(demo.converted(), EngineOptions(n_ctx=512)):
            pass
        *_, finished = engine.generate(command)
    assert isinstance(finished, Finished)
    return finished.timings
