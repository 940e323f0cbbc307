"""``VocabOrder``: its counts, when it sorts, and that expected probability is what to sort by."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cce
from cce.backends.problem import Problem
from cce.backends.resolve import resolve

pytestmark = pytest.mark.usefixtures("one_thread")

V = 11
BATCHES = [
    torch.tensor([[3, 3, 7], [-100, 7, 3]]),
    torch.tensor([0, 7, 7, -100]),
    torch.tensor(10),
    torch.tensor([]).long(),
]


def by_hand(batches: list[Tensor], decay: float = 1.0, ignore_index: int = -100) -> list[float]:
    counts = [0.0] * V
    for batch in batches:
        found = Counter(batch.flatten().tolist())
        counts = [decay * old + (found[v] if v != ignore_index else 0) for v, old in enumerate(counts)]
    return counts


def most_frequent_first(counts: list[float]) -> list[int]:
    return sorted(range(len(counts)), key=lambda v: (-counts[v], v))


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("ignore_index", [-100, 7, 2**40])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8])
def test_counts(decay: float, ignore_index: int, dtype: torch.dtype) -> None:
    """Of targets of any shape, those that do not count left out; a batch may be empty."""
    order = cce.VocabOrder(V, every=1, decay=decay)
    batches = [torch.where(x < 0, ignore_index, x) if ignore_index == 7 else x[x >= 0] for x in BATCHES]
    for batch in batches:
        order.update(batch.to(dtype), ignore_index)
    expected = by_hand(batches, decay, ignore_index)
    assert order.counts.tolist() == expected
    assert order.permutation.tolist() == most_frequent_first(expected)
    assert order.permutation.dtype == torch.int64 and order.updates == len(batches)


def test_default_ignore_index() -> None:
    order = cce.VocabOrder(V, every=1)
    for batch in BATCHES:
        order.update(batch)
    assert order.counts.tolist() == by_hand(BATCHES)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16])
def test_counts_at_once(dtype: torch.dtype) -> None:
    """Unigram counts order at once; steps add to a copy of them."""
    counts = torch.tensor([4, 0, 9, 0, 9, 1, 0, 0, 0, 0, 4]).to(dtype)
    order = cce.VocabOrder(V, counts=counts)
    assert order.permutation.tolist() == [2, 4, 0, 10, 5, 1, 3, 6, 7, 8, 9]
    order.update(torch.tensor([1] * 10))
    assert order.permutation[0] == 1 and counts[1] == 0


def test_mean_probabilities() -> None:
    order = cce.VocabOrder(3, every=1)
    order.update_probabilities(torch.tensor([0.2, 0.5, 0.3], requires_grad=True))
    assert order.permutation.tolist() == [1, 2, 0] and not order.counts.requires_grad
    order.update_probabilities(torch.tensor([0.1, 0.1, 0.8], dtype=torch.bfloat16))
    assert order.permutation.tolist() == [2, 1, 0]


def test_natural_before_the_first_update() -> None:
    assert cce.VocabOrder(V).permutation.tolist() == list(range(V))


def test_sorted_at_the_first_update_and_every_third() -> None:
    """In between, permutation and spec are the same objects."""
    order, base = cce.VocabOrder(V, every=3), cce.Spec(filter="tile")
    changed = []
    for step in range(1, 10):
        before, spec = order.permutation, order.spec(base)
        order.update(torch.full((step,), step))
        if order.permutation is not before:
            changed.append(step)
            assert order.permutation.tolist() == most_frequent_first(order.counts.tolist())
        assert (order.spec(base) is spec) == (order.permutation is before)
        assert torch.equal(order.spec(base).permutation, order.permutation)
    assert changed == [1, 3, 6, 9]


def test_sorted_on_request() -> None:
    order = cce.VocabOrder(V, every=100)
    order.update(torch.tensor([1]))
    order.update(torch.tensor([5, 5]))
    before = order.spec()
    order.refresh()
    assert order.permutation[:2].tolist() == [5, 1]
    assert torch.equal(order.spec().permutation, order.permutation) and order.spec() is not before


def test_spec_keeps_the_fields_of_its_base() -> None:
    order = cce.VocabOrder(V)
    for base in (None, cce.Spec(filter="none"), cce.Spec(filter="element", threshold=0.5, vocab_order="mean_logit")):
        assert order.spec(base) == replace(base or cce.Spec(), vocab_order=range(V))
        assert order.spec(replace(base or cce.Spec())) is order.spec(base)  # made anew, with the same fields


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("saved_at", [0, 1, 4])
def test_state(saved_at: int) -> None:
    """What is loaded has the same order, and goes on as the original does; a state kept does not change."""
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randint(V, (20,), generator=rng) for _ in range(9)]
    order = cce.VocabOrder(V, every=3, decay=0.9)
    for batch in batches[:saved_at]:
        order.update(batch)
    state, kept = order.state_dict(), through_a_file(order.state_dict())
    loaded = cce.VocabOrder(V, every=3, decay=0.9, counts=torch.arange(V))
    loaded.spec()
    loaded.load_state_dict(kept)
    for batch in [None, *batches[saved_at:]]:
        if batch is not None:
            order.update(batch)
            loaded.update(batch)
        assert loaded.updates == order.updates
        assert torch.equal(loaded.counts, order.counts) and torch.equal(loaded.permutation, order.permutation)
        assert loaded.spec() == order.spec()
    assert state["updates"] == saved_at and torch.equal(state["counts"], kept["counts"])
    assert torch.equal(state["permutation"], kept["permutation"])


def test_relabel() -> None:
    """A head whose rows are in this order has the same loss of the relabelled targets."""
    e, c, bias = torch.randn(6, 5), torch.randn(V, 5), torch.randn(V)
    targets = torch.tensor([3, 0, -100, 10, 3, 7], dtype=torch.int32)
    order = cce.VocabOrder(V, counts=torch.bincount(targets.clamp(min=0), minlength=V))
    new = order.relabel(targets)
    assert new.dtype == torch.int64 and new[2] == -100
    assert torch.equal(order.permutation[new[new >= 0]], targets[targets >= 0])
    natural = cce.Spec(vocab_order="natural")
    found = cce.loss(e, c[order.permutation], new, bias[order.permutation], spec=natural)
    torch.testing.assert_close(found, cce.loss(e, c, targets, bias))
    beyond = torch.tensor([[V, -1], [2**40, -(2**40)]])
    assert torch.equal(order.relabel(beyond), beyond)


def test_as_vocab_order_of_a_spec() -> None:
    """The same loss and gradients, exact or filtered at a threshold that nothing reaches."""
    problem = zipf_problem(n=64, d=8, v=200)
    order = cce.VocabOrder(200)
    order.update(problem.targets)
    for base in (cce.Spec(filter="none"), cce.Spec(filter="element", threshold=1e-30, block_n=8, block_v=32)):
        found, expected = (problem.gradients(spec) for spec in (order.spec(base), cce.Spec(filter="none")))
        torch.testing.assert_close(found, expected)


def test_a_permutation_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a spec is made; looking at its values in every call would wait for a GPU."""
    problem, order = zipf_problem(n=64, d=8, v=200), cce.VocabOrder(200)
    spec = order.spec(cce.Spec(filter="element"))
    monkeypatch.setattr("cce.spec._permutation", lambda order: pytest.fail("the values were looked at"))
    for _ in range(2):
        problem.gradients(order.spec(cce.Spec(filter="element")))
    resolved = resolve(spec, Problem(n=64, v=200, d=8, grad_e=True))
    assert resolved.permutation is spec.permutation and resolved.block_v is not None


