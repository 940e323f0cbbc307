"""A vocabulary split over 1 to 4 processes: outputs, losses and gradients are those of one process."""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
from harness import Workers
from splits import CUTS, LOSSES, Data, N, V, call, call_terms, data, of_part, relative_errors, split_of
from torch import Tensor
from torch import distributed as dist

import cce
from cce import losses

RANKS = pytest.mark.parametrize("ranks", CUTS)
#: As tests of one process have them: roundoffs of sums of V terms, a few at a time.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
BLOCKS = {"block_n": 16, "block_v": 16}


def every_loss(group: dist.ProcessGroup, backend: str, dtype: torch.dtype) -> dict[str, list[float]]:
    """Errors of every option, against the same call in one process."""
    whole = data(dtype)
    part, split = split_of(group, whole)
    found = {}
    for name, options in LOSSES.items():
        alone = of_part(call(whole, backend=backend, **options), part)
        found[name] = relative_errors(call(whole, part, backend=backend, vocab_parallel=split, **options), alone)
    for name, options in {"terms": {}, "terms-softcap": {"softcap": 5.0, "logit_scale": 0.7}}.items():
        alone = of_part(call_terms(whole, backend=backend, **options), part)
        found[name] = relative_errors(call_terms(whole, part, backend=backend, vocab_parallel=group, **options), alone)
    return found


@RANKS
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
def test_every_option(workers: Workers, ranks: int, backend: str, dtype: torch.dtype) -> None:
    for rank, found in enumerate(workers.run(every_loss, backend, dtype, ranks=ranks)):
        wrong = {name: errors for name, errors in found.items() if not max(errors) <= TOLERANCE[dtype]}
        assert not wrong, f"rank {rank} of {ranks}"


def half(group: dist.ProcessGroup, dtype: torch.dtype) -> list[list[float]]:
    """Errors against float64 of the split call, and of the call in one process."""
    rounded = data(dtype)
    wide = data()
    wide = type(wide)(*(x.double() if x.is_floating_point() else x for x in vars(rounded).values()))
    part, split = split_of(group, rounded)
    exact = of_part(call(wide), part)
    alone = of_part(call(rounded), part)
    return [relative_errors(x, exact) for x in (call(rounded, part, vocab_parallel=split), alone)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_half_precision(workers: Workers, dtype: torch.dtype) -> None:
    """dE is summed over the processes in float32: no more error than where one process adds it up."""
    for found, alone in workers.run(half, dtype, ranks=4):
        assert all(x <= 1.5 * y + 1e-6 for x, y in zip(found, alone, strict=True)), (found, alone)


def filtered(group: dist.ProcessGroup, filter: str, threshold: float, compensate: bool) -> list[list[float]]:
    """Of the loss and each gradient: the error against the exact call and the norm of that, both squared."""
    whole = peaked()
    part, split = split_of(group, whole)
    spec = {**BLOCKS, "filter": filter, "threshold": threshold, "compensate": compensate}
    exact = of_part(call(whole, reduction="sum"), part)
    found = call(whole, part, spec, reduction="sum", vocab_parallel=split)
    return [[float((x - y).square().sum()), float(y.square().sum())] for x, y in zip(found, exact, strict=True)]


def peaked() -> Data:
    """Large enough that most tiles may be skipped."""
    return data(n=64, d=16, v=1200)


def errors_of(workers: Workers, ranks: int, *arguments: Any) -> list[float]:
    """Relative errors of the whole loss, dE, dC and dbias, the last two put together from all parts."""
    found = torch.tensor(workers.run(filtered, *arguments, ranks=ranks))  # (ranks, 4, 2)
    error, norm = found.sum(0).unbind(1)
    return (error / norm).sqrt().tolist()


@RANKS
@pytest.mark.parametrize(("filter", "threshold"), [("element", 2.0**-9), ("tile", 2.0**-6)])
def test_filter(workers: Workers, ranks: int, filter: str, threshold: float) -> None:
    """What is skipped is compensated, whoever holds the target; without that the error is that of one process, too.

    Each process has tiles of its own entries, so that they are not the very tiles of one process.
    """
    one = errors_of(workers, 1, filter, threshold, True)
    loss, *found = errors_of(workers, ranks, filter, threshold, True)
    assert loss <= 1e-12
    assert all(0 < x <= 2 * y for x, y in zip(found, one[1:], strict=True)), (found, one)
    dropped = errors_of(workers, ranks, filter, threshold, False)
    assert dropped[1] > 3 * found[0], "nothing was skipped"


def shared_rows(group: dist.ProcessGroup) -> int:
    """Entries whose row of dC another has, too: those of one tile, skipped in all rows."""
    whole = peaked()
    part, split = split_of(group, whole)
    spec = {**BLOCKS, "filter": "element", "threshold": 2.0**-9}
    dc = call(whole, part, spec, vocab_parallel=split)[2]
    return len(dc) - len(dc.unique(dim=0))


def test_a_part_of_little_mass_is_skipped(workers: Workers) -> None:
    """Its own softmax is large somewhere; its share of the whole one is not."""
    skipped = workers.run(shared_rows, ranks=4)[3]
    part = peaked().part(3, 4)
    assert skipped > 0.5 * (part.stop - part.start)


def terms_of_de(group: dist.ProcessGroup) -> list[float]:
    whole = data()
    part, _ = split_of(group, whole)
    split = cce.VocabParallel(group, reduce_de=False)
    found = call(whole, part, vocab_parallel=split)
    de = found[1].clone()
    dist.all_reduce(de, group=group)
    return [*relative_errors([de], [call(whole)[1]]), *relative_errors([found[1]], [de])]


def test_unreduced(workers: Workers) -> None:
    """The terms that the processes keep add up to dE, and none is dE itself."""
    for whole, own in workers.run(terms_of_de, ranks=3):
        assert whole <= 1e-12 and own > 1e-3


def own_tokens(group: dist.ProcessGroup, sizes: tuple[int, ...], reduction: str) -> list[float]:
    """Each rank has tokens of its own, and multiplies its loss by its number plus 1."""
    whole, rank = data(), dist.get_rank(group)
    part, _ = split_of(group, whole)
    rows = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    e, c = whole.e[rows[rank]].clone().requires_grad_(), whole.c[part].clone().requires_grad_()
    split = cce.VocabParallel(group, tokens="own")
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 1e-2}
    loss = cce.loss(e, c, whole.targets[rows[rank]], spec=cce.Spec(filter="none"), vocab_parallel=split, **options)
    de, dc = torch.autograd.grad((rank + 1) * loss.sum(), (e, c))
    every, all_c = whole.e.clone().requires_grad_(), whole.c.clone().requires_grad_()
    losses = [cce.loss(every[r], all_c, whole.targets[r], **options) for r in rows if r.stop > r.start]
    numbers = [i for i, r in enumerate(rows) if r.stop > r.start]
    total = sum((i + 1) * x.sum() for i, x in zip(numbers, losses, strict=True))
    want_e, want_c = torch.autograd.grad(total, (every, all_c))
    own = losses[numbers.index(rank)].detach() if rank in numbers else loss.detach()
    return relative_errors([loss.detach(), de, dc], [own, want_e[rows[rank]], want_c[part]])


