"""An extended head is the same head where it was, and has the same statistics as a whole."""

from __future__ import annotations

import pytest
import torch

from cce.benchmarks import extend, heads
from cce.benchmarks import statistics as head_statistics

pytestmark = pytest.mark.usefixtures("one_thread")

N, D, V = 256, 32, 1024


@pytest.fixture(scope="module")
def head():
    """Zipf frequencies along a common mean row, as a trained head has them."""
    rng = torch.Generator().manual_seed(0)
    mean = torch.randn(D, generator=rng) / D**0.5
    frequency = 1 / torch.arange(1, V + 1)
    e = torch.randn(N, D, generator=rng) + 4 * mean
    c = torch.randn(V, D, generator=rng) * 0.3 + (frequency.log()[:, None] / 4 + 1) * mean
    targets = torch.multinomial((e @ c.T).softmax(1), 1, generator=rng)[:, 0]
    return extend.TrainedHead("test", e.bfloat16(), c.bfloat16(), targets, (1e6 * frequency).long())


def logits(head):
    return head.e.double() @ head.c.double().T


def test_original_logits_stay(head):
    found, expected = logits(extend.extend(head, N, 48, 1500))[:, :V], logits(head)
    # Two roundings to bf16, of e and of c, each of at most 2^-9 an entry.
    bound = 2 * 2**-9 * head.e.double().norm(dim=1)[:, None] * head.c.double().norm(dim=1)
    assert ((found - expected).abs() <= bound).all()


def test_shape_and_dtype(head):
    found = extend.extend(head, 300, 48, 1500)
    assert found.e.shape == (300, 48) and found.c.shape == (1500, 48)
    assert found.e.dtype == found.c.dtype == torch.bfloat16
    assert found.targets.shape == (300,) and found.counts.shape == (1500,)
    assert torch.equal(found.targets[:N], head.targets) and torch.equal(found.counts[:V], head.counts)
    assert not torch.equal(found.e[N:], found.e[: 300 - N]), "copies of rows have noise"


def test_no_column_is_empty(head):
    found = extend.extend(head, N, 3 * D, V)
    for x in (found.e, found.c):
        size = x.float().norm(dim=0)
        assert size.min() > size.max() / 20


def test_new_entries_weigh_what_the_counts_say(head):
    v = 2 * V
    found = extend.extend(head, N, D, v)
    share = float(logits(found).softmax(1)[:, V:].sum(1).mean())
    law = float((1 / torch.arange(1, v + 1))[V:].sum() / (1 / torch.arange(1, v + 1)).sum())
    assert share == pytest.approx(law, rel=0.1)
    assert float(found.counts[V:].sum() / found.counts.sum()) == pytest.approx(law, rel=0.1)


def test_counts_fall_on_behind_the_given_ones(head):
    counts = extend.extend(head, N, D, 4 * V).counts.double()
    given, first, last = counts[V // 2 : V].mean(), counts[V : 2 * V].mean(), counts[2 * V :].mean()
    assert given > first > last > 0


def test_statistics_stay_close(head):
    real, found = (head_statistics.spectrum(x) for x in (head, extend.extend(head, N, 2 * D, V + V // 8)))
    for name in ("nll, mean", "entropy, mean", "largest p, mean", "entries with p >= 2^-12, mean"):
        assert found[name] == pytest.approx(real[name], rel=0.1), name


def test_rows_only(head):
    found = extend.extend(head, N // 2, D, V)
    assert torch.equal(found.targets, head.targets[: N // 2]) and torch.equal(found.counts, head.counts)


def test_the_same_seed_makes_the_same_head(head):
    first, second, other = (extend.extend(head, 300, 48, 1500, seed) for seed in (0, 0, 1))
    assert torch.equal(first.e, second.e) and torch.equal(first.c, second.c)
    assert not torch.equal(first.c, other.c)


@pytest.mark.parametrize("shape", [(N, D - 1, V), (N, D, V - 1), (0, D, V)])
def test_smaller_is_refused(head, shape):
    with pytest.raises(ValueError, match="only extended"):
        extend.extend(head, *shape)


def test_all_statistics(head, monkeypatch):
    whole = head_statistics.measure(head, head.counts)
    monkeypatch.setattr(heads, "CHUNK_LOGITS", 100 * V)
    assert head_statistics.measure(head, head.counts) == pytest.approx(whole, rel=1e-4)
    p = logits(head).softmax(1)
    assert whole["entries with p >= 2^-12, mean"] == pytest.approx(
        float((p >= 2**-12).double().sum(1).mean()), rel=0.01
    )
    assert whole["entropy, mean"] == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-3)
    assert all(0 < whole[name] <= 1 for name in whole if name.startswith("live"))
