"""The common beginning and end of every recipe: the call of ``cce.terms`` and the reduction of the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from cce.distributed.operands import operands
from cce.frontend import checks
from cce.frontend.reduction import reduce
from cce.functional import SHARED_DEFAULTS, Terms, nll_of_each, terms
from cce.spec import Spec


class Options(TypedDict, total=False):
    """Keyword options of :func:`cce.terms` that a recipe accepts and passes on, unless its docstring says otherwise.

    Attributes:
        bias: (V,), added to the logits; -inf masks a vocabulary entry.
        ignore_index: targets with this value cost nothing; default -100.
        shift: with shift s, ``targets[..., s:]`` are predicted from ``e[..., :-s, :]``; the results have their shape.
        softcap: ``z = softcap * tanh(logit_scale * (e c^T + bias) / softcap)``; None leaves the logits as they are.
        logit_scale: see ``softcap``.
        backend: name of the backend, as for :func:`cce.loss`.
        spec: a :class:`cce.Spec`, as for :func:`cce.loss`.
        vocab_parallel: split of the vocabulary over processes (:class:`cce.VocabParallel`).
    """

    bias: Tensor | None
    ignore_index: int
    shift: int
    softcap: float | None
    logit_scale: float
    backend: str
    spec: Spec | None
    vocab_parallel: Any


@dataclass(frozen=True)
class Call:
    """The arguments of one recipe.

    Attributes:
        e: (..., D); c: (V, D).
        targets: integers with the leading shape of ``e``; with ``target_weight``, (..., K).
        options: options of :func:`cce.terms`.
        reduction: reduction, as for ``cce.frontend.reduction.reduce``.
        token_weight: weights with the leading shape of ``e``, or None.
        target_weight: (..., K) weights of K entries per token, or None.
    """

    e: Tensor
    c: Tensor
    targets: Tensor
    options: dict[str, Any]
    reduction: str
    token_weight: Tensor | None
    target_weight: Tensor | None = None

    @classmethod
    def of(
        cls,
        e: Tensor,
        c: Tensor,
        targets: Tensor,
        options: Mapping[str, Any],
        *,
        reduction: str = "mean",
        token_weight: Tensor | None = None,
        target_weight: Tensor | None = None,
        temperature: float = 1.0,
        temperature_name: str = "temperature",
        reductions: tuple[str, ...] = checks.REDUCTIONS,
    ) -> Call:
        """Check what ``terms`` does not, and make the call; the logits will be divided by ``temperature``."""
        check_options(options)
        e, c, bias, targets, split = operands(e, c, options.get("bias"), targets, options.get("vocab_parallel"))
        checks.check_tensors(e, c, targets, None, target_weight, part=split is not None)
        checks.check_choice("reduction", reduction, reductions)
        checks.check_token_weight(token_weight, e.shape[:-1], e.device)
        wide = torch.promote_types(torch.promote_types(e.dtype, c.dtype), torch.float32)
        passed = {**tempered(options, temperature, temperature_name, wide), "bias": bias, "vocab_parallel": split}
        # int64, as uint8 cannot hold -100: it would equal 156.
        return cls(e, c, targets.to(torch.int64), passed, reduction, token_weight, target_weight)

    def terms(self, *outputs: str) -> Terms:
        return terms(self.e, self.c, self.targets, outputs=outputs, **self.options)

    def nll(self) -> Tensor:
        """Loss of every token, in the results' shape."""
        found = self.terms("nll").nll
        assert found is not None
        return found

    def nll_of_each(self, entries: Tensor) -> Tensor:
        """Negative log-likelihoods (..., K) of several entries (..., K) per token."""
        return nll_of_each(self.e, self.c, entries, **self.options)

    @property
    def filtered(self) -> bool:
        """Whether the spec asks for a filter."""
        spec = self.options.get("spec")
        return spec is not None and spec.filter not in (None, "none")

    @property
    def ignore_index(self) -> int:
        return self.options.get("ignore_index", -100)

    @property
    def in_use(self) -> Tensor:
        """Mask of the tokens that count, bool, in the results' shape."""
        if self.target_weight is None:
            return self.of_results(self.targets) != self.ignore_index
        return (self.of_results(self.targets, dim=-2) != self.ignore_index).any(-1)

    def of_results(self, x: Tensor, dim: int = -1) -> Tensor:
        """Return ``x[..., shift:]`` along ``dim``, which matches the results."""
        shift = self.options.get("shift", 0)
        if not shift:  # without a shift there may be no such dimension
            return x
        shift = min(shift, x.shape[dim])
        return x.narrow(dim, shift, x.shape[dim] - shift)

    def reduce(self, per_token: Tensor) -> Tensor:
        """Reduce one loss per token to the recipe's result."""
        weight = None if self.token_weight is None else self.of_results(self.token_weight)
        return reduce(per_token, self.in_use, self.reduction, weight)


def check_options(options: Mapping[str, Any], accepted: Iterable[str] = tuple(Options.__annotations__)) -> None:
    """Check the options' names, and the values that a recipe may use before :func:`cce.terms` sees them."""
    checks.check_option_names(options, accepted)
    values = {**SHARED_DEFAULTS, **options}
    shared = {name: x for name, x in values.items() if name not in ("bias", "vocab_parallel")}
    checks.check_options(**shared)


def tempered(options: Mapping[str, Any], temperature: float, name: str, wide: torch.dtype) -> dict[str, Any]:
    """Return the options that divide all logits by ``temperature``, the recipe's argument ``name``.

    ``wide``: dtype of the results, which must be able to hold the divided scale.
    """
    found = dict(options)
    if temperature != 1:
        scale, softcap = found.get("logit_scale", 1.0), found.get("softcap")
        checks.check_number(
            name,
            temperature,
            "a finite number > 0 by which logit_scale and softcap can be divided",
            lambda t: t > 0 and all(divisible(x, t, wide) for x in (scale, softcap) if x is not None),
        )
        found["logit_scale"] = scale / temperature
        if softcap is not None:  # softcap * tanh(x / softcap) / t = (softcap / t) * tanh(x / softcap)
            found["softcap"] = softcap / temperature
    return found


def divisible(x: float, by: float, wide: torch.dtype) -> bool:
    """Whether dtype ``wide`` can hold the quotient of two numbers above 0."""
    limits = torch.finfo(wide)
    return limits.tiny <= x / by <= limits.max
