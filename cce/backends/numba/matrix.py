"""The matrix unit of sm_80 and later: fragments of the factors from shared memory into registers, and their product.

A warp executes these together, so their twin works on whole panels: ``kernels/multiply.py``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

from cce.backends.numba.intrinsics import I32, I64, U32, ptx


def item(context: Any, builder: Any, kind: Any, array: Any, *indices: Any) -> Any:
    """Function for the location of an element of an array in registers."""
    made = context.make_array(kind)(context, builder, array)
    wide = [context.cast(builder, x, types.int64, types.int64) for x in indices]
    return cgutils.get_item_pointer(context, builder, kind, made, wide)


def number(n: int) -> Any:
    """Constant of 64 bits."""
    return ir.Constant(ir.IntType(64), n)


def _load_matrices(transposed: str) -> Any:
    body = f"ldmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 {{$0, $1, $2, $3}}, [$4];"

    @intrinsic
    def load_matrices(typing, fragment, row, address):
        """Load four 8 x 8 matrices of 16-bit numbers from shared memory: ``ldmatrix.sync.aligned.m8n8.x4``.

        Lane l has the address of row l % 8 of matrix l // 8, 16 bytes. From row l // 4 of matrix i it gets number 2 (l
        % 4) and the next, as word ``fragment[row, i]``; with ``.trans``, from the matrices' transposes.
        """
        signature = types.void(fragment, I64, I32)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            word = ir.IntType(32)
            kind = ir.FunctionType(ir.LiteralStructType([word] * 4), [word])
            asm = ir.InlineAsm(kind, body, "=r,=r,=r,=r,r,~{memory}", side_effect=True)
            found = builder.call(asm, [args[2]])
            for i in range(4):
                where = item(context, builder, signature.args[0], args[0], args[1], number(i))
                builder.store(builder.extract_value(found, i), where)
            return context.get_dummy_value()

        return signature, codegen

    return load_matrices


load_matrices = _load_matrices("")
load_matrices_transposed = _load_matrices(".trans")


def _multiply_16(shape: str, kind: str) -> Any:
    body = (
        f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )

    @intrinsic
    def multiply_16(typing, z, i, j, a, b, row, half):
        """Compute z += a b for a 16 x 8 piece of a tile: ``mma.sync.aligned`` m16n8k16 (bf16, fp16) or m16n8k8 (tf32).

        The thread's piece is z[2 i : 2 i + 2, 2 j : 2 j + 2]; a[i] has four words of the factor's 16 rows and
        b[row, 2 half : 2 half + 2] two of its 8 columns.
        """
        signature = types.void(z, I64, I64, a, b, I64, I64)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            word, real = ir.IntType(32), ir.FloatType()
            two = number(2)
            z0, z1 = builder.mul(args[1], two), builder.mul(args[2], two)
            where = [
                item(context, builder, signature.args[0], args[0],
                      builder.add(z0, number(q // 2)), builder.add(z1, number(q % 2)))
                for q in range(4)
            ]  # fmt: skip
            b0 = builder.mul(args[6], two)
            factors = [
                builder.load(item(context, builder, signature.args[3], args[3], args[1], number(q))) for q in range(4)
            ] + [
                builder.load(item(context, builder, signature.args[4], args[4], args[5], builder.add(b0, number(q))))
                for q in range(2)
            ]
            sums = [builder.load(x) for x in where]
            result = ir.FunctionType(ir.LiteralStructType([real] * 4), [word] * 6 + [real] * 4)
            asm = ir.InlineAsm(result, body, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", side_effect=False)
            found = builder.call(asm, factors + sums)
            for q in range(4):
                builder.store(builder.extract_value(found, q), where[q])
            return context.get_dummy_value()

        return signature, codegen

    return multiply_16


multiply_pieces = {
    "bf16": _multiply_16("m16n8k16", "bf16"),
    "fp16": _multiply_16("m16n8k16", "f16"),
    "tf32": _multiply_16("m16n8k8", "tf32"),
}


@intrinsic
def read_tf32(typing, address):
    """Read a float from shared memory, rounded to tf32: ``ld.shared.f32``, ``cvt.rna.tf32.f32``."""
    body = "{ .reg .f32 x; ld.shared.f32 x, [$1]; cvt.rna.tf32.f32 $0, x; }"
    return ptx(U32(I32), body, "=r,r,~{memory}", effect=True)
