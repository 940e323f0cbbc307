"""What a GPU can do and Python has no word for: each function here is a few instructions of PTX.

``twins.py`` has the same functions in plain Python, for Numba's simulator; ``device.py`` picks one of the two.
Addresses in shared memory are 32-bit integers, pointers to global memory 64-bit integers. Arrays that live in a
thread's registers are ``cuda.local.array`` whose every index is a constant once loops are unrolled.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from cce.backends.numba.numpy_names import populate_array

F32, I32, U32, I64 = types.float32, types.int32, types.uint32, types.int64
SMEM = 3  # the address space of shared memory
_LLVM = {F32: ir.FloatType(), I32: ir.IntType(32), U32: ir.IntType(32), I64: ir.IntType(64), types.void: ir.VoidType()}
_LLVM[types.uint16] = ir.IntType(16)


def ptx(signature: Any, body: str, constraints: str, effect: bool = False) -> tuple[Any, Any]:
    """An intrinsic that is one piece of assembly: what its function returns."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_LLVM[signature.return_type], [_LLVM[x] for x in signature.args])
        result = builder.call(ir.InlineAsm(kind, body, constraints, side_effect=effect), args)
        return context.get_dummy_value() if signature.return_type == types.void else result

    return signature, codegen


# Control


def repeat(body: Any, count: int) -> Any:
    """The function of a tuple that calls ``body(n, tuple)`` for n < ``count``, written out one after the other.

    What a long loop does to arrays in registers: the compiler would not unroll it, and indices must be constants. They
    are so for LLVM only: of an integer that Numba knows it would compile ``body`` anew.
    """

    @intrinsic
    def run(typing, state):
        kind = typing.resolve_value_type(body)
        inner = typing.resolve_function_type(kind, (types.int64, state), {})

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            call = context.get_function(kind, inner)
            for n in range(count):
                call(builder, [ir.Constant(ir.IntType(64), n), args[0]])
            return context.get_dummy_value()

        return types.void(state), codegen

    return run


# Arithmetic


@intrinsic
def exp2(typing, x):
    """2^x, 0 for -inf: ``ex2.approx.ftz.f32``."""
    return ptx(F32(F32), "ex2.approx.ftz.f32 $0, $1;", "=f,f")


@intrinsic
def log2(typing, x):
    """Logarithm to base 2, -inf for 0: ``lg2.approx.ftz.f32``."""
    return ptx(F32(F32), "lg2.approx.ftz.f32 $0, $1;", "=f,f")


@intrinsic
def divide(typing, x, y):
    """x / y to 2 units in the last place: ``div.full.f32``."""
    return ptx(F32(F32, F32), "div.full.f32 $0, $1, $2;", "=f,f,f")


@intrinsic
def reciprocal(typing, x):
    """1 / x to a unit in the last place: ``rcp.approx.ftz.f32``."""
    return ptx(F32(F32), "rcp.approx.ftz.f32 $0, $1;", "=f,f")


@intrinsic
def maximum(typing, x, y):
    """The larger of two floats, NaN if either is: ``max.NaN.f32``."""
    return ptx(F32(F32, F32), "max.NaN.f32 $0, $1, $2;", "=f,f,f")


@intrinsic
def pack_bf16(typing, low, high):
    """Two floats as bfloat16 in one word: ``cvt.rn.bf16x2.f32``."""
    return ptx(U32(F32, F32), "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f")


@intrinsic
def pack_fp16(typing, low, high):
    """Two floats as float16 in one word: ``cvt.rn.f16x2.f32``."""
    return ptx(U32(F32, F32), "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f")


@intrinsic
def widen_bf16(typing, bits):
    """The float of 16 bits of bfloat16: they are its upper half (``mov.b32``)."""
    return ptx(F32(types.uint16), "{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 $0, {zero, $1}; }", "=f,h")


@intrinsic
def widen_fp16(typing, bits):
    """The float of 16 bits of float16: ``cvt.f32.f16``."""
    return ptx(F32(types.uint16), "cvt.f32.f16 $0, $1;", "=f,h")


# Other lanes of the warp


@intrinsic
def lane_xor(typing, x, mask):
    """x of the lane whose number differs in the bits of ``mask``: ``shfl.sync.bfly.b32``."""
    return ptx(F32(F32, I32), "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;", "=f,f,r", effect=True)


@intrinsic
def lane_xor_int(typing, x, mask):
    """As ``lane_xor``, of an integer."""
    return ptx(I32(I32, I32), "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;", "=r,r,r", effect=True)


# Global memory


