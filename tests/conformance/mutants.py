"""Backends with one mistake each, most of them a bug some peer has had: the conformance kit must refuse them all."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from my_backend import MyBackend


class NoMaximum(MyBackend):
    """exp() without the maximum subtracted."""

    def tile_sums(self, z):
        m, _, tile_entropy = super().tile_sums(z)
        return m, z.exp().sum(1).log() - m, tile_entropy


class LastTileDropped(MyBackend):
    """The ragged last tile's logits count for nothing."""

    def forward(self, inputs, problem, spec, maps):
        self.ragged = problem.v % spec.block_v
        return super().forward(inputs, problem, spec, maps)

    def tile_sums(self, z):
        m, log_s, tile_entropy = super().tile_sums(z)
        if self.ragged and z.shape[1] == self.ragged:
            m = torch.full_like(m, -1e30)
        return m, log_s, tile_entropy


class MaskBeforeSoftcap(MyBackend):
    """Columns beyond V are masked before the softcap, which makes -softcap of them: they add mass."""

    def tile_sums(self, z):
        m, log_s, tile_entropy = super().tile_sums(z)
        if self.softcap is not None and z.shape[1] < self.block_v:
            padding = torch.tensor(self.block_v - z.shape[1]).log() - self.softcap - m
            log_s = torch.logaddexp(log_s, padding)
        return m, log_s, tile_entropy

    def forward(self, inputs, problem, spec, maps):
        self.softcap, self.block_v = problem.softcap, spec.block_v
        return super().forward(inputs, problem, spec, maps)


class SoftcapForgotten(MyBackend):
    """The softcap's derivative is left out."""

    def softcap_derivative(self, problem, z):
        return 1.0


class ScaleForgotten(MyBackend):
    """Gradients lack the factor logit_scale."""

    def backward(self, inputs, problem, spec, outputs, maps, upstream):
        found = super().backward(inputs, problem, spec, outputs, maps, upstream)
        undo = {name: None if x is None else x / problem.logit_scale for name, x in vars(found).items()}
        return replace(found, **undo)


class HalfAccumulator(MyBackend):
    """Logits are rounded to bf16."""

    def logits(self, problem, e, c, bias):
        return super().logits(problem, e, c, bias).to(torch.bfloat16).to(e.dtype)


class BiasTwice(MyBackend):
    """The bias is added once a D-chunk."""

    def logits(self, problem, e, c, bias):
        return super().logits(problem, e, c, None if bias is None else 2 * bias)


class TargetForgotten(MyBackend):
    """The target's own term is missing."""

    def subtract_targets(self, dz, place, g):
        return dz


class RepeatedTargetOnce(MyBackend):
    """A target named twice in a row is subtracted once: a scatter that overwrites."""

    def subtract_targets(self, dz, place, g):
        for k in range(1, place.shape[1]):
            place = torch.where((place[:, k] == place[:, 0])[:, None] & (torch.arange(place.shape[1]) == k), -1, place)
        return super().subtract_targets(dz, place, g)


class OneUpstreamForAll(MyBackend):
    """Every row gets the mean of the upstream gradients."""

    def softmax_gradient(self, z, outputs, upstream):
        return super().softmax_gradient(z, outputs, replace(upstream, a=upstream.a.mean().expand_as(upstream.a)))


class EntropyForgotten(MyBackend):
    """The entropy has no gradient."""

    def softmax_gradient(self, z, outputs, upstream):
        return super().softmax_gradient(z, outputs, replace(upstream, h=None))


class NegativeEntropy(MyBackend):
    """lse - sum p z as float32 gives it: rounding takes a peaked row below 0."""

    def forward(self, inputs, problem, spec, maps):
        found = super().forward(inputs, problem, spec, maps)
        return found if found.entropy is None else replace(found, entropy=found.entropy - 1e-6)


class ZeroGradients(MyBackend):
    """Gradients of the right shape, all 0."""

    def backward(self, *args):
        found = super().backward(*args)
        return replace(found, **{k: None if x is None else torch.zeros_like(x) for k, x in vars(found).items()})


class Unwritten(MyBackend):
    """The last row of dC is never written."""

    def backward(self, inputs, *args):
        found = super().backward(inputs, *args)
        if found.dc is not None:
            dc = torch.empty_like(found.dc)
            dc[:-1] = found.dc[:-1]
            found = replace(found, dc=dc)
        return found


class NoCompensation(MyBackend):
    """Skipped tiles leave nothing behind though the spec compensates."""

    def add_skipped(self, inputs, problem, spec, *args):
        super().add_skipped(inputs, problem, replace(spec, compensate=False), *args)


class CompensatesAll(MyBackend):
    """Live tiles are compensated too."""

    def add_skipped(self, inputs, problem, spec, outputs, maps, upstream, live, *args):
        super().add_skipped(inputs, problem, spec, outputs, maps, upstream, torch.zeros_like(live), *args)


