"""A vocabulary split over the processes of a group: each holds some rows of ``c``, in the order of ranks.

Every process computes its part of each row's outputs; one exchange joins them, in the order of the ranks, so that all
processes hold the same bits. The gradient of a logit needs only the joined log-sum-exp (and entropy), so each process
computes dC of its own rows alone, and its term of dE, which is summed over the group in float32.

Source: Megatron-LM's vocabulary-parallel cross-entropy (arXiv 1909.08053, section 3), for outputs that never exist as
logits; the entropy by its chain rule, as over the tiles (docs/algorithm.md).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cce import torch_private
from cce.backends.base import Backend
from cce.backends.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.shared.pair import joined, pair
from cce.backends.shared.rows import used_rows
from cce.backends.shared.weighted_logit import finest_dtype
from cce.spec import Spec


@dataclass(frozen=True)
class Part:
    """This process's part of the vocabulary, passed through the operators as its ``key``.

    Attributes:
        group: name of the process group.
        first: first entry of this part, counted over the whole vocabulary, as targets are.
        sizes: number of entries of every rank.
        reduce_de: whether dE is summed over the group; otherwise it stays this process's term.
    """

    group: str
    first: int
    sizes: tuple[int, ...]
    reduce_de: bool = True

    @property
    def total(self) -> int:
        """Size of the whole vocabulary."""
        return sum(self.sizes)

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    @lru_cache(maxsize=64)
    def from_key(key: str) -> Part | None:
        """Return the part with this key, or None if the key is empty."""
        if not key:
            return None
        fields = json.loads(key)
        return Part(**{**fields, "sizes": tuple(fields["sizes"])})

    def local(self, inputs: Inputs[Tensor], v: int) -> Inputs[Tensor]:
        """Inputs with targets counted within this part of ``v`` entries; -1 for targets in another part."""
        targets = inputs.targets - self.first
        inside = (targets >= 0) & (targets < v) & (inputs.targets >= 0)
        return replace(inputs, targets=torch.where(inside, targets, -1), in_use=used_rows(inputs))


def forward(
    part: Part, backend: Backend, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]
) -> Outputs[Tensor]:
    """Compute the outputs over all parts; ``maps`` are those of this part, relative to the whole rows' softmax."""
    local = part.local(inputs, problem.v)
    if problem.v:
        found = _widened(backend.forward(local, problem, spec, maps), spec)
    else:
        found = _nothing(inputs, problem, spec)
    largest = _largest(local, problem, found) if found.prediction is not None else None
    joined = _join(part, found, largest, inputs.targets)
    if maps.tile_mass is not None and problem.v:
        _relate(maps.tile_mass, spec, found, joined)
    return _of_rows_in_use(joined, inputs, used_rows(inputs))


def backward(
    part: Part,
    backend: Backend,
    inputs: Inputs[Tensor],
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Tensor],
    maps: Maps[Tensor],
    upstream: Upstream[Tensor],
) -> Gradients[Tensor]:
    """Compute dC and dbias of this part, and dE summed over all; ``upstream``: gradients of the joined outputs."""
    problem, local = replace(problem, part=True), part.local(inputs, problem.v)
    if problem.v:
        g = upstream.g.masked_fill(local.targets < 0, 0)
        found = backend.backward(local, problem, spec, outputs, maps, replace(upstream, g=g))
    else:
        found = _no_gradients(inputs, problem)
    if found.de is None or not part.reduce_de:
        return found
    de = found.de.to(problem.de_dtype).contiguous()
    dist.all_reduce(de, group=group_of(part.group))
    return replace(found, de=de)


def group_of(name: str) -> dist.ProcessGroup:
    """Process group of this name."""
    found: dist.ProcessGroup = torch_private.process_group(name)
    return found


def _widened(outputs: Outputs[Tensor], spec: Spec) -> Outputs[Tensor]:
    """Convert the outputs to the accumulation dtype, in which all processes send them; a backend may be more precise.

    The weighted logit is not converted: it is sent as two numbers.
    """
    dtype = getattr(torch, str(spec.accumulate))
    fields: dict[str, Any] = {
        name: x.to(dtype) if x is not None and x.is_floating_point() and name != "weighted_logit" else x
        for name, x in vars(outputs).items()
    }
    return Outputs(**fields)


