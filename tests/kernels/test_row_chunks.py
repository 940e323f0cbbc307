"""Losses whose gradients are computed along with them, of some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from meter import peak_of, size_of
from torch import Tensor

import cce
from cce import registry
from cce.backends.gpu import one_pass, row_chunks
from cce.backends.gpu.row_chunks import MOST_ROUNDED, RowChunks, Total, most_frequent
from cce.backends.gpu.sizes import least_scratch, logits_bytes
from cce.backends.problem import Problem
from cce.backends.resolve import resolve
from cce.benchmarks import heads
from cce.testing import CASES, Case, run_case
from cce.testing.data import make_inputs, make_problem
from cce.testing.kernels.plain_backend import PlainBackend
from cce.testing.kernels.plain_one_pass import PlainOnePass

pytestmark = pytest.mark.usefixtures("one_thread")
N, D, V = 1300, 24, 300
SPEC = cce.Spec(filter="none", scratch_bytes=1_420_000)
KIT = [case for case in CASES if case.name.startswith("row-chunks")]


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    cce.register_backend("plain", PlainBackend)
    yield
    cce.unregister_backend("plain")


def chunks_of(case: Case) -> RowChunks:
    problem = make_problem(case, "cpu")
    found = row_chunks.row_chunks(problem, resolve(case.make_spec(), problem))
    assert found is not None
    return found


def test_the_kits_cases_have_several_chunks() -> None:
    assert len(KIT) == 3
    for case in KIT:
        found = chunks_of(case)
        assert found.first < case.n and len(found.later(case.n - found.first)) > 1, case


# --- right values, whatever rows are in use


def leaves(seed: int, ignored: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    e, c, bias = (torch.randn(*shape, generator=rng) for shape in ((N, D), (V, D), (V,)))
    targets = torch.randint(V, (N,), generator=rng)
    targets[torch.rand(N, generator=rng) < ignored] = -100
    e[targets < 0] = torch.nan
    return e.requires_grad_(), c.requires_grad_(), bias.requires_grad_(), targets


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, torch.tensor(0.75, dtype=loss.dtype))


def dense(e: Tensor, c: Tensor, bias: Tensor, targets: Tensor, reduction: str) -> tuple[Tensor, ...]:
    wide = [x.detach().double().requires_grad_() for x in (e, c, bias)]
    z = wide[0][targets >= 0] @ wide[1].T + wide[2]
    loss = torch.nn.functional.cross_entropy(z, targets[targets >= 0], reduction=reduction)
    return (loss, *gradients(loss, *wide))


@pytest.mark.parametrize("captured", [False, True], ids=["", "captured"])
@pytest.mark.parametrize("ignored", [0.0, 0.1, 0.6, 0.97, 1.0])
def test_rows_without_a_target(ignored: float, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are left out after the first chunk; but not while a graph is captured, as nothing can be asked."""
    if captured:
        monkeypatch.setattr(one_pass, "is_captured", lambda x: True)
    e, c, bias, targets = leaves(3, ignored)
    loss = cce.loss(e, c, targets, bias, reduction="sum", spec=SPEC, backend="plain")
    found = (loss, *gradients(loss, e, c, bias))
    for x, y in zip(found, dense(e, c, bias, targets, "sum"), strict=True):
        assert (x.double() - y).norm() <= 2.0**-18 * y.norm()  # less than LAMBDA sqrt(N) roundings of float32
        assert bool(x.isfinite().all())


