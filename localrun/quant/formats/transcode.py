"""Converts a checkpoint's number formats to ggml's: exactly where the target can represent the value, otherwise with measured loss.

    official            ggml     how
    FP4 + E8M0 / 32     MXFP4    byte shuffle, exact
    FP8 + E8M0 / 128²   BF16     exact
    FP8 + E8M0 / 128²   Q8_0     ggml's reference rounding; the loss is measured on every weight
    FP8, FP4, BF16, F32 F32      exact
    FP4                 BF16     exact
    F32, BF16           Q8_0, BF16 (F32 only), or copied
    FP8, FP4, BF16, F32 K, IQ    decoded to F32, quantized by `ggml_quantize` or `k_quantize`; the loss is measured
    I64                 I32      exact, range checked

A weight that the target can't represent (NaN, beyond F32, below BF16's smallest step) is an error, never a silent change.

Layouts (element j of a block of 32 unless said otherwise):
  E8M0: byte e is 2^(e-127), 0xFF is NaN (OCP Microscaling Formats 1.0, section 5.4.1).
  FP4 (E2M1): sign<<3 | code, magnitudes 0 .5 1 1.5 2 3 4 6. Official byte i holds elements 2i (low nibble) and 2i+1.
  MXFP4 block, 17 bytes: E8M0 scale, then byte j holds elements j (low nibble) and j+16 (ggml-common.h, block_mxfp4).
  FP8 (E4M3FN): 1 sign, 4 exponent (bias 7), 3 mantissa bits; 0x7F and 0xFF are NaN. One scale per 128 x 128 weights.
  Q8_0 block, 34 bytes: F16 scale d = max|x|/127, then 32 int8 round(x/d), halves away from zero (quantize_row_q8_0_ref).

Conversions release the interpreter lock and use one thread: callers bring the threads. Notable departure: whole arrays are never
decoded to F32 first; a block at a time stays in the first-level cache, for K and IQ types some rows in the second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.alignment import ceil_div
from localrun.errors import FormatError
from localrun.quant.formats import quantize as ggml_quantize
from localrun.quant.formats.later import kernels
from localrun.quant.model.source import Encoding, Projection

Bytes = npt.NDArray[np.uint8]

_NAN_SCALE = 0xFF
_FP4_SAFE_MAX = 252
"""Largest E8M0 scale with which every FP4 code stays below F32's limit: 6 * 2^125."""
_FP8_SAFE_MAX = 246
"""The same for E4M3: 448 * 2^119."""
_FP8_BF16_SAFE_MIN = 3
"""Smallest E8M0 scale with which every E4M3 value is a multiple of BF16's smallest step 2^-133: 2^-9 * 2^-124."""


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a rounding conversion, as sums over weights in F64.

    Attributes:
        error_power: sum of squared differences.
        power: sum of squared weights.
    """

    error_power: float = 0.0
    power: float = 0.0

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.error_power + other.error_power, self.power + other.power)

    @property
    def relative_rms(self) -> float:
        """Root of error power over power; 0 where all weights are 0."""
        return float((self.error_power / self.power) ** 0.5) if self.power > 0 else 0.0


# --- checks ------------------------------------------------------------------------------------------------------------------

_MAGNITUDES_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_MAGNITUDES_FP4[8] = -0.0


def _fp8_values() -> npt.NDArray[np.float64]:
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[127] = np.nan
    return values


def _check_scales(scale: Bytes, low: int, high: int, where: str) -> bool:
    """Rejects NaN scales; returns whether some are outside low..high, so that single values must be checked."""
    if scale.size and int(scale.max()) == _NAN_SCALE:
        at = int(np.flatnonzero(scale == _NAN_SCALE)[0])
        raise FormatError(f"{where}: scale {at} is NaN (0xFF)", hint="the file is damaged; download it again")
    return bool(scale.size) and (int(scale.min()) < low or int(scale.max()) > high)


def _refuse_overflow(where: str, scale: int, target: str) -> FormatError:
    return FormatError(f"{where}: weights with scale 2^{scale - 127} can't be represented exactly in {target}")


def _check_fp4(weight: Bytes, scale: Bytes, where: str) -> None:
    if not _check_scales(scale, 0, _FP4_SAFE_MAX, where):
        return
    blocks = weight.reshape(-1, 16)
    for i in np.flatnonzero(scale > _FP4_SAFE_MAX):
        codes = np.concatenate([blocks[i] & 7, (blocks[i] >> 4) & 7])
        if np.float64(_MAGNITUDES_FP4[codes.max()]) * 2.0 ** (int(scale[i]) - 127) > np.finfo(np.float32).max:
            raise _refuse_overflow(where, int(scale[i]), "F32")


def _check_fp8(weight: Bytes, scale: Bytes, n_out: int, n_in: int, bf16: bool, where: str) -> None:
    if kernels.any_above(weight, np.uint8(0x7F), np.uint8(0x7E)):
        at = int(np.flatnonzero((weight & 0x7F) == 0x7F)[0])
        raise FormatError(f"{where}: weight {at} is NaN", hint="the file is damaged; download it again")
    low = _FP8_BF16_SAFE_MIN if bf16 else 0
    if not _check_scales(scale, low, _FP8_SAFE_MAX, where):
        return
    values, rows, n_blocks = _fp8_values(), weight.reshape(n_out, n_in), ceil_div(n_in, 128)
    for i in np.flatnonzero((scale < low) | (scale > _FP8_SAFE_MAX)):
        block = rows[i // n_blocks * 128 :][:128, i % n_blocks * 128 :][:, :128]
        scaled = values[block & 0x7F] * 2.0 ** (int(scale[i]) - 127)
        steps = scaled * 2.0**133
        if scaled.max() > np.finfo(np.float32).max or (bf16 and (steps != np.floor(steps)).any()):
            raise _refuse_overflow(where, int(scale[i]), "BF16" if bf16 else "F32")


def _check_nan(values: npt.NDArray[Any], where: str) -> None:
    mask, infinity = (0x7FFF, 0x7F80) if values.dtype == np.uint16 else (0x7FFFFFFF, 0x7F800000)
    kind = values.dtype.type
    if kernels.any_above(values, kind(mask), kind(infinity)):
        at = int(np.flatnonzero((values & kind(mask)) > kind(infinity))[0])
        raise FormatError(f"{where}: weight {at} is NaN", hint="the file is damaged; download it again")


# --- conversions -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one source matrix, as stored in the file.

    Attributes:
        dtype: safetensors dtype.
        weight: the rows' bytes, flat.
        scale: E8M0 bytes of these rows, flat; empty for dtypes without scales. FP8 rows start at a multiple of 128.
        n_out, n_in: rows and logical row length.
        where: `file: tensor` for messages.
        limit: exclusive upper bound of integers.
        importance: what a squared error in a column counts, for types that are searched for; None: all alike.
    """

    dtype: str
    weight: Bytes
    scale: Bytes
    n_out: int
    n_in: int
    where: str
    limit: int = 1 << 31
    importance: npt.NDArray[np.float32] | None = None


