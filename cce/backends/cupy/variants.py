"""Variants of the kernels that calls need: macros, and shared memory. Names are those of cuda/options.cuh."""

from __future__ import annotations

import torch

from cce.backends.cupy.gpu import Gpu
from cce.backends.cupy.module import Variant
from cce.backends.gpu.arrays import Dense, Formula, Live, Rows, Splits, Tiles
from cce.spec import Spec

THREADS = 256
TARGET_THREADS = 128  # threads of target_logits
TILE_N = TILE_V = TILE_D = 128
_ROW_BYTES = 128  # row of an operand in shared memory
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def targets_variant(gpu: Gpu, e: torch.dtype, c: torch.dtype, formula: Formula, copy: bool = False) -> Variant:
    """Variant of target_logits for dtypes ``e`` and ``c``; ``copy``: also copy the rows of ``e`` that count."""
    macros = {"E_TYPE": DTYPES[e], "C_TYPE": DTYPES[c], "COPY": copy, **formula_macros(formula)}
    return _variant(gpu, "targets", macros, kernel="target_logits")


def one_pass_variant(gpu: Gpu, name: str, targets: torch.dtype = torch.int64) -> Variant:
    """Variant of a kernel of one_pass.cu; ``targets``: dtype of the targets that prepare takes."""
    macros = {"TARGET_BYTES": targets.itemsize, "UNSIGNED": not targets.is_signed}
    return _variant(gpu, "one_pass", macros if name == "prepare" else {}, kernel=name)


def store_variant(gpu: Gpu, dtype: torch.dtype, formula: Formula) -> Variant:
    """Variant of store."""
    return _of_tiles(gpu, "one_pass_store", formula_macros(formula) | dtype_macros(dtype, formula), TILE_N, TILE_V)


def scale_variant(gpu: Gpu, dtype: torch.dtype, capped: bool) -> Variant:
    """Variant of scale."""
    return _variant(gpu, "one_pass_scale", {"DTYPE": DTYPES[dtype], "SOFTCAP": capped})


def multiply_variant(gpu: Gpu, x: torch.dtype, y: torch.dtype) -> Variant:
    """Variant of multiply for tensors of dtypes ``x`` and ``y``."""
    return _variant(gpu, "one_pass_multiply", {"X_TYPE": DTYPES[x], "Y_TYPE": DTYPES[y]})


def statistics_variant(
    gpu: Gpu, dtype: torch.dtype, formula: Formula, spec: Spec, splits: Splits, tiles: Tiles | None, columns: int
) -> Variant:
    """Variant of statistics with tiles of ``columns`` columns."""
    macros = formula_macros(formula) | dtype_macros(dtype, formula)
    macros |= {
        "ENTROPY": splits.gap is not None, "WEIGHTED": splits.weighted is not None,
        "PREDICTION": splits.best is not None,
    }  # fmt: skip
    if tiles is not None:
        macros |= {
            "MAPS": 1, "TILE_ENTROPY": tiles.entropy is not None,
            "ONLINE": spec.lse_accumulation == "online", "BLOCK_V": spec.block_v or 0,
        }  # fmt: skip
    return _of_tiles(gpu, "statistics", macros, TILE_N, columns)


def gradient_variant(gpu: Gpu, dense: Dense) -> Variant:
    """Variant of gradient."""
    macros = formula_macros(dense.formula) | dtype_macros(dense.e.dtype, dense.formula) | dense_macros(dense)
    return _of_tiles(gpu, "gradient", macros, TILE_N, TILE_V)


def live_variant(gpu: Gpu, spec: Spec, live: Live, pack: int) -> Variant:
    """Variant for dx of live tiles, at most ``pack`` of a row block at a time."""
    macros = formula_macros(live.formula) | dtype_macros(live.e.dtype, live.formula) | rows_macros(live.rows)
    macros |= {"SORTED": live.sorted_rows, "DBIAS": live.column_sums is not None} | _blocks(spec)
    return _of_tiles(gpu, "live", macros, macros["BLOCK_N"], pack * macros["BLOCK_V"])


