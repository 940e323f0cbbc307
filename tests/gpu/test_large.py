"""Matrices and maps of more elements than 32 bits can count."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from heads import Answer, Head, Truth, dense, peaked, truth
from torch import Tensor

import cce

pytestmark = pytest.mark.gpu

THRESHOLD = 2.0**-13
SPECS = {
    "exact": cce.Spec(filter="none"),
    "natural": cce.Spec(filter="element", threshold=THRESHOLD, vocab_order="natural"),
    "ordered": cce.Spec(filter="element", threshold=THRESHOLD, vocab_order="mean_logit"),
    "uncompensated": cce.Spec(filter="element", threshold=THRESHOLD, vocab_order="natural", compensate=False),
}
SIZES = {
    "c": (256, 2048, 1_100_000),  # c and dC: V D > 2**31
    "logits": (16384, 64, 151_936),  # N V > 2**31
}


@pytest.fixture(scope="module", params=SIZES, ids=str)
def solved(request: pytest.FixtureRequest) -> Iterator[tuple[Head, Tensor, Truth, Answer]]:
    """A head, the entries whose dC is looked at, what is true, and what the dense computation finds."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    n, d, v = SIZES[request.param]
    assert max(n, d) * v > 2**31
    head = peaked(n, d, v)
    some = torch.randint(v, (1000,), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    ends = torch.arange(1000, device="cuda")
    rows = torch.cat([ends, v - 1 - ends, some, head.targets[:1000]]).unique()
    yield head, rows, truth(head, rows, THRESHOLD), dense(head, rows)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("name", SPECS)
def test_as_the_dense_computation(backend: str, name: str, solved: tuple[Head, Tensor, Truth, Answer]) -> None:
    """Errors are at most twice those of the dense one, and what the filter may leave out."""
    head, rows, true, plain = solved
    e, c = head.leaves()
    loss = cce.loss(e, c, head.targets, backend=backend, spec=SPECS[name])
    de, dc = torch.autograd.grad(loss, (e, c))
    # A sum of D products, rounded to float32 at each step, and in the log-sum-exp likewise.
    longest = float(head.c.norm(dim=1, dtype=torch.float32).max())
    rounding = e.shape[1] * 2.0**-24 * float(head.e.norm(dim=1, dtype=torch.float32).max()) * longest
    assert abs(float(loss.detach()) - float(true.loss)) <= 2 * rounding
    left_out_de = left_out_dc = 0.0
    if SPECS[name].filter != "none":
        # Of a row: at most its small probabilities, times rows of c or, compensated, what these lie from their mean.
        left_out_de = float(true.small.norm()) * 2 * longest / len(e)
        # Of an entry: at most the threshold of each row.
        left_out_dc = len(rows) ** 0.5 * THRESHOLD * float(head.e.norm(dim=1, dtype=torch.float32).mean())
    assert error(de, true.de) <= 2 * error(plain.de, true.de) + left_out_de
    assert error(dc[rows], true.dc) <= 2 * error(plain.dc, true.dc) + left_out_dc
    # Each row by itself, too: one row in the wrong place would be lost in the sum of all.
    # Without compensation a row may lack all its small probabilities, times rows of c.
    left_out = 0.0 if SPECS[name].compensate else true.small * longest / len(e)
    wrong = (de.double() - true.de).norm(dim=1) > 0.5 * true.de.norm(dim=1) + left_out
    assert not wrong.any(), f"rows of dE: {wrong.nonzero()[:10, 0].tolist()}"
    of_targets = torch.isin(rows, head.targets)
    wrong = ((dc[rows].double() - true.dc).norm(dim=1) > 0.5 * true.dc.norm(dim=1)) & of_targets
    assert not wrong.any(), f"rows of dC: {rows[wrong][:10].tolist()}"


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm())