def _view(data: Bytes, dtype: type[Any]) -> npt.NDArray[Any]:
    """`data` as another dtype; a copy only where a file's odd offset has left it unaligned."""
    view: npt.NDArray[Any] = data.view(dtype)
    return view if view.flags.aligned else view.copy()


def _row_buffer() -> npt.NDArray[np.float32]:
    return np.empty(128, np.float32)


def _q8_0_result(result: tuple[int, float, float], where: str) -> Loss:
    bad, error, power = result
    if bad >= 0:
        raise FormatError(f"{where}: block at weight {bad} is too large (or not finite) for Q8_0's F16 scale")
    return Loss(error, power)


def _convert_fp4_mxfp4(rows: Rows, out: Bytes) -> None:
    _check_fp4(rows.weight, rows.scale, rows.where)
    kernels.fp4_to_mxfp4(rows.weight, rows.scale, out)


def _convert_fp4_f32(rows: Rows, out: Bytes) -> None:
    _check_fp4(rows.weight, rows.scale, rows.where)
    kernels.fp4_to_f32(rows.weight, rows.scale, _MAGNITUDES_FP4, out.view(np.float32))


def _convert_fp8_f32(rows: Rows, out: Bytes) -> None:
    _check_fp8(rows.weight, rows.scale, rows.n_out, rows.n_in, False, rows.where)
    kernels.fp8_to_f32(rows.weight, rows.scale, rows.n_out, rows.n_in, _row_buffer(), out.view(np.float32))


def _convert_fp8_bf16(rows: Rows, out: Bytes) -> None:
    _check_fp8(rows.weight, rows.scale, rows.n_out, rows.n_in, True, rows.where)
    kernels.fp8_to_bf16(rows.weight, rows.scale, rows.n_out, rows.n_in, _row_buffer(), out.view(np.uint16))


