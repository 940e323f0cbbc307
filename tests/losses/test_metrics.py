"""Perplexity and accuracy against dense logits, batch by batch and together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cce
from cce import losses


def test_evaluate(problem: Any) -> None:
    found = losses.evaluate(problem.e, problem.c, problem.targets, **problem.call)
    use, z = problem.in_use, problem.logits().detach()
    hits = (z.argmax(-1) == problem.labels)[use]
    assert found.tokens == use.sum() and found.correct == hits.sum()
    torch.testing.assert_close(found.accuracy, hits.float().mean())
    torch.testing.assert_close(found.perplexity, (-problem.p().detach().log()[use]).mean().exp())
    torch.testing.assert_close(found.loss, cce.loss(problem.e, problem.c, problem.targets, **problem.call).detach())
    assert not found.nll.requires_grad


def test_some_are_predicted_and_some_not() -> None:
    """Among them an ignored token, whose prediction of -1 is no hit, even where -1 is what is ignored."""
    targets = torch.tensor([0, 1, 0, -1])
    found = losses.evaluate(torch.eye(4), torch.eye(4), targets, ignore_index=-1)
    assert (int(found.correct), int(found.tokens)) == (2, 3)


def test_batches_add_up(problem: Any) -> None:
    whole = losses.evaluate(problem.e, problem.c, problem.targets, **problem.call)
    one, two = (
        losses.evaluate(problem.e[rows], problem.c, problem.targets[rows], **problem.call)
        for rows in (slice(0, 1), slice(1, None))
    )
    both = one + two
    assert both.tokens == whole.tokens and both.correct == whole.correct
    torch.testing.assert_close(both.perplexity, whole.perplexity)
    with pytest.raises(TypeError):
        one + 1


def test_of_nothing() -> None:
    found = losses.evaluate(torch.ones(2, 3), torch.ones(4, 3), torch.full((2,), -100))
    assert found.tokens == 0 and found.perplexity.isnan() and found.accuracy.isnan()
