"""GPU operations that Python cannot express: each function here is a few instructions of PTX.

``twins.py`` has the same functions in plain Python, for Numba's simulator; ``device.py`` chooses between the two.
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
    """Build the pair that an intrinsic's function returns for one piece of assembly."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_LLVM[signature.return_type], [_LLVM[x] for x in signature.args])
        result = builder.call(ir.InlineAsm(kind, body, constraints, side_effect=effect), args)
        return context.get_dummy_value() if signature.return_type == types.void else result

    return signature, codegen


# Control


def repeat(body: Any, count: int) -> Any:
    """Make a function of a tuple that calls ``body(n, tuple)`` for n < ``count``, fully unrolled.

    It is for long loops over arrays in registers, which the compiler would not unroll, although indices must be
    constants. They are constants for LLVM only: Numba would compile ``body`` anew for each literal integer.
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
    """Base-2 logarithm, -inf for 0: ``lg2.approx.ftz.f32``."""
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
    """The larger of two floats, NaN if either is NaN: ``max.NaN.f32``."""
    return ptx(F32(F32, F32), "max.NaN.f32 $0, $1, $2;", "=f,f,f")


@intrinsic
def pack_bf16(typing, low, high):
    """Round two floats to bfloat16 and pack them in one word: ``cvt.rn.bf16x2.f32``."""
    return ptx(U32(F32, F32), "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f")


@intrinsic
def pack_fp16(typing, low, high):
    """Round two floats to float16 and pack them in one word: ``cvt.rn.f16x2.f32``."""
    return ptx(U32(F32, F32), "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f")


@intrinsic
def widen_bf16(typing, bits):
    """Widen the bits of a bfloat16 to a float, of which they are the upper half (``mov.b32``)."""
    return ptx(F32(types.uint16), "{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 $0, {zero, $1}; }", "=f,h")


@intrinsic
def widen_fp16(typing, bits):
    """Widen the bits of a float16 to a float: ``cvt.f32.f16``."""
    return ptx(F32(types.uint16), "cvt.f32.f16 $0, $1;", "=f,h")


# Other lanes of the warp


@intrinsic
def lane_xor(typing, x, mask):
    """Read x from the lane whose number differs in the bits of ``mask``: ``shfl.sync.bfly.b32``."""
    return ptx(F32(F32, I32), "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;", "=f,f,r", effect=True)


@intrinsic
def lane_xor_int(typing, x, mask):
    """Like ``lane_xor``, for an integer."""
    return ptx(I32(I32, I32), "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;", "=r,r,r", effect=True)


# Global memory


def _array(pointer: Any, dtype: Any) -> tuple[Any, Any]:
    """Array of unlimited length at a pointer. Its length is never read: indices are not checked."""
    kind = types.Array(dtype, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        item = ir.Constant(ir.IntType(64), dtype.bitwidth // 8)
        nothing = ir.Constant(ir.IntType(64), 0)  # added to an index below 0: as a constant 0, no instruction
        array = context.make_array(kind)(context, builder)
        data = builder.inttoptr(args[0], context.get_data_type(dtype).as_pointer())
        populate_array(array, data, [nothing], [item], item, None)
        return array._getvalue()

    return kind(I64), codegen


@intrinsic
def floats(typing, pointer):
    """float32 numbers at a pointer, to be indexed like an array."""
    return _array(pointer, F32)


@intrinsic
def ints(typing, pointer):
    """int32 numbers at a pointer."""
    return _array(pointer, I32)


@intrinsic
def longs(typing, pointer):
    """int64 numbers at a pointer."""
    return _array(pointer, I64)


@intrinsic
def halves(typing, pointer):
    """16-bit words at a pointer, of bfloat16 or float16 numbers."""
    return _array(pointer, types.uint16)


@intrinsic
def flags(typing, pointer):
    """Bytes at a pointer, of booleans."""
    return _array(pointer, types.uint8)


@intrinsic
def words(typing, pointer):
    """32-bit words at a pointer, of two 16-bit numbers each."""
    return _array(pointer, U32)


# Shared memory


@intrinsic
def shared_address(typing, array):
    """Address, in shared memory, of an array there (``cvta.to.shared``)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        inside = builder.addrspacecast(data, ir.PointerType(data.type.pointee, addrspace=SMEM))
        return builder.ptrtoint(inside, ir.IntType(32))

    return I32(array), codegen


@intrinsic
def copy_16(typing, address, pointer, place, valid):
    """Start a copy of 16-byte piece number ``place`` at a pointer into shared memory; zeros if not ``valid``.

    ``cp.async.cg.shared.global`` bypasses the registers and the L1 cache.
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
    """Form one group of the copies started since the last call: ``cp.async.commit_group``."""
    return ptx(types.void(), "cp.async.commit_group;", "~{memory}", effect=True)


def _copies_wait(count: int) -> Any:
    @intrinsic
    def copies_wait(typing):
        """Wait until all but the last ``count`` groups of copies have arrived: ``cp.async.wait_group``."""
        return ptx(types.void(), f"cp.async.wait_group {count};", "~{memory}", effect=True)

    return copies_wait


#: Functions by count, which is part of the instruction.
copies_wait = [_copies_wait(count) for count in range(8)]


@intrinsic
def read_float(typing, address):
    """Read a float from shared memory: ``ld.shared.f32``."""
    return ptx(F32(I32), "ld.shared.f32 $0, [$1];", "=f,r,~{memory}", effect=True)


@intrinsic
def write_float(typing, address, x):
    """Write a float to shared memory: ``st.shared.f32``."""
    return ptx(types.void(I32, F32), "st.shared.f32 [$0], $1;", "r,f,~{memory}", effect=True)


@intrinsic
def read_int(typing, address):
    """Read an integer from shared memory: ``ld.shared.s32``."""
    return ptx(I32(I32), "ld.shared.s32 $0, [$1];", "=r,r,~{memory}", effect=True)


@intrinsic
def write_int(typing, address, x):
    """Write an integer to shared memory: ``st.shared.s32``."""
    return ptx(types.void(I32, I32), "st.shared.s32 [$0], $1;", "r,r,~{memory}", effect=True)


@intrinsic
def draw(typing, pointer, place):
    """Read the int32 counter at a place and increment it, atomically: ``atom.global.add.s32``."""
    body = "{ .reg .b64 at; mad.lo.s64 at, $2, 4, $1; atom.global.add.s32 $0, [at], 1; }"
    return ptx(I32(I64, I64), body, "=r,l,l,~{memory}", effect=True)