def _convert_fp8_q8_0(rows: Rows, out: Bytes) -> Loss:
    _check_fp8(rows.weight, rows.scale, rows.n_out, rows.n_in, False, rows.where)
    result = kernels.fp8_to_q8_0(
        rows.weight, rows.scale, rows.n_out, rows.n_in, _row_buffer(), out.view(np.int8), out.view(np.uint16)
    )
    return _q8_0_result(result, rows.where)


def _copy_bf16(rows: Rows, out: Bytes) -> None:
    _check_nan(_view(rows.weight, np.uint16), rows.where)
    out[:] = rows.weight


def _copy_f32(rows: Rows, out: Bytes) -> None:
    _check_nan(_view(rows.weight, np.uint32), rows.where)
    out[:] = rows.weight


def _convert_bf16_f32(rows: Rows, out: Bytes) -> None:
    bits = _view(rows.weight, np.uint16)
    _check_nan(bits, rows.where)
    kernels.bf16_to_f32(bits, out.view(np.uint32))


def _convert_f32_bf16(rows: Rows, out: Bytes) -> Loss:
    bits = _view(rows.weight, np.uint32)
    _check_nan(bits, rows.where)
    target = out.view(np.uint16)
    kernels.f32_to_bf16(bits, target)
    before, after = bits.view(np.float32), (target.astype(np.uint32) << 16).view(np.float32)
    return Loss(
        float(np.square(before - after, dtype=np.float64).sum()), float(np.square(before, dtype=np.float64).sum())
    )


def _convert_f32_q8_0(rows: Rows, out: Bytes) -> Loss:
    return _quantise_q8_0(_view(rows.weight, np.float32), rows.where, out)


