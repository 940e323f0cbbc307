"""``vocab_parallel=``: how the vocabulary is split over processes, and what they tell one another about a call."""

from __future__ import annotations

import sys
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cce.parallel import gather

TOKENS = ("same", "own")


@dataclass(frozen=True)
class VocabParallel:
    """A classifier whose rows are split over the processes of a group, in the order of their ranks.

    Each process passes its own rows ``c`` (V_local, D) and their ``bias`` (V_local,); parts may differ in size, and be
    empty. Targets, predictions and class weights are counted over the whole vocabulary.

    Args:
        group: a ``torch.distributed`` process group, a one-dimensional ``DeviceMesh``, or None for the default group.
        reduce_de: the gradient of ``e`` is summed over the group, in float32. False leaves this process's term, for
            callers that reduce it themselves (a reduce-scatter in sequence parallelism).
        tokens: "same" where every process passes the same ``e`` and ``targets`` (tensor parallelism); the results
            and dE are then the same on all. "own" where each passes tokens of its own (data parallelism, a head that
            FSDP has sharded): hidden states are gathered, each process gets the results and dE of its own tokens, and
            dC is the sum over all processes' losses.

    Raises:
        TypeError, ValueError: an argument of another type, a mesh of several dimensions.

    >>> VocabParallel(reduce_de=False).tokens
    'same'
    """

    group: Any = None
    reduce_de: bool = True
    tokens: str = "same"

    def __post_init__(self) -> None:
        if not isinstance(self.reduce_de, bool):
            raise TypeError(f"VocabParallel.reduce_de: got {self.reduce_de!r}, expected True or False")
        if not isinstance(self.tokens, str) or self.tokens not in TOKENS:
            raise ValueError(f"VocabParallel.tokens: got {self.tokens!r}, expected one of {TOKENS}")
        if self.tokens == "own" and not self.reduce_de:
            raise ValueError(
                "VocabParallel.reduce_de: got False with tokens='own', expected True: dE goes to its owner"
            )
        group = self.group
        if group is not None and not _is(group, "torch.distributed", "ProcessGroup"):
            if not _is(group, "torch.distributed.device_mesh", "DeviceMesh"):
                raise TypeError(
                    f"vocab_parallel: got {group!r} of type {type(group).__name__}, expected a process group, "
                    "a one-dimensional DeviceMesh or a cce.VocabParallel"
                )
            if group.ndim != 1:
                raise ValueError(
                    f"vocab_parallel: got a DeviceMesh of {group.ndim} dimensions, {group.mesh_dim_names}, "
                    "expected one of them: mesh['name']"
                )
            object.__setattr__(self, "group", group.get_group())


class Operands(NamedTuple):
    """The tensors of a call as this process holds them, and how the vocabulary is split, if it is."""

    e: Tensor
    c: Tensor
    bias: Tensor | None
    targets: Tensor
    split: VocabParallel | None


def operands(e: Any, c: Any, bias: Any, targets: Any, vocab_parallel: Any) -> Operands:
    """Reads ``vocab_parallel``, and the placements of DTensors, which say the same without it.

    Raises:
        TypeError, ValueError: a value of another type, or a placement that is neither replicated nor, for ``c`` and
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
            raise ValueError("vocab_parallel: got a group beside a DTensor c, expected None: c says how it is split")
        split = split or VocabParallel()
        split = VocabParallel(sharded, split.reduce_de, split.tokens)
    summed = split is None or split.reduce_de
    e, _ = _local("e", e, grad=Replicate() if summed else Partial())
    targets, _ = _local("targets", targets)
    return Operands(e, c, bias, targets, split)


def _local(name: str, x: Any, shard: bool = False, grad: Any = None) -> tuple[Any, Any]:
    """This process's part of a DTensor, and the group that its dimension 0 is sharded over, if it is."""
    if not _is_dtensor(x):
        return x, None
    from torch.distributed.tensor import Replicate, Shard

    found = [i for i, placement in enumerate(x.placements) if placement != Replicate()]
    allowed = "Replicate()" + (", on one mesh dimension Shard(0)" if shard else "")
    if any(x.placements[i] != Shard(0) or type(x.placements[i]) is not Shard for i in found) or len(found) > shard:
        raise ValueError(f"{name}: got a DTensor with placements {x.placements}, expected {allowed}; redistribute it")
    placements = None if grad is None else [grad] * len(x.placements)
    return x.to_local(grad_placements=placements), x.device_mesh.get_group(found[0]) if found else None


