"""SwiGLU against its definition in F64, and at the values where a naive formula overflows."""

from __future__ import annotations

import numpy as np
import pytest

from localrun.quant.model.activation import swiglu


@pytest.mark.parametrize("limit", [10.0, np.inf])
def test_swiglu_is_its_definition(limit: float) -> None:
    rng = np.random.default_rng(1)
    gate, up = (rng.normal(0, 8, (3, 64)).astype(np.float32) for _ in range(2))
    clamped = np.minimum(gate.astype(np.float64), limit)
    expected = clamped / (1 + np.exp(-clamped)) * np.clip(up, -limit, limit)
    np.testing.assert_allclose(swiglu(gate, up, limit), expected, rtol=1e-5, atol=1e-7)


def test_a_very_negative_gate_gives_zero_without_a_warning() -> None:
    gate, up = np.float32([-1e4, -200.0]), np.float32([3.0, -3.0])
    with np.errstate(all="raise", under="ignore"):
        assert np.abs(swiglu(gate, up, 10.0)).max() == 0
