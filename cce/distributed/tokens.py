"""Tokens of all processes in one matrix, for a split vocabulary whose processes have their own tokens.

Every process combines all tokens with its part of the vocabulary. All processes need the gradient of an output, which
only the owner of the token knows; dE of a token has already been summed over the parts when its owner receives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cce.distributed.join import gather, group_of
from cce.torch_private import differentiable, fake, operator


@operator("cce::gather_rows")
def gather_rows(x: Tensor, group: str, sizes: Sequence[int]) -> Tensor:
    """Gather the rows of all processes, by rank, (sum(sizes), ...); ``x`` (sizes[rank], ...) are this one's."""
    most = max(sizes)
    padded = x.new_zeros(most, *x.shape[1:])
    padded[: len(x)] = x
    every = gather(padded, group)
    return torch.cat([rows[:size] for rows, size in zip(every, sizes, strict=True)])


@fake("cce::gather_rows")
def _(x: Tensor, group: str, sizes: Sequence[int]) -> Tensor:
    return x.new_empty(sum(sizes), *x.shape[1:])


@operator("cce::own_rows")
def own_rows(x: Tensor, group: str, sizes: Sequence[int]) -> Tensor:
    """Select this process's rows, (sizes[rank], ...), of ``x`` (sum(sizes), ...)."""
    rank = group_of(group).rank()
    first = sum(sizes[:rank])
    return x[first : first + sizes[rank]].clone()


@fake("cce::own_rows")
def _(x: Tensor, group: str, sizes: Sequence[int]) -> Tensor:
    return x.new_empty(sizes[group_of(group).rank()], *x.shape[1:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.group, ctx.sizes = inputs


def _own(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return own_rows(grad, ctx.group, ctx.sizes), None, None


def _gather(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return gather_rows(grad, ctx.group, ctx.sizes), None, None


differentiable("cce::gather_rows", _own, _setup_context)
differentiable("cce::own_rows", _gather, _setup_context)