def products_variants(gpu: Gpu, spec: Spec, live: Live) -> tuple[Variant, Variant]:
    """Variants of both products, and of dbias."""
    macros = dtype_macros(live.e.dtype, live.formula) | {"SORTED": live.sorted_rows} | _blocks(spec)
    if live.dc is not None:
        macros["DC_TYPE"] = DTYPES[live.dc.dtype]
    block_n, block_v, size = macros["BLOCK_N"], macros["BLOCK_V"], live.e.element_size()
    along = _ROW_BYTES // size  # largest part of K that a step takes
    e_step, c_step = min(along, block_v), min(along, block_n)
    factor = max(block_n * _ROW_BYTES, _across(min(block_v, 128), c_step, size))
    stage = factor + _across(TILE_D, max(e_step, c_step), size)
    blocks = 1 if size == 4 else 2
    stages = gpu.stages(stage, 256, blocks)
    blocks = min(blocks, gpu.blocks(stages * stage + 256))
    products = _variant(gpu, "products", macros | {"STAGES": stages, "BLOCKS_AT_ONCE": blocks}, stages * stage)
    dbias = Variant(products.file, "dbias_kernel", products.macros, products.architecture, 0)
    return products, dbias


def _variant(gpu: Gpu, name: str, macros: dict[str, int], shared: int = 0, kernel: str = "") -> Variant:
    """Variant of a kernel; macros that are 0, their default, are left out."""
    given = tuple(sorted((key, int(value)) for key, value in macros.items() if value))
    return Variant(f"{name}.cu", f"{kernel or name.removeprefix('one_pass_')}_kernel", given, gpu.architecture, shared)


def _of_tiles(gpu: Gpu, name: str, macros: dict[str, int], rows: int, columns: int) -> Variant:
    """Variant that computes logits in tiles (tiles.cuh); two thread blocks at a time if 128 registers suffice."""
    heavy = macros["DTYPE"] == 2 or any(macros.get(name) for name in ("SOFTCAP", "ENTROPY", "WEIGHTED", "PREDICTION"))
    blocks = 1 if columns > TILE_V or heavy else 2
    stage = (rows + columns) * _ROW_BYTES
    more = (bool(macros.get("BIAS")) + bool(macros.get("WEIGHTED"))) * columns * 4
    stages = gpu.stages(stage, more, blocks)
    blocks = min(blocks, gpu.blocks(stages * stage + more))
    macros = macros | {"TILE_N": rows, "TILE_V": columns, "STAGES": stages, "BLOCKS_AT_ONCE": blocks}
    return _variant(gpu, name, macros, stages * stage + more)


def _across(columns: int, step: int, size: int) -> int:
    """Bytes of an operand whose rows run along K (copies.cuh)."""
    return -(-columns * size // _ROW_BYTES) * step * _ROW_BYTES


def formula_macros(formula: Formula) -> dict[str, int]:
    """Macros of a logit's formula."""
    return {
        "BIAS": formula.bias is not None, "SOFTCAP": formula.softcap is not None,
        "SCALE": formula.softcap is None and formula.scale != 1,
    }  # fmt: skip


def dtype_macros(dtype: torch.dtype, formula: Formula) -> dict[str, int]:
    """Macros of the products' dtype."""
    return {"DTYPE": DTYPES[dtype], "IEEE": dtype == torch.float32 and formula.ieee}


def rows_macros(rows: Rows) -> dict[str, int]:
    """Macros of the gradient's terms."""
    return {"ENTROPY": rows.h is not None, "SEVERAL_TARGETS": rows.targets.shape[1] > 1}


def dense_macros(dense: Dense) -> dict[str, int]:
    """Macros of an exact backward, besides those of the formula."""
    return rows_macros(dense.rows) | {"DBIAS": dense.column_sums, "WEIGHTED": dense.weight is not None}


def _blocks(spec: Spec) -> dict[str, int]:
    assert spec.block_n is not None and spec.block_v is not None
    return {"BLOCK_N": spec.block_n, "BLOCK_V": spec.block_v}
