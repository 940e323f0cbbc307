"""Holds any kernels to their contract: every method, called directly, against ``PlainKernels``.

From a script: ``contract.run(kernels, "cuda")``. Results are poisoned before, what lies around them must stay as it
was, and NaN lies around the operands.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cce.backends.gpu.arrays import DeadMass, Dense, Formula, Live, Rows, Sizes, Splits, Tiles, Window
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.sizes import cdiv
from cce.backends.problem import Problem
from cce.backends.resolve import resolve
from cce.spec import Spec
from cce.testing.kernels.case import Case
from cce.testing.kernels.cases import CASES
from cce.testing.kernels.data import drawn
from cce.testing.kernels.lists import Lists
from cce.testing.kernels.plain import PlainKernels
from cce.testing.kernels.plain_math import logits
from cce.testing.kernels.plans import make_plan, plan_to, random_live, random_maps, random_rows
from cce.testing.kernels.results import Results, compare, operand, surrounded


def run(
    kernels: Kernels, device: str = "cpu", only: Iterable[str] | None = None, small: bool = False
) -> list[tuple[str, bool, str]]:
    """Every case whose name contains one of ``only``: its name, whether it passed, and what was wrong.

    Args:
        kernels: to be checked.
        device: of the tensors.
        only: parts of names; all cases by default.
        small: with fewer rows and columns, for a simulator.
    """
    wanted = [""] if only is None else list(only)
    chosen = (case for case in CASES if any(part in case.name for part in wanted))
    return [run_case(kernels, case, device, small) for case in chosen]


def run_case(kernels: Kernels, case: Case, device: str = "cpu", small: bool = False) -> tuple[str, bool, str]:
    """One case; nothing is raised."""
    try:
        bench = Bench(kernels, case, device, small)
        if bench.refusals:
            return case.name, True, "refused: " + "; ".join(bench.refusals)
        faults = getattr(bench, case.method)()
        return case.name, not faults, "; ".join(faults)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return case.name, False, f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"[:400]


class Bench(Lists):
    """A case, drawn, and the kernels that are held to it."""

    def __init__(self, kernels: Kernels, case: Case, device: str, small: bool) -> None:
        self.kernels, self.device = kernels, device
        problem, spec = case.problem(device), case.spec()
        self.sizes: Sizes = kernels.sizes(problem, spec)
        self.refusals = kernels.unsupported(problem, spec)
        self.case = case = case.shrunk(self.sizes) if small else case
        self.problem: Problem = case.problem(device)
        self.spec: Spec = resolve(case.spec(), self.problem)
        self.sizes = kernels.sizes(self.problem, self.spec)
        self.plain = PlainKernels(self.sizes)
        self.rng = torch.Generator().manual_seed(case.n + case.v)
        self.dtype = self.problem.dtype
        self.e, self.c, self.bias, self.counts, self.odd = drawn(case, self.rng)
        self.formula = Formula(self._to(self.bias), case.scale, case.softcap, case.ieee)

    def _to(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(self.device)

    def operand(self, x: Tensor) -> Tensor:
        """A matrix as the kernels take it; if they take any layout, one that is not aligned."""
        x = x.to(self.device, self.dtype)
        return surrounded(x) if self.kernels.any_layout else operand(x)

    @property
    def tolerance(self) -> float:
        """Tolerance of sums in float32, as a relative norm."""
        if self.dtype == torch.float32 and not self.case.ieee and self.device != "cpu":
            return 2.0**-8  # a matrix unit cuts both factors off to 10 bits
        return {"large": 2e-4, "masked low": 1e-3}.get(self.case.bias, 5e-5)

    @property
    def rounded(self) -> float:
        """Tolerance of results computed from rounded dx, or rounded themselves."""
        return max(self.tolerance, {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}.get(self.dtype, 0.0))

    # Each method below calls the one of the same name, and returns what is wrong.

    def target_logits(self) -> list[str]:
        case, found = self.case, Results(self.device)
        e, c = (case.strided(x.to(self.device)) for x in (self.e, self.c))
        targets = torch.randint(-1, case.v, (case.n, case.k), generator=self.rng)
        targets[-1, -1] = case.v - 1
        targets = torch.where(self.counts[:, None], targets, -1).to(self.device)
        out, expected = found.new("target_logits", (case.n, case.k)), torch.empty(case.n, case.k, device=self.device)
        self.kernels.target_logits(e, c, targets, self.formula, out)
        self.plain.target_logits(e, c, targets, self.formula, expected)
        return [*compare("target_logits", out, expected, 5e-5), *found.overruns()]

    def statistics(self) -> list[str]:
        found, wanted = Results(self.device), Results(self.device)
        mine, theirs = self._statistics(self.kernels, found), self._statistics(self.plain, wanted)
        faults, rows = found.overruns(), self.counts.to(self.device)
        told, infinite = rows & ~self.odd.to(self.device), (self.e == torch.inf).any(1).to(self.device)
        for one, other in zip(mine, theirs, strict=True):
            for name, x in vars(one).items():
                if x is not None and name != "best":
                    count = self.spec.tiles(self.case.v) if isinstance(one, Tiles) else len(x)
                    # Of a row with NaN the sum alone is told; of one with inf the maximum, too.
                    which = rows if name in ("sum", "log_sum") else told
                    expected = getattr(other, name)[:count, which]
                    label = f"{type(one).__name__.lower()}.{name}"
                    if name in ("sum", "log_sum"):  # inf says the same of a row with inf
                        x = torch.where(infinite & (x == torch.inf), torch.nan, x)
                    faults += compare(label, x[:count, which], expected, self.tolerance)
        if self.case.strange and not torch.equal(mine[0].max[:, infinite], theirs[0].max[:, infinite]):
            faults.append("splits.max: where inf was expected")
        return faults + self._compare_best(mine[0], theirs[0])

    def _statistics(self, kernels: Kernels, results: Results) -> tuple[Splits, Tiles]:
        """All windows of the vocabulary, one after the other. No tiles come as one that holds None."""
        case, n, columns, tiles = self.case, self.case.n, self.sizes.forward_columns, None
        step = cdiv(cdiv(case.v, columns), case.windows) * columns
        shape = (min(case.splits, cdiv(min(step, case.v), columns)), n)  # no split without a tile
        splits = Splits(
            results.new("max", shape),
            results.new("sum", shape),
            results.new("gap", shape) if "entropy" in case.outputs else None,
            results.new("weighted", shape) if "weighted_logit" in case.outputs else None,
            results.new("best", shape, torch.int32) if "prediction" in case.outputs else None,
        )
        if case.filter != "none":
            assert self.spec.block_v is not None
            high = cdiv(case.v, columns) * (columns // self.spec.block_v)
            tiles = Tiles(
                results.new("tile max", (high, n)),
                results.new("tile log_sum", (high, n)),
                results.new("tile entropy", (high, n)) if "entropy" in case.outputs else None,
            )
        weight = self._to(self._weights()) if splits.weighted is not None else None
        for v0 in range(0, case.v, step):
            part = slice(v0, min(case.v, v0 + step))
            formula = replace(self.formula, bias=None if self.bias is None else self._to(self.bias[part].clone()))
            u = None if weight is None else weight[part].clone()
            e, c = self.operand(self.e), self.operand(self.c[part])
            kernels.statistics(self.problem, self.spec, Window(e, c, formula, u, v0, splits, tiles))
        return splits, tiles or Tiles(None, None, None)  # type: ignore[arg-type]

    def _weights(self) -> Tensor:
        u = torch.rand(self.case.v, generator=torch.Generator().manual_seed(9))
        u[::5] = 0
        return u

    def _compare_best(self, mine: Splits, theirs: Splits) -> list[str]:
        """The same place, or where products are rounded one of a logit as large."""
        if mine.best is None or theirs.best is None:
            return []
        rows = self.counts.to(self.device)
        some = theirs.max.isfinite()[:, rows]
        if not bool(some.any()):
            return ["best: no row has a largest logit, so that nothing is compared"]
        best, expected = (torch.where(some, x[:, rows].long(), 0) for x in (mine.best, theirs.best))
        if bool((best < 0).any()) or bool((best >= self.case.v).any()):
            return [f"best: outside [0, {self.case.v})"]
        z = logits(self.e.to(self.device)[rows], self.c.to(self.device), self.formula).T
        gap = float((z.gather(0, best) - z.gather(0, expected))[some].abs().amax())
        if self.case.integers and bool((best != expected).any()):
            return [f"best: {int((best != expected).sum())} of {best.numel()} are not the first of the largest"]
        return [] if gap <= 10 * self.tolerance else [f"best: a logit {gap:.2g} from the largest"]

    def _rows(self, z: Tensor) -> tuple[Rows, Tensor]:
        """Values that dx is computed from, on the device; and the mask (N,) of rows that need a gradient."""
        case = self.case
        known = torch.where(self.counts[:, None], z, 0.0)
        rows = random_rows(self.problem, known, self.rng, "entropy" in case.outputs, "weighted_logit" in case.outputs)
        keep = (rows.a != 0) | (rows.g != 0).any(1)
        moved: dict[str, Any] = {
            name: None if x is None else x.to(self.device).contiguous() for name, x in vars(rows).items()
        }
        return Rows(**moved), keep.to(self.device)

    def gradient(self) -> list[str]:
        case, n = self.case, self.case.n
        rows, _ = self._rows(logits(self.e, self.c, replace(self.formula, bias=self.bias)))
        weight = self._to(self._weights()) if rows.s is not None else None
        found, wanted = Results(self.device), Results(self.device)
        v0, v1 = case.v // 3, case.v - 5
        formula = replace(self.formula, bias=None if self.bias is None else self._to(self.bias))
        height, widths = cdiv(n, self.sizes.gradient_rows), {"dz 0": min(8, case.v), "dz 1": v1 - v0}
        for kernels, results in ((self.kernels, found), (self.plain, wanted)):
            dense = Dense(self.operand(self.e), formula, rows, weight, case.dbias)
            window = kernels.gradient(self.problem, self.spec, dense)
            for number, (first, last) in enumerate(((0, min(8, case.v)), (v0, v1))):
                columns = last - first
                unit = 16 // self.dtype.itemsize  # a wide store may write the rest of its 16 bytes
                whole = (n, cdiv(columns, unit) * unit)
                dz = results.new(f"dz {number}", whole, self.dtype, cdiv(columns, 16) * 16 + 16)[:, :columns]
                sums = results.new(f"column_sums {number}", (height, columns)) if case.dbias else None
                window(self.operand(self.c[first:last]), first, dz, sums)
        faults, keep = found.overruns(), self.counts.to(self.device)
        for name in found.whole:
            x, expected = found.whole[name][1], wanted.whole[name][1]
            if name.startswith("dz"):
                x, expected = (y[:, : widths[name]] for y in (x, expected))
                faults += compare(name, x[keep], expected[keep], self.rounded)
            else:
                faults += compare(name, x, expected, self.tolerance)
        return faults

    def mean_rows(self) -> list[str]:
        found, wanted = Results(self.device), Results(self.device)
        order = torch.randperm(self.case.v, generator=self.rng).to(self.device) if self.case.ordered else None
        c = self.operand(self.c)
        for kernels, results in ((self.kernels, found), (self.plain, wanted)):
            out = results.new("means", (self.spec.tiles(self.case.v), c.shape[1]), self.dtype)
            kernels.mean_rows(self.problem, self.spec, c, order, out)
        means, expected = (results.whole["means"][1] for results in (found, wanted))
        # Twice the roundoff: on a CPU the library rounds the sum, and then the mean.
        return [*found.overruns(), *compare("means", means, expected, 2 * self.rounded)]

    def dead_mass(self) -> list[str]:
        case, n = self.case, self.case.n
        rows, _ = self._rows(logits(self.e, self.c, replace(self.formula, bias=self.bias)))
        assert self.spec.block_n is not None
        tiles, blocks = self.spec.tiles(case.v), cdiv(n, self.spec.block_n)
        live = random_live(tiles, blocks, case.density, self.rng).to(self.device)
        row_order = torch.randperm(n, generator=self.rng).to(self.device)
        maps = random_maps(self.problem, self.spec, self.device, self.rng)
        found, wanted = Results(self.device), Results(self.device)
        for kernels, results in ((self.kernels, found), (self.plain, wanted)):
            for first, last in ((0, tiles // 3), (tiles // 3, tiles)):
                out = results.new(f"mass from {first}", (last - first, n), self.dtype)
                mass = DeadMass(rows, maps, row_order, live, first, out)
                if not kernels.dead_mass(self.problem, self.spec, mass):
                    return []  # the library's then
        faults = found.overruns()
        for name, (_, out) in found.whole.items():
            faults += compare(name, out, wanted.whole[name][1], self.rounded)
        return faults

    def live(self) -> list[str]:
        case, order = self.case, None
        e, c, bias = self.e, self.c, self.bias
        if case.ordered:
            order = torch.randperm(case.v, generator=self.rng)
            c, bias = c[order], None if bias is None else bias[order]
        rows, keep = self._rows(logits(e, c, replace(self.formula, bias=bias)))
        keep &= self.counts.to(self.device)
        assert self.spec.block_n is not None
        tiles, blocks = self.spec.tiles(case.v), cdiv(case.n, self.spec.block_n)
        on = random_live(tiles, blocks, case.density, self.rng)
        plan = make_plan(on, case.slots or 2 * blocks + 1, self.sizes.pack)
        row_order = torch.randperm(case.n, generator=self.rng).to(self.device)
        if case.nan_rows and bool(self.counts[row_order.cpu()][self.spec.block_n :].all()):
            return ["no row of NaN is where it could leak"]
        state = self.rng.get_state()
        found, wanted = Results(self.device), Results(self.device)
        for kernels, results in ((self.kernels, found), (self.plain, wanted)):
            self.rng.set_state(state)
            live = self._live(plan_to(plan, self.device), rows, keep, row_order, self._to(order), results)
            chunk = kernels.live(self.problem, self.spec, live)
            for k in range(plan.chunks):
                chunk(k)
        faults = found.overruns()
        for name in ("de", "dc", "dbias"):
            if name in found.whole:
                faults += compare(name, found.whole[name][1], wanted.whole[name][1], self.rounded)
        return faults

    def _live(self, plan, rows: Rows, keep: Tensor, row_order: Tensor, order: Tensor | None, out: Results) -> Live:  # type: ignore[no-untyped-def]
        case, block_n, block_v = self.case, self.spec.block_n or 0, self.spec.block_v or 0
        e, c = self.operand(self.e), self.operand(self.c)
        if case.sorted_rows:
            sorted_e = torch.where(keep[row_order][:, None], e[row_order], 0)
            e = self.operand(sorted_e)
        tiles, wanted = self.spec.tiles(case.v), case.wanted
        dz = out.new("dz", (plan.max_items + 1, block_n, block_v), self.dtype)
        sums = out.new("column_sums", (plan.max_items, block_v)) if "dbias" in wanted else None
        de = out.new("de", (case.n, e.shape[1])) if "de" in wanted else None
        draw = torch.randn(case.n, e.shape[1], generator=self.rng)
        if de is not None:
            de.copy_(draw)
        mass_e = torch.randn(tiles, e.shape[1], generator=self.rng).to(self.device)
        mass = torch.randn(tiles, generator=self.rng).to(self.device)
        return Live(
            plan=plan, e=e, sorted_rows=case.sorted_rows, c=c, order=order, formula=self.formula, rows=rows,
            row_order=row_order, keep=keep, dz=dz, column_sums=sums, de=de,
            dc=out.new("dc", (case.v, case.d), case.c_dtype or case.dtype) if "dc" in wanted else None,
            dbias=out.new("dbias", (case.v,)) if "dbias" in wanted else None,
            mass_e=mass_e if case.compensate and "dc" in wanted else None,
            mass=mass if case.compensate and "dbias" in wanted else None,
            norm=torch.tensor(0.125, device=self.device) if case.norm else None,
        )  # fmt: skip
