"""Low-level operations that numba lacks: typed loads and stores by address, calls through addresses, atomic tickets, rounding
up.

Addresses are signed 64-bit integers throughout (`types.intp`): numba turns uint64 + int64 into a float. Loads and stores need
no alignment. There are no checks; callers own the memory.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numba as nb
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ROWS = "void(intp, intp, intp, intp, intp, intp, intp, intp, intp)"
"""Signature of row kernels, the C functions that multiply some rows of a matrix with one tile of tokens:

matrix address, extra argument, first row (a multiple of 16), rows, row length, panel, tokens of the tile, out, out's bytes per
token. `out` receives rows up to the next multiple of 16. The driver in `tasks` calls them by address, so that any combination of
types works without compiling anything for it.
"""


def _pointer(builder: Any, address: Any, target: Any) -> Any:
    return builder.inttoptr(address, target.as_pointer())


def _make_load(value_type: Any) -> Any:
    @intrinsic
    def load(_typing: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            value = builder.load(_pointer(builder, args[0], context.get_value_type(value_type)))
            value.align = 1
            return value

        return value_type(types.intp), codegen

    return load


def _make_store(value_type: Any) -> Any:
    @intrinsic
    def store(_typing: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            instruction = builder.store(args[1], _pointer(builder, args[0], context.get_value_type(value_type)))
            instruction.align = 1
            return context.get_dummy_value()

        return types.void(types.intp, value_type), codegen

    return store


load_u8: Callable[[Any], Any] = _make_load(types.uint8)
load_i16: Callable[[Any], int] = _make_load(types.int16)
load_u16: Callable[[Any], Any] = _make_load(types.uint16)
load_u32: Callable[[Any], Any] = _make_load(types.uint32)
load_i32: Callable[[Any], int] = _make_load(types.int32)
load_i64: Callable[[Any], int] = _make_load(types.int64)
load_f32: Callable[[Any], Any] = _make_load(types.float32)
store_u8: Callable[[int, Any], None] = _make_store(types.uint8)
store_i8: Callable[[int, Any], None] = _make_store(types.int8)
store_i16: Callable[[int, Any], None] = _make_store(types.int16)
store_u16: Callable[[int, Any], None] = _make_store(types.uint16)
store_u32: Callable[[int, Any], None] = _make_store(types.uint32)
store_i32: Callable[[int, Any], None] = _make_store(types.int32)
store_i64: Callable[[int, Any], None] = _make_store(types.int64)
store_f32: Callable[[int, Any], None] = _make_store(types.float32)


@intrinsic
def pointer(_typing: Any, address: Any) -> Any:
    """The address as a void pointer, for `numba.carray`."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), codegen


def _make_call(n_args: int) -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        int64 = ir.IntType(64)
        builder.call(_pointer(builder, args[0], ir.FunctionType(ir.VoidType(), [int64] * n_args)), args[1:])
        return context.get_dummy_value()

    return codegen


@intrinsic
def call_0(_typing: Any, function: Any) -> Any:
    """Calls the C function at address `function` without arguments; a result is dropped."""
    return types.void(types.intp), _make_call(0)


@intrinsic
def call_1(_typing: Any, function: Any, a: Any) -> Any:
    """Calls `void f(int64)` by address."""
    return types.void(*[types.intp] * 2), _make_call(1)


@intrinsic
def call_3(_typing: Any, function: Any, a: Any, b: Any, c: Any) -> Any:
    """Calls `void f(int64, int64, int64)` by address; pointers count as int64."""
    return types.void(*[types.intp] * 4), _make_call(3)


