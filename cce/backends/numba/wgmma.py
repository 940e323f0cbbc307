"""Hopper's matrix unit: four warps multiply 64 rows by up to 256 columns, both factors read from shared memory.

It works asynchronously, so a product is started and later waited for (PTX: asynchronous warpgroup level matrix
instructions). It exists on sm_90a only; on other architectures, and in the simulator, ``multiply.py`` does the same
with ``mma.sync``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from cce.backends.numba.intrinsics import I32, I64, ptx
from cce.backends.numba.matrix import number

#: Depth of the factors that one instruction takes, and their types. tf32 factors cannot be transposed.
KINDS = {"bf16": "k16.f32.bf16.bf16", "fp16": "k16.f32.f16.f16", "tf32": "k8.f32.tf32.tf32"}
SLICES = 4  # products per panel: of 32 bytes of each row, or of 16 whole rows if transposed


@intrinsic
def fence_copies(typing):
    """Make copies in shared memory visible to the matrix unit: ``fence.proxy.async.shared::cta``."""
    return ptx(types.void(), "fence.proxy.async.shared::cta;", "~{memory}", effect=True)


@intrinsic
def panel_descriptor(typing, address):
    """Descriptor of a panel for the matrix unit: rows of 128 bytes, 16-byte pieces swizzled as in ``tiles.py``.

    Bits 0-13: address / 16; 16-29, for transposed factors: bytes from a panel of 64 rows to the next, 8192 / 16; 32-45:
    bytes from 8 rows to the next 8, 1024 / 16; 62-63: the 128-byte swizzle, 1.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.IntType(64)
        start = builder.and_(builder.lshr(args[0], ir.Constant(ir.IntType(32), 4)), ir.Constant(ir.IntType(32), 0x3FFF))
        fixed = (1 << 62) | (64 << 32) | (512 << 16)
        return builder.or_(builder.zext(start, wide), ir.Constant(wide, fixed))

    return I64(I32), codegen


def start_product(columns: int, kind: str, a_transposed: bool = False, b_transposed: bool = False) -> Any:
    """Make the intrinsic for tiles of so many columns and factors of this kind, stored as in ``multiply.py``."""
    transposes = "" if kind == "tf32" else f", {int(a_transposed)}, {int(b_transposed)}"
    steps = [
        128 if transposed else 2 for transposed in (a_transposed, b_transposed)
    ]  # from slice to slice, in 16-byte units
    registers = columns // 2
    sums = ", ".join(f"${i}" for i in range(registers))
    lines = ["wgmma.fence.sync.aligned;"]
    for s in range(SLICES):
        a, b = (2 * registers + i * SLICES + s for i in range(2))
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{columns}{KINDS[kind]} {{{sums}}}, ${a}, ${b}, 1, 1, 1{transposes};"
        )
    lines.append("wgmma.commit_group.sync.aligned;")
    body = "\n".join(lines)
    constraints = _in_place(registers) + ",l" * (2 * SLICES)

    @intrinsic
    def start(typing, z, a, b):
        """Start z += a b^T for a panel of 64 rows and one of ``columns`` rows: four ``wgmma.mma_async`` m64nNk16 (k8).

        z must not be accessed before a ``finish_products``; a and b are descriptors.
        """

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            factors = [
                builder.add(x, number(step * s)) for x, step in zip(args[1:], steps, strict=True) for s in range(SLICES)
            ]
            _change_all(context, builder, signature.args[0], args[0], registers, body, constraints, factors)
            return context.get_dummy_value()

        return types.void(z, I64, I64), codegen

    return start


def finish_products(columns: int) -> Any:
    """Make the intrinsic that waits for products, for tiles of so many columns."""
    registers = columns // 2

    @intrinsic
    def finish(typing, z):
        """Wait for all products: ``wgmma.wait_group 0``; z passes through it, so that it is not read earlier."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            body, constraints = "wgmma.wait_group.sync.aligned 0;", _in_place(registers)
            _change_all(context, builder, signature.args[0], args[0], registers, body, constraints, [])
            return context.get_dummy_value()

        return types.void(z), codegen

    return finish


@intrinsic
def finish_but_one(typing):
    """Wait for all products but the one started last: ``wgmma.wait_group 1``."""
    return ptx(types.void(), "wgmma.wait_group.sync.aligned 1;", "~{memory}", effect=True)


def _in_place(registers: int) -> str:
    """Constraints for registers that are read and written."""
    return ",".join(["=f"] * registers + [str(i) for i in range(registers)])


def _change_all(
    context: Any, builder: Any, kind: Any, z: Any, registers: int, body: str, constraints: str, more: list[Any]
) -> None:
    """Emit assembly that changes the whole array z in registers.

    Register 4 j + q belongs to row 8 (q // 2) + lane // 4 and column 8 j + 2 (lane % 4) + q % 2 of the warp's 16 rows.
    """
    real = ir.FloatType()
    data, columns = context.make_array(kind)(context, builder, z).data, registers // 2
    places = [r % 4 // 2 * columns + r // 4 * 2 + r % 2 for r in range(registers)]
    where = [builder.gep(data, [number(place)], inbounds=True) for place in places]
    arguments = [builder.load(x) for x in where] + more
    result = ir.LiteralStructType([real] * registers)
    asm_type = ir.FunctionType(result, [real] * registers + [ir.IntType(64)] * len(more))
    found = builder.call(ir.InlineAsm(asm_type, body, constraints + ",~{memory}", side_effect=True), arguments)
    for r in range(registers):
        builder.store(builder.extract_value(found, r), where[r])