@pytest.mark.gpu
def test_default_device() -> None:
    """Whatever it is, counts begin where there are values, and follow the first targets."""
    torch.set_default_device("meta")
    try:
        order = cce.VocabOrder(V)
        order.update(BATCHES[0])
        spec = order.spec(cce.Spec(filter="element", threshold=0.25))
        e, c = (torch.linspace(-1, 1, n * 4, device="cpu").view(n, 4) for n in (6, V))
        live = cce.live_fraction(e, c, BATCHES[0].flatten(), spec=spec)
        loss = cce.loss(e, c, BATCHES[0].flatten(), spec=spec)
    finally:
        torch.set_default_device(None)
    assert order.permutation.tolist() == most_frequent_first(by_hand(BATCHES[:1]))
    assert 0 <= live <= 1 and torch.isfinite(loss)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_updates_do_not_wait_for_a_gpu() -> None:
    """The counts follow the first targets to their device, and stay there."""
    order, batches = new(every=2), [x.cuda() for x in BATCHES]
    order.update(batches[0])
    probabilities = torch.zeros(V, device="cuda")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            order.update(batch)
        order.update_probabilities(probabilities)
        relabelled = order.relabel(batches[0])
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert order.counts.device.type == order.permutation.device.type == relabelled.device.type == "cuda"
    assert order.counts.tolist() == by_hand(BATCHES)
    assert order.spec().permutation is order.spec().permutation