@pytest.mark.parametrize("ignored", [0.0, 0.6])
def test_the_way_is_taken(ignored: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every chunk; without this, the other way's gradients would pass as this one's."""
    seen: list[int] = []
    chunk = one_pass._chunk

    def counted(kernels, inputs, problem, *others):  # type: ignore[no-untyped-def]
        seen.append(problem.n)
        return chunk(kernels, inputs, problem, *others)

    monkeypatch.setattr(one_pass, "_chunk", counted)
    e, c, bias, targets = leaves(3, ignored)
    cce.loss(e, c, targets, bias, spec=SPEC, backend="plain")
    used = int((targets[256:] >= 0).sum())
    assert seen[0] == 256 and sum(seen[1:]) == used and len(seen) == (3 if ignored == 0 else 2)


def test_explained() -> None:
    """Not for a part of a vocabulary, which takes the ordinary way."""
    e, c, _, targets = leaves(3, 0.0)
    found = cce.explain(e, c, targets, spec=SPEC, backend="plain")
    assert found.note.endswith("in 3 products; 256 rows, then at most 896 at a time")
    part = replace(found.problem, part=True)
    assert not registry.note("plain", part, found.spec)


def test_the_same_bits() -> None:
    e, c, bias, targets = leaves(5, 0.3)
    first, second = (gradients(cce.loss(e, c, targets, bias, spec=SPEC, backend="plain"), e, c, bias) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# --- mistakes that the kit finds


class FirstForgotten(Total):
    """The first chunk's outputs are not kept."""

    def add(self, rows, outputs, found):  # type: ignore[no-untyped-def]
        if rows != slice(0, 256):
            super().add(rows, outputs, found)


class SumForgotten(Total):
    """dC is that of the last chunk."""

    def add_dc(self, dz, e):  # type: ignore[no-untyped-def]
        self._dc = None
        super().add_dc(dz, e)


class BiasForgotten(Total):
    """So is dbias."""

    def add(self, rows, outputs, found):  # type: ignore[no-untyped-def]
        self._dbias = None
        super().add(rows, outputs, found)


class Shifted(Total):
    """Rows are put one chunk too far up."""

    def add(self, rows, outputs, found):  # type: ignore[no-untyped-def]
        length = rows.stop - rows.start
        super().add(rows if rows.start == 0 else slice(rows.start - 1, rows.start - 1 + length), outputs, found)


class WideForgotten(Total):
    """The rows summed in float32 are those of the last chunk."""

    def add_dc(self, dz, e):  # type: ignore[no-untyped-def]
        self._wide = None
        super().add_dc(dz, e)


class WideElsewhere(Total):
    """They are put into other rows."""

    @property
    def gradients(self):  # type: ignore[no-untyped-def]
        self._entries = self._entries.flip(0)
        return super().gradients


MUTANTS = {
    FirstForgotten: 0, SumForgotten: 0, BiasForgotten: 0, Shifted: 0, WideForgotten: -1, WideElsewhere: -1,
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_fail(mutant: type[Total], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases of the kit: the first sums a float32 dC, the last a bfloat16 one."""
    monkeypatch.setattr(one_pass, "Total", mutant)
    assert not run_case(registry.load("plain"), KIT[MUTANTS[mutant]]).passed


def test_the_most_frequent_targets() -> None:
    targets = torch.tensor([[5, -1], [3, 5], [3, 0], [-1, -1]])
    assert most_frequent(targets, 8, 4).tolist() == [3, 5, 0, 1]


# --- the plan


def problem_of(n: int, d: int, v: int, grads: str = "e,c", dtype: torch.dtype = torch.bfloat16) -> Problem:
    return Problem(n, v, d, e_dtype=dtype, c_dtype=dtype, grad_e="e" in grads, grad_c="c" in grads)


@given(
    n=st.integers(1, 200_000), v=st.integers(1, 300_000), d=st.integers(1, 8192), mib=st.integers(1, 8192),
    used=st.floats(0, 1), grads=st.sampled_from(["e", "c", "e,c"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)  # fmt: skip
def test_chunks_have_every_row_and_fit(
    n: int, v: int, d: int, mib: int, used: float, grads: str, dtype: torch.dtype
) -> None:
    problem = problem_of(n, d, v, grads, dtype)
    found = row_chunks.row_chunks(problem, resolve(cce.Spec(scratch_bytes=mib * 2**20), problem))
    if found is None:
        return
    rest = round((n - found.first) * used)
    later = found.later(rest)
    assert [row for r0, r1 in later for row in (r0, r1)][1:-1:2] == [r1 for _, r1 in later[:-1]]
    assert 0 < found.first <= n and (not later or (later[0][0], later[-1][1]) == (0, rest))
    longest = max([found.first, *(r1 - r0 for r0, r1 in later)])
    assert logits_bytes(replace(problem, n=longest)) <= mib * 2**20
    if problem.grad_c and dtype != torch.float32:
        assert len(later) <= MOST_ROUNDED


def test_more_memory_never_leads_back() -> None:
    problem = problem_of(8192, 2304, 256_000)
    served = [
        row_chunks.row_chunks(problem, resolve(cce.Spec(scratch_bytes=mib * 2**20), problem)) is not None
        for mib in range(64, 8192, 64)
    ]
    assert served == sorted(served) and served[-1] and not served[0]


def test_float16_is_not_divided() -> None:
    """Its sums may leave float16's range before they are multiplied by their scale."""
    problem = problem_of(8192, 2304, 256_000, dtype=torch.float16)
    assert row_chunks.row_chunks(problem, resolve(cce.Spec(scratch_bytes=2**30), problem)) is None


@pytest.mark.parametrize("entropy", [1.0, 2.5, 4.5])
def test_the_error_of_a_rounded_sum(entropy: float) -> None:
    """dC, rounded after each of the most chunks there are, errs by less than 1.5 times as much as one of one chunk."""
    n, d, v = 4096, 48, 8192
    head = heads.synthetic(n, d, v, torch.bfloat16, entropy=entropy)
    e, dz = head.e.float(), (head.e.float() @ head.c.float().T).softmax(1)
    dz[torch.arange(n), head.targets] -= 1
    exact, dz = dz.double().T @ e.double(), dz.bfloat16()
    problem = problem_of(n, d, v)
    total, first = Total(head.e, head.targets[:, None], problem), n // 8
    for r0, r1 in [(0, first), *((first + a, first + b) for a, b in RowChunks(first, 384).later(n - first))]:
        total.add_dc(dz[r0:r1], head.e[r0:r1])
    one = (dz.float().T @ e).bfloat16()
    assert len(RowChunks(first, 384).later(n - first)) == MOST_ROUNDED
    found = total.gradients.dc
    assert found is not None
    assert (found.double() - exact).norm() < 1.5 * (one.double() - exact).norm()


# --- memory


class Idle(PlainOnePass):
    """Kernels that take no memory."""

    def target_logits(self, e, c, targets, formula, out, used_e):  # type: ignore[no-untyped-def]
        pass

    def store(self, e, c, formula, q, tile_max, tile_sum):  # type: ignore[no-untyped-def]
        q.zero_()

    def join(self, *arguments):  # type: ignore[no-untyped-def]
        pass

    def scale(self, *arguments):  # type: ignore[no-untyped-def]
        pass


@pytest.mark.parametrize("ignored", [1, 3])
def test_memory_of_the_chunks(ignored: int) -> None:
    """Beside the results no more than the scratch memory, whatever the rows in use."""
    case = replace(KIT[0], bias=False, v=4000, spec={"filter": "none", "scratch_bytes": 15_500_000})
    problem, inputs = make_problem(case, "cpu"), make_inputs(case, "cpu")
    spec = resolve(case.make_spec(), problem)
    assert chunks_of(case).first < case.n and spec.scratch_bytes >= least_scratch(problem, spec)
    inputs.targets[1::ignored] = -1
    given = inputs, problem, spec, torch.ones(case.n, 1)
    (outputs, found), peak = peak_of(lambda: one_pass.loss_and_gradients(Idle(128), *given))
    vectors = 10 * 8 * problem.n
    assert peak - size_of(outputs) - size_of(found) - vectors <= spec.scratch_bytes
