"""``vocab_parallel=``: the split of the vocabulary over processes, and their agreement on a call."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from cce.distributed import agreement
from cce.distributed.agreement import Said
from cce.distributed.join import Part
from cce.spec import Spec, fields_of

TOKENS = ("same", "own")


@dataclass(frozen=True)
class VocabParallel:
    """A classifier whose rows are split over the processes of a group, in the order of their ranks.

    Each process passes its own rows ``c`` (V_local, D) and their ``bias`` (V_local,); parts may differ in size, and be
    empty. Targets, predictions and class weights are counted over the whole vocabulary.

    Args:
        group: a ``torch.distributed`` process group, a one-dimensional ``DeviceMesh``, or None for the default group.
        reduce_de: sum the gradient of ``e`` over the group, in float32. False leaves this process's term, for callers
            that reduce it themselves (a reduce-scatter in sequence parallelism).
        tokens: "same" if every process passes the same ``e`` and ``targets`` (tensor parallelism); the results and dE
            are then the same on all. "own" if each passes its own tokens (data parallelism, a head sharded by FSDP):
            hidden states are gathered, each process gets the results and dE of its own tokens, and dC is the gradient
            of the sum of all processes' losses.

    Raises:
        TypeError, ValueError: an argument has another type or value, or the mesh has several dimensions.

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
        if group is not None and not instance_of(group, "torch.distributed", "ProcessGroup"):
            if not instance_of(group, "torch.distributed.device_mesh", "DeviceMesh"):
                raise TypeError(
                    f"vocab_parallel: got {group!r} of type {type(group).__name__}, expected a process group, "
                    "a one-dimensional DeviceMesh or a cce.VocabParallel"
                )
            if group.ndim != 1:
                raise ValueError(
                    f"vocab_parallel: got a DeviceMesh with {group.ndim} dimensions, {group.mesh_dim_names}, "
                    "expected one of them: mesh['name']"
                )
            object.__setattr__(self, "group", group.get_group())


class Agreement(NamedTuple):
    """Sizes and ranks that the processes of a group have agreed on.

    Attributes:
        group: name of the group.
        rank: rank of this process.
        sizes: number of vocabulary entries of every rank.
        rows: number of tokens of every rank.
        part: key of this process's part; made here, as torch.compile takes all of this as constants.
    """

    group: str
    rank: int
    sizes: tuple[int, ...]
    rows: tuple[int, ...]
    part: str

    @classmethod
    def of(cls, split: VocabParallel, group: Any, sizes: tuple[int, ...], rows: tuple[int, ...]) -> Agreement:
        """Agreement of a group's processes, as seen from this process."""
        rank = group.rank()
        part = Part(group.group_name, sum(sizes[:rank]), sizes, split.reduce_de)
        return cls(group.group_name, rank, sizes, rows, part.key)


#: For every group, the kinds of calls and what was agreed on them; entries are dropped along with their group. The
#: first call of a kind on a GPU asks, so all processes must forget the same ones: the oldest of the group, all of whose
#: calls every process makes.
_known: WeakKeyDictionary[Any, dict[tuple[Any, ...], Agreement]] = WeakKeyDictionary()
_MOST = 64