class Agreement(NamedTuple):
    """What the processes of a group have told one another.

    Attributes:
        group: its name.
        rank: of this process.
        sizes: vocabulary entries of every rank.
        rows: tokens of every rank.
    """

    group: str
    rank: int
    sizes: tuple[int, ...]
    rows: tuple[int, ...]


_FIELDS = ("D", "N", "K", "dtypes, options and outputs", "targets")
_known: dict[tuple[Any, ...], Agreement] = {}


def agree(split: VocabParallel, e: Tensor, c: Tensor, targets: Tensor, signature: tuple[Any, ...]) -> Agreement:
    """Sizes of all parts; and that all processes make the same call.

    On a CPU every call asks, so that a process that differs is an error on all. On a GPU, where asking waits, the first
    call of its kind asks; processes that differ later meet the group's timeout.

    Args:
        split: how the vocabulary is split.
        e: (N, D); c: (V_local, D); targets: (N, K).
        signature: of what else must be the same everywhere.

    Raises:
        ValueError: the processes differ, or the vocabulary is empty.
        RuntimeError: there is no process group.
    """
    if torch.compiler.is_compiling():
        if split.tokens == "own":
            raise RuntimeError("VocabParallel.tokens: 'own' is not supported under torch.compile, 'same' is")
        # The length of a range is a constant to the compiler even where the size is a symbol.
        v, d = (len(range(size)) for size in c.shape)
        return _agree_compiled(split, v, d, e.device.type)
    kind = zlib.crc32(repr((str(e.dtype), *signature)).encode())
    vector = (c.shape[0], c.shape[1], len(targets), targets.shape[1], kind)
    key = (id(split.group), *vector)
    if e.device.type != "cpu" and key in _known:
        return _known[key]
    checksum = int(_checksum(targets)) if split.tokens == "same" else 0
    _known[key] = found = _ask(split, (*vector, checksum), e.device)
    return found


def _ask(split: VocabParallel, vector: tuple[int, ...], device: torch.device) -> Agreement:
    """One exchange of a few integers; ranks that differ in what must be the same are an error on all of them."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("vocab_parallel: no process group; call torch.distributed.init_process_group first")
    group: Any = split.group or dist.group.WORLD
    table = gather(torch.tensor(vector, device=device), group.group_name).tolist()
    sizes, *fields = zip(*table, strict=True)
    for name, values in zip(_FIELDS, fields, strict=False):
        if len(set(values)) > 1 and not (name == "N" and split.tokens == "own"):
            raise ValueError(f"vocab_parallel: {_difference(name, values)}")
    if sum(sizes) == 0:
        raise ValueError("c: got no row on any process of the group, expected V >= 1 in all")
    return Agreement(group.group_name, group.rank(), sizes, fields[1] if len(fields) > 1 else ())


def _difference(name: str, values: tuple[int, ...]) -> str:
    shown = f", {list(values)} by rank" if len(name) == 1 else ""
    hint = "; where each has tokens of its own: cce.VocabParallel(group, tokens='own')" * (name in ("N", "targets"))
    return f"the processes of the group differ in {name}{shown}, expected the same call on all{hint}"


def _checksum(targets: Tensor) -> Tensor:
    """Of the values and their places: integers that overflow, mixed as SplitMix64 mixes them."""
    flat = targets.flatten().to(torch.int64)
    mixed = flat * -7046029254386353131 + torch.arange(len(flat), device=flat.device) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 31)) * -7723592293110705685
    return (mixed ^ (mixed >> 29)).sum()


def _agree_compiled(split: VocabParallel, v: int, d: int, device: str) -> Agreement:
    """The compiler asks once, while it traces, and takes the answer as a constant."""
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    return _ask(split, (v, d), where)


# What torch.compiler.assume_constant_result sets; calling that would import the compiler.
_agree_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_dtensor(x: Any) -> bool:
    return _is(x, "torch.distributed.tensor", "DTensor")


def _is(x: Any, module: str, name: str) -> bool:
    """Whether ``x`` is of a class whose module may not have been imported, in which case it is not."""
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and isinstance(x, found)