@pytest.mark.parametrize("sizes", [(15, 15, 15), (5, 30, 10), (20, 0, 25)], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_own_tokens(workers: Workers, sizes: tuple[int, ...], reduction: str) -> None:
    for errors in workers.run(own_tokens, sizes, reduction, ranks=3):
        assert max(errors) <= 1e-12


def left_alone(group: dist.ProcessGroup) -> str:
    """The other rank does not come."""
    short = dist.new_group([0, 1], timeout=timedelta(seconds=1)) if dist.get_rank() < 2 else None
    if dist.get_rank(group) == 1:
        return "away"
    whole = data()
    with pytest.raises(RuntimeError) as error:
        cce.loss(whole.e, whole.c[:10], whole.targets, vocab_parallel=cce.VocabParallel(short))
    return str(error.value)


def test_a_process_that_is_missing() -> None:
    """The group's timeout, with a message."""
    own = Workers(2, timeout=30)
    try:
        message, _ = own.run(left_alone)
    finally:
        own.stop()
    assert "imed out" in message or "imeout" in message, message


def bits(group: dist.ProcessGroup) -> list[list[Tensor]]:
    whole = data(torch.float32)
    part, split = split_of(group, whole)
    return [call_terms(whole, part, {**BLOCKS, "filter": "element"}, vocab_parallel=split) for _ in range(3)]


def test_same_bits(workers: Workers) -> None:
    """Every run, and what all processes have is the same on all."""
    found = workers.run(bits, ranks=4)
    for runs in found:
        assert all(torch.equal(x, y) for other in runs[1:] for x, y in zip(runs[0], other, strict=True))
    for runs in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0][:3], found[0][0][:3], strict=True))  # all but dC, dbias


