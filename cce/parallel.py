"""A vocabulary split over the processes of a group: each holds some rows of ``c``, one after the other by rank.

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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from cce.backends.base import Backend
from cce.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.rows import used_rows
from cce.spec import Spec


@dataclass(frozen=True)
class Part:
    """This process's part of the vocabulary; travels through the operators as its ``key``.

    Attributes:
        group: name of the process group.
        first: the first entry; targets are counted from the first of all.
        sizes: entries of every rank.
        reduce_de: dE is summed over the group; else it stays this process's term.
    """

    group: str
    first: int
    sizes: tuple[int, ...]
    reduce_de: bool = True

    @property
    def total(self) -> int:
        """V of the whole vocabulary."""
        return sum(self.sizes)

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    @lru_cache(maxsize=64)
    def from_key(key: str) -> Part | None:
        """The part whose key this is; None of an empty one."""
        if not key:
            return None
        fields = json.loads(key)
        return Part(**{**fields, "sizes": tuple(fields["sizes"])})

    def local(self, inputs: Inputs[Tensor], v: int) -> Inputs[Tensor]:
        """The inputs with targets counted within this part of ``v`` entries; -1 where another part holds them."""
        targets = inputs.targets - self.first
        inside = (targets >= 0) & (targets < v) & (inputs.targets >= 0)
        return replace(inputs, targets=torch.where(inside, targets, -1), in_use=used_rows(inputs))


def forward(
    part: Part, backend: Backend, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]
) -> Outputs[Tensor]:
    """The outputs over all parts; ``maps`` are those of this one, relative to the whole rows' softmax."""
    local = part.local(inputs, problem.v)
    if problem.v:
        found = _widened(backend.forward(local, problem, spec, maps), spec)
    else:
        found = _nothing(inputs, problem, spec)
    largest = _largest(local, problem, found) if found.prediction is not None else None
    joined = _join(part, found, largest)
    if maps.tile_mass is not None and problem.v:
        _relate(maps.tile_mass, spec, found.lse, joined.lse)
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
    """dC and dbias of this part, dE summed over the parts; ``upstream`` are the gradients of the joined outputs."""
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
    """The process group of this name."""
    found: dist.ProcessGroup = _resolve_process_group(name)  # type: ignore[arg-type]
    return found


def _widened(outputs: Outputs[Tensor], spec: Spec) -> Outputs[Tensor]:
    """In the accumulation dtype, as all processes must send them; a backend may be more precise."""
    dtype = getattr(torch, str(spec.accumulate))
    fields: dict[str, Any] = {
        name: x.to(dtype) if x is not None and x.is_floating_point() else x for name, x in vars(outputs).items()
    }
    return Outputs(**fields)


def _nothing(inputs: Inputs[Tensor], problem: Problem, spec: Spec) -> Outputs[Tensor]:
    """Of a part without entries."""
    n, dtype = len(inputs.targets), getattr(torch, str(spec.accumulate))
    zero = inputs.e.new_zeros(n, dtype=dtype)
    extra = dict.fromkeys(problem.outputs & {"entropy", "weighted_logit"}, zero)
    if "prediction" in problem.outputs:
        extra["prediction"] = zero.to(torch.int64)
    return Outputs(zero - torch.inf, inputs.e.new_zeros(inputs.targets.shape, dtype=dtype), **extra)


def _no_gradients(inputs: Inputs[Tensor], problem: Problem) -> Gradients[Tensor]:
    e, c = inputs.e, inputs.c
    return Gradients(
        e.new_zeros(problem.n, problem.d, dtype=problem.de_dtype) if problem.grad_e else None,
        torch.zeros_like(c) if problem.grad_c else None,
        c.new_zeros(0) if problem.grad_bias else None,
    )


def _largest(local: Inputs[Tensor], problem: Problem, found: Outputs[Tensor], step: int = 1024) -> Tensor:
    """(N,) the logit of each row's prediction in this part, -inf where there is none: dot products."""
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
    # A softcap and a positive scale change no order.
    return z.masked_fill(prediction < 0, -torch.inf)


