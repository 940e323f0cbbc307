"""How far a right answer may be from the float64 formula, found by Monte Carlo arithmetic.

The formula is evaluated again in float64 with every step disturbed, at random, by as much as the arithmetic of the
problem's dtype may err there (D. S. Parker, *Monte Carlo Arithmetic*, UCLA CSD-970002, 1997). What the results then
scatter is what rounding may cost, for any recipe, and for a gradient as for a value. No case has a constant of its own;
the model, that of ``cce.reference.bounds``, knows dtypes, sizes and magnitudes only. With u the unit roundoff of the
sums (float64's of float64 problems, else float32's) and u_in that of the products' factors:

- a logit errs by ``(LAMBDA sqrt(D) + 2) u |e|.|c|`` times the softcap's slope, and by ``FEW u |z|``; but not at all
  where every partial sum is a multiple of one power of two and has at most 24 (53) bits: there it is exact;
- ``p = exp(z - lse)`` by ``FEW u (1 + |z - lse|)`` relative: only differences count, so a common offset costs nothing;
- a negative log-likelihood by its logit, where kernels sum it apart, and ``(FEW + LAMBDA sqrt(V)) u``;
- an lse by the same and ``FEW u |lse|``;
- p of the backward by the error of its logit, which is computed again, and dz by ``FEW u`` of each of its parts;
- dz is stored to ``u_in``, and with an underflow relative to the largest upstream gradient; without the part of a
  weighted logit, whose gradient is a product of its own: what remains may be larger than their sum;
- a sum of n terms by ``LAMBDA sqrt(n) u`` of their magnitudes; anything else computed by ``FEW u``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

#: n independent roundings grow as LAMBDA sqrt(n) u; FEW elementary operations lie on the way of one value.
LAMBDA, FEW = 2.0, 4.0

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
#: Half the least number, or the least normal one where a GPU flushes what is below.
UNDERFLOW = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25, torch.float32: 2.0**-126, torch.float64: 2.0**-1022}


class Noise:
    """Disturbs what passes through it; with ``generator=None`` it changes nothing, and the formula is plain PyTorch.

    Args:
        dtype: of the problem: the wider of e's and c's.
        generator: of the signs.
        results: the dtype of the results.
        skipped: largest probability that a filter may take for another one as small; 0 without a filter, which would
            also leave out rows with an upstream gradient of 0, whatever they hold.
        apart: the targets' logits are sums of their own, as kernels make them, with roundings of their own.
        one_pass: kernels may keep exponentials in float16 until they are gradients, of bfloat16 problems, too.
        dtypes: of e and c, in which a recipe may store what it makes of them.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
        results: torch.dtype = torch.float32,
        skipped: float = 0.0,
        apart: bool = False,
        one_pass: bool = False,
        **dtypes: torch.dtype,
    ) -> None:
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        self.u = UNIT[sums] + UNIT[torch.float64]  # the formula's own roundings are added
        self.results = torch.promote_types(sums, results)
        self.bits = 53 if sums == torch.float64 else 24
        kept = torch.float16 if one_pass and dtype == torch.bfloat16 else dtype
        self.kept = max(UNIT[kept], UNIT[sums]) if one_pass else 0.0
        self.u_in, self.underflow = UNIT[dtype], max(UNDERFLOW[kept], UNDERFLOW[sums])
        self.stored = {name: UNIT[x] for name, x in dtypes.items()}
        self.own = {name: UNIT[torch.promote_types(x, torch.float32)] for name, x in dtypes.items()}
        self.generator, self.skipped, self.apart = generator, skipped, apart
        self.largest = 0.0  # upstream gradient of a logit met in this backward
        self.peak = 0.0  # number met on the way to a result
        self.beside: Tensor | None = None  # (N, V) what is added to the products' results as products of its own

    def signs(self, x: Tensor, *shape: int) -> Tensor:
        found = torch.randint(0, 2, shape or x.shape, generator=self.generator, dtype=x.dtype)
        return 2 * found - 1

    def by(self, x: Tensor, size: Tensor | float) -> Tensor:
        """``x`` off by ``size``, with the derivative of ``x``."""
        if self.generator is None:
            return x
        error = torch.as_tensor(size, dtype=x.dtype).detach().expand(x.shape) * self.signs(x)
        return x + torch.where(torch.isfinite(error), error, 0)

    def few(self, x: Tensor) -> Tensor:
        """``x`` after some operations on it alone."""
        self.peak = max(self.peak, float(_finite(x.detach()).abs().max()) if x.numel() else 0.0)
        return self.by(x, FEW * self.u * x.detach().abs())

    def sum(self, x: Tensor, dim: int = -1) -> Tensor:
        return self.by(x.sum(dim), (FEW + LAMBDA * math.sqrt(x.shape[dim])) * self.u * x.detach().abs().sum(dim))

    def nll(self, x: Tensor, v: int) -> Tensor:
        """A difference to the row's largest logit and the logarithm of a sum, neither negative."""
        return self.by(x, (FEW * (1 + x.detach().abs()) + LAMBDA * math.sqrt(v)) * self.u)

    def on_gradient(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """``x``, whose gradient is changed on its way back."""
        if self.generator is None or not x.requires_grad:
            return x
        return self._changed(x, change)

    def _changed(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        x = x * 1  # a node of its own
        x.register_hook(change)
        return x

    def log_softmax(self, z: Tensor, error: Tensor | float = 0.0) -> Tensor:
        """Disturbs dz by some roundings of its parts, each row's p by the error of its log-sum-exp, and each p by the
        ``error`` of its logit, which is computed again: it may be off by another rounding than in the log-sum-exp.
        """
        met: list[Tensor] = []
        p = F.softmax(z.detach(), -1)

        def at_z(dz: Tensor) -> Tensor:
            g, row = met[-1], met[-1].sum(-1, keepdim=True) * p
            lse = (FEW + LAMBDA * math.sqrt(z.shape[-1])) * self.u
            dz = self.by(dz, FEW * self.u * (g.abs() + row.abs()) + error * row.abs())
            return dz + _finite(lse * row) * self.signs(z, len(z), 1)

        if not z.requires_grad:
            return F.log_softmax(z, -1)
        if self.skipped:
            # Or not, beside a row that counts: the exact formula has NaN there, a disturbed one 0, and both are right.
            z = self.on_gradient(z, lambda dz: torch.where((met[-1] == 0).all(-1, keepdim=True), 0, dz))
        found = F.log_softmax(self.on_gradient(z, at_z), -1)
        return self._changed(found, lambda g: self._meet(met, g))

    def _meet(self, met: list[Tensor], g: Tensor) -> Tensor:
        met.append(g)
        self.note(g)
        self.note(g.sum(-1))  # by which each p is multiplied
        return g

    def note(self, upstream: Tensor) -> None:
        self.largest = max(self.largest, float(_finite(upstream).abs().max()) if upstream.numel() else 0.0)

    def product(self, e: Tensor, c: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """e c^T + bias, whose gradients are sums of stored, rounded dx.

        A p that is flushed to 0 takes its upstream gradient times the logits' ``scale`` along.
        """
        dx: list[Tensor] = []

        def at_x(g: Tensor) -> Tensor:
            most = self.underflow * self.largest * max(1.0, abs(scale))
            lost = torch.minimum(g.abs(), torch.tensor(most, dtype=g.dtype))
            dx.append(g.abs())
            # Below the least normal number all errors may have one sign; or there are none.
            rest = g.abs() if self.beside is None else g.abs() + self.beside
            stored = self.by(g, self.u_in * rest + 2 * self.skipped * self.largest)
            return stored - torch.sign(_finite(g)) * _finite(lost) * (self.signs(g, 1) > 0)

        # Stored in e's or c's dtype: the sum of several calls' gradients has the rounding of each.
        own = max(self.stored.values(), default=0.0)

        def summed(x: Tensor, size: Callable[[], Tensor], terms: int) -> Tensor:
            unit = (LAMBDA * math.sqrt(terms) + 2) * self.u
            return self.on_gradient(x, lambda g: self.by(g, unit * size() + own * g.abs()))

        def added(g: Tensor) -> Tensor:
            """dC is stored before what is beside the products is added."""
            return g if self.beside is None else self.by(g, own * self.beside.T @ e.detach().abs())

        left = summed(e, lambda: dx[-1] @ c.detach().abs(), len(c))
        right = summed(self.on_gradient(c, added), lambda: dx[-1].T @ e.detach().abs(), len(e))
        x = left @ right.T
        if bias is not None:
            x = x + summed(bias, lambda: dx[-1].sum(0), len(e))
        return self.on_gradient(x, at_x)

    def capped(self, z: Tensor, softcap: float) -> Tensor:
        """softcap tanh(z / softcap); the derivative 1 - tanh^2 errs by some u of 1, of equal logits by the same."""
        met: list[Tensor] = []

        def at_z(g: Tensor) -> Tensor:
            # 1 - tanh^2 changes by at most 2 / softcap of what the logit does, whose exponential may have been kept.
            size = (FEW * self.u + 2 * self.kept / softcap) * _finite(met[-1])
            return self.by(g, size.abs()) + size * self.signs(g, 1)

        inner = self.on_gradient(z, at_z)
        return self.on_gradient(softcap * torch.tanh(inner / softcap), lambda g: met.append(g) or g)


def product_error(e: Tensor, c: Tensor, bias: Tensor | None, noise: Noise) -> Tensor:
    """(N, V) how far e c^T + bias may err; 0 where it is exact."""
    size = e.abs() @ c.abs().T
    b = torch.zeros(len(c), dtype=e.dtype) if bias is None else torch.where(bias.isinf(), 0, bias)
    unit = grid(e) * grid(c)
    exact = ((size + b.abs()) <= unit * 2.0**noise.bits) & (b / unit == (b / unit).round())
    delta = (LAMBDA * math.sqrt(e.shape[1]) + 2) * noise.u * size + 2 * noise.u * b.abs()
    return torch.where(exact, 0, delta)


def logit_error(delta: Tensor, z: Tensor, scale: float, softcap: float | None, noise: Noise) -> Tensor:
    """(N, V) how far a logit may err, if e c^T + bias does by ``delta``."""
    u, exact = noise.u, delta == 0
    delta = delta * scale
    if softcap is not None:
        delta = (1 - (z / softcap) ** 2 + 2 * delta / softcap) * delta
    own = torch.where(exact, float(softcap is not None or math.frexp(scale)[0] != 0.5), 1.0)
    lse = torch.logsumexp(z, -1, keepdim=True)
    return delta + FEW * u * (own * z.abs() + 1 + (z - lse).abs())


def normalized(x: Tensor, name: str, noise: Noise) -> Tensor:
    """Rows of norm 1 of e or c, computed and differentiated in at least float32."""
    met: list[Tensor] = []

    def change(g: Tensor) -> Tensor:
        y, at_y = F.normalize(x.detach(), dim=1), met[-1].abs()
        size = (at_y + y.abs() * (at_y * y.abs()).sum(1, keepdim=True)) / x.detach().norm(dim=1, keepdim=True)
        return noise.by(g, (FEW + LAMBDA * math.sqrt(x.shape[1])) * noise.own[name] * size)

    return noise.on_gradient(F.normalize(noise.on_gradient(x, change), dim=1), lambda g: met.append(g) or g)


def grid(x: Tensor) -> float:
    """The largest power of two of which all numbers in ``x`` are multiples."""
    x = x[torch.isfinite(x) & (x != 0)]
    if not x.numel():
        return 1.0
    mantissa, exponent = torch.frexp(x)
    whole = (mantissa * 2.0**53).to(torch.int64)
    lowest = torch.frexp((whole & -whole).to(torch.float64))[1] - 1
    return 2.0 ** int((exponent + lowest).min() - 53)


def _finite(x: Tensor) -> Tensor:
    return torch.where(torch.isfinite(x), x, 0)
