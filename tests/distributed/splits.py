"""A problem whose vocabulary is split: what one process finds, and what each of several does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

import cce

N, D, V = 45, 12, 203
#: The first of V entries of every rank, by number of ranks, a larger vocabulary in proportion: parts of different
#: sizes, one of them empty, one without a target.
CUTS = {1: (0,), 2: (0, 150), 3: (0, 40, 40), 4: (0, 5, 64, 130)}


@dataclass(frozen=True)
class Data:
    """Tensors of a call, whole."""

    e: Tensor
    c: Tensor
    bias: Tensor
    targets: Tensor
    token_weight: Tensor
    class_weight: Tensor

    def part(self, rank: int, ranks: int) -> slice:
        """The vocabulary entries of a rank."""
        cuts = [cut * len(self.c) // V for cut in (*CUTS[ranks], V)]
        return slice(cuts[rank], cuts[rank + 1])


def data(dtype: torch.dtype = torch.float64, n: int = N, d: int = D, v: int = V) -> Data:
    """Peaked, so that tiles are skipped: logits fall with the rank of an entry along a common mean row."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    mean = normal(d)
    mean /= mean.norm()
    e = normal(n, d) + 4 * mean
    rank = torch.arange(1, v + 1, dtype=torch.float64).log()[:, None]
    c = normal(v, d) * (1.5 / d**0.5) + (1 - 0.5 * rank) * mean
    targets = (torch.rand(n, generator=rng) ** 2 * 64).long()  # none in the last parts
    targets[5], targets[17:20] = -100, -100
    weights = torch.rand(n, generator=rng, dtype=torch.float64), torch.rand(v, generator=rng, dtype=torch.float64)
    return Data(e.to(dtype), c.to(dtype), normal(v).to(dtype), targets, *(w + 0.1 for w in weights))


#: Options of ``cce.loss``, some by the name of what they are in the data, some for :func:`call` to make.
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "softcap": {"softcap": 5.0, "logit_scale": 0.7},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "smoothing-softcap": {"label_smoothing": 0.2, "softcap": 5.0},
    "weights": {"weight": "class_weight", "token_weight": "token_weight", "label_smoothing": 0.1},
    "shift": {"shift": 2},
    "ignored": {"ignore_index": 3},
    "all-ignored": {"targets": -100, "reduction": "sum"},
    "soft-targets": {"k": 3, "softcap": 6.0},
    "order": {"order": True},
    "online": {"lse_accumulation": "online"},
}


def call(
    data: Data, part: slice = slice(None), spec: dict[str, Any] | None = None, backend: str = "torch", **options: Any
) -> list[Tensor]:
    """The loss, dE, and dC and dbias of the part's entries, for upstream gradients of order 1."""
    e, c, bias = (x.clone().requires_grad_() for x in (data.e, data.c[part], data.bias[part]))
    fields = dict(spec or {"filter": "none"})
    options = dict(options)
    if options.pop("order", False):
        fields["vocab_order"] = torch.arange(len(c)).flip(0)
    if "lse_accumulation" in options:
        fields["lse_accumulation"] = options.pop("lse_accumulation")
    options |= {name: getattr(data, options[name]) for name in ("weight", "token_weight") if name in options}
    targets = data.targets.masked_fill(data.targets < 0, options.get("ignore_index", -100))
    targets = targets if "targets" not in options else torch.full_like(data.targets, options.pop("targets"))
    if k := options.pop("k", 0):
        targets = torch.stack([targets, *((targets + 50 * i) % V for i in range(1, k))], 1)
        options["target_weight"] = torch.linspace(0.1, 1, targets.numel(), dtype=torch.float64).view(targets.shape)
    loss = cce.loss(e, c, targets, bias, spec=cce.Spec(**fields), backend=backend, **options)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, (e, c, bias), upstream + (loss.ndim == 0) * 2)]


def call_terms(
    data: Data, part: slice = slice(None), spec: dict[str, Any] | None = None, backend: str = "torch", **options: Any
) -> list[Tensor]:
    """All outputs of ``cce.terms``, and gradients that every differentiable one takes part in.

    With a filter, that takes no gradient of lse and entropy, all but these two.
    """
    e, c, bias = (x.clone().requires_grad_() for x in (data.e, data.c[part], data.bias[part]))
    fields = cce.Spec(**(spec or {"filter": "none"}))
    outputs = ("nll", "lse", "entropy", "prediction") if fields.filter == "none" else ("nll", "prediction")
    found = cce.terms(e, c, data.targets, bias, outputs=outputs, spec=fields, backend=backend, **options)
    up = torch.linspace(-1, 2, N, dtype=found.nll.dtype)
    total = (found.nll * up).sum()
    if fields.filter == "none":
        total = total + (found.lse * up.flip(0) + found.entropy * up.square()).sum()
    return [x.detach() for x in found if x is not None] + list(torch.autograd.grad(total, (e, c, bias)))


def of_part(whole: list[Tensor], part: slice) -> list[Tensor]:
    """What one process found, as far as it is a rank's: the rows of dC and dbias that are its own."""
    return [*whole[:-2], whole[-2][part], whole[-1][part]]


def relative_errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """``||x - ref|| / ||ref||`` of each; where ref is 0, or has no element, ``||x||``."""
    errors = []
    for x, ref in zip(found, expected, strict=True):
        assert x.shape == ref.shape, f"shape {tuple(x.shape)}, expected {tuple(ref.shape)}"
        gap, norm = float((x.double() - ref.double()).norm()), float(ref.double().norm())
        errors.append(gap / norm if norm else gap)
    return errors


def split_of(group: dist.ProcessGroup, whole: Data) -> tuple[slice, cce.VocabParallel]:
    """This rank's part, and what to pass as ``vocab_parallel``."""
    return whole.part(dist.get_rank(group), dist.get_world_size(group)), cce.VocabParallel(group)
