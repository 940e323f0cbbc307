"""The tensors of a call as one process holds them: DTensors say how a vocabulary is split."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from cce.distributed.vocab_parallel import VocabParallel, instance_of


class Operands(NamedTuple):
    """The tensors of a call as this process holds them, and the split of the vocabulary, if any."""

    e: Tensor
    c: Tensor
    bias: Tensor | None
    targets: Tensor
    split: VocabParallel | None


def operands(e: Any, c: Any, bias: Any, targets: Any, vocab_parallel: Any) -> Operands:
    """Read ``vocab_parallel``, or the placements of DTensors, which say the same without it.

    Raises:
        TypeError, ValueError: a value has another type, or a placement is neither replicated nor, for ``c`` and
            ``bias``, sharded by vocabulary entries.
    """
    split = vocab_parallel
    if split is not None and not isinstance(split, VocabParallel):
        split = VocabParallel(split)
    if not any(_is_dtensor(x) for x in (e, c, bias, targets)):
        return Operands(e, c, bias, targets, split)
    from torch.distributed.tensor import Partial, Replicate

    c, sharded = _local("c", c, shard=True)
    bias, _ = _local("bias", bias, shard=True)
    if sharded is not None:
        if split is not None and split.group is not None and split.group is not sharded:
            raise ValueError("vocab_parallel: got a group along with a DTensor c, expected None: c has its own split")
        split = split or VocabParallel()
        split = VocabParallel(sharded, split.reduce_de, split.tokens)
    summed = split is None or split.reduce_de
    e, _ = _local("e", e, grad=Replicate() if summed else Partial())
    targets, _ = _local("targets", targets)
    return Operands(e, c, bias, targets, split)


def _local(name: str, x: Any, shard: bool = False, grad: Any = None) -> tuple[Any, Any]:
    """This process's part of a DTensor, and the group over which its dimension 0 is sharded, if any."""
    if not _is_dtensor(x):
        return x, None
    from torch.distributed.tensor import Replicate, Shard

    found = [i for i, placement in enumerate(x.placements) if placement != Replicate()]
    allowed = "Replicate()" + (", on one mesh dimension Shard(0)" if shard else "")
    if any(x.placements[i] != Shard(0) or type(x.placements[i]) is not Shard for i in found) or len(found) > shard:
        raise ValueError(f"{name}: got a DTensor with placements {x.placements}, expected {allowed}; redistribute it")
    placements = None if grad is None else [grad] * len(x.placements)
    return x.to_local(grad_placements=placements), x.device_mesh.get_group(found[0]) if found else None


def _is_dtensor(x: Any) -> bool:
    return instance_of(x, "torch.distributed.tensor", "DTensor")
