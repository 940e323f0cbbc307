"""The tensors of a plan, in memory of odd layouts whose surroundings are NaN or no vocabulary entry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from plan import Plan
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float32", "bfloat16", "float16", "float64", "bool", "int64", "int32", "int16", "int8")
} | {name: getattr(torch, name) for name in ("uint8", "uint16", "uint32", "uint64")}
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


@dataclass
class Made:
    """Tensors by the names of the call's arguments, and the memory they lie in."""

    tensors: dict[str, Tensor]
    memory: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)

    def float64(self) -> dict[str, Tensor]:
        """Copies for the formulae."""
        return {
            name: x.detach()
            .cpu()
            .to(torch.float64 if x.is_floating_point() or name.endswith("_weight") else torch.int64)
            .clone()
            for name, x in self.tensors.items()
        }

    def written(self) -> list[str]:
        """Tensors whose memory, surroundings included, is no longer what it was."""
        return [name for name, x in self.memory.items() if not torch.equal(_bits(x), self.before[name])]


def _bits(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).view(torch.uint8).clone()


def make(plan: Plan, device: str) -> Made:
    """All tensors of a call; those in ``plan.wants`` require a gradient."""
    g = torch.Generator().manual_seed(plan.values)
    values = _values(plan, g)
    made = Made({})
    for name, x in values.items():
        dtype = DTYPES[plan.dtypes.get(name, "float32" if x.is_floating_point() else "int64")]
        if name == "rewards":
            dtype = torch.float64  # as the advantages are then
        if name in ("targets", "negatives") and not fits(x, dtype):
            dtype = torch.int64
        laid, memory = lay(x.to(dtype).to(device), plan.layouts.get(name, "plain"))
        wanted = name in plan.wants and laid.is_floating_point()
        made.tensors[name] = laid.detach().requires_grad_(wanted)
        made.memory[name], made.before[name] = memory, _bits(memory)
    return made


def fits(x: Tensor, dtype: torch.dtype) -> bool:
    return not x.numel() or (int(x.min()) >= torch.iinfo(dtype).min and int(x.max()) <= torch.iinfo(dtype).max)


