"""The kernels of a pass that computes gradients along with the loss: they compile, and take what Python gives them."""

from __future__ import annotations

import re
import struct

import pytest
import torch
from compiling import GPUS, check_lines, compiled, stand_in

from cce.backends.cupy import one_pass, sm90_one_pass, sm90_tiles, variants
from cce.backends.cupy import sources as source_files
from cce.backends.cupy.gpu import Gpu
from cce.backends.cupy.module import Variant
from cce.backends.gpu.arrays import Formula

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
)  # fmt: skip
BIAS = torch.zeros(1)
PLAIN, BOTH, IEEE = Formula(None, 1.0, None, False), Formula(BIAS, 0.5, None, False), Formula(BIAS, 0.5, None, True)
CAPPED, EVERY = Formula(None, 1.0, 30.0, False), Formula(BIAS, 0.5, 30.0, False)


def portable(gpu: Gpu) -> dict[str, Variant]:
    """Every kernel, with every option at the ends of the dtypes."""
    return {
        "store": variants.store_variant(gpu, BF16, PLAIN),
        "store half": variants.store_variant(gpu, F16, BOTH),
        "store capped": variants.store_variant(gpu, BF16, CAPPED),
        "store tf32": variants.store_variant(gpu, F32, PLAIN),
        "store ieee": variants.store_variant(gpu, F32, IEEE),
        **{f"scale {dtype}": variants.scale_variant(gpu, dtype, False) for dtype in (BF16, F16, F32)},
        **{f"scale capped {dtype}": variants.scale_variant(gpu, dtype, True) for dtype in (BF16, F32)},
        **{f"prepare {dtype}": variants.one_pass_variant(gpu, "prepare", dtype) for dtype in INTEGERS},
        "join": variants.one_pass_variant(gpu, "join"),
        "value": variants.one_pass_variant(gpu, "value"),
        "multiply": variants.multiply_variant(gpu, BF16, F32),
        "multiply others": variants.multiply_variant(gpu, F16, BF16),
        "targets": variants.targets_variant(gpu, F16, F16, BOTH, True),
    }


SETTINGS = {name: portable(gpu) for name, gpu in GPUS.items()}
OWN = (
    "store half", "store ieee", "scale torch.float32", "prepare torch.int64", "prepare torch.uint8", "join", "value",
    "multiply", "targets",
)  # fmt: skip
SM90 = {
    "plain": sm90_tiles.variant_of("one_pass_store", 2, BF16, PLAIN, {}, 0),
    "every option": sm90_tiles.variant_of("one_pass_store", 1, F16, EVERY, {}, 0),
    "capped": sm90_tiles.variant_of("one_pass_store", 1, BF16, CAPPED, {}, 0),
}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", SETTINGS["sm_80"])
def test_compiles_without_spills(gpu: str, name: str) -> None:
    variant = SETTINGS[gpu][name]
    found = compiled(stand_in(SETTINGS, gpu, name, OWN))
    threads = one_pass.THREADS if variant.file != "one_pass.cu" else 1024
    blocks = dict(variant.macros).get("BLOCKS_AT_ONCE", 1)
    assert found.local == 0 and found.stack <= (16 if "prepare" in name else 0)  # where an assertion's call returns to
    assert found.registers * threads * blocks <= 65536
    assert blocks * (found.shared + variant.shared + 1024) <= GPUS[gpu].shared + blocks * 1024


@pytest.mark.parametrize("name", SM90)
def test_hoppers_compiles_without_spills_to_its_instructions(name: str) -> None:
    found = compiled(SM90[name], disassemble=True)
    assert (found.stack, found.local) == (16 if name == "capped" else 0, 0)  # four registers of a thread, once a tile
    assert found.registers <= 168
    assert "HGMMA.64x256x16.F32" in found.instructions
    assert ("UTMALDG.2D.MULTICAST" in found.instructions) == (name == "plain")
    assert "F2FP.F16.F32" in found.instructions  # q is float16, of bfloat16 factors, too
    assert found.shared + SM90[name].shared <= 232448


LAYOUTS = {
    **{name: (SETTINGS["sm_90"][f"{name}{more}"], layout, f"{name.capitalize()}Arguments") for name, more, layout in (
        (name, " torch.int64" if name == "prepare" else " torch.bfloat16" if name == "scale" else "", layout)
        for name, layout in one_pass.LAYOUTS.items()
    )},
    "store_sm90": (SM90["plain"], sm90_one_pass.STORE_LAYOUT, "Arguments"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_arguments_lie_where_the_kernel_looks(name: str) -> None:
    """The compiler compares the places of all numbers, in their order, and the size."""
    variant, layout, kind = LAYOUTS[name]
    text = source_files.source(variant.file)
    fields = _fields(text, kind)
    where = "__INTADDR__(&(static_cast<{}*>(nullptr)->{}))"
    lines = [
        f"static_assert({where.format(kind, field)} == {place});"
        for field, place in zip(fields, _places(layout), strict=True)
    ]
    size = struct.calcsize("<" + layout)
    lines.append(f"static_assert(sizeof({kind}) == {-(-size // 64) * 64 if '128s' in layout else size});")
    check_lines(variant, lines)


def _fields(text: str, kind: str) -> list[str]:
    """Names of a struct's numbers, in their order; those of a struct inside after its name and a dot."""
    inner = {
        "Matrix": ["data", "pitch", "bytes"], "Formula": ["scale", "softcap"], "TileSums": ["max", "sum"],
    }  # fmt: skip
    body = re.search(rf"struct {kind} {{\n(.*?)\n}};", text, re.DOTALL)
    assert body is not None
    found = []
    for line in body[1].splitlines():
        line = re.sub(r" *//.*", "", line).replace("*", " ").replace("const ", "").strip()
        kinds, names = re.fullmatch(r"((?:long )*\w+) +(.*);", line).groups()  # type: ignore[union-attr]
        for name in names.split(","):
            found += [f"{name.strip()}.{more}" for more in inner[kinds]] if kinds in inner else [name.strip()]
    return found


def _places(layout: str) -> list[int]:
    """Where each number begins."""
    found, place = [], 0
    for count, code in re.findall(r"(\d*)([a-z])", layout):
        if code == "s":
            found.append(place)
            place += int(count)
            continue
        for _ in range(int(count or 1)):
            if code != "x":
                found.append(place)
            place += {"q": 8, "i": 4, "f": 4, "x": 1}[code]
    return found