def new(**arguments: Any) -> cce.VocabOrder:
    return cce.VocabOrder(**{"v": V, **arguments})


def load(**changed: Any) -> None:
    new().load_state_dict({**new().state_dict(), **changed})


NAN, COUNTS = math.nan, torch.ones(V)
BAD: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    (new, {"v": 0}, ValueError, "v: got 0, expected an int >= 1"),
    (new, {"v": 1.0}, TypeError, "v: got 1.0 of type float"),
    (new, {"every": 0}, ValueError, "every: got 0"),
    (new, {"every": True}, TypeError, "every: got True"),
    *((new, {"decay": x}, ValueError, f"decay: got {x}, expected a number in (0, 1]") for x in (0, -1.0, 1.5, NAN)),
    (new, {"decay": "1"}, TypeError, "decay: got '1' of type str"),
    (new, {"counts": [1] * V}, TypeError, "counts: got [1, 1"),
    (new, {"counts": COUNTS.bool()}, TypeError, "counts: got dtype torch.bool"),
    (new, {"counts": torch.ones(V + 1)}, ValueError, "counts: got shape (12,), expected (11,)"),
    (new, {"counts": -COUNTS}, ValueError, "counts: got -1.0 at index 0"),
    (new, {"counts": COUNTS.to("meta")}, ValueError, "counts: got a tensor on meta"),
    (new().update, {"targets": [1]}, TypeError, "targets: got [1] of type list"),
    (new().update, {"targets": COUNTS}, TypeError, "targets: got dtype torch.float32, expected an integer dtype"),
    (new().update, {"targets": torch.tensor([0, V])}, ValueError, "targets: got 11"),
    (new().update, {"targets": torch.tensor([-1])}, ValueError, "targets: got -1"),
    (new().update, {"targets": torch.tensor([0]), "ignore_index": None}, TypeError, "ignore_index: got None"),
    (new().update, {"targets": torch.tensor([0]), "ignore_index": 2**70}, ValueError, "ignore_index: got 11805"),
    (new().update_probabilities, {"probabilities": COUNTS.long()}, TypeError, "probabilities: got dtype torch.int64"),
    (new().update_probabilities, {"probabilities": COUNTS[None]}, ValueError, "probabilities: got shape (1, 11)"),
    *(
        (new().update_probabilities, {"probabilities": COUNTS * x}, ValueError, f"probabilities: got {x} at index 0")
        for x in (-0.5, math.inf, NAN)
    ),
    (new().relabel, {"ids": COUNTS}, TypeError, "ids: got dtype torch.float32"),
    (new().spec, {"base": "none"}, TypeError, "base: got 'none' of type str, expected a cce.Spec"),
    (new().load_state_dict, {"state_dict": [1]}, TypeError, "state_dict: got [1] of type list"),
    (new().load_state_dict, {"state_dict": {}}, ValueError, "state_dict: got the keys []"),
    (load, {"every": 3}, ValueError, "'every'"),
    (load, {"counts": torch.ones(3)}, ValueError, "state_dict['counts']: got shape (3,), expected (11,)"),
    (load, {"updates": -1}, ValueError, "state_dict['updates']: got -1"),
    (load, {"updates": 1.0}, TypeError, "state_dict['updates']: got 1.0"),
    (load, {"permutation": COUNTS}, TypeError, "state_dict['permutation']: got dtype torch.float32"),
    (load, {"permutation": COUNTS.long()}, ValueError, "state_dict['permutation']: got tensor([1, 1"),
    (load, {"permutation": torch.arange(3)}, ValueError, "state_dict['permutation']: got shape (3,)"),
]


