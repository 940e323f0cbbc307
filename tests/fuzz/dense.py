"""The float64 definitions of ``cce.loss`` and ``cce.terms``: dense logits and PyTorch's own functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from noise import FEW, LAMBDA, UNIT, Noise, logit_error, product_error
from torch import Tensor


class LogSumExp(torch.autograd.Function):
    """torch.logsumexp, whose derivative is the softmax also where that is NaN."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return torch.logsumexp(z, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0][..., None] * torch.softmax(ctx.saved_tensors[0], -1)


class Masked(torch.autograd.Function):
    """-inf where ``mask`` is, whatever the logit; the derivative is 0 there, times NaN in a row that has no softmax."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return z.masked_fill(mask, -torch.inf)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ~ctx.saved_tensors[0], None


class Tokens:
    """The tokens in use of a call, and what the logits say of them; results have the results' shape, 0 if ignored.

    Args:
        t: float64 copies of the tensors, targets int64.
        options: of ``cce.terms``.
        noise: what disturbs the arithmetic.
        needed: rows of the results whose logits enter at all; the others' are 0, whatever e and the bias hold.
    """

    def __init__(
        self, t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise, needed: Tensor | None = None
    ) -> None:
        self.noise, self.c, soft = noise, t["c"], "target_weight" in t
        self.shift = options.get("shift", 0)
        self.lead = t["targets"].ndim - soft
        targets = self.ahead(t["targets"])
        valid = targets != options.get("ignore_index", -100)
        self.counts = valid  # with soft targets (..., K)
        self.in_use = valid.any(-1) if soft else valid
        self.shape = self.in_use.shape
        self.rows = self.in_use.reshape(-1).nonzero()[:, 0]
        e = t["e"]
        if self.shift:
            e = e.narrow(-2, 0, max(e.shape[-2] - self.shift, 0))
        self.e = e.reshape(-1, e.shape[-1])[self.rows]
        flat = (self.in_use.numel(), targets.shape[-1] if soft else 1)
        self.targets, self.valid = (x.reshape(flat)[self.rows] for x in (targets.masked_fill(~valid, 0), valid))
        self.scale, self.softcap = options.get("logit_scale", 1.0), options.get("softcap")
        self.error: Tensor | float = 0.0  # of the logits
        if needed is not None:
            self.e = torch.where(self.of_rows(needed)[:, None], self.e, 0)
        self.z = self._logits(t.get("bias"))
        if needed is not None:
            self.z = torch.where(self.of_rows(needed)[:, None], self.z, 0)
        self.logp = noise.log_softmax(self.z, self.error)

    def ahead(self, x: Tensor) -> Tensor:
        """What stands beside the results: x[..., shift:] along the last leading dimension."""
        if not self.shift:
            return x
        length = x.shape[self.lead - 1]
        start = min(self.shift, length)
        return x.narrow(self.lead - 1, start, length - start)

    def _logits(self, bias: Tensor | None) -> Tensor:
        noise, z = self.noise, self.noise.product(self.e, self.c, bias, self.scale)
        delta = product_error(self.e, self.c, bias, noise).detach() if noise.generator is not None else torch.zeros(())
        z = self.scale * (z if self.softcap is None else noise.by(z, delta))  # the softcap's slope errs, too
        if self.softcap is not None:
            z = noise.capped(z, self.softcap)
            if bias is not None:
                z = Masked.apply(z, torch.isneginf(bias))
        if noise.generator is None or not z.numel():
            return z
        error = logit_error(delta, z.detach(), self.scale, self.softcap, noise)
        self.error = torch.where(torch.isfinite(z), error, 0)
        return noise.by(z, self.error)

    def fill(self, x: Tensor) -> Tensor:
        """From rows in use to the results' shape."""
        out = x.new_zeros(self.in_use.numel(), *x.shape[1:])
        return out.index_copy(0, self.rows, x).reshape((*self.shape, *x.shape[1:]))

    def of_rows(self, x: Tensor) -> Tensor:
        """From tensors beside the targets to rows in use."""
        x = self.ahead(x)
        return x.reshape(self.in_use.numel(), *x.shape[self.lead :])[self.rows]

    def each(self, entries: Tensor | None = None) -> Tensor:
        """(N, K) negative log-likelihoods of entries (N, K); of the targets."""
        entries = self.targets if entries is None else entries
        found = -self.logp.gather(-1, entries)
        if self.noise.apart and self.noise.generator is not None and self.z.numel():
            # The gradient at a target may be that of exp(-nll).
            found = self.noise.on_gradient(found, lambda g: self.noise.by(g, self.error.gather(-1, entries) * g.abs()))
            found = self.noise.by(found, self.error.gather(-1, entries))
        return self.noise.nll(found, len(self.c))

    def nll(self) -> Tensor:
        """(N,)"""
        return self.each()[:, 0]

    def lse(self) -> Tensor:
        noise, z = self.noise, self.z
        found: Tensor = LogSumExp.apply(
            noise.on_gradient(z, lambda dz: noise.by(dz, (8 * noise.u + self.error) * dz.abs()))
        )
        found = noise.nll(noise.few(found), len(self.c))
        return noise.on_gradient(found, lambda g: noise.note(g) or g)

    def entropy(self) -> Tensor:
        logp = self.logp.masked_fill(torch.isneginf(self.logp), 0)
        return self.noise.nll(-self.noise.sum(self.logp.exp() * logp), len(self.c))

    def predicted(self) -> Tensor:
        return self.fill(self.z.detach().argmax(-1) + 1) - 1