class FilterIgnored(MyBackend):
    """Computes every tile, and compensates the dead ones on top."""

    def drop_dead(self, dx, live):
        return dx


class OtherLiveSet(MyBackend):
    """The threshold is half of what the spec says."""

    def forward(self, inputs, problem, spec, maps):
        return super().forward(inputs, problem, replace(spec, threshold=spec.threshold / 2), maps)


class LiveWithoutTargets(MyBackend):
    """A tile that holds a target may be skipped."""

    def work_list(self, inputs, problem, spec, maps, upstream):
        none = replace(inputs, targets=torch.full_like(inputs.targets, -1))
        return super().work_list(none, problem, spec, maps, upstream)


class OrderIgnored(MyBackend):
    """The prediction is a place in the order, not an entry."""

    def forward(self, inputs, problem, spec, maps):
        found = super().forward(inputs, problem, spec, maps)
        if inputs.vocab_order is None or found.prediction is None:
            return found
        return replace(found, prediction=inputs.vocab_order.argsort()[found.prediction])


class ScalesInPlace(MyBackend):
    """Saved gradients are scaled in place: a second backward is scaled twice."""

    def backward(self, inputs, problem, spec, outputs, maps, upstream):
        upstream.a.mul_(problem.logit_scale * 0.5)
        return super().backward(inputs, problem, spec, outputs, maps, upstream)


class RowsIgnored(MyBackend):
    """Reads the first N rows of e instead of those in use."""

    def wide(self, inputs, spec):
        if inputs.rows is not None:
            inputs = replace(inputs, rows=torch.arange(len(inputs.rows)))
        return super().wide(inputs, spec)


class Irreproducible(MyBackend):
    """The order of additions changes from run to run, as with atomics."""

    runs = itertools.count()

    def backward(self, *args):
        found = super().backward(*args)
        return found if found.de is None else replace(found, de=found.de * (1 + next(self.runs) * 2.0**-22))


class FrozenLosesGradient(MyBackend):
    """No weight gradient when the input is frozen."""

    def backward(self, inputs, problem, *args):
        return super().backward(inputs, replace(problem, grad_c=problem.grad_c and problem.grad_e), *args)


class LossAndLseApart(MyBackend):
    """The target's logit comes from another computation, so that a loss can be negative."""

    def forward(self, inputs, problem, spec, maps):
        found = super().forward(inputs, problem, spec, maps)
        return replace(found, nll=found.nll - 2e-6 * (inputs.targets >= 0))


class StrideDropped(MyBackend):
    """The bias is read as if it were contiguous."""

    group = "layouts"

    def wide(self, inputs, spec):
        bias = inputs.bias
        if bias is not None:
            room = bias.untyped_storage().size() // bias.element_size() - bias.storage_offset()
            inputs = replace(inputs, bias=bias.as_strided((min(len(bias), room),), (1,)))
        return super().wide(inputs, spec)


class MaximumForgotten(MyBackend):
    """nll is the difference of the rounded log-sum-exp and the target's logit."""

    def negative_log_likelihood(self, m, log_s, target_logits):
        return ((m + log_s)[:, None] - target_logits).clamp(min=0)


class LowPartIgnored(MyBackend):
    """p is made of the rounded log-sum-exp alone."""

    def softmax_gradient(self, z, outputs, upstream):
        return super().softmax_gradient(z, replace(outputs, lse_low=outputs.lse_low * 0), upstream)


class NanInLiveTilesOnly(MyBackend):
    """A comparison with NaN is false, so that the tiles of a row without values are dead."""

    group = "patterns"

    def work_list(self, inputs, problem, spec, maps, upstream):
        known = replace(maps, tile_mass=maps.tile_mass.nan_to_num(nan=0.0))
        a = upstream.a.where(upstream.a.isfinite(), 1.0)
        return super().work_list(inputs, problem, spec, known, replace(upstream, a=a))


class MaskOverflows(MyBackend):
    """A masked logit becomes the lowest number, which a large upstream gradient makes infinite: 0 * inf."""

    group = "patterns"

    def softmax_gradient(self, z, outputs, upstream):
        return super().softmax_gradient(z, outputs, upstream) + self.of_masked(z, outputs, upstream)

    def of_masked(self, z, outputs, upstream):
        lowest = z.clamp(min=-1e38) - z.clamp(min=-1e37)  # of masked logits -9e37, else 0
        p = (z - outputs.lse[:, None]).exp()
        return p * (0 * lowest if upstream.h is None else upstream.h[:, None] * lowest)


class MaskCapped(MyBackend):
    """The softcap makes -softcap of a masked entry."""

    group = "patterns"

    def logits(self, problem, e, c, bias):
        lowest = torch.finfo(e.dtype).min / 4
        return super().logits(problem, e, c, bias if problem.softcap is None or bias is None else bias.clamp(lowest))


MUTANTS = [value for value in list(vars().values()) if isinstance(value, type) and MyBackend in value.__mro__[1:]]