def agree(
    split: VocabParallel,
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    spec: Spec,
    grads: str,
    options: Mapping[str, Any],
) -> Agreement:
    """Check that all processes make the same call, and return the sizes of all parts.

    On a CPU every call asks, so that a process that differs is an error on all; so does every call with tokens="own",
    as the numbers of tokens may differ each time. Otherwise, on a GPU, where asking may wait for it, only the first
    call of its kind asks. A kind is everything listed here but the tokens; processes that differ later run into the
    group's timeout.

    Args:
        split: split of the vocabulary.
        e: (N, D); c: (V_local, D); bias: (V_local,); targets: (N, K).
        spec: spec of the call.
        grads: comma-separated names of those of "e", "c" and "bias" whose gradient is wanted.
        options: other values that must be the same everywhere, by name; numbers and strings.

    Raises:
        ValueError: the processes differ, the vocabulary is empty, or, with tokens="own", a process has a target outside
            it; raised on all of them.
        RuntimeError: there is no process group.
    """
    own = split.tokens == "own"
    tensors = (e.dtype, c.dtype, None if bias is None else bias.dtype, grads, e.device.type)
    key_of_spec = (spec.key, spec.permutation is None)
    if torch.compiler.is_compiling():
        if own:
            raise RuntimeError("VocabParallel.tokens: 'own' is not supported under torch.compile, 'same' is")
        # To the compiler, the length of a range is a constant even where the size is a symbol.
        sizes = tuple(len(range(size)) for size in (c.shape[0], c.shape[1], targets.shape[1]))
        return _agree_compiled(split, sizes, tensors, key_of_spec)
    group = _group(split)
    kind = (c.shape[0], c.shape[1], targets.shape[1], tensors, key_of_spec, repr((split.reduce_de, options)))
    asks = own or e.device.type == "cpu"
    if not asks and kind in _known.get(group, {}):
        return _known[group][kind]
    fields = _fields(split, c.shape[1], targets.shape[1], tensors, key_of_spec, options)
    checked = own and (e.device.type == "cpu" or os.environ.get("CCE_CHECK_TARGETS") == "1")
    span = agreement.span(targets, options["ignore_index"]) if checked else agreement.NO_SPAN
    said = Said(c.shape[0], len(targets), 0 if own else agreement.checksum(targets), *span)
    found = _ask(group, e.device, said, fields, own)
    if checked:
        agreement.check_spans(found, options["ignore_index"])
    agreed = Agreement.of(split, group, tuple(x.v for x in found), tuple(x.n for x in found))
    if not asks:
        kinds = _known.setdefault(group, {})
        if len(kinds) >= _MOST:
            del kinds[next(iter(kinds))]
        kinds[kind] = agreed
    return agreed


def tell_refusal(split: VocabParallel | None, error: Exception, *tensors: Any) -> None:
    """Turn an error of this process, before the group has agreed, into one on all processes that wait for it."""
    devices = {x.device.type for x in tensors if isinstance(x, Tensor)}
    if split is None or len(devices) != 1 or torch.compiler.is_compiling() or not _initialized():
        return
    device = torch.device(devices.pop())
    if device.type != "cpu" and split.tokens != "own":  # on a GPU, it is not known whether the others ask
        return
    with suppress(RuntimeError):  # the others did not take part: only this process's error is raised
        agreement.refuse(_group(split), device, error)


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _group(split: VocabParallel) -> Any:
    if not _initialized():
        raise RuntimeError("vocab_parallel: no process group; call torch.distributed.init_process_group first")
    return split.group or dist.group.WORLD


def _ask(group: Any, device: torch.device, said: Said, fields: Mapping[str, str], own: bool) -> list[Said]:
    found = agreement.ask(group, device, said, fields, own)
    if sum(x.v for x in found) == 0:
        raise ValueError("c: got no row on any process of the group, expected V >= 1 in total")
    return found


def _fields(
    split: VocabParallel,
    d: int,
    k: int,
    tensors: tuple[Any, ...],
    key_of_spec: tuple[str, bool],
    options: Mapping[str, Any],
) -> dict[str, str]:
    """Everything that must be the same, by the name known to users."""
    e_dtype, c_dtype, bias, grads, device = tensors
    wanted = grads.split(",")
    key, no_permutation = key_of_spec
    spec = fields_of(key)
    if not no_permutation:
        spec["vocab_order"] = None  # each process orders its own entries
    fields = {
        "D": d,
        "K": k,
        "e.dtype": e_dtype,
        "c.dtype": c_dtype,
        "bias": bias,
        **{f"{name}.requires_grad": name in wanted for name in ("e", "c", "bias")},
        "device": device,
        **options,
        **{f"spec.{name}": value for name, value in spec.items()},
        "VocabParallel.tokens": split.tokens,
        "VocabParallel.reduce_de": split.reduce_de,
        "torch.compile": False,
    }
    return {name: agreement.shown(value) for name, value in fields.items()}


def _agree_compiled(
    split: VocabParallel, sizes: tuple[int, ...], tensors: tuple[Any, ...], key_of_spec: tuple[str, bool]
) -> Agreement:
    """Agree under the compiler, which asks once, while it traces, and takes the answer as a constant."""
    v, d, k = sizes
    group, fields = _group(split), _fields(split, d, k, tensors, key_of_spec, {})
    device = tensors[-1]
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    found = _ask(group, where, Said(v, -1), {**fields, "torch.compile": "True"}, False)
    return Agreement.of(split, group, tuple(x.v for x in found), ())


# Set what torch.compiler.assume_constant_result sets; calling that would import the compiler.
_agree_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def instance_of(x: Any, module: str, name: str) -> bool:
    """Whether ``x`` is of a class whose module may not have been imported, in which case it is not."""
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and isinstance(x, found)