@pytest.mark.parametrize(("call", "arguments", "kind", "message"), BAD, ids=[bad[3] for bad in BAD])
def test_bad_input(call: Callable[..., Any], arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        call(**arguments)
    assert message in str(caught.value)


def test_a_bad_update_changes_nothing() -> None:
    order = new(every=1)
    with pytest.raises(ValueError):
        order.update(torch.tensor([4, V]))
    assert order.updates == 0 and not order.counts.any()


@dataclass(frozen=True)
class ZipfProblem:
    """Hidden states around a common direction, along which the head has Zipf's frequencies; targets of the model."""

    e: Tensor  # (N, D)
    c: Tensor  # (V, D)
    targets: Tensor  # (N,)

    @property
    def p(self) -> Tensor:
        return (self.e @ self.c.T).softmax(1)

    def gradients(self, spec: cce.Spec) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, dE and dC."""
        e, c = self.e.clone().requires_grad_(), self.c.clone().requires_grad_()
        loss = cce.loss(e, c, self.targets, spec=spec)
        loss.backward()
        assert e.grad is not None and c.grad is not None
        return loss.detach(), e.grad, c.grad


def zipf_problem(n: int, d: int, v: int, seed: int = 1, common: float = 4.0) -> ZipfProblem:
    """The entry of rank r has mean logit -log r, plus a constant: p ~ 1/r. The head is the same for every seed."""
    rng = torch.Generator().manual_seed(0)
    direction = torch.randn(d, generator=rng)
    direction /= direction.norm()
    log_rank = torch.randperm(v, generator=rng).add(1).log()[:, None]
    c = torch.randn(v, d, generator=rng) * 0.5 / d**0.5 - log_rank / common * direction
    rng.manual_seed(seed)
    e = torch.randn(n, d, generator=rng) + common * direction
    return ZipfProblem(e, c, torch.multinomial((e @ c.T).softmax(1), 1, generator=rng)[:, 0])


def test_hit_counts_are_the_wrong_key() -> None:
    """Sorted by how many rows exceeded the threshold, tiles mix entries of different probability.

    Nine tenths of the entries never exceed it, and hold half of the mass: hit counts say nothing of their order.
    In tiles of entries alike, by target counts or by mean probability, the compensated filter errs half as much,
    with fewer of them live; nor does half the threshold for the hits make up for it.
    """
    n, d, v, threshold = 512, 32, 8192, 2.0**-10
    orders = {name: cce.VocabOrder(v, every=8) for name in ("natural", "targets", "probability", "hits")}
    rng = torch.Generator().manual_seed(0)
    for step in range(8):
        p = zipf_problem(n, d, v, seed=2 + step).p
        orders["targets"].update(torch.multinomial(p, 32, replacement=True, generator=rng))
        orders["probability"].update_probabilities(p.mean(0))
        orders["hits"].update_probabilities((p > threshold).float().sum(0))
    now = zipf_problem(n, d, v, seed=1)
    exact = now.gradients(cce.Spec(filter="none"))

    def measured(name: str, threshold: float = threshold) -> tuple[float, float, float]:
        spec = orders[name].spec(cce.Spec(filter="element", threshold=threshold))
        found = now.gradients(spec)
        de, dc = (float((x - y).norm() / y.norm()) for x, y in zip(found[1:], exact[1:], strict=True))
        return cce.live_fraction(now.e, now.c, now.targets, spec=spec), de, dc

    hits, natural = measured("hits"), measured("natural")
    assert float((orders["hits"].counts == 0).double().mean()) > 0.9
    for name in ("targets", "probability"):
        good = measured(name)
        assert good[0] < hits[0] and good[0] < 0.5 * natural[0], name
        assert good[1] < 0.5 * hits[1] and good[2] < 0.6 * hits[2], name
    lower = measured("hits", threshold / 2)
    targets = measured("targets")
    assert lower[0] > targets[0] and lower[1] > targets[1], "half the threshold would make up for it"
