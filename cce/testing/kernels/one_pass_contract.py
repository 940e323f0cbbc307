"""Holds any kernels of a pass with gradients to their contract: every method, against ``PlainOnePass``.

From a script: ``one_pass_contract.run(kernels.one_pass(), "cuda")``.
"""

from __future__ import annotations

import math
import traceback
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Formula
from cce.backends.gpu.one_pass_kernels import OnePassKernels
from cce.backends.gpu.sizes import cdiv, pitch
from cce.backends.problem import Problem
from cce.backends.resolve import resolve
from cce.spec import Spec
from cce.testing.kernels.plain_one_pass import PlainOnePass, bits_of_q
from cce.testing.kernels.results import Results, compare, operand, surrounded

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One problem, on which all methods are called.

    Attributes:
        bias: "", "random", "masked" (-inf; whole tiles, and a target's entry) or "masked low" (and what is left lies
            where exp(-z) is no float32).
        nan_rows: some rows have no target, and hold NaN. strange: some that have one have logits that are all NaN, -inf
            or inf. offset: of all logits of every other row, a power of two; products are exact then.
    """

    name: str
    n: int = 70
    v: int = 1100
    d: int = 72
    k: int = 1
    dtype: torch.dtype = BF16
    bias: str = ""
    scale: float = 1.0
    softcap: float | None = None
    ieee: bool = True
    nan_rows: bool = False
    strange: bool = False
    offset: float = 0.0
    targets: torch.dtype = torch.int64

    def __str__(self) -> str:
        return self.name


_PLAIN = Case("plain")
CASES = (
    _PLAIN,
    replace(_PLAIN, name="one row", n=1, v=7, d=8, targets=torch.int8),
    replace(_PLAIN, name="one class", n=5, v=1, d=3, targets=torch.uint8),
    replace(_PLAIN, name="aligned sizes", n=128, v=1024, d=128, targets=torch.int32),
    replace(_PLAIN, name="many rows", n=300, v=773, d=40, targets=torch.int16),
    replace(_PLAIN, name="float16 k3", dtype=F16, k=3, bias="random", scale=1.5),
    replace(_PLAIN, name="float32 k2", dtype=F32, d=33, k=2),
    replace(_PLAIN, name="tf32", dtype=F32, d=33, ieee=False, bias="random"),
    replace(_PLAIN, name="masked", bias="masked", k=2),
    replace(_PLAIN, name="softcap", softcap=12.0, bias="random", scale=4.0),
    replace(_PLAIN, name="softcap float32", softcap=2.0, dtype=F32, k=2),
    replace(_PLAIN, name="softcap masked", softcap=9.0, bias="masked", k=2, nan_rows=True),
    replace(_PLAIN, name="masked low", bias="masked low"),
    replace(_PLAIN, name="nan rows", nan_rows=True, scale=0.5),
    replace(_PLAIN, name="nan rows k3", nan_rows=True, k=3, dtype=F16),
    replace(_PLAIN, name="wide d", n=20, v=300, d=1030),
    replace(_PLAIN, name="offset 2^20", offset=2.0**20, d=24, k=2),
    replace(_PLAIN, name="offset 2^13 float16", offset=2.0**13, d=24, dtype=F16),
    replace(_PLAIN, name="strange", strange=True, k=2),
    replace(_PLAIN, name="strange float32", strange=True, dtype=F32, bias="masked"),
)


def run(kernels: OnePassKernels, device: str = "cpu") -> list[tuple[str, bool, str]]:
    """Every case: its name, whether it passed, and what was wrong."""
    return [run_case(kernels, case, device) for case in CASES]


def run_case(kernels: OnePassKernels, case: Case, device: str = "cpu") -> tuple[str, bool, str]:
    """One case; nothing is raised."""
    try:
        faults = Bench(kernels, case, device).faults()
        return case.name, not faults, "; ".join(faults)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return case.name, False, f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"[:400]


class Bench:
    """A case, drawn, and the kernels that are held to it."""

    def __init__(self, kernels: OnePassKernels, case: Case, device: str) -> None:
        self.case, self.device = case, device
        problem = Problem(
            n=case.n, v=case.v, d=case.d, k=case.k, e_dtype=case.dtype, c_dtype=case.dtype,
            device=torch.device(device).type, bias=bool(case.bias), softcap=case.softcap, logit_scale=case.scale,
            grad_e=True, grad_c=True,
        )  # fmt: skip
        self.kernels = kernels.of_problem(problem, resolve(Spec(filter="none"), problem))
        self.plain = PlainOnePass(self.kernels.columns(case.dtype))
        rng = torch.Generator().manual_seed(case.n + case.v)
        e = torch.randn(case.n, case.d, generator=rng)
        c = torch.randn(case.v, case.d, generator=rng) * (1.5 / math.sqrt(case.d))
        targets = torch.randint(-1, min(case.v, 100), (case.n, case.k), generator=rng)
        targets[-1, -1] = min(case.v, 100) - 1
        if case.nan_rows:
            e[3::14], targets[3::14] = torch.nan, -1
        if case.offset:
            e, c = (torch.randint(-1, 2, x.shape, generator=rng).float() for x in (e, c))
            e[::2, 0], c[:, 0] = case.offset, 1
        self.odd = torch.zeros(case.n, dtype=torch.bool)
        if case.strange:
            self.odd[1:20:6] = True
            values = torch.tensor([torch.nan, -torch.inf, torch.inf])
            rows = self.odd.nonzero()[:, 0]
            e[rows, 0], c[:, 0] = values[torch.arange(len(rows)) % 3], 1
        bias = torch.randn(case.v, generator=rng) if case.bias else None
        if bias is not None and case.bias != "random":
            bias -= 300.0 * (case.bias == "masked low")
            bias[::3] = -torch.inf
            bias[case.v // 6 : -case.v // 6] = -torch.inf  # whole tiles
        self.e, self.c, self.targets = e.to(device, case.dtype), c.to(device, case.dtype), targets.to(device)
        self.formula = Formula(None if bias is None else bias.to(device), case.scale, case.softcap, case.ieee)
        self.offsets = torch.zeros(case.n)
        self.offsets[::2] = case.offset
        self.offsets = torch.where((targets >= 0).any(1), self.offsets, 0).to(device)
        weights = torch.rand(targets.shape, generator=rng) + 0.5
        weights[:: max(2, case.n // 3)] = 0  # rows whose a is 0
        self.weights = torch.where(targets >= 0, weights, 0).to(device)

    def faults(self) -> list[str]:
        found, wanted = Results(self.device), Results(self.device)
        mine, theirs = self._all(self.kernels, found), self._all(self.plain, wanted)
        faults = found.overruns()
        for name, (x, tolerance) in mine.items():
            faults += compare(name, x, theirs[name][0], tolerance)
        again = self._all(self.kernels, Results(self.device))
        return faults + [f"{name}: other bits" for name, (x, _) in mine.items() if not _same(x, again[name][0])]

    def _all(self, kernels: OnePassKernels, results: Results) -> dict[str, tuple[Tensor, float]]:
        """Results of every method, with their allowed relative errors."""
        case, (n, v, k), new = self.case, (self.case.n, self.case.v, self.case.k), results.new
        given = torch.where(self.targets < 0, 100 if v > 100 else -1 % 127, self.targets)
        ignore = 100 if v > 100 else -1 % 127
        prepared, mean = new("prepared", (n, k), torch.int64), new("mean", (n, k))
        kernels.prepare(given.to(case.targets), v, ignore, prepared, mean)
        only = new("prepared alone", (n, k), torch.int64)
        kernels.prepare(given.to(case.targets), v, ignore, only, None)

        some = (self.targets >= 0).any(1)
        told = some & ~self.odd.to(self.device)  # of a row without a softmax the sums alone are told
        targets, logits, used = self.targets, new("target_logits", (n, k)), new("used_e", (n, case.d), case.dtype)
        kernels.target_logits(self.e, self.c, targets, self.formula, logits, used)
        tiles, width = cdiv(v, kernels.columns(case.dtype)), pitch(v)
        q = new("q", (n, cdiv(v, 8) * 8), case.dtype, width)[:, :v]
        tile_max, tile_sum, nll = new("tile_max", (tiles, n)), new("tile_sum", (tiles, n)), new("nll", (n, k))
        lse, lse_low = new("lse", (n,)), new("lse_low", (n,))
        laid_out = surrounded if self.kernels.any_layout else operand
        kernels.store(laid_out(self.e), laid_out(self.c), self.formula, q, tile_max, tile_sum)
        kept = bits_of_q(q).float().clone()
        kernels.join(tile_max, tile_sum, logits, targets, lse, lse_low, nll)
        a = torch.where(some, self.weights.sum(1) * case.scale, torch.nan)
        g = self.weights * case.scale
        kernels.scale(q, tile_max, lse, lse_low, nll, targets, a, g, self.formula.softcap)
        value = new("value", (1,))[0]
        kernels.value(self.weights, torch.where(nll.isfinite(), nll, 1), value)
        x, y = self.e.nan_to_num().clone(), self.c.to(torch.float32, copy=True)
        strange, dropped = self.e.clone(), y.clone()
        strange[~some], dropped[0, 0] = torch.nan, torch.nan

        def multiply(x: Tensor, y: Tensor | None, factor: float, targets: Tensor, is_de: bool) -> None:
            kernels.multiply(x, y, torch.tensor(factor, device=self.device), targets, is_de)

        multiply(x, y, 0.3, targets, False)
        multiply(y, None, 1.0, targets, False)
        of_rows = [strange.clone() for _ in range(3)]
        for found, factor in zip(of_rows, (0.3, 1.0, 2.0 if some.all() else torch.inf), strict=True):
            multiply(found, None, factor, targets, True)
        multiply(strange, dropped, torch.nan, torch.full_like(targets, -1), False)

        tile_sum = torch.where(tile_sum == torch.inf, torch.nan, tile_sum)  # inf says the same of a row with inf
        lse = torch.where(lse == torch.inf, torch.nan, lse)
        sums = 2.0**-8 if case.dtype == F32 and not case.ieee and self.device != "cpu" else 5e-5
        rounded = max(sums, {BF16: 2.0**-9, F16: 2.0**-11}.get(case.dtype, 0.0))
        return {
            "prepared": (prepared, 0), "prepared alone": (only, 0), "mean": (mean, 1e-6),
            "target_logits": (logits, sums), "used_e": (used, 0), "q": (kept[told], max(sums, 2.0**-11)),
            "tile_max": (tile_max[:, told], sums), "tile_sum": (tile_sum[:, some], sums), "lse": (lse, sums),
            "lse + lse_low": (lse.double() + lse_low.double() - self.offsets, sums), "nll": (nll, sums),
            "dz": (q.float(), 2 * rounded), "value": (value, sums), "x": (x.float(), rounded), "y": (y, 1e-6),
            "no target": (torch.cat([strange.float().flatten(), dropped.flatten()]), 0),
            **{f"rows {i}": (found.float(), rounded) for i, found in enumerate(of_rows)},
        }  # fmt: skip


def _same(x: Tensor, y: Tensor) -> bool:
    """The same bits."""
    x, y = (each.reshape(-1).contiguous().view(torch.uint8) for each in (x, y))
    return torch.equal(x, y)