def _join(part: Part, found: Outputs[Tensor], largest: Tensor | None) -> Outputs[Tensor]:
    """All parts' outputs joined, by one exchange of a few numbers a row."""
    lse, k = found.lse, found.target_logits.shape[1]
    columns = [lse, *found.target_logits.T]
    columns += [x for x in (found.entropy, found.weighted_logit, largest) if x is not None]
    if found.prediction is not None:  # as the bits of a number: all of them arrive
        integer = torch.int32 if lse.dtype == torch.float32 else torch.int64
        columns.append(found.prediction.to(integer).view(lse.dtype))
    gathered = gather(torch.stack(columns), part.group)  # (ranks, columns, N)
    parts = list(gathered.unbind(1))
    lse_of = parts[0]
    lse = lse_of.logsumexp(0)
    target_logits = torch.stack([parts[1 + i].sum(0) for i in range(k)], 1)
    rest = parts[1 + k :]
    entropy = None if found.entropy is None else _join_entropy(lse, lse_of, rest.pop(0))
    weighted = None if found.weighted_logit is None else rest.pop(0).sum(0)
    prediction = None
    if found.prediction is not None:
        best, entry = rest
        rank = best.argmax(0)  # the first, where they tie
        prediction = entry.contiguous().view(integer).gather(0, rank[None])[0].to(torch.int64)
        for before, size in enumerate(part.sizes[:-1]):  # nothing is copied to a GPU, which would wait
            prediction = prediction + size * (rank > before)
    return Outputs(lse, target_logits, entropy, weighted, prediction)


def _join_entropy(lse: Tensor, lse_of: Tensor, entropy_of: Tensor) -> Tensor:
    """H = sum_r w_r (H_r + lse - lse_r), w_r = exp(lse_r - lse): every term is at least 0."""
    log_w = lse_of - lse.masked_fill(lse == -torch.inf, 0)
    terms: Tensor = log_w.exp() * (entropy_of - log_w.clamp(min=-1e4, max=0))
    return terms.sum(0)


def _relate(tile_mass: Tensor, spec: Spec, lse: Tensor, joined: Tensor, step: int = 64) -> None:
    """Makes the map of a part one of the whole: masses shrink by the part's own; what no longer hits a tile is dead.

    A row hits the tile still if its mass there exceeds the threshold. For filter "element", whose quantity the map
    does not hold, that keeps some tiles alive that one process would have skipped, and skips none that it would keep.
    """
    assert spec.threshold is not None
    ratio = (lse - joined).exp().nan_to_num(nan=0.0)  # a row masked in all parts: -inf - -inf
    for t in range(0, len(tile_mass), step):
        mass = tile_mass[t : t + step] * ratio
        mass = torch.where(mass < -spec.threshold, mass, mass.abs())
        tile_mass[t : t + step] = mass


def _of_rows_in_use(outputs: Outputs[Tensor], inputs: Inputs[Tensor], in_use: Tensor) -> Outputs[Tensor]:
    """Ignored rows are 0, -1 in the prediction; lse is at least each target's logit, so that no loss is negative."""
    named = outputs.target_logits.masked_fill(inputs.targets < 0, -torch.inf)
    lse = torch.maximum(outputs.lse, named.amax(1))

    def kept(x: Tensor | None, fill: int = 0) -> Any:
        return None if x is None else x.masked_fill(~in_use, fill)

    return Outputs(
        kept(lse),
        outputs.target_logits.masked_fill(inputs.targets < 0, 0),
        kept(outputs.entropy),
        kept(outputs.weighted_logit),
        kept(outputs.prediction, -1),
    )


def gather(x: Tensor, group: str) -> Tensor:
    """(ranks, *x.shape): every process's ``x``, by rank."""
    processes = group_of(group)
    out = x.new_empty(processes.size(), *x.shape)
    # Its name changed with torch 2.13.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(out.view(-1), x.contiguous().view(-1), group=processes)
    return out
