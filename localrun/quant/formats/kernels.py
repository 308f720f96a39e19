"""Compiled loops behind `formats`: number formats of checkpoints to ggml's, one block at a time.

No checks here: callers have refused NaN and scales out of range. All kernels release the interpreter lock, use one thread and are
cached on disk once compiled. Offsets are unsigned (np.uintp): numba then drops its negative-index handling, which keeps LLVM from
vectorising. Slices are avoided inside loops: each costs two atomic reference counts. Integer expressions are cast after every step:
numba widens them to 64 bits otherwise, which halves the lanes. Row buffers have 128 floats. Layouts: see `formats`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from localrun.kernel_cache import cached_jit

_U = np.uintp


@intrinsic
def _as_f32(context: Any, bits: Any) -> Any:
    return types.float32(types.uint32), lambda ctx, b, sig, args: b.bitcast(args[0], ir.FloatType())


@intrinsic
def _as_u32(context: Any, value: Any) -> Any:
    return types.uint32(types.float32), lambda ctx, b, sig, args: b.bitcast(args[0], ir.IntType(32))


@intrinsic
def _shuffle_fp4_block(context: Any, target: Any, source: Any) -> Any:
    """16 bytes of official FP4 at address `source` to 16 MXFP4 bytes at `target`: 9.5 GB/s on one core against 1.2 for the loop
    that LLVM makes of the same in Python (4096 x 2048 weights, AVX-512 machine)."""

    def generate(ctx: Any, b: Any, sig: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.IntType(8), 16)

        def constant(n: int) -> Any:
            return ir.Constant(vector, [n] * 16)

        def interleave(first: int) -> Any:
            lanes = [first + k // 2 + (16 if k % 2 else 0) for k in range(16)]
            return b.shuffle_vector(low, high, ir.Constant(ir.VectorType(ir.IntType(32), 16), lanes))

        packed = b.load(b.inttoptr(args[1], vector.as_pointer()))
        packed.align = 1
        low, high = b.and_(packed, constant(15)), b.lshr(packed, constant(4))
        # interleave(0) is elements 0..15 in order, interleave(8) elements 16..31
        block = b.or_(interleave(0), b.shl(interleave(8), constant(4)))
        b.store(block, b.inttoptr(args[0], vector.as_pointer())).align = 1
        return ctx.get_dummy_value()

    return types.void(types.uintp, types.uintp), generate


@cached_jit(nogil=True)
def fp4_to_mxfp4(weight: Any, scale: Any, out: Any) -> None:
    """`n` blocks of 32: `weight` (16 n) uint8 and `scale` (n) E8M0 to `out` (17 n) uint8. Exact."""
    source, target = weight.ctypes.data, out.ctypes.data
    for i in range(scale.size):
        out[_U(17 * i)] = scale[_U(i)]
        _shuffle_fp4_block(np.uintp(target + 17 * i + 1), np.uintp(source + 16 * i))


@cached_jit(nogil=True, forceinline=True)
def _e8m0(e: Any) -> Any:
    """E8M0 as f32; 2^-127 is subnormal there, hence the case."""
    return _as_f32(np.uint32(e) << np.uint32(23)) if e > 0 else _as_f32(np.uint32(0x00400000))


@cached_jit(nogil=True)
def fp4_to_f32(weight: Any, scale: Any, magnitudes: Any, out: Any) -> None:
    """`n` blocks of 32: `weight` (16 n) uint8 and `scale` (n) E8M0 to `out` (32 n) f32. Exact.

    Args:
        magnitudes: (16) f32, the value of each 4-bit code.
    """
    for i in range(scale.size):
        d = _e8m0(scale[_U(i)])
        for j in range(16):
            code = weight[_U(16 * i + j)]
            for half in range(2):
                nibble = (code >> np.uint8(4 * half)) & np.uint8(15)
                out[_U(32 * i + 2 * j + half)] = magnitudes[_U(nibble)] * d


@cached_jit(nogil=True, forceinline=True)
def _decode_fp8(weight: Any, at: Any, n: Any, d: Any, out: Any) -> None:
    """`out[:n]` = E4M3 values of `weight[at:at + n]` times d.

    Exponent and mantissa move into F32's place; for E4M3's subnormals (exponent 0) the implicit one is added and taken off again.
    """
    one, bias, tiny_bias = np.uint32(1 << 23), np.uint32(120 << 23), np.uint32(121 << 23)
    smallest = np.float32(2.0**-6)
    for j in range(n):
        byte = np.uint32(weight[at + _U(j)])
        magnitude = np.uint32(np.uint32(byte & np.uint32(0x7F)) << np.uint32(20))
        tiny = magnitude < one
        x = _as_f32(np.uint32(magnitude + (tiny_bias if tiny else bias))) - (smallest if tiny else np.float32(0))
        sign = np.uint32(np.uint32(byte & np.uint32(0x80)) << np.uint32(24))
        out[_U(j)] = _as_f32(np.uint32(_as_u32(x) | sign)) * d


@cached_jit(nogil=True)
def fp8_to_f32(weight: Any, scale: Any, n_out: int, n_in: int, row: Any, out: Any) -> None:
    """`weight` (n_out * n_in) E4M3 and `scale` (ceil(n_out / 128) * ceil(n_in / 128)) E8M0 to `out` (n_out * n_in) f32. Exact.

    Args:
        row: (128) f32, scratch.
    """
    n_blocks = (n_in + 127) // 128
    for r in range(n_out):
        for c in range(n_blocks):
            at, n = _U(r * n_in + c * 128), min(128, n_in - c * 128)
            _decode_fp8(weight, at, n, _e8m0(scale[_U(r // 128 * n_blocks + c)]), row)
            for j in range(n):
                out[at + _U(j)] = row[_U(j)]


@cached_jit(nogil=True)
def fp8_to_bf16(weight: Any, scale: Any, n_out: int, n_in: int, row: Any, out: Any) -> None:
    """As `fp8_to_f32`, to `out` (n_out * n_in) uint16. Exact: an E4M3 value has 4 significant bits."""
    n_blocks = (n_in + 127) // 128
    for r in range(n_out):
        for c in range(n_blocks):
            at, n = _U(r * n_in + c * 128), min(128, n_in - c * 128)
            _decode_fp8(weight, at, n, _e8m0(scale[_U(r // 128 * n_blocks + c)]), row)
            for j in range(n):
                out[at + _U(j)] = np.uint16(_as_u32(row[_U(j)]) >> np.uint32(16))


@cached_jit(nogil=True, forceinline=True)
def _f16_bits(x: Any) -> Any:
    """IEEE half of a non-negative f32, round to nearest even; 0x7C00 (infinity) beyond its range."""
    bits = _as_u32(x)
    if bits >= np.uint32(0x47800000):
        return np.uint16(0x7C00)
    if bits < np.uint32(0x38800000):
        # 0.5 has a step of 2^-24, the smallest half: the addition rounds, the low bits are the subnormal half
        return np.uint16(_as_u32(x + np.float32(0.5)) - np.uint32(0x3F000000))
    odd = (bits >> np.uint32(13)) & np.uint32(1)
    return np.uint16((bits - np.uint32(112 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13))


@cached_jit(nogil=True, forceinline=True)
def _f16_value(bits: Any) -> Any:
    """f32 of a finite non-negative half."""
    if bits < np.uint16(0x400):
        return np.float32(bits) * np.float32(2.0**-24)
    return _as_f32((np.uint32(bits) << np.uint32(13)) + np.uint32(112 << 23))


@cached_jit(nogil=True, forceinline=True)
def _max_abs(x: Any, at: Any) -> Any:
    """Largest magnitude of 32 floats, compared as integers: the same order, vectorisable, and NaN comes out as itself.

    The count is written as a quarter of the row buffer's 128: LLVM unrolls a constant 32 into a chain of scalar comparisons
    (0.42 against 0.70 billion weights/s for all of FP8 to Q8_0, one core).
    """
    most = np.uint32(0)
    for j in range(x.size // 4):
        magnitude = np.uint32(_as_u32(x[at + _U(j)]) & np.uint32(0x7FFFFFFF))
        most = magnitude if magnitude > most else most
    return _as_f32(most)


@cached_jit(nogil=True, forceinline=True)
def _round_block(x: Any, at: Any, inverse: Any, out: Any, to: Any) -> None:
    half, one, zero = np.float32(0.5), np.float32(1), np.float32(0)
    for j in range(32):
        y = x[at + _U(j)] * inverse
        magnitude = abs(y)
        whole = np.float32(np.int32(magnitude))
        # not floor(y + 0.5): that rounds 0.49999997 up
        whole = whole + (one if magnitude - whole >= half else zero)
        out[to + _U(j)] = np.int8(np.int32(-whole if y < zero else whole))


@cached_jit(nogil=True, forceinline=True, fastmath={"reassoc"})
def _block_loss(x: Any, at: Any, inverse: Any, q: Any, to: Any, step: Any) -> Any:
    """Squared error and power of a block in units of its step, where F32 neither over- nor underflows."""
    error, power = np.float32(0), np.float32(0)
    for j in range(32):
        value = x[at + _U(j)] * inverse
        difference = value - np.float32(q[to + _U(j)]) * step
        error += difference * difference
        power += value * value
    return error, power


@cached_jit(nogil=True, forceinline=True)
def _q8_0_blocks(x: Any, n_blocks: int, out: Any, out16: Any, at: Any) -> Any:
    """Quantises 32 * n_blocks floats to `out[at:]`; (number of the first block whose scale is no finite half or -1, loss)."""
    error, power, smallest = 0.0, 0.0, np.float32(2.0**-126)
    for b in range(n_blocks):
        d = _max_abs(x, _U(32 * b)) / np.float32(127)
        # Below F32's normal range 1 / d would be infinite; the half scale is 0 there anyway.
        inverse = np.float32(1) / d if d >= smallest else np.float32(0)
        bits = _f16_bits(d)
        if bits >= np.uint16(0x7C00):
            return b, error, power
        to = at + _U(34 * b)
        out16[to // _U(2)] = bits
        _round_block(x, _U(32 * b), inverse, out, to + _U(2))
        e, p = _block_loss(x, _U(32 * b), inverse, out, to + _U(2), _f16_value(bits) * inverse)
        unit = np.float64(d) * np.float64(d)
        error += np.float64(e) * unit
        power += np.float64(p) * unit
    return -1, error, power


@cached_jit(nogil=True)
def fp8_to_q8_0(weight: Any, scale: Any, n_out: int, n_in: int, row: Any, out: Any, out16: Any) -> Any:
    """As `fp8_to_f32`, to Q8_0; `n_in` is a multiple of 32.

    Args:
        out: (n_out * n_in / 32 * 34) int8.
        out16: the same bytes as uint16, for the scales.

    Returns:
        The first weight of a block whose scale is not a finite half (conversion stops there), or -1; the squared error; and the
        sum of the squared weights.
    """
    n_blocks, error, power, to = (n_in + 127) // 128, 0.0, 0.0, 0
    for r in range(n_out):
        for c in range(n_blocks):
            at, n = r * n_in + c * 128, min(128, n_in - c * 128)
            _decode_fp8(weight, _U(at), n, _e8m0(scale[_U(r // 128 * n_blocks + c)]), row)
            bad, e, p = _q8_0_blocks(row, n // 32, out, out16, _U(to))
            if bad >= 0:
                return at + 32 * bad, error, power
            error += e
            power += p
            to += n // 32 * 34
    return -1, error, power


@cached_jit(nogil=True)
def f32_to_q8_0(x: Any, row: Any, out: Any, out16: Any) -> Any:
    """`x` (n) f32, n a multiple of 32, to `out` (n / 32 * 34) int8; `row`, `out16` and the result as in `fp8_to_q8_0`."""
    error, power = 0.0, 0.0
    for at in range(0, x.size, 128):
        n = min(128, x.size - at)
        for j in range(n):
            row[_U(j)] = x[_U(at + j)]
        bad, e, p = _q8_0_blocks(row, n // 32, out, out16, _U(at // 32 * 34))
        if bad >= 0:
            return at + 32 * bad, error, power
        error += e
        power += p
    return -1, error, power


@cached_jit(nogil=True)
def f32_to_bf16(bits: Any, out: Any) -> None:
    """Round to nearest even, as ggml_compute_fp32_to_bf16; NaN is checked before."""
    for i in range(bits.size):
        n = bits[_U(i)]
        odd = (n >> np.uint32(16)) & np.uint32(1)
        out[_U(i)] = np.uint16((n + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@cached_jit(nogil=True)
def bf16_to_f32(bits: Any, out: Any) -> None:
    """`bits` (n) uint16 to `out` (n) uint32, the bits of F32. Exact."""
    for i in range(bits.size):
        out[_U(i)] = np.uint32(bits[_U(i)]) << np.uint32(16)


@cached_jit(nogil=True)
def any_above(values: Any, mask: Any, limit: Any) -> Any:
    """Whether `value & mask > limit` holds anywhere (how NaN looks in every float format)."""
    found = False
    for i in range(values.size):
        found |= (values[_U(i)] & mask) > limit
    return found


@cached_jit(nogil=True)
def flush_tiny(x: Any, limit: Any, out: Any) -> None:
    """Copies, with magnitudes below `limit` as zero."""
    zero = np.float32(0)
    for i in range(x.size):
        value = x[_U(i)]
        out[_U(i)] = value if abs(value) >= limit else zero


@cached_jit(nogil=True, fastmath={"reassoc"})
def squared_error(x: Any, y: Any) -> Any:
    """Sum of (x - y)^2 and of x^2, in F64 over runs of 4096 that are summed in F32 and in units where F32 does not underflow."""
    error, power = 0.0, 0.0
    for at in range(0, x.size, 4096):
        n = min(4096, x.size - at)
        most = np.float32(1e-30)
        for j in range(n):
            most = max(most, abs(x[_U(at + j)]))
        inverse = np.float32(1) / most
        e, p = np.float32(0), np.float32(0)
        for j in range(n):
            value = x[_U(at + j)] * inverse
            difference = value - y[_U(at + j)] * inverse
            e += difference * difference
            p += value * value
        unit = np.float64(most) * np.float64(most)
        error += np.float64(e) * unit
        power += np.float64(p) * unit
    return error, power