def reduce(
    noise: Noise, values: Tensor, weight: Tensor | None, reduction: str, divisor: Tensor | None = None
) -> Tensor:
    """``values`` (N,) of rows in use, "mean" or "sum"; the divisor is the sum of the weights, if no other is given."""
    if weight is not None:
        weight = noise.few(weight)
        values = noise.few(values * weight)
    if reduction == "sum":
        return noise.sum(values)
    divisor = weight if divisor is None else divisor
    total = torch.tensor(float(len(values)), dtype=values.dtype) if divisor is None else noise.sum(divisor)
    return noise.few(noise.sum(values) / torch.where(total == 0, torch.nan, total))


def loss(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, ...]:
    """As ``F.cross_entropy`` of the logits, with what cce adds: token weights, several targets a token, the z-loss."""
    tokens = Tokens(t, options, noise)
    nll, weight, v = tokens.each(), t.get("weight"), len(t["c"])
    coefficients = torch.ones_like(nll)
    if "target_weight" in t:
        coefficients = tokens.of_rows(t["target_weight"]).masked_fill(~tokens.valid, 0)
    of_class = torch.ones_like(nll) if weight is None else weight[tokens.targets]
    # An entry that is no target costs nothing, whatever its logit.
    terms = torch.where(tokens.valid, noise.few(noise.few(coefficients * of_class) * nll), 0)
    value = noise.sum(terms)
    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    if smoothing:
        u = torch.full((v,), 1 / v, dtype=nll.dtype) if weight is None else weight / v
        smooth = _smooth(tokens, u)
        value = noise.few(noise.few((1 - smoothing) * value) + noise.few(smoothing * smooth))
    if z_loss:
        lse = tokens.lse()
        value = noise.few(value + noise.few(z_loss * noise.few(lse * lse)))
    token_weight = tokens.of_rows(t["token_weight"]) if "token_weight" in t else None
    if options.get("reduction", "mean") == "none":
        return (tokens.fill(value if token_weight is None else noise.few(value * noise.few(token_weight))),)
    divisor = None
    if weight is not None and "target_weight" not in t:
        divisor = of_class[:, 0] if token_weight is None else of_class[:, 0] * token_weight
    return (reduce(noise, value, token_weight, options.get("reduction", "mean"), divisor),)


def _smooth(tokens: Tokens, u: Tensor) -> Tensor:
    """(N,) - sum_v u_v log p_v, the difference of (sum u) lse and the weighted logit, which are computed apart.

    So an error that all logits of a row have in common, which no difference of logits shows, is not cancelled.
    """
    noise, found = tokens.noise, tokens.noise.sum(-(tokens.logp * u))
    if noise.generator is None or not found.numel():
        return found
    size = (tokens.z.detach().abs() * u).nan_to_num(0, 0, 0)
    # In float64, whatever the problem's dtype: the mean row, which is a sum of V, and a product with it.
    product = (LAMBDA * (math.sqrt(tokens.e.shape[1]) + math.sqrt(len(u))) + FEW) * UNIT[torch.float64]
    common = (tokens.error * u + product * size).sum(-1)
    if tokens.softcap is not None:  # a float32 sum; else a float64 product with the mean row
        common = common + 4 * noise.u * tokens.softcap * u.sum()
    else:

        def apart(s: Tensor) -> Tensor:
            noise.beside = tokens.scale * (s[:, None] * u).abs()
            return s

        found = noise.on_gradient(found, apart)
    return noise.by(found, common)


def terms(t: Mapping[str, Tensor], options: Mapping[str, Any], noise: Noise) -> tuple[Tensor, ...]:
    """The differentiable outputs asked for, in order."""
    tokens = Tokens(t, options, noise)
    found = []
    for name in options["outputs"]:
        if name == "nll" and "target_weight" in t:
            w = tokens.of_rows(t["target_weight"]).masked_fill(~tokens.valid, 0)
            found.append(noise.sum(torch.where(tokens.valid, noise.few(noise.few(w) * tokens.each()), 0)))
        elif name != "prediction":
            found.append({"nll": tokens.nll, "lse": tokens.lse, "entropy": tokens.entropy}[name]())
    return tuple(tokens.fill(x) for x in found)
