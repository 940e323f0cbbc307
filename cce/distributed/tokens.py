"""Tokens of all processes in one matrix, for a split vocabulary whose processes have tokens of their own.

Every process meets all tokens with its part of the vocabulary. A gradient of an output is wanted by all processes, and
known to the one whose token it is; dE of a token is summed over the parts already when it comes back to its owner.
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
    """(sum(sizes), ...): the rows of all processes, by rank; ``x`` (sizes[rank], ...) are this one's."""
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
    """(sizes[rank], ...): this process's rows of ``x`` (sum(sizes), ...)."""
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
