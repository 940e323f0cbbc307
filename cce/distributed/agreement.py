"""Comparison of a call between the processes of a group, so that a difference is an error on all of them.

The first exchange is a few integers, however the arguments of the processes differ: collectives abort, hang or mix up
numbers if sizes or dtypes do. All processes see the same table, and so take the same branch: if it shows that something
differs, or that a process cannot make the call at all, a second exchange sends texts that describe it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cce.distributed.join import gather

_MOST = 200  # most characters of a value in a message; ten times as many for a refusal
#: Least and largest target if there is none, or they are not needed.
NO_SPAN = (0, -1)


class Said(NamedTuple):
    """Numbers that describe a process's call.

    Attributes:
        v: number of its vocabulary entries.
        n: number of its tokens, -1 if unknown.
        targets: checksum of the targets, 0 if they may differ.
        low, high: least and largest target in use; ``NO_SPAN`` without one.
    """

    v: int
    n: int
    targets: int = 0
    low: int = NO_SPAN[0]
    high: int = NO_SPAN[1]


def ask(group: Any, device: torch.device, said: Said, fields: Mapping[str, str], own: bool) -> list[Said]:
    """Exchange the numbers, and return those of every process, by rank.

    Args:
        group: process group.
        device: device of the call's tensors.
        said: numbers of this process.
        fields: values that must be the same everywhere, as text.
        own: whether each process has its own tokens.

    Raises:
        ValueError: the processes differ, or one of them refuses the call; raised on all of them.
    """
    found, texts = _exchange(group, device, said, fields, "", own)
    if texts is not None:
        raise ValueError(f"vocab_parallel: {_difference(found, texts, own)}")
    return found


def refuse(group: Any, device: torch.device, error: Exception) -> None:
    """Tell the other processes, which are asking, that this one cannot make the call."""
    text = f"{type(error).__name__}: {error}"
    _exchange(group, device, Said(0, 0), {}, text[: 10 * _MOST] or "error", True)


def _exchange(
    group: Any, device: torch.device, said: Said, fields: Mapping[str, str], refusal: str, own: bool
) -> tuple[list[Said], list[tuple[dict[str, str], str]] | None]:
    """Return the numbers of all processes, and, if there is a problem, the fields and refusal of each."""
    where = _device(group, device)
    digest = struct.unpack("<qq", hashlib.sha256(json.dumps(fields).encode()).digest()[:16])
    text = json.dumps([{name: value[:_MOST] for name, value in fields.items()}, refusal]).encode()
    row = (*said, *digest, int(bool(refusal)), len(text))
    table = gather(torch.tensor(row, dtype=torch.int64, device=where), group.group_name).tolist()
    found = [Said(*row[: len(said)]) for row in table]
    same = {row[len(said) : -2] for row in map(tuple, table)}
    tokens = {(x.n, x.targets) for x in found}
    if len(same) == 1 and not any(row[-2] for row in table) and (own or len(tokens) == 1):
        return found, None
    lengths = [row[-1] for row in table]
    padded = torch.tensor(list(text.ljust(max(lengths))), dtype=torch.uint8, device=where)
    texts = gather(padded, group.group_name).cpu()
    return found, [json.loads(bytes(line[:length].tolist())) for line, length in zip(texts, lengths, strict=True)]


def _device(group: Any, device: torch.device) -> torch.device:
    """Device of the exchange: the same type on all processes, wherever each has its tensors.

    It is the CPU if the group supports it: then nothing waits for a GPU.
    """
    types = [x.type for x in getattr(group, "_device_types", ())]
    if not types or (device.type in types and "cpu" not in types):
        return device
    return torch.device("cpu" if "cpu" in types else types[0])


def _difference(found: Sequence[Said], texts: Sequence[tuple[dict[str, str], str]], own: bool) -> str:
    refusals = {rank: text for rank, (_, text) in enumerate(texts) if text}
    if refusals:
        return "; ".join(f"rank {rank} refuses the call: {text}" for rank, text in refusals.items())
    names = list(dict.fromkeys(name for fields, _ in texts for name in fields))
    values = {name: [fields.get(name, "not given") for fields, _ in texts] for name in names}
    differ = [f"{name}: {by_rank(x)}" for name, x in values.items() if len(set(x)) > 1]
    hint = ""
    if not own and len({x.n for x in found}) > 1:
        differ.insert(0, f"N: {by_rank([str(x.n) for x in found])}")
    elif not own and not differ:
        differ = ["targets"]
    if not own and differ[0].split(":")[0] in ("N", "targets"):
        hint = "; if each process has its own tokens, use cce.VocabParallel(group, tokens='own')"
    return f"the processes of the group differ in {'; '.join(differ)}; expected the same call on all{hint}"


def by_rank(values: Sequence[str]) -> str:
    """Describe which ranks have which value.

    >>> by_rank(["True", "False", "True", "True", "True"])
    'True on ranks 0, 2-4, False on rank 1'
    """
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ", ".join(f"{value} on rank{'s' * (len(x) > 1)} {_ranges(x)}" for value, x in ranks.items())


def _ranges(numbers: Sequence[int]) -> str:
    runs = [[x for _, x in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def checksum(targets: Tensor) -> int:
    """Checksum of the values and their places: overflowing integers, mixed as in SplitMix64."""
    flat = targets.flatten().to(torch.int64)
    mixed = flat * -7046029254386353131 + torch.arange(len(flat), device=flat.device) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 31)) * -7723592293110705685
    return int((mixed ^ (mixed >> 29)).sum())


def span(targets: Tensor, ignore_index: int) -> tuple[int, int]:
    """Least and largest of the targets in use."""
    used = targets.to(torch.int64)
    used = used[used != ignore_index]
    return (int(used.min()), int(used.max())) if len(used) else NO_SPAN


def check_spans(found: Sequence[Said], ignore_index: int) -> None:
    """Check the targets of all processes on each: otherwise the others would wait for the one with a bad target."""
    v = sum(x.v for x in found)
    for rank, (low, high) in enumerate((x.low, x.high) for x in found):
        if (low, high) != NO_SPAN and (low < 0 or high >= v):
            bad = low if low < 0 else high
            raise ValueError(
                f"targets: got {bad} on rank {rank}, expected values in [0, {v}) or ignore_index={ignore_index}"
            )


def shown(value: Any) -> str:
    """Text of an option's value, the same for equal numbers.

    >>> shown(1.0), shown(1), shown(0.1), shown("mean"), shown(torch.float32), shown(None)
    ('1', '1', '0.1', 'mean', 'float32', 'None')
    """
    if isinstance(value, float) and not isinstance(value, bool):
        return str(int(value)) if value.is_integer() else repr(float(value))
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)
