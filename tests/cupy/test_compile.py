"""The portable kernels compile for every architecture, to its matrix instructions, and take what Python gives them."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest
import torch
from compiling import GPUS, check_lines, compiled, stand_in

from cce.backends.cupy import arguments, variants
from cce.backends.cupy import sources as source_files
from cce.backends.cupy.gpu import Gpu
from cce.backends.cupy.module import Variant
from cce.backends.gpu.arrays import Dense, Formula, Live, Rows, Splits, Tiles
from cce.spec import Spec

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
X = torch.zeros(1)
PLAIN, BIAS, SCALE = Formula(None, 1.0, None, False), Formula(X, 1.0, None, False), Formula(None, 2.0, None, False)
CAPPED, CAPPED_IEEE, IEEE = Formula(X, 2.0, 30.0, False), Formula(X, 2.0, 30.0, True), Formula(None, 1.0, None, True)
ALL: dict[str, Any] = {"k": 2, "entropy": True, "dbias": True, "weighted": True}
LSE, EVERY = Splits(X, X, None, None, None), Splits(X, X, X, X, X)
MAPS, ALL_MAPS = Tiles(X, X, None), Tiles(X, X, X)


def spec(block_n: int = 128, block_v: int = 128, **fields: Any) -> Spec:
    return Spec(filter="element", block_n=block_n, block_v=block_v, **fields)


def rows(k: int = 1, entropy: bool = False) -> Rows:
    h = X if entropy else None
    return Rows(X, X, X, X, torch.zeros(1, k, dtype=torch.int32), h, h, None)


def dense(dtype: torch.dtype, formula: Formula, dbias: bool = False, weighted: bool = False, **options: Any) -> Dense:
    """What a variant depends on."""
    return Dense(torch.zeros(1, 8, dtype=dtype), formula, rows(**options), X if weighted else None, dbias)


def live(dtype: torch.dtype, formula: Formula, sorted_rows: bool = True, dbias: bool = False, **options: Any) -> Live:
    """What a variant depends on; the rest is None."""
    e, dc, sums = torch.zeros(1, 8, dtype=dtype), torch.zeros(1, 8, dtype=dtype), X if dbias else None
    of_rows: Any = rows(**options)
    nothing: Any = None
    return Live(
        nothing, e, sorted_rows, nothing, None, formula, of_rows, nothing, nothing, nothing, sums, X, dc, sums, None,
        None, None,
    )  # fmt: skip


def statistics(gpu: Gpu, dtype: torch.dtype, formula: Formula, found: Splits, tiles: Tiles | None, of: Spec) -> Variant:
    columns = max(128, of.block_v or 0) if tiles else 128
    return variants.statistics_variant(gpu, dtype, formula, of, found, tiles, columns)


def of_live(gpu: Gpu, of: Spec, arguments: Live) -> Variant:
    return variants.live_variant(gpu, of, arguments, max(1, 128 // (of.block_v or 0)))


def settings(gpu: Gpu) -> dict[str, Variant]:
    """Every kernel: as it is most often, and with all there is, in every dtype and at the ends of the blocks."""
    all_live = {"k": 2, "entropy": True, "sorted_rows": False, "dbias": True}
    return {
        "statistics": statistics(gpu, BF16, PLAIN, LSE, None, spec()),
        "statistics maps": statistics(gpu, BF16, PLAIN, LSE, MAPS, spec()),
        "statistics maps bias": statistics(gpu, F16, BIAS, LSE, MAPS, spec()),
        "statistics narrow": statistics(gpu, BF16, SCALE, LSE, MAPS, spec(block_v=16, lse_accumulation="online")),
        "statistics wide everything": statistics(gpu, BF16, CAPPED, EVERY, ALL_MAPS, spec(block_v=256)),
        "statistics tf32": statistics(gpu, F32, PLAIN, LSE, None, spec()),
        "statistics ieee everything": statistics(gpu, F32, CAPPED_IEEE, EVERY, ALL_MAPS, spec()),
        "gradient": variants.gradient_variant(gpu, dense(BF16, PLAIN)),
        "gradient dbias": variants.gradient_variant(gpu, dense(F16, BIAS, dbias=True)),
        "gradient everything": variants.gradient_variant(gpu, dense(BF16, CAPPED, **ALL)),
        "gradient ieee everything": variants.gradient_variant(gpu, dense(F32, CAPPED_IEEE, **ALL)),
        "live": of_live(gpu, spec(), live(BF16, PLAIN)),
        "live unsorted": of_live(gpu, spec(), live(BF16, BIAS, False, True)),
        "live narrow": of_live(gpu, spec(16, 32), live(F16, CAPPED, **all_live)),
        "live wide ieee everything": of_live(gpu, spec(64, 256), live(F32, CAPPED_IEEE, **all_live)),
        "products": variants.products_variants(gpu, spec(), live(BF16, PLAIN))[0],
        "products unsorted": variants.products_variants(gpu, spec(64, 128), live(F16, PLAIN, False))[0],
        "products narrow": variants.products_variants(gpu, spec(16, 16), live(BF16, PLAIN))[0],
        "products tf32": variants.products_variants(gpu, spec(16, 256), live(F32, PLAIN))[0],
        "products ieee": variants.products_variants(gpu, spec(), live(F32, IEEE))[0],
        "dbias": variants.products_variants(gpu, spec(), live(BF16, BIAS, dbias=True))[1],
        "targets": variants.targets_variant(gpu, BF16, F32, CAPPED),
    }


SETTINGS = {name: settings(gpu) for name, gpu in GPUS.items()}
NAMES = list(SETTINGS["sm_80"])
#: Of each kernel the variants that take the most registers: each architecture compiles its own.
OWN = (
    "statistics wide everything", "statistics ieee everything", "gradient everything", "gradient ieee everything",
    "live narrow", "live wide ieee everything", "products ieee", "products tf32", "dbias", "targets",
)  # fmt: skip
MULTIPLY = [name for name in NAMES if name not in ("dbias", "targets")]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", NAMES)
def test_compiles_into_registers_and_shared_memory(gpu: str, name: str) -> None:
    """As many blocks of threads fit as the launch bound promises; nothing is spilled."""
    variant = SETTINGS[gpu][name]
    found = compiled(stand_in(SETTINGS, gpu, name, OWN))
    blocks = dict(variant.macros).get("BLOCKS_AT_ONCE", 1)
    assert found.stack == 0
    assert found.registers * variants.THREADS * blocks <= 65536
    assert found.shared + variant.shared <= GPUS[gpu].shared_of_block
    assert blocks * (found.shared + variant.shared + 1024) <= GPUS[gpu].shared + blocks * 1024


@pytest.mark.parametrize("name", MULTIPLY)
def test_multiplies_by_matrix_units_behind_copies(name: str) -> None:
    """The instructions, those of sm_80: copies to shared memory that nobody waits for, and the dtype's products."""
    text = compiled(SETTINGS["sm_80" if name in OWN else "sm_90"][name], disassemble=True).instructions
    product = {"tf32": "HMMA.1688.F32.TF32", "ieee": "FFMA"}.get(name.split(" ")[1] if " " in name else "")
    if "ieee" in name:
        assert "HMMA" not in text and "FFMA" in text
    elif product is not None:
        assert product in text
    else:
        assert re.search(r"HMMA\.16816\.F32(\.BF16)?", text) and "LDSM" in text
    assert "LDGSTS.E.BYPASS.128" in text