def _convert_bf16_q8_0(rows: Rows, out: Bytes) -> Loss:
    values = np.empty(rows.weight.size // 2, np.uint32)
    kernels.bf16_to_f32(_view(rows.weight, np.uint16), values)
    return _quantise_q8_0(values.view(np.float32), rows.where, out)


def _quantise_q8_0(values: npt.NDArray[np.float32], where: str, out: Bytes) -> Loss:
    _check_nan(values.view(np.uint32), where)
    return _q8_0_result(kernels.f32_to_q8_0(values, _row_buffer(), out.view(np.int8), out.view(np.uint16)), where)


def _convert_integers(rows: Rows, out: Bytes) -> None:
    values = _view(rows.weight, np.int64 if rows.dtype == "I64" else np.int32)
    bad = np.flatnonzero((values < 0) | (values >= rows.limit))
    if bad.size:
        raise FormatError(f"{rows.where}: entry {bad[0]} is {values[bad[0]]}, expected 0 to {rows.limit - 1}")
    out.view(np.int32)[:] = values


_CHUNK_WEIGHTS = 1 << 17
"""Weights that are decoded at a time: half a MiB of F32 and its copy stay in a core's second-level cache."""


def _convert_fp4_bf16(rows: Rows, out: Bytes) -> None:
    # FP4's smallest step times the smallest scale, 2^-128, is a multiple of BF16's smallest, 2^-133.
    _check_fp4(rows.weight, rows.scale, rows.where)
    values = np.empty(rows.n_out * rows.n_in, np.float32)
    kernels.fp4_to_f32(rows.weight, rows.scale, _MAGNITUDES_FP4, values)
    kernels.f32_to_bf16(values.view(np.uint32), out.view(np.uint16))


def _convert_by_search(rows: Rows, target: GGMLQuantizationType, out: Bytes) -> Loss:
    """Decodes a few rows at a time to F32, quantizes them and measures what that changed."""
    _check_source(rows)
    weights = ggml_quantize.prepare_weights(rows.importance, rows.n_in, target, rows.where)
    # A power of two up to 128: FP8's scales change every 128 rows.
    step = 1 << max(0, min(7, (_CHUNK_WEIGHTS // rows.n_in).bit_length() - 1))
    values, back = np.empty((step, rows.n_in), np.float32), np.empty(step * rows.n_in, np.float32)
    row, loss = out.size // rows.n_out, Loss()
    for first in range(0, rows.n_out, step):
        count = min(step, rows.n_out - first)
        chunk, decoded = values[:count], back[: count * rows.n_in]
        _decode_chunk(rows, first, count, chunk.reshape(-1))
        written = out[first * row : (first + count) * row]
        ggml_quantize.quantize_rows(chunk, target, weights, written, rows.where)
        ggml_quantize.dequantize_rows(written, target, decoded)
        loss += Loss(*kernels.squared_error(chunk.reshape(-1), decoded))
    return loss


def _check_source(rows: Rows) -> None:
    if rows.dtype == "I8":
        _check_fp4(rows.weight, rows.scale, rows.where)
    elif rows.dtype == "F8_E4M3":
        _check_fp8(rows.weight, rows.scale, rows.n_out, rows.n_in, False, rows.where)
    else:
        _check_nan(_view(rows.weight, np.uint16 if rows.dtype == "BF16" else np.uint32), rows.where)


def _decode_chunk(rows: Rows, first: int, count: int, out: npt.NDArray[np.float32]) -> None:
    """Rows `first..first + count` in F32; for FP8 they must lie in one block of 128."""
    size = row_bytes(rows.dtype, rows.n_in)
    weight = rows.weight[first * size : (first + count) * size]
    if rows.dtype == "I8":
        blocks = rows.n_in // 32
        scale = rows.scale[first * blocks : (first + count) * blocks]
        kernels.fp4_to_f32(weight, scale, _MAGNITUDES_FP4, out)
    elif rows.dtype == "F8_E4M3":
        blocks = ceil_div(rows.n_in, 128)
        scale = rows.scale[first // 128 * blocks :][:blocks]
        kernels.fp8_to_f32(weight, scale, count, rows.n_in, _row_buffer(), out)
    elif rows.dtype == "BF16":
        kernels.bf16_to_f32(_view(weight, np.uint16), out.view(np.uint32))
    else:
        out[:] = _view(weight, np.float32)


_T = GGMLQuantizationType
_CONVERSIONS: dict[tuple[str, GGMLQuantizationType], Callable[[Rows, Bytes], Loss | None]] = {
    ("I8", _T.MXFP4): _convert_fp4_mxfp4,
    ("I8", _T.F32): _convert_fp4_f32,
    ("I8", _T.BF16): _convert_fp4_bf16,
    ("F8_E4M3", _T.F32): _convert_fp8_f32,
    ("F8_E4M3", _T.BF16): _convert_fp8_bf16,
    ("F8_E4M3", _T.Q8_0): _convert_fp8_q8_0,
    ("BF16", _T.BF16): _copy_bf16,
    ("BF16", _T.F32): _convert_bf16_f32,
    ("BF16", _T.Q8_0): _convert_bf16_q8_0,
    ("F32", _T.F32): _copy_f32,
    ("F32", _T.BF16): _convert_f32_bf16,
    ("F32", _T.Q8_0): _convert_f32_q8_0,
    ("I64", _T.I32): _convert_integers,
    ("I32", _T.I32): _convert_integers,
}
_NUMBERS = ("I8", "F8_E4M3", "BF16", "F32")


def can_convert(dtype: str, target: GGMLQuantizationType) -> bool:
    """Whether `convert_rows` supports the pair."""
    return (dtype, target) in _CONVERSIONS or (dtype in _NUMBERS and target in ggml_quantize.TYPES)


def convert_rows(rows: Rows, target: GGMLQuantizationType, out: Bytes) -> Loss | None:
    """Converts rows to ggml's layout.

    Args:
        rows: the source.
        target: ggml type; `can_convert` must hold, and `n_in` be a multiple of its block.
        out: exactly the rows' size in the target type, aligned to 4 bytes.

    Returns:
        The loss, or None for an exact conversion.

    Raises:
        FormatError: a NaN, or a value that the target can't hold.
    """
    special = _CONVERSIONS.get((rows.dtype, target))
    return _convert_by_search(rows, target, out) if special is None else special(rows, out)


_ENCODED_DTYPE = {Encoding.FP4: "I8", Encoding.FP8: "F8_E4M3"}


def decode_projection(projection: Projection, weight: Bytes, scale: Bytes, where: str = "expert") -> Bytes:
    """One projection's file bytes as ggml rows of `projection.type`.

    Raises:
        FormatError: a NaN, or a value that the type can't hold.
    """
    if projection.encoding is Encoding.GGML:
        return weight
    out = np.empty(projection.n_bytes, np.uint8)
    dtype = _ENCODED_DTYPE[projection.encoding]
    convert_rows(Rows(dtype, weight, scale, projection.n_out, projection.n_in, where), projection.type, out)
    return out


def row_bytes(dtype: str, n_in: int) -> int:
    """Bytes of one row in the file, scales aside."""
    return n_in // 2 if dtype == "I8" else n_in * {"F8_E4M3": 1, "BF16": 2, "F32": 4, "I64": 8, "I32": 4}[dtype]