def _nothing(inputs: Inputs[Tensor], problem: Problem, spec: Spec) -> Outputs[Tensor]:
    """Outputs of a part without entries."""
    n, dtype = len(inputs.targets), getattr(torch, str(spec.accumulate))
    zero = inputs.e.new_zeros(n, dtype=dtype)
    extra = dict.fromkeys(problem.outputs & {"entropy", "weighted_logit"}, zero)
    if "prediction" in problem.outputs:
        extra["prediction"] = zero.to(torch.int64)
    return Outputs(zero - torch.inf, inputs.e.new_zeros(inputs.targets.shape, dtype=dtype), zero * torch.nan, **extra)


def _no_gradients(inputs: Inputs[Tensor], problem: Problem) -> Gradients[Tensor]:
    e, c = inputs.e, inputs.c
    return Gradients(
        e.new_zeros(problem.n, problem.d, dtype=problem.de_dtype) if problem.grad_e else None,
        torch.zeros_like(c) if problem.grad_c else None,
        c.new_zeros(0) if problem.grad_bias else None,
    )


def _largest(local: Inputs[Tensor], problem: Problem, found: Outputs[Tensor], step: int = 1024) -> Tensor:
    """Logit of each row's prediction in this part, (N,), by dot products; -inf where there is none."""
    prediction = found.prediction
    assert prediction is not None
    if problem.v == 0:
        return found.lse
    entry, parts = prediction.clamp(min=0), []
    for n0 in range(0, len(entry), step):
        rows = slice(n0, n0 + step) if local.rows is None else local.rows[n0 : n0 + step]
        c = local.c.index_select(0, entry[n0 : n0 + step])
        parts.append((local.e[rows].to(found.lse.dtype) * c.to(found.lse.dtype)).sum(1))
    z = torch.cat(parts)
    if local.bias is not None:
        z = z + local.bias.index_select(0, entry)
    # A softcap and a positive scale preserve the order.
    return z.masked_fill(prediction < 0, -torch.inf)


def _join(part: Part, found: Outputs[Tensor], largest: Tensor | None, targets: Tensor) -> Outputs[Tensor]:
    """Join all parts' outputs, by one exchange of a few numbers per row; ``targets`` are those of the whole."""
    lse, k = found.lse, found.nll.shape[1]
    low = torch.zeros_like(lse) if found.lse_low is None else found.lse_low
    columns = [lse, low, *found.nll.T]
    if found.weighted_logit is not None:
        weighted = found.weighted_logit.to(finest_dtype(lse.device))
        high = weighted.to(lse.dtype)
        columns += [high, torch.where(high.isfinite(), weighted - high, 0).to(lse.dtype)]
    columns += [x for x in (found.entropy, largest) if x is not None]
    if found.prediction is not None:  # sent as the bits of a float, all of which arrive
        integer = torch.int32 if lse.dtype == torch.float32 else torch.int64
        columns.append(found.prediction.to(integer).view(lse.dtype))
    gathered = gather(torch.stack(columns), part.group)  # (ranks, columns, N)
    parts = list(gathered.unbind(1))
    lse_of, low_of = parts[:2]
    m, log_s = joined(lse_of, low_of, 0)
    lse, lse_low = pair(m, log_s)
    nll = [_join_nll(part, (m, log_s), (lse_of, low_of), parts[2 + i], targets[:, i]) for i in range(k)]
    rest = parts[2 + k :]
    weighted_logit: Tensor | None = None
    if found.weighted_logit is not None:
        fine = finest_dtype(lse.device)
        weighted_logit = (rest.pop(0).to(fine) + rest.pop(0).to(fine)).sum(0)
    entropy = None
    if found.entropy is not None:
        log_w = torch.where(lse_of == -torch.inf, lse_of, ((lse_of - lse) + low_of) - lse_low)
        entropy = _join_entropy(log_w, rest.pop(0)).masked_fill(~lse.isfinite(), torch.nan)
    prediction = None
    if found.prediction is not None:
        best, entry = rest
        rank = best.argmax(0)  # the first in a tie
        prediction = entry.contiguous().view(integer).gather(0, rank[None])[0].to(torch.int64)
        for before, size in enumerate(part.sizes[:-1]):  # nothing is copied to a GPU, which would wait
            prediction = prediction + size * (rank > before)
    return Outputs(lse, torch.stack(nll, 1), lse_low, entropy, weighted_logit, prediction)


