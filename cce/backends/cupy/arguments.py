"""Structs of the kernels' arguments, field by field as in the CUDA sources that define them."""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong, c_void_p

from torch import Tensor

from cce.backends.cupy.launch import Arguments, strided
from cce.backends.gpu import arrays


class Matrix(Arguments):
    """Struct ``Matrix`` of copies.cuh."""

    _fields_ = (("data", c_void_p), ("pitch", c_longlong), ("bytes", c_int))

    @classmethod
    def of(cls, x: Tensor) -> Matrix:
        size = x.element_size()
        return cls(data=strided(x), pitch=x.stride(0) * size, bytes=x.shape[1] * size)


class Formula(Arguments):
    """Struct ``Formula`` of formula.cuh."""

    _fields_ = (("scale", c_float), ("softcap", c_float))

    @classmethod
    def of(cls, formula: arrays.Formula) -> Formula:
        return cls(scale=formula.scale, softcap=formula.softcap or 0.0)


class Splits(Arguments):
    """Struct ``Splits`` of statistics.cuh."""

    _fields_ = tuple((name, c_void_p) for name in ("max", "sum", "gap", "weighted", "best"))

    @classmethod
    def of(cls, splits: arrays.Splits) -> Splits:
        return cls(**vars(splits))


class Tiles(Arguments):
    """Struct ``Tiles`` of statistics.cuh."""

    _fields_ = tuple((name, c_void_p) for name in ("max", "log_sum", "entropy"))

    @classmethod
    def of(cls, tiles: arrays.Tiles | None) -> Tiles:
        return cls() if tiles is None else cls(**vars(tiles))


class Rows(Arguments):
    """Struct ``Rows`` of dx.cuh."""

    _fields_ = (
        *((name, c_void_p) for name in ("lse", "lse_low", "a", "g", "entropy", "h", "s", "targets")), ("K", c_int)
    )  # fmt: skip

    @classmethod
    def of(cls, rows: arrays.Rows) -> Rows:
        return cls(**vars(rows), K=rows.targets.shape[1])


class TargetsArguments(Arguments):
    """Arguments of targets.cu."""

    _fields_ = (
        ("e", c_void_p), ("c", c_void_p),
        *((name, c_longlong) for name in ("stride_en", "stride_ed", "stride_cv", "stride_cd")),
        ("bias", c_void_p), ("targets", c_void_p), ("out", c_void_p), ("formula", Formula),
        ("D", c_int), ("K", c_int), ("used_e", c_void_p),
    )  # fmt: skip


class StatisticsArguments(Arguments):
    """Arguments of statistics.cu."""

    _fields_ = (
        ("e", Matrix), ("c", Matrix), ("bias", c_void_p), ("weight", c_void_p), ("splits", Splits), ("tiles", Tiles),
        ("formula", Formula), *((name, c_int) for name in ("N", "V", "first", "S")),
    )  # fmt: skip


class GradientArguments(Arguments):
    """Arguments of gradient.cu."""

    _fields_ = (
        ("e", Matrix), ("c", Matrix), ("bias", c_void_p), ("weight", c_void_p), ("rows", Rows), ("dz", c_void_p),
        ("pitch_dz", c_longlong), ("column_sums", c_void_p), ("formula", Formula),
        *((name, c_int) for name in ("N", "V", "first")),
    )  # fmt: skip


class LiveArguments(Arguments):
    """Arguments of live.cu."""

    _fields_ = (
        ("e", Matrix), ("c", Matrix), ("order", c_void_p), ("bias", c_void_p), ("rows", Rows),
        *((name, c_void_p) for name in (
            "row_of", "tile_list", "item_block", "item_first", "item_slot", "item_tiles", "items", "dz", "column_sums",
        )),
        ("formula", Formula), *((name, c_int) for name in ("N", "V", "T", "max_items", "chunk")),
    )  # fmt: skip


class ProductsArguments(Arguments):
    """Arguments of products.cu."""

    _fields_ = (
        ("dz", c_void_p), ("e", Matrix), ("c", Matrix),
        *((name, c_void_p) for name in (
            "order", "row_of", "tile_list", "block_slot", "block_tiles", "block_first", "de", "live_count",
            "block_list", "slot_list", "chunk_start", "counters", "mass_e", "mass", "norm", "dc", "column_sums",
            "dbias",
        )),
        *((name, c_int) for name in ("N", "V", "D", "T", "blocks", "dc_columns", "chunk")),
    )  # fmt: skip
