"""The cases of the contract of a pass with gradients run, and tell right kernels from wrong ones."""

from __future__ import annotations

import pytest
import torch

from cce.testing.kernels import one_pass_contract as one_pass_contract
from cce.testing.kernels.one_pass_contract import CASES
from cce.testing.kernels.plain_math import finite
from cce.testing.kernels.plain_one_pass import PlainOnePass

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_kernels_meet_it(case):
    _, passed, message = one_pass_contract.run_case(PlainOnePass(128), case)
    assert passed, message


class MaximumForgotten(PlainOnePass):
    """q is taken about 0."""

    def store(self, e, c, formula, q, tile_max, tile_sum):
        super().store(e, c, formula, q, tile_max, tile_sum)
        tile_max.zero_()


class LastTileDropped(PlainOnePass):
    """lse does without the last tile."""

    def join(self, tile_max, tile_sum, *others):
        super().join(tile_max[:-1], tile_sum[:-1], *others)


class ShiftForgotten(PlainOnePass):
    """nll is the difference of two rounded numbers, which may be large."""

    def join(self, tile_max, tile_sum, target_logits, targets, lse, lse_low, nll):
        super().join(tile_max, tile_sum, target_logits, targets, lse, lse_low, nll)
        nll.copy_(torch.where(nll.isfinite() & (nll > 0), lse[:, None] - target_logits, nll))


class RestForgotten(PlainOnePass):
    """The log-sum-exp is one number."""

    def scale(self, q, tile_max, lse, lse_low, *others):
        super().scale(q, tile_max, lse, lse_low * 0, *others)


class NoSoftmaxIsZero(PlainOnePass):
    """A row without a softmax has no gradient."""

    def scale(self, q, tile_max, lse, lse_low, nll, targets, a, g, softcap):
        super().scale(q, tile_max, lse, lse_low, nll, targets, a, g, softcap)
        q[~lse.isfinite()] = 0


class OneTarget(PlainOnePass):
    """Of a row's targets the first alone is looked at."""

    def scale(self, q, tile_max, lse, lse_low, nll, targets, a, g, softcap):
        super().scale(q, tile_max, lse, lse_low, nll[:, :1], targets[:, :1], a, g, softcap)


class NanKept(PlainOnePass):
    """Rows without a target are scaled as others."""

    def scale(self, q, tile_max, lse, lse_low, nll, targets, a, g, softcap):
        super().scale(q, tile_max, lse, lse_low, nll, targets.clamp(min=0), a, g, softcap)


class MaskedTargetLeftOut(PlainOnePass):
    """A masked target has no gradient."""

    def scale(self, q, tile_max, lse, lse_low, nll, targets, a, g, softcap):
        super().scale(q, tile_max, lse, lse_low, nll, targets, a, torch.where(nll == torch.inf, 0, g), softcap)


class FactorOfMaskedTile(PlainOnePass):
    """A tile without an entry is scaled by exp(0 - lse), which may be infinite."""

    def scale(self, q, tile_max, lse, lse_low, nll, targets, a, g, softcap):
        super().scale(q, tile_max, lse, lse_low, nll, targets, a, g, softcap)
        factor = torch.exp(finite(tile_max) - lse).repeat_interleave(self.columns(q.dtype), 0)[: q.shape[1]]
        q.mul_((factor.T / factor.T).where(targets >= 0, 1))


class DerivativeForgotten(PlainOnePass):
    """A softcap has none."""

    def scale(self, *arguments):
        super().scale(*arguments[:-1], None)


class TargetOff(PlainOnePass):
    """A target's p is that of another logit."""

    def scale(self, q, tile_max, lse, lse_low, nll, targets, a, g, softcap):
        super().scale(q, tile_max, lse, lse_low, nll + 0.01, targets, a, g, softcap)


class CopiesAll(PlainOnePass):
    """Rows without a target are copied, too."""

    def target_logits(self, e, c, targets, formula, out, used_e):
        super().target_logits(e, c, targets, formula, out, used_e)
        used_e.copy_(e)


class CountsAll(PlainOnePass):
    """A mean is over ignored targets, too."""

    def prepare(self, targets, v, ignore_index, out, weights):
        super().prepare(targets, v, ignore_index, out, weights)
        if weights is not None:
            weights.fill_(1 / out.numel())


class OtherBits(PlainOnePass):
    """A sum in an order of its own."""

    def value(self, weights, nll, out):
        super().value(weights, nll, out)
        self.calls = getattr(self, "calls", 0) + 1
        out.mul_(1 + 1e-6 * self.calls)


class RowsKept(PlainOnePass):
    """Rows without a target keep what they hold."""

    def multiply(self, x, y, factor, targets, is_de):
        super().multiply(x, y, factor, targets, False)


class NoTargetKept(PlainOnePass):
    """Without any target an infinite factor makes NaN."""

    def multiply(self, x, y, factor, targets, is_de):
        super().multiply(x, y, factor, targets.clamp(min=0), is_de)


MUTANTS = {
    MaximumForgotten: "plain", LastTileDropped: "aligned sizes", OneTarget: "float16 k3", NanKept: "nan rows",
    MaskedTargetLeftOut: "masked", FactorOfMaskedTile: "masked low", CopiesAll: "nan rows", CountsAll: "plain",
    DerivativeForgotten: "softcap", TargetOff: "softcap float32", RowsKept: "plain", NoTargetKept: "plain",
    OtherBits: "plain", ShiftForgotten: "offset 2^20", RestForgotten: "offset 2^20", NoSoftmaxIsZero: "strange",
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutants_do_not(mutant):
    case = next(case for case in CASES if case.name == MUTANTS[mutant])
    assert not one_pass_contract.run_case(mutant(128), case)[1], mutant.__doc__