def lay(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """A tensor of this layout, with the values of ``x`` where it can hold them, and its memory."""
    if layout == "flipped" and x.ndim:
        x = x.to(torch.float64 if x.is_floating_point() else torch.int64).flip(-1).to(x.dtype)
        return x, x
    if layout == "plain" or not x.ndim or not x.numel():
        return x, x
    if layout == "expanded":
        return x.narrow(-1 if x.shape[0] == 1 else 0, 0, 1).expand(x.shape), x
    shape = list(x.shape)
    if layout == "windows" and x.ndim == 2:  # rows that overlap
        memory = x.reshape(-1)[: x.shape[0] + x.shape[1] - 1].clone()
        return memory.unfold(0, x.shape[1], 1), memory
    if layout in ("strided", "windows"):
        memory = around(x, [*shape[:-1], 2 * shape[-1] + 1])
        view = memory[..., 1::2]
    elif layout == "offset":
        memory = around(x, [x.numel() + 6])
        view = memory[3:-3].view(shape)
    elif layout == "transposed":
        memory = around(x, shape[::-1])
        view = memory.permute(*range(x.ndim)[::-1])
    else:
        memory = around(x, [*shape, 3])
        view = memory[..., 1]
    view.copy_(x)
    return view, memory


def around(x: Tensor, shape: list[int]) -> Tensor:
    """Memory that no call may read."""
    if x.is_floating_point():
        return x.new_full(shape, torch.nan)
    return torch.full(
        shape, torch.iinfo(x.dtype).max if x.dtype != torch.bool else True, dtype=x.dtype, device=x.device
    )


def _values(plan: Plan, g: torch.Generator) -> dict[str, Tensor]:
    """In float32, float64 where a number would not fit; integers in int64."""
    lead, d, v, k = plan.lead, plan.d, plan.v, plan.k
    if plan.call in ("clip_contrastive", "nt_xent"):
        found = {"e": _matrix(plan, g, (*lead, d)), "c": _matrix(plan, g, (*lead, d))}
        if "logit_scale" in plan.kinds:
            found["logit_scale"] = torch.rand((), generator=g) * 20 + 0.1
        return _break(plan, g, found)
    targets = torch.randint(0, v, (*lead, k) if k and plan.call != "unlikelihood" else lead, generator=g)
    of_heads = {"multi_token": (plan.heads, *lead), "multi_codebook": (*lead, plan.heads)}.get(plan.call, lead)
    c_shape = (plan.heads, v, d) if plan.call == "multi_codebook" else (v, d)
    if plan.call == "multi_codebook":
        targets = torch.randint(0, v, of_heads, generator=g)
        of_heads = lead if plan.values % 2 else of_heads
    e, c = _matrix(plan, g, (*of_heads, d)), _matrix(plan, g, c_shape)
    if plan.data == "equal":
        c = c[..., :1, :].expand(c.shape).clone()
    if plan.data == "confident" and c.ndim == 2 and targets.ndim == e.ndim - 1:
        e = c[targets] * torch.randint(1, 40, (*lead, 1), generator=g) / max(d**0.5, 1)
    if plan.offset and d > 1:
        e[..., 0], c[..., 0] = plan.offset, 1
    found = {"e": e, "c": c, "targets": targets}
    ignore = plan.options.get("ignore_index", -100)
    for name in plan.kinds:
        found[name] = _other(plan, g, name, targets)
    left_out = torch.rand(targets.shape, generator=g) < plan.ignored
    if plan.ignored and k and targets.ndim > len(lead):
        left_out |= (torch.rand(lead, generator=g) < plan.ignored / 2)[..., None]
    if plan.dtypes.get("targets", "int64").startswith("uint") and ignore < 0:
        left_out &= False
    found["targets"] = targets = targets.masked_fill(left_out, ignore)
    if plan.call == "unlikelihood":
        found["negatives"] = found["negatives"].masked_fill(
            torch.rand(found["negatives"].shape, generator=g) < plan.ignored / 2, ignore
        )
    for name, kind in plan.kinds.items():
        if kind == "nan_ignored":
            none = targets == ignore
            none = none if found[name].shape == none.shape else none.all(-1)
            found[name] = found[name].masked_fill(none, torch.nan)
    if plan.call == "top_k_distillation":
        found["targets"] = _without_repeats(targets, ignore)
    return _break(plan, g, found)


def _without_repeats(targets: Tensor, ignore: int) -> Tensor:
    ordered = targets.sort(-1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return ordered.masked_fill(again, ignore)


def _matrix(plan: Plan, g: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    x = torch.randn(shape, generator=g)
    if plan.data == "whole" or (plan.offset and plan.data == "normal"):
        return torch.randint(-3, 4, shape, generator=g) * 0.5
    if plan.data == "zero":
        return x * 0
    if plan.data == "large":
        return x * 250 / plan.d**0.25
    if plan.data == "tiny":
        return x * 1e-3
    return x * (0.3, 1.0, 2.0)[plan.values % 3]


def _other(plan: Plan, g: torch.Generator, name: str, targets: Tensor) -> Tensor:
    """The tensors beside e, c and targets."""
    kind, lead, v = plan.kinds[name], plan.lead, plan.v
    if name == "bias":
        x = torch.randn(v, generator=g) if plan.data != "whole" else torch.randint(-4, 5, (v,), generator=g) * 0.25
        if kind == "masked":
            x = x.masked_fill(torch.rand(v, generator=g) < 0.4, -torch.inf)
        elif kind == "all_masked":
            x = torch.full_like(x, -torch.inf)
        elif kind == "large":
            x = x * 100
        elif kind == "common":
            x = torch.full_like(x, 2.0**12) + (x * 4).round() / 4
        return x
    if name == "negatives":
        return torch.randint(0, v, (*lead, plan.k), generator=g)
    if name == "head_weight":
        return torch.rand(plan.heads, generator=g)
    shift = plan.options.get("shift", 0)
    results = (*lead[:-1], max(lead[-1] - shift, 0)) if lead else lead
    shape: Any = {"weight": (v,), "token_weight": lead, "target_weight": targets.shape}.get(name, results)
    if name == "ref_log_prob" and plan.call == "dpo":
        shape = lead[:1]
    if name == "rewards":
        return torch.randint(0, 3, lead[:1], generator=g) * 0.5
    if name == "advantages" and plan.values % 3 == 0:
        shape = results[:-1]
    x = torch.randn(shape, generator=g)
    if name in ("old_log_prob", "ref_log_prob"):
        return -x.abs() - 0.1
    if kind == "probabilities":
        x = x.exp()
        return x / x.sum(-1, keepdim=True) * (0.5 + 0.5 * torch.rand((), generator=g))
    if kind == "zeros":
        return x.abs() * (torch.rand(shape, generator=g) < 0.5)
    return x if kind == "normal" else x.abs() + 1  # as an integer, too


def _break(plan: Plan, g: torch.Generator, found: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, value in plan.broken:
        if name in found and found[name].numel():
            flat = found[name].contiguous().view(-1)
            flat[int(torch.randint(0, flat.numel(), (), generator=g))] = float(value)
            found[name] = flat.view(found[name].shape)
    return found
