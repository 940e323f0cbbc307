"""The kernels for sm_90 compile, to the instructions they are made for, and take the arguments that Python gives."""

from __future__ import annotations

import ctypes

import pytest
import torch
from compiling import check_lines, compiled

from cce.backends.cupy import sm90, sm90_tiles
from cce.backends.cupy.module import Variant
from cce.backends.gpu.arrays import Formula

REGISTERS = 168  # 65536 over 384 threads, in eights; the warpgroups then share them otherwise


def variant(name: str, cluster: int = 2, dtype: torch.dtype = torch.bfloat16, **options: int) -> Variant:
    """Options in small letters; those of the formula go where the backend has them."""
    bias = torch.zeros(1) if options.pop("bias", 0) else None
    softcap = 30.0 if options.pop("softcap", 0) else None
    formula = Formula(bias, 0.5 if options.pop("scale", 0) else 1.0, softcap, False)
    macros = {key.upper(): value for key, value in options.items()}
    arrays = sum(macros.get(key, 0) for key in ("WEIGHTED", "DBIAS", "GATHER")) + (name == "live" and bias is None)
    return sm90_tiles.variant_of(name, cluster, dtype, formula, macros, arrays)


EVERY = {"bias": 1, "softcap": 1, "entropy": 1}
VARIANTS = {
    "forward": variant("statistics"),
    "forward, maps": variant("statistics", maps=1),
    "forward, every map": variant("statistics", **EVERY, maps=1, tile_entropy=1, prediction=1),
    "forward, every output": variant("statistics", **EVERY, weighted=1, prediction=1),
    "forward, narrow blocks": variant("statistics", 1, torch.float16, scale=1, maps=1, online=1, block_v=64),
    "gradient": variant("gradient"),
    "gradient, dbias": variant("gradient", 1, torch.float16, bias=1, scale=1, dbias=1),
    "gradient, everything": variant("gradient", **EVERY, weighted=1, dbias=1, several_targets=1),
    "live": variant("live", 1),
    "live, everything": variant("live", 1, **EVERY, several_targets=1),
    "live, gathered": variant("live", 1, gather=1),
    "live, gathered, everything": variant("live", 1, torch.float16, **EVERY, several_targets=1, gather=1),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_without_spills_to_hoppers_instructions(name: str) -> None:
    found = compiled(VARIANTS[name], disassemble=True)
    macros = dict(VARIANTS[name].macros)
    assert (found.stack, found.local) == (0, 0)
    assert found.registers <= REGISTERS
    text = found.instructions
    assert "HGMMA.64x256x16.F32" in text and " HMMA" not in text
    assert ".BF16" in text or macros.get("DTYPE") == 1
    assert "UTMALDG.2D" in text
    assert ("UTMALDG.2D.MULTICAST" in text) == (macros["CLUSTER"] == 2)
    assert ("LDGSTS" in text) == bool(macros.get("GATHER"))
    assert "USETMAXREG" in text
    assert found.shared + VARIANTS[name].shared <= 232448  # there is so much for a block


@pytest.mark.parametrize(
    ("name", "struct"),
    [
        ("statistics", sm90.StatisticsArguments),
        ("gradient", sm90.GradientArguments),
        ("live", sm90.LiveArguments),
    ],
)
def test_the_arguments_lie_where_the_kernel_looks(name: str, struct: type[ctypes.Structure]) -> None:
    """The compiler compares every field's place; the whole is at least as large as what the driver copies."""
    fields = [field[0] for field in struct._fields_ if field[0] != "padding"]
    where = "__INTADDR__(&(static_cast<Arguments*>(nullptr)->{}))"  # NVRTC has no offsetof
    lines = [f"static_assert({where.format(f)} == {getattr(struct, f).offset});" for f in fields]
    lines.append(f"static_assert(sizeof(Arguments) <= {ctypes.sizeof(struct)});")
    check_lines(variant(name, 1 if name == "live" else 2), lines)