def _join_nll(
    part: Part, whole: tuple[Tensor, Tensor], of_parts: tuple[Tensor, Tensor], nll_of: Tensor, targets: Tensor
) -> Tensor:
    """Loss lse - z, (N,), from the part that holds the target: its own nll, plus the joined lse minus its own.

    Args:
        whole: (N,) each; the joined log-sum-exp is their sum. of_parts: (ranks, N) each, likewise for every part.
        nll_of: (ranks, N). targets: (N,).
    """
    m, log_s = whole
    rank = torch.zeros_like(targets)
    for end in list(accumulate(part.sizes))[:-1]:  # nothing is copied to a GPU, which would wait
        rank += targets >= end
    lse, low, nll = (x.gather(0, rank[None])[0] for x in (*of_parts, nll_of))
    found = nll + (((m - lse) + log_s) - low)
    # In a part that is masked entirely, the target's logit is -inf.
    return torch.where(lse == -torch.inf, m - lse, found).clamp(min=0)


def _join_entropy(log_w: Tensor, entropy_of: Tensor) -> Tensor:
    """Entropy H = sum_r w_r (H_r - log w_r), w_r = exp(lse_r - lse): all terms at least 0, 0 for masked parts."""
    terms = log_w.exp() * (entropy_of - log_w.clamp(min=-1e4, max=0))
    return torch.where(log_w == -torch.inf, 0, terms).sum(0)


def _relate(tile_mass: Tensor, spec: Spec, own: Outputs[Tensor], whole: Outputs[Tensor], step: int = 64) -> None:
    """Turn the map of a part into one of the whole: masses shrink by the part's own, and some tiles become dead.

    A row still hits the tile if its mass there exceeds the threshold. For filter "element", whose quantity the map does
    not hold, this keeps some tiles alive that a single process would skip, and skips none that it would keep.
    """
    assert spec.threshold is not None
    assert own.lse_low is not None and whole.lse_low is not None
    ratio = ((own.lse - whole.lse) + (own.lse_low - whole.lse_low)).exp()
    ratio = torch.where(own.lse == -torch.inf, 0, ratio)  # for a part that is masked entirely
    for t in range(0, len(tile_mass), step):
        mass = tile_mass[t : t + step] * ratio
        mass = torch.where(mass >= -spec.threshold, mass.abs(), mass)  # NaN stays negative, so that it is computed
        tile_mass[t : t + step] = mass


def _of_rows_in_use(outputs: Outputs[Tensor], inputs: Inputs[Tensor], in_use: Tensor) -> Outputs[Tensor]:
    """Set ignored rows to 0, and to -1 in the prediction."""

    def kept(x: Tensor | None, fill: int = 0) -> Any:
        return None if x is None else x.masked_fill(~in_use, fill)

    return Outputs(
        kept(outputs.lse),
        outputs.nll.masked_fill(inputs.targets < 0, 0),
        kept(outputs.lse_low),
        kept(outputs.entropy),
        kept(outputs.weighted_logit),
        kept(outputs.prediction, -1),
    )


def gather(x: Tensor, group: str) -> Tensor:
    """Gather every process's ``x``, by rank: (ranks, *x.shape)."""
    processes = group_of(group)
    out = x.new_empty(processes.size(), *x.shape)
    # Its name changed with torch 2.13.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(out.view(-1), x.contiguous().view(-1), group=processes)
    return out