def _array(pointer: Any, dtype: Any) -> tuple[Any, Any]:
    """An array without an end that begins at a pointer. Its length is never read: indices are not checked."""
    kind = types.Array(dtype, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        item = ir.Constant(ir.IntType(64), dtype.bitwidth // 8)
        nothing = ir.Constant(ir.IntType(64), 0)  # an index below 0 has it added: then that is no instruction
        array = context.make_array(kind)(context, builder)
        data = builder.inttoptr(args[0], context.get_data_type(dtype).as_pointer())
        populate_array(array, data, [nothing], [item], item, None)
        return array._getvalue()

    return kind(I64), codegen


@intrinsic
def floats(typing, pointer):
    """The float32 numbers at a pointer, to be indexed like an array."""
    return _array(pointer, F32)


@intrinsic
def ints(typing, pointer):
    """The int32 numbers at a pointer."""
    return _array(pointer, I32)


@intrinsic
def longs(typing, pointer):
    """The int64 numbers at a pointer."""
    return _array(pointer, I64)


@intrinsic
def halves(typing, pointer):
    """The 16-bit words at a pointer, of bfloat16 or float16 numbers."""
    return _array(pointer, types.uint16)


@intrinsic
def flags(typing, pointer):
    """The bytes at a pointer, of booleans."""
    return _array(pointer, types.uint8)


@intrinsic
def words(typing, pointer):
    """The 32-bit words at a pointer, of two 16-bit numbers each."""
    return _array(pointer, U32)


# Shared memory


@intrinsic
def shared_address(typing, array):
    """The address in shared memory of an array there (``cvta.to.shared``)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        inside = builder.addrspacecast(data, ir.PointerType(data.type.pointee, addrspace=SMEM))
        return builder.ptrtoint(inside, ir.IntType(32))

    return I32(array), codegen


@intrinsic
def copy_16(typing, address, pointer, place, valid):
    """Starts a copy of the 16-byte piece number ``place`` at a pointer into shared memory; zeros if not ``valid``.

    ``cp.async.cg.shared.global``: past the registers and the first cache.
    """
    body = "{ .reg .b64 from; mad.lo.s64 from, $2, 16, $1; cp.async.cg.shared.global.L2::128B [$0], [from], 16, $3; }"
    signature = types.void(I32, I64, I64, types.boolean)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        size = builder.select(args[3], ir.Constant(word, 16), ir.Constant(word, 0))
        kind = ir.FunctionType(ir.VoidType(), [word, ir.IntType(64), ir.IntType(64), word])
        builder.call(ir.InlineAsm(kind, body, "r,l,l,r,~{memory}", side_effect=True), [*args[:3], size])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def copies_commit(typing):
    """Makes one group of the copies started since the last: ``cp.async.commit_group``."""
    return ptx(types.void(), "cp.async.commit_group;", "~{memory}", effect=True)


def _copies_wait(count: int) -> Any:
    @intrinsic
    def copies_wait(typing):
        """Waits until all but the last ``count`` groups of copies have arrived: ``cp.async.wait_group``."""
        return ptx(types.void(), f"cp.async.wait_group {count};", "~{memory}", effect=True)

    return copies_wait


#: By count, for it is part of the instruction.
copies_wait = [_copies_wait(count) for count in range(8)]


@intrinsic
def read_float(typing, address):
    """A float in shared memory: ``ld.shared.f32``."""
    return ptx(F32(I32), "ld.shared.f32 $0, [$1];", "=f,r,~{memory}", effect=True)


@intrinsic
def write_float(typing, address, x):
    """A float into shared memory: ``st.shared.f32``."""
    return ptx(types.void(I32, F32), "st.shared.f32 [$0], $1;", "r,f,~{memory}", effect=True)


@intrinsic
def read_int(typing, address):
    """An integer in shared memory: ``ld.shared.s32``."""
    return ptx(I32(I32), "ld.shared.s32 $0, [$1];", "=r,r,~{memory}", effect=True)


@intrinsic
def write_int(typing, address, x):
    """An integer into shared memory: ``st.shared.s32``."""
    return ptx(types.void(I32, I32), "st.shared.s32 [$0], $1;", "r,r,~{memory}", effect=True)


@intrinsic
def draw(typing, pointer, place):
    """The int32 number at a place, which goes up by one for whoever comes next: ``atom.global.add.s32``."""
    body = "{ .reg .b64 at; mad.lo.s64 at, $2, 4, $1; atom.global.add.s32 $0, [at], 1; }"
    return ptx(I32(I64, I64), body, "=r,l,l,~{memory}", effect=True)
