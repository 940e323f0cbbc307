"""Evaluation without logits: perplexity and token accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cce.losses.call import Call, Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Evaluation:
    """Sums over the tokens of one or more batches; ``a + b`` is the evaluation of both.

    Attributes:
        nll: scalar float64, summed negative log-likelihood in nats.
        correct: scalar int64, number of tokens whose target has the largest logit.
        tokens: scalar int64, number of tokens in use.
    """

    nll: Tensor
    correct: Tensor
    tokens: Tensor

    @property
    def loss(self) -> Tensor:
        """Mean negative log-likelihood of a token; NaN without tokens."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> Tensor:
        """Perplexity ``exp(loss)``."""
        return self.loss.exp()

    @property
    def accuracy(self) -> Tensor:
        """Share of the tokens that are predicted correctly."""
        return self.correct / self.tokens

    def __add__(self, other: Evaluation) -> Evaluation:
        if not isinstance(other, Evaluation):
            return NotImplemented
        return Evaluation(self.nll + other.nll, self.correct + other.correct, self.tokens + other.tokens)


@torch.no_grad()
def evaluate(e: Tensor, c: Tensor, targets: Tensor, **options: Unpack[Options]) -> Evaluation:
    """Perplexity and token accuracy from one pass over the logits, without a gradient.

    Nothing waits for a GPU until a number is read. The perplexity of a data set is that of the sum of its batches'
    evaluations, not the mean of their perplexities.

    Args:
        e, c, targets: (..., D), (V, D), (...); ignored tokens do not count.
        **options: :class:`Options`.

    Returns:
        Evaluation: sums, with loss, perplexity and accuracy computed from them.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.terms`.

    >>> e, c = torch.eye(3), torch.eye(3)
    >>> found = evaluate(e, c, torch.tensor([0, 1, 0])) + evaluate(e, c, torch.tensor([0, -100, 2]))
    >>> found.tokens, found.accuracy, found.perplexity.float()
    (tensor(5), tensor(0.8000), tensor(2.1201))
    """
    call = Call.of(e, c, targets, options)
    out = call.terms("nll", "prediction")
    assert out.nll is not None and out.prediction is not None
    in_use = call.in_use
    hit = (out.prediction == call.of_results(call.targets)) & in_use
    # Sums are float64, which MPS does not have.
    wide = out.nll.dtype if out.nll.device.type == "mps" else torch.float64
    return Evaluation(out.nll.sum(dtype=wide), hit.sum(), in_use.sum())