def compiled(group: dist.ProcessGroup) -> list[float]:
    whole = data()
    part, split = split_of(group, whole)

    def loss(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
        return cce.loss(e, c, targets, softcap=4.0, label_smoothing=0.1, vocab_parallel=split)

    fast = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    errors = []
    for n in (N, N - 7):
        results = []
        for f in (fast, loss):
            e, c = (x.clone().requires_grad_() for x in (whole.e[:n], whole.c[part]))
            value = f(e, c, whole.targets[:n])
            results.append([value.detach(), *torch.autograd.grad(value, (e, c))])
        errors += relative_errors(*results)
    return errors


def test_compiled(workers: Workers) -> None:
    for errors in workers.run(compiled, ranks=2):
        assert max(errors) <= 1e-12


def frozen(group: dist.ProcessGroup) -> list[float]:
    whole = data()
    part, split = split_of(group, whole)
    errors = []
    for wanted in ("e", "c"):
        grads = []
        for c, options in ((whole.c[part], {"vocab_parallel": split}), (whole.c, {})):
            e, c = whole.e.clone().requires_grad_(wanted == "e"), c.clone().requires_grad_(wanted == "c")
            loss = cce.loss(e, c, whole.targets, **options)
            grads.append(torch.autograd.grad(loss, e if wanted == "e" else c)[0])
        errors += relative_errors([grads[0]], [grads[1] if wanted == "e" else grads[1][part]])
    return errors


def test_frozen(workers: Workers) -> None:
    for errors in workers.run(frozen, ranks=3):
        assert max(errors) <= 1e-12


def test_without_a_process_group() -> None:
    whole = data()
    with pytest.raises(RuntimeError, match="vocab_parallel: no process group"):
        cce.loss(whole.e, whole.c, whole.targets, vocab_parallel=cce.VocabParallel())


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"group": "tp"}, TypeError, "vocab_parallel: got 'tp' of type str, expected a process group"),
        ({"reduce_de": 1}, TypeError, "reduce_de: got 1, expected True or False"),
        ({"tokens": "others"}, ValueError, "tokens: got 'others', expected one of"),
        ({"tokens": "own", "reduce_de": False}, ValueError, "reduce_de: got False with tokens='own'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        cce.VocabParallel(**arguments)


def in_triton(group: dist.ProcessGroup) -> dict[str, list[float]]:
    """The triton backend, which sees ignored rows itself, and must tell them from rows whose target is elsewhere."""
    import fast_interpreter  # which only a process that interprets can import

    fast_interpreter.hasten()
    warnings.filterwarnings("ignore", module="triton.runtime.interpreter")  # as pyproject.toml does
    whole = data(torch.float32)
    part, split = split_of(group, whole)
    exact, skips = {"filter": "none"}, {**BLOCKS, "filter": "element", "threshold": 2.0**-9}
    found = {}
    for name, spec in {"plain": exact, "smoothing": exact, "smoothing-softcap": exact, "soft-targets": exact}.items():
        alone = of_part(call(whole, spec=spec, **LOSSES[name]), part)
        split_call = call(whole, part, spec, "triton", vocab_parallel=split, **LOSSES[name])
        found[name] = relative_errors(split_call, alone)
    alone = of_part(call_terms(whole), part)
    found["terms"] = relative_errors(call_terms(whole, part, exact, "triton", vocab_parallel=split), alone)
    of_torch = call_terms(whole, part, skips, vocab_parallel=split)
    found["filtered"] = relative_errors(call_terms(whole, part, skips, "triton", vocab_parallel=split), of_torch)
    return found


def test_triton_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    own = Workers(2)
    try:
        for found in own.run(in_triton):
            wrong = {name: errors for name, errors in found.items() if not max(errors) <= TOLERANCE[torch.float32]}
            assert not wrong
    finally:
        own.stop()


def recipes(group: dist.ProcessGroup) -> dict[str, list[float]]:
    """Losses that cce.terms and the negative log-likelihoods of several entries are made into."""
    whole = data()
    part, split = split_of(group, whole)
    negatives = (whole.targets[:, None] + torch.tensor([3, 90])) % V

    def focal(e: Tensor, c: Tensor, **options: Any) -> Tensor:
        return losses.focal(e, c, whole.targets, **options)

    def unlikelihood(e: Tensor, c: Tensor, **options: Any) -> Tensor:
        return losses.unlikelihood(e, c, whole.targets, negatives=negatives, **options)

    found = {}
    for recipe in (focal, unlikelihood):
        results = []
        for rows, options in ((whole.c[part], {"vocab_parallel": split}), (whole.c, {})):
            e, c = whole.e.clone().requires_grad_(), rows.clone().requires_grad_()
            loss = recipe(e, c, **options)
            results.append([loss.detach(), *torch.autograd.grad(loss, (e, c))])
        found[recipe.__name__] = relative_errors(results[0], [*results[1][:2], results[1][2][part]])
    with pytest.raises(ValueError, match="vocab_parallel: got a split vocabulary"):
        losses.ldr(whole.e, whole.c[part], whole.targets, vocab_parallel=split)
    return found


def test_recipes(workers: Workers) -> None:
    for found in workers.run(recipes, ranks=3):
        assert all(max(errors) <= 1e-10 for errors in found.values()), found
