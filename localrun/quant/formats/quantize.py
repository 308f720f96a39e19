"""Quantizes F32 rows to any block type and back: with our quantizers where they exist (`k_quantize`,
`grid_quantize`), with ggml's otherwise.

Chooses the quantizer, and does the checks that the C code lacks: it aborts the process on NaN, on rows that are not whole
blocks, on missing importance weights, and where squares of tiny numbers underflow. Everything that passes `quantize_rows` is
safe for it. Calls release the interpreter lock and use one thread: callers provide threads.

Knows nothing about files or tensors; `ggml.types` calls ggml.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from localrun.errors import FormatError
from localrun.ggml import types
from localrun.quant.formats.later import grid_quantize, k_quantize, kernels

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_T = GGMLQuantizationType
_GRID_TYPES = frozenset({_T.IQ2_XXS, _T.IQ2_XS, _T.IQ2_S, _T.IQ3_XXS, _T.IQ3_S})

TYPES = _GRID_TYPES | {_T.MXFP4, _T.Q8_0, _T.Q6_K, _T.Q5_K, _T.Q4_K, _T.Q3_K, _T.Q2_K, _T.IQ4_XS}
"""What rows can be quantized to."""

_MAX_WEIGHT_EXPONENT = 12
_SMALLEST_WEIGHT = np.float32(2.0**-14)
_TINY = np.float32(2.0**-24)
"""The grid types' search compares squares of (importance times |x|)^2, which must not vanish in F32: with |x| at least 2^-24 (the
smallest F16, the type of every block's scale) and importance between 2^-14 and 2^12, none does: 2^(2 * -14 + 4 * -24) > 2^-126."""

_F16_MAX_BITS = np.uint32(np.float32(65504).view(np.uint32))
_MAGNITUDE = np.uint32(0x7FFFFFFF)


def needs_weights(kind: GGMLQuantizationType) -> bool:
    """Whether the type can't be quantized without importance; `quantize_rows` then uses uniform importance."""
    return types.needs_importance(kind)


def prepare_weights(weights: Floats | None, n_in: int, kind: GGMLQuantizationType, where: str) -> Floats | None:
    """Importance prepared for ggml: checked, scaled by a power of two (which changes no result), and nonzero everywhere.

    Args:
        weights: `(n_in,)`, or None: then all ones where the type needs weights.
        where: name of the tensor for error messages.

    Raises:
        FormatError: another length, a negative number, NaN or infinity.
    """
    if weights is None:
        return np.ones(n_in, np.float32) if needs_weights(kind) else None
    if weights.shape != (n_in,) or weights.dtype != np.float32:
        raise FormatError(f"{where}: importance of shape {weights.shape} for rows of {n_in}")
    largest = float(weights.max())
    if not (np.isfinite(weights).all() and float(weights.min()) >= 0):
        raise FormatError(f"{where}: importance is negative or not a number")
    if largest == 0:
        return np.ones(n_in, np.float32)
    exponent = _MAX_WEIGHT_EXPONENT - int(np.frexp(largest)[1])
    scaled: Floats = np.maximum(np.ldexp(weights, exponent).astype(np.float32), _SMALLEST_WEIGHT)
    return scaled


def quantize_rows(
    values: Floats,
    kind: GGMLQuantizationType,
    weights: Floats | None = None,
    out: Bytes | None = None,
    where: str = "tensor",
    *,
    ours: bool = True,
) -> Bytes:
    """Quantizes rows: with our quantizers where there is one for the type, otherwise as llama.cpp does.

    Args:
        values: `(n_out, n_in)`, contiguous.
        kind: one of TYPES.
        weights: importance of the columns, `(n_in,)`; what a squared error there counts. Use `prepare_weights` once for many calls.
        out: where the rows go; allocated if None.
        where: name of the tensor for error messages.
        ours: False: by ggml's quantizer in any case, for comparison.

    Returns:
        The rows' bytes, flat.

    Raises:
        FormatError: NaN, infinity, or beyond F16's range; a row that is no whole number of blocks; unusable weights.
    """
    n_out, n_in = values.shape
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if kind not in TYPES or n_in % block:
        raise FormatError(f"{where}: rows of {n_in} values can't be stored as {kind.name} (blocks of {block})")
    check_range(values.view(np.uint32), kind, where)
    weights = prepare_weights(weights, n_in, kind, where)
    size = n_out * (n_in // block * block_bytes)
    out = np.empty(size, np.uint8) if out is None else out
    assert out.size == size
    assert out.flags.c_contiguous
    assert values.flags.c_contiguous
    if kind in k_quantize.TYPES and ours:
        k_quantize.quantize(values, kind, weights, out)
        return out
    if kind == _T.IQ2_XXS and ours:
        assert weights is not None
        grid_quantize.quantize(values, weights, out)
        return out
    if kind in _GRID_TYPES:
        flushed = np.empty_like(values)
        kernels.flush_tiny(values.reshape(-1), _TINY, flushed.reshape(-1))
        values = flushed
    importance = None if weights is None else weights.ctypes.data
    written = types.quantize(kind, values.ctypes.data, n_out, n_in, out.ctypes.data, importance)
    assert written == size
    return out


def check_range(bits: npt.NDArray[np.uint32], kind: GGMLQuantizationType, where: str) -> None:
    """Refuses what would become NaN or infinity in a block's F16 scale.

    Raises:
        FormatError: names the first weight.
    """
    flat = bits.reshape(-1)
    if kernels.any_above(flat, _MAGNITUDE, _F16_MAX_BITS):
        at = int(np.flatnonzero((flat & _MAGNITUDE) > _F16_MAX_BITS)[0])
        value = float(flat[at : at + 1].view(np.float32)[0])
        if np.isnan(value):
            raise FormatError(f"{where}: weight {at} is NaN", hint="the file is damaged; download it again")
        raise FormatError(f"{where}: block at weight {at} is too large (or not finite) for {kind.name}'s F16 scale")


def dequantize_rows(rows: Bytes, kind: GGMLQuantizationType, out: Floats | None = None) -> Floats:
    """The values of whole blocks, flat. `rows` is contiguous; several hundred million weights per second and core."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    assert rows.flags.c_contiguous
    assert rows.size % block_bytes == 0
    n = rows.size // block_bytes * block
    out = np.empty(n, np.float32) if out is None else out
    assert out.size == n
    assert out.flags.c_contiguous
    types.dequantize(kind, rows.ctypes.data, n, out.ctypes.data)
    return out
