"""The kernels of the work list, the plan, sorted rows and maps compile, and take what Python gives them."""

from __future__ import annotations

import ctypes

import pytest
import torch
from compiling import GPUS, check_lines, compiled

from cce.backends.cupy import lists, rows
from cce.backends.cupy.gpu import Gpu
from cce.backends.cupy.module import Variant

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def variants(gpu: Gpu) -> dict[str, tuple[Variant, int]]:
    """Every kernel, with the threads of its blocks."""
    found = {
        f"{name} {'half' if half else 'float'}": (lists.work_variant(gpu, name, half), 256)
        for name in ("hits", "rank", "row_of", "live_tiles")
        for half in (False, True)
    }
    found |= {
        name: (lists.plan_variant(gpu, name), threads)
        for name, threads in (("tile_list", 1024), ("chunks", 256), ("items", 256))
    }
    found |= {f"scatter {dtype}": (rows.rows_variant(gpu, "scatter_rows", dtype), 128) for dtype in (BF16, F16, F32)}
    found |= {f"fill {half}": (rows.rows_variant(gpu, "fill_maps", half=half), 256) for half in (False, True)}
    return found | {
        "gather": (rows.rows_variant(gpu, "gather_rows"), 128),
        "join": (rows.rows_variant(gpu, "joined"), 64),
    }


VARIANTS = {name: variants(gpu) for name, gpu in GPUS.items()}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", VARIANTS["sm_80"])
def test_compiles_without_spills(gpu: str, name: str) -> None:
    """And two blocks of threads share a multiprocessor."""
    variant, threads = VARIANTS[gpu][name]
    found = compiled(variant)
    assert (found.stack, found.local) == (0, 0)
    assert 2 * found.registers * threads <= 65536


def test_rows_are_moved_sixteen_bytes_at_a_time() -> None:
    gather, scatter = (VARIANTS["sm_90"][name][0] for name in ("gather", "scatter torch.bfloat16"))
    assert "LDG.E.128" in compiled(gather, disassemble=True).instructions
    assert "STG.E.128" in compiled(gather, disassemble=True).instructions
    assert "LDG.E.128" in compiled(scatter, disassemble=True).instructions


STRUCTS = {
    lists.WorkArguments: "hits half", lists.PlanArguments: "items",
    rows.GatherArguments: "gather", rows.ScatterArguments: "gather",
    rows.FillArguments: "gather", rows.JoinArguments: "gather",
}  # fmt: skip


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_the_arguments_lie_where_the_kernel_looks(struct: type[ctypes.Structure]) -> None:
    name = STRUCTS[struct]
    lines = [f"static_assert(sizeof({struct.__name__}) == {ctypes.sizeof(struct)});"]
    for field, *_ in struct._fields_:
        where = f"__INTADDR__(&(static_cast<{struct.__name__}*>(nullptr)->{field}))"
        lines.append(f"static_assert({where} == {getattr(struct, field).offset});")
    check_lines(VARIANTS["sm_90"][name][0], lines)
