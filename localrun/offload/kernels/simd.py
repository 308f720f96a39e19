"""A thin layer over llvmlite for writing kernels as vector code: 16 lanes of 32 bits, or 64 of 8.

Lane r of a 32-bit vector belongs to weight row r of a group of 16 rows; in a byte vector, bytes 4r to 4r + 3 hold four
consecutive elements of row r. Python runs once per compilation: loops and lists here unroll code, `Simd.loop` emits a loop.
`Simd` is plain LLVM, which any processor runs; `Avx2`, `AvxVnni`, `Avx512` and `Avx512Vnni` add what formats need beyond it. The
256-bit ones work on both halves of a vector in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from llvmlite import ir
from numba.core import cgutils

from localrun.alignment import LINE_BYTES
from localrun.offload.kernels.cpu import Level
from localrun.offload.kernels.reading import Reading

I8, I16, I32, I64, F16, F32 = (
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
    ir.HalfType(),
    ir.FloatType(),
)
BYTES = ir.VectorType(I8, 64)
WORDS = ir.VectorType(I16, 32)
INTS = ir.VectorType(I32, 16)
FLOATS = ir.VectorType(F32, 16)

HALF_WORDS = ir.VectorType(I16, 16)

LANES = 16


class _KeptLoad(ir.LoadInstr):  # type: ignore[misc]  # llvmlite has no types
    """A load that the compiler neither drops nor moves past another one of these."""

    def descr(self, buf: list[str]) -> None:
        parts: list[str] = []
        super().descr(parts)
        buf.append("".join(parts).replace("load ", "load volatile ", 1))


class Simd:
    """Emits vector instructions at the builder's position. `pointer` arguments are `i8*` values, offsets Python ints.

    Attributes:
        vnni: a dot product of bytes is one instruction, exact for all of them.
        in_order: the order of reads matters, so `load_in_order` and `touch` keep it.
        pages: these also request lines of the pages that follow (`Reading.PAGES`).
    """

    vnni = False

    def __init__(self, builder: Any, *, in_order: bool = False, pages: bool = False) -> None:
        self.b, self.in_order, self.pages = builder, in_order, pages

    # -- memory ---------------------------------------------------------------------------------------------------

    def pointer(self, address: Any, offset: Any = None) -> Any:
        """`i8*` from an integer address, plus a run-time byte offset."""
        base = self.b.inttoptr(address, I8.as_pointer())
        return base if offset is None else self.b.gep(base, [offset])

    def at(self, pointer: Any, index: Any, stride: int, offset: int = 0) -> Any:
        """pointer + index * stride + offset."""
        shifted = self.b.add(self.b.mul(index, I64(stride)), I64(offset))
        return self.b.gep(pointer, [shifted])

    def load(self, pointer: Any, offset: int, type_: Any) -> Any:
        """A value of `type_` from any address."""
        source = self.b.bitcast(self.b.gep(pointer, [I64(offset)]), type_.as_pointer())
        value = self.b.load(source)
        value.align = 1
        return value

    def store(self, value: Any, pointer: Any, offset: int = 0, *, streams: bool = False) -> None:
        """Stores a value at any address.

        Args:
            streams: past the caches, for a whole cache line; a fence must follow before others are told.
        """
        target = self.b.bitcast(self.b.gep(pointer, [I64(offset)]), value.type.as_pointer())
        store = self.b.store(value, target)
        store.align = LINE_BYTES if streams else 1
        if streams:
            store.set_metadata("nontemporal", self.b.module.add_metadata([I32(1)]))

    def prefetch(self, pointer: Any, offset: int) -> None:
        """Asks for a cache line, to be read soon."""
        self.call("llvm.prefetch.p0", ir.VoidType(), self.b.gep(pointer, [I64(offset)]), I32(0), I32(3), I32(1))

    def load_in_order(self, pointer: Any, offset: int, type_: Any) -> Any:
        """As `load`; if `in_order`, these loads keep their order. Processors that prefetch by themselves follow reads that are in
        order; `prefetch` in large numbers disturbs them."""
        if not self.in_order:
            return self.load(pointer, offset, type_)
        if self.pages:
            self._request_of_next_pages(pointer, offset)
        source = self.b.bitcast(self.b.gep(pointer, [I64(offset)]), type_.as_pointer())
        load = _KeptLoad(self.b.block, source)
        load.align = 1
        self.b._insert(load)
        return load

    def _request_of_next_pages(self, pointer: Any, offset: int) -> None:
        """Line i of each 256 in order requests line i // 4 of page i % 4 of the next 256, so that all are requested once."""
        address = self.b.add(self.b.ptrtoint(pointer, I64), I64(offset))
        page = self.b.and_(self.b.shl(address, I64(6)), I64(3 << 12))  # bits 6 and 7 of the address
        line = self.b.and_(self.b.lshr(address, I64(2)), I64(63 << 6))  # bits 8 to 13
        window = self.b.and_(address, I64(-(4 << 12)))
        self.prefetch(self.pointer(self.b.or_(window, self.b.or_(page, line))), 4 << 12)

    def touch(self, pointer: Any, offset: int) -> None:
        """Reads a cache line now and drops it, if `in_order`."""
        self.load_in_order(pointer, offset, INTS)

    def stack(self, n_bytes: int) -> Any:
        """`i8*` to scratch of this function, 64-byte aligned."""
        with self.b.goto_entry_block():
            slot = self.b.alloca(ir.ArrayType(I8, n_bytes))
            slot.align = 64
        return self.b.bitcast(slot, I8.as_pointer())

    # -- constants and conversions --------------------------------------------------------------------------------

    @staticmethod
    def ints(value: int) -> Any:
        """16 equal 32-bit constants."""
        return ir.Constant(INTS, [value] * 16)

    @staticmethod
    def words(value: int) -> Any:
        """32 equal 16-bit constants."""
        return ir.Constant(WORDS, [value] * 32)

    @staticmethod
    def floats(value: float) -> Any:
        """16 equal F32 constants."""
        return ir.Constant(FLOATS, [value] * 16)

    @staticmethod
    def bytes(values: Sequence[int]) -> Any:
        """64 byte constants; a shorter pattern repeats."""
        pattern = [v & 255 for v in values]
        return ir.Constant(BYTES, (pattern * (64 // len(pattern)))[:64])

    def splat(self, scalar: Any, lanes: int = LANES) -> Any:
        """A run-time scalar in all lanes."""
        vector = ir.VectorType(scalar.type, lanes)
        first = self.b.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
        return self.b.shuffle_vector(
            first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        )

    def splat_dword(self, pointer: Any, offset: int) -> Any:
        """One dword of four int8 activations in all 16 lanes, as bytes; folds into the dot product's operand."""
        return self.b.bitcast(self.splat(self.load(pointer, offset, I32)), BYTES)

    def splat_f32(self, pointer: Any, offset: int) -> Any:
        """The F32 there in all lanes."""
        return self.splat(self.load(pointer, offset, F32))

    def splat_i32(self, pointer: Any, offset: int) -> Any:
        """The int32 there in all lanes."""
        return self.splat(self.load(pointer, offset, I32))

    def as_bytes(self, vector: Any) -> Any:
        """The same 512 bits as 64 bytes."""
        return self.b.bitcast(vector, BYTES)

    def as_ints(self, vector: Any) -> Any:
        """The same 512 bits as 16 32-bit lanes."""
        return self.b.bitcast(vector, INTS)

    def to_float(self, ints: Any) -> Any:
        """Signed 32-bit lanes as F32, rounded."""
        return self.b.sitofp(ints, FLOATS)

    def halves(self, pointer: Any, offset: int) -> Any:
        """16 F16 values as F32."""
        return self.b.fpext(self.load(pointer, offset, ir.VectorType(F16, 16)), FLOATS)

    def byte_lanes(self, pointer: Any, offset: int) -> Any:
        """16 bytes as unsigned 32-bit lanes."""
        return self.b.zext(self.load(pointer, offset, ir.VectorType(I8, 16)), INTS)

    # -- arithmetic -----------------------------------------------------------------------------------------------

    def mul(self, a: Any, b: Any) -> Any:
        """a * b, F32."""
        return self.b.fmul(a, b)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, F32; rounded once or twice, as the processor is faster."""
        return self.call("llvm.fmuladd.v16f32", FLOATS, a, b, c)

    def sum_floats(self, floats: Any) -> Any:
        """Sum over the lanes, in any order."""
        module, name = self.b.module, "llvm.vector.reduce.fadd.v16f32"
        function = module.globals.get(name) or ir.Function(module, ir.FunctionType(F32, [F32, FLOATS]), name)
        return self.b.call(function, [F32(0.0), floats], fastmath=("reassoc",))

    def shift_right(self, ints: Any, count: int) -> Any:
        """Each lane shifted, zeros from the left."""
        return self.b.lshr(ints, self.ints(count)) if count else ints

    def shift_left(self, ints: Any, count: int) -> Any:
        """Each lane shifted, zeros from the right."""
        return self.b.shl(ints, self.ints(count)) if count else ints

    def mask(self, ints: Any, value: int) -> Any:
        """Each lane & value."""
        return self.b.and_(ints, self.ints(value))

    def words_sub(self, ints: Any, value: int) -> Any:
        """Both 16-bit halves of each lane minus a constant."""
        return self.as_ints(self.b.sub(self.b.bitcast(ints, WORDS), self.words(value)))

    def byte_field(self, ints: Any, byte: int, bits: int = 8) -> Any:
        """The low `bits` of byte `byte` of each lane."""
        shifted = self.shift_right(ints, 8 * byte)
        return shifted if byte == 3 and bits == 8 else self.mask(shifted, (1 << bits) - 1)

    def madd(self, a: Any, b: Any) -> Any:
        """Sums of neighbouring products of signed 16-bit values, 32 bits wide."""
        parts = []
        for odd in range(2):
            lanes = ir.Constant(ir.VectorType(I32, 16), list(range(odd, 32, 2)))
            parts.append([self.b.sext(self.b.shuffle_vector(v, v, lanes), INTS) for v in (a, b)])
        return self.b.add(self.b.mul(*parts[0]), self.b.mul(*parts[1]))

    # What formats need and plain LLVM has no good way for; see the classes below.

    def dot(self, total: Any, unsigned_bytes: Any, signed_bytes: Any, *, small: bool = True) -> Any:
        """total + four products per lane, exact in 32 bits; small: weights are below 128."""
        raise NotImplementedError

    def byte_pairs(self, unsigned_bytes: Any, signed_bytes: Any) -> Any:
        """Sums of neighbouring products as saturating 16-bit values."""
        raise NotImplementedError

    def dot_words(self, total: Any, a: Any, b: Any) -> Any:
        """total + two products of signed 16-bit values per lane."""
        raise NotImplementedError

    def lookup16(self, table: Any, indices: Any) -> Any:
        """Per byte: `table[index]` within each 128-bit lane, index 0..15."""
        raise NotImplementedError

    def lookup64(self, table: Any, indices: Any) -> Any:
        """Per byte: `table[index & 63]`."""
        raise NotImplementedError

    def lookup128(self, low: Any, indices: Any, high: Any) -> Any:
        """Per byte: entry `index & 127` of the 128 bytes low|high."""
        raise NotImplementedError

    def negated(self, values: Any, signs: Any) -> Any:
        """Bytes, negated where the top bit of `signs` is set."""
        return self.b.select(self.b.icmp_signed("<", signs, self.bytes([0])), self.b.neg(values), values)

    def bits_at(self, offsets: Any, source: Any) -> Any:
        """Per byte: eight bits of its 64-bit lane of `source`, starting at bit `offset & 63`, wrapping."""
        raise NotImplementedError

    def affine(self, source: Any, matrix: Any) -> Any:
        """Per byte: an 8x8 bit matrix times the byte, over GF(2)."""
        raise NotImplementedError

    def choose(self, mask: int, a: Any, b: Any) -> Any:
        """Per byte: the bits of `mask` from a, the others from b."""
        return self.b.or_(self.b.and_(a, self.bytes([mask])), self.b.and_(b, self.bytes([~mask])))

    def and_or(self, a: Any, b: Any, c: Any) -> Any:
        """a & b | c."""
        return self.b.or_(self.b.and_(a, b), c)

    def constants(self, values: Sequence[int]) -> Any:
        """`i8*` to 64-bit numbers that never change."""
        table = ir.Constant(ir.ArrayType(I64, len(values)), list(values))
        return self.b.bitcast(cgutils.global_constant(self.b, "table", table), I8.as_pointer())

    def call(self, name: str, result: Any, *args: Any) -> Any:
        """An LLVM intrinsic or function by name; declares it in the module."""
        module = self.b.module
        function = module.globals.get(name) or ir.Function(
            module, ir.FunctionType(result, [a.type for a in args]), name
        )
        return self.b.call(function, args)

    # -- control --------------------------------------------------------------------------------------------------

    def loop(self, count: Any, carried: Sequence[Any], body: Callable[[Any, list[Any]], Sequence[Any]]) -> list[Any]:
        """`for i in range(count): carried = body(i, carried)`; count is at least 1. Returns the last values."""
        b = self.b
        entry, head, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(I64(0), entry)
        values = []
        for value in carried:
            phi = b.phi(value.type)
            phi.add_incoming(value, entry)
            values.append(phi)
        results = list(body(index, list(values)))
        following = b.add(index, I64(1))
        index.add_incoming(following, b.block)
        for phi, result in zip(values, results, strict=True):
            phi.add_incoming(result, b.block)
        b.cbranch(b.icmp_signed("<", following, count), head, after)
        b.position_at_end(after)
        return results


class _Pairs(Simd):
    """Dot products without VNNI, by way of sums of two products."""

    def dot(self, total: Any, unsigned_bytes: Any, signed_bytes: Any, *, small: bool = True) -> Any:
        """total + four products per lane; small: weights are below 128, so that sums of two products fit 16 bits."""
        if small:
            return self.b.add(total, self.madd(self.byte_pairs(unsigned_bytes, signed_bytes), self.words(1)))
        weights, values, eight = (
            self.b.bitcast(unsigned_bytes, WORDS),
            self.b.bitcast(signed_bytes, WORDS),
            self.words(8),
        )
        even = self.madd(self.b.and_(weights, self.words(255)), self.b.ashr(self.b.shl(values, eight), eight))
        return self.b.add(self.b.add(total, even), self.madd(self.b.lshr(weights, eight), self.b.ashr(values, eight)))

    def dot_words(self, total: Any, a: Any, b: Any) -> Any:
        """total + two products of signed 16-bit values per lane."""
        return self.b.add(total, self.madd(self.b.bitcast(a, WORDS), self.b.bitcast(b, WORDS)))


class Avx512(_Pairs):
    """AVX-512 F, BW, VL and DQ; the methods for grids need VBMI and GFNI too."""

    def byte_pairs(self, unsigned_bytes: Any, signed_bytes: Any) -> Any:
        return self.call("llvm.x86.avx512.pmaddubs.w.512", WORDS, unsigned_bytes, signed_bytes)

    def madd(self, a: Any, b: Any) -> Any:
        return self.call("llvm.x86.avx512.pmaddw.d.512", INTS, a, b)

    def lookup16(self, table: Any, indices: Any) -> Any:
        return self.call("llvm.x86.avx512.pshuf.b.512", BYTES, table, indices)

    def lookup64(self, table: Any, indices: Any) -> Any:
        return self.call("llvm.x86.avx512.permvar.qi.512", BYTES, table, indices)

    def lookup128(self, low: Any, indices: Any, high: Any) -> Any:
        return self.call("llvm.x86.avx512.vpermi2var.qi.512", BYTES, low, indices, high)

    def bits_at(self, offsets: Any, source: Any) -> Any:
        return self.call("llvm.x86.avx512.pmultishift.qb.512", BYTES, offsets, source)

    def affine(self, source: Any, matrix: Any) -> Any:
        return self.call("llvm.x86.vgf2p8affineqb.512", BYTES, source, matrix, I8(0))

    def choose(self, mask: int, a: Any, b: Any) -> Any:
        return self.as_bytes(self._ternary(self.bytes([mask]), a, b, 0xCA))

    def _ternary(self, a: Any, b: Any, c: Any, truth: int) -> Any:
        return self.call("llvm.x86.avx512.pternlog.d.512", INTS, *(self.as_ints(v) for v in (a, b, c)), I32(truth))

    def and_or(self, a: Any, b: Any, c: Any) -> Any:
        return self._ternary(a, b, c, 0xEA)


class Avx512Vnni(Avx512):
    """AVX-512 with its VNNI instructions."""

    vnni = True

    def dot(self, total: Any, unsigned_bytes: Any, signed_bytes: Any, *, small: bool = True) -> Any:
        return self.call("llvm.x86.avx512.vpdpbusd.512", INTS, total, unsigned_bytes, signed_bytes)

    def dot_words(self, total: Any, a: Any, b: Any) -> Any:
        return self.call(
            "llvm.x86.avx512.vpdpwssd.512", INTS, total, self.b.bitcast(a, WORDS), self.b.bitcast(b, WORDS)
        )


class Avx2(_Pairs):
    """AVX2; methods that only 512-bit code uses are missing."""

    def _halves_of(self, vector: Any) -> list[Any]:
        n = vector.type.count // 2
        return [
            self.b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, n), list(range(first, first + n))))
            for first in (0, n)
        ]

    def _both(self, name: str, element: Any, *vectors: Any) -> Any:
        """A 256-bit instruction on both halves."""
        result = ir.VectorType(element, 256 // element.width)
        low, high = (self.call(name, result, *halves) for halves in zip(*map(self._halves_of, vectors), strict=True))
        lanes = ir.Constant(ir.VectorType(I32, 2 * result.count), list(range(2 * result.count)))
        return self.b.shuffle_vector(low, high, lanes)

    def byte_pairs(self, unsigned_bytes: Any, signed_bytes: Any) -> Any:
        return self._both("llvm.x86.avx2.pmadd.ub.sw", I16, unsigned_bytes, signed_bytes)

    def madd(self, a: Any, b: Any) -> Any:
        return self._both("llvm.x86.avx2.pmadd.wd", I32, a, b)

    def negated(self, values: Any, signs: Any) -> Any:
        """Bytes, negated where the top bit of `signs` is set."""
        return self._both("llvm.x86.avx2.psign.b", I8, values, self.b.or_(signs, self.bytes([1])))

    def lookup16(self, table: Any, indices: Any) -> Any:
        """Per byte: `table[index & 15]` within each 128-bit lane."""
        return self._both("llvm.x86.avx2.pshuf.b", I8, table, indices)


class AvxVnni(Avx2):
    """AVX2 with the 256-bit VNNI instructions of newer desktop processors."""

    vnni = True

    def dot(self, total: Any, unsigned_bytes: Any, signed_bytes: Any, *, small: bool = True) -> Any:
        return self._both("llvm.x86.avx512.vpdpbusd.256", I32, total, unsigned_bytes, signed_bytes)

    def dot_words(self, total: Any, a: Any, b: Any) -> Any:
        a, b = self.b.bitcast(a, WORDS), self.b.bitcast(b, WORDS)
        return self._both("llvm.x86.avx512.vpdpwssd.256", I32, total, a, b)


_CLASSES: Final[dict[Level, type[Simd]]] = {
    Level.GENERIC: Simd,
    Level.AVX2: Avx2,
    Level.AVX_VNNI: AvxVnni,
    Level.AVX512: Avx512,
    Level.AVX512_VNNI: Avx512Vnni,
}


def simd_for(level: Level, builder: Any, reading: Reading) -> Simd:
    """The emitter for a level and a way to read."""
    return _CLASSES[level](builder, in_order=reading is not Reading.AHEAD, pages=reading is Reading.PAGES)