@intrinsic
def call_5(_typing: Any, function: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
    """Calls a C function of five int64 by address."""
    return types.void(*[types.intp] * 6), _make_call(5)


@intrinsic
def call_6(_typing: Any, function: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
    """Calls a C function of six int64 by address."""
    return types.void(*[types.intp] * 7), _make_call(6)


@intrinsic
def call_9(_typing: Any, function: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any) -> Any:
    """Calls a C function of nine int64 by address."""
    return types.void(*[types.intp] * 10), _make_call(9)


@intrinsic
def call_i32(_typing: Any, function: Any, a: Any, b: Any) -> Any:
    """Calls `int32 f(int64, int64)` by address; a C function of fewer arguments ignores the rest."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        i64 = ir.IntType(64)
        return builder.call(_pointer(builder, args[0], ir.FunctionType(ir.IntType(32), [i64, i64])), args[1:])

    return types.int32(types.intp, types.intp, types.intp), codegen


@intrinsic
def call_i64(_typing: Any, function: Any, a: Any, b: Any) -> Any:
    """Calls `int64 f(int64, int64)` by address."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        i64 = ir.IntType(64)
        return builder.call(_pointer(builder, args[0], ir.FunctionType(i64, [i64, i64])), args[1:])

    return types.int64(types.intp, types.intp, types.intp), codegen


@intrinsic
def call_pread(_typing: Any, function: Any, fd: Any, address: Any, size: Any, offset: Any) -> Any:
    """Calls `int64 f(int64, int64, int64, int64)` by address, such as libc's `pread`."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        i64 = ir.IntType(64)
        return builder.call(_pointer(builder, args[0], ir.FunctionType(i64, [i64] * 4)), args[1:])

    return types.int64(*[types.intp] * 5), codegen


@intrinsic
def stack(_typing: Any, n_bytes: Any) -> Any:
    """Address of scratch on the caller's stack, 64-byte aligned; `n_bytes` is a constant. One buffer per place in the source."""
    if not isinstance(n_bytes, types.IntegerLiteral):
        return None

    def codegen(_context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        with builder.goto_entry_block():
            slot = builder.alloca(ir.ArrayType(ir.IntType(8), n_bytes.literal_value))
            slot.align = 64
        return builder.ptrtoint(slot, ir.IntType(64))

    return types.intp(n_bytes), codegen


@intrinsic
def copy(_typing: Any, target: Any, source: Any, n_bytes: Any) -> Any:
    """memcpy."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        byte = ir.IntType(8)
        cgutils.raw_memcpy(builder, _pointer(builder, args[0], byte), _pointer(builder, args[1], byte), args[2], 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@intrinsic
def float_of_bits(_typing: Any, bits: Any) -> Any:
    """The F32 with these 32 bits."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def atomic_add(_typing: Any, address: Any, amount: Any) -> Any:
    """Adds to the int64 at `address`, returns the value before; ordered against all other memory operations."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0], ir.IntType(64)), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
def atomic_load(_typing: Any, address: Any) -> Any:
    """The int64 at `address`; what its writer wrote before is visible afterwards."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], ir.IntType(64)), "acquire", 8)

    return types.int64(types.intp), codegen


@intrinsic
def atomic_exchange(_typing: Any, address: Any, value: Any) -> Any:
    """Stores to the int64 at `address`, returns the value before; ordered against all other memory operations."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", _pointer(builder, args[0], ir.IntType(64)), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
def atomic_take(_typing: Any, address: Any, value: Any) -> Any:
    """Sets the int64 at `address` if it is zero; True if it was. Ordered against all other memory operations."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        i64 = ir.IntType(64)
        result = builder.cmpxchg(_pointer(builder, args[0], i64), i64(0), args[1], "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(types.intp, types.int64), codegen


@intrinsic
def pause(_typing: Any) -> Any:
    """Tells the processor that this is a waiting loop (x86 `pause`, ARM `yield`)."""

    def codegen(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        if platform.machine() == "x86_64":
            function_type = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function_type, "llvm.x86.sse2.pause"), [])
        elif platform.machine() == "aarch64":
            function_type = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            hint = cgutils.get_or_insert_function(builder.module, function_type, "llvm.aarch64.hint")
            builder.call(hint, [ir.IntType(32)(1)])  # YIELD
        return context.get_dummy_value()

    return types.void(), codegen


@nb.njit(inline="always")
def blocks_of(n: int, size: int) -> int:
    """`alignment.ceil_div` for compiled code; n >= 0."""
    return (n + size - 1) // size


@nb.njit(inline="always")
def rounded_up(n: int, multiple: int) -> int:
    """`alignment.align_up` for compiled code; n >= 0."""
    return (n + multiple - 1) // multiple * multiple