STRUCTS = {
    "targets": arguments.TargetsArguments, "statistics": arguments.StatisticsArguments,
    "gradient": arguments.GradientArguments, "live": arguments.LiveArguments, "products": arguments.ProductsArguments,
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTS)
def test_the_arguments_lie_where_the_kernel_looks(name: str) -> None:
    """The compiler compares every field's place, those of inner structs too, and the whole."""
    struct = STRUCTS[name]
    of_kernel = struct.__name__
    lines = [f"static_assert(sizeof({of_kernel}) == {ctypes.sizeof(struct)});"]
    for field, place in _places(struct):
        lines.append(f"static_assert(__INTADDR__(&(static_cast<{of_kernel}*>(nullptr)->{field})) == {place});")
    check_lines(SETTINGS["sm_90"][name], lines)


def _places(struct: type[ctypes.Structure], prefix: str = "", start: int = 0) -> list[tuple[str, int]]:
    found = []
    for name, kind in struct._fields_:
        place = start + getattr(struct, name).offset
        if issubclass(kind, ctypes.Structure):
            found += _places(kind, f"{prefix}{name}.", place)
        else:
            found.append((prefix + name, place))
    return found


def test_the_text_of_a_kernel_is_all_it_is_made_of() -> None:
    """Nothing is left to include: a cache's key is the text."""
    for path in source_files.FOLDER.rglob("*.cu"):
        text = source_files.source(str(path.relative_to(source_files.FOLDER)))
        assert "#include" not in text
        assert text.count("__device__ __forceinline__ float quad_max(") <= 1
