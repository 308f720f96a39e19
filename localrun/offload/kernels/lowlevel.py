"""What numba lacks for kernels on raw memory: typed loads and stores by address, calls through addresses, atomic tickets.

Addresses are signed 64-bit integers throughout (`types.intp`): numba turns uint64 + int64 into a float. Loads and stores need
no alignment. Nothing here checks anything; callers own the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


def _pointer(builder: Any, address: Any, target: Any) -> Any:
    return builder.inttoptr(address, target.as_pointer())


def _make_load(value_type: Any) -> Callable[..., Any]:
    @intrinsic
    def load(_typing: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            value = builder.load(_pointer(builder, args[0], context.get_value_type(value_type)))
            value.align = 1
            return value

        return value_type(types.intp), codegen

    return load  # type: ignore[no-any-return]


def _make_store(value_type: Any) -> Callable[..., Any]:
    @intrinsic
    def store(_typing: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            instruction = builder.store(args[1], _pointer(builder, args[0], context.get_value_type(value_type)))
            instruction.align = 1
            return context.get_dummy_value()

        return types.void(types.intp, value_type), codegen

    return store  # type: ignore[no-any-return]


load_u8, store_u8 = _make_load(types.uint8), _make_store(types.uint8)
load_i8, store_i8 = _make_load(types.int8), _make_store(types.int8)
load_u16, store_u16 = _make_load(types.uint16), _make_store(types.uint16)
load_u32, store_u32 = _make_load(types.uint32), _make_store(types.uint32)
load_i32, store_i32 = _make_load(types.int32), _make_store(types.int32)
load_u64, store_u64 = _make_load(types.uint64), _make_store(types.uint64)
load_i64, store_i64 = _make_load(types.int64), _make_store(types.int64)
load_f32, store_f32 = _make_load(types.float32), _make_store(types.float32)


@intrinsic
def pointer(_typing: Any, address: Any) -> Any:
    """The address as a void pointer, for `numba.carray`."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), codegen


@intrinsic
def call_to_float(_typing: Any, function: Any, row: Any, out: Any, n_elements: Any) -> Any:
    """Calls ggml's `void to_float(const void *row, float *out, int64_t n)` at address `function`."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        int64 = ir.IntType(64)
        target = builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), [int64, int64, int64]).as_pointer())
        builder.call(target, args[1:])
        return _context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), codegen


@intrinsic
def atomic_add(_typing: Any, address: Any, amount: Any) -> Any:
    """Adds to the int64 at `address`, returns the value before; ordered against all other memory operations."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0], ir.IntType(64)), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), codegen
