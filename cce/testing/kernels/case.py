"""A case of the kernels' contract: a problem, and what a kernel may find in it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Sizes
from cce.backends.problem import Problem
from cce.backends.resolve import resolve
from cce.spec import Spec

_FILTERED = ("live", "mean_rows", "dead_mass", "plan", "work_list", "gather_rows", "scatter_rows")


@dataclass(frozen=True)
class Case:
    """One call, or the calls of one pass, of a kernel.

    Attributes:
        name: begins with the method's. method: of :class:`Kernels`.
        n, v, d, k: sizes; D is padded. dtype: of both operands, if e_dtype and c_dtype do not say otherwise.
        bias: "", "random", "large", "few masked" (two are -inf), "masked" (a third, and whole
            tiles) or "masked low" (the same, the
            others near -1500).
        integers: operands in {-1, 0, 1}: products are exact, and the largest logits tie.
        offset: of all logits of every other row, a power of two; with ``integers``. strange: some rows that count have
            logits that are all NaN, -inf or inf.
        outputs: "entropy" (a gap; a gradient h), "weighted_logit" (a gradient s), "prediction".
        filter: of :meth:`statistics`: what maps are there. windows, splits: of the vocabulary.
        view: of operands of ``target_logits``: "", "transposed" or "sliced".
        nan_rows: some rows do not count, and hold NaN.
        density: of live tiles. slots: of the scratch, 0: few. pack: tiles of an item. wanted: gradients.
    """

    name: str
    n: int = 70
    v: int = 1100
    d: int = 72
    k: int = 1
    dtype: torch.dtype = torch.bfloat16
    e_dtype: torch.dtype | None = None
    c_dtype: torch.dtype | None = None
    bias: str = ""
    softcap: float | None = None
    scale: float = 1.0
    ieee: bool = True
    integers: bool = False
    offset: float = 0.0
    strange: bool = False
    outputs: tuple[str, ...] = ()
    filter: str = "none"
    accumulation: str = "tile"
    block_n: int = 16
    block_v: int = 32
    windows: int = 1
    splits: int = 3
    view: str = ""
    nan_rows: bool = False
    dbias: bool = True
    density: float = 0.4
    slots: int = 0
    pack: int = 2
    sorted_rows: bool = False
    ordered: bool = False
    compensate: bool = True
    norm: bool = False
    wanted: tuple[str, ...] = ("de", "dc", "dbias")

    def __str__(self) -> str:
        return self.name

    @property
    def method(self) -> str:
        return self.name.split(" ")[0]

    def problem(self, device: str) -> Problem:
        live = self.method in _FILTERED
        return Problem(
            n=self.n, v=self.v, d=self.d, k=self.k, e_dtype=self.e_dtype or self.dtype,
            c_dtype=self.c_dtype or self.dtype, device=device, bias=bool(self.bias), softcap=self.softcap,
            logit_scale=self.scale, outputs=frozenset(self.outputs), grad_e=not live or "de" in self.wanted,
            grad_c=not live or "dc" in self.wanted,
            grad_bias="dbias" in self.wanted if self.method == "live" else bool(self.bias) and self.dbias,
        )  # fmt: skip

    def spec(self) -> Spec:
        spec = Spec(
            filter="element" if self.method in _FILTERED else self.filter, threshold=2.0**-9,
            block_n=self.block_n, block_v=self.block_v, lse_accumulation=self.accumulation, vocab_order="natural",
        )  # fmt: skip
        return resolve(spec, self.problem("cpu"))

    def shrunk(self, sizes: Sizes) -> Case:
        """The same with fewer rows and columns, but of more than one tile."""
        columns = sizes.forward_columns if self.method == "statistics" else sizes.gradient_columns
        if self.method == "live":
            return replace(self, n=min(self.n, 2 * self.block_n + 3), v=min(self.v, 5 * self.block_v + 3), d=12)
        return replace(self, n=min(self.n, 20), v=min(self.v, max(48, 3 * columns + 5)), d=12)

    def strided(self, x: Tensor) -> Tensor:
        if self.view == "transposed":
            return x.T.contiguous().T
        if self.view == "sliced":
            wide = x.new_full((len(x), 2 * x.shape[1] + 1), torch.nan)
            wide[:, 1::2] = x
            return wide[:, 1::2]
        return x
