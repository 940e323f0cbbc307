"""The ranks start, answer, and tell what went wrong."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from harness import Workers
from torch import Tensor
from torch import distributed as dist


def total(group: dist.ProcessGroup, x: Tensor) -> tuple[Tensor, int]:
    x = x * (dist.get_rank(group) + 1)
    dist.all_reduce(x, group=group)
    return x, os.getpid()


def fails_on_one(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 1:
        raise ZeroDivisionError("of this rank")
    dist.barrier(group)


def dies(group: dist.ProcessGroup) -> None:
    os._exit(3)


def sleeps(group: dist.ProcessGroup) -> None:
    time.sleep(60)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_size(workers: Workers, ranks: int) -> None:
    found = workers.run(total, torch.ones(2), ranks=ranks)
    assert [x.tolist() for x, _ in found] == [[sum(range(ranks + 1))] * 2] * ranks
    assert len({process for _, process in found}) == ranks


def test_ranks_are_used_again(workers: Workers) -> None:
    once, again = (workers.run(total, torch.ones(1), ranks=2) for _ in range(2))
    assert [process for _, process in once] == [process for _, process in again]


@pytest.mark.parametrize(
    ("function", "ranks", "message"),
    [
        (fails_on_one, 2, "rank 1 of 2: Traceback(.|\n)*of this rank"),
        (dies, 1, "rank 0 of 1: died"),
        (sleeps, 1, "rank 0 of 1: did not answer in time"),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_failures(function: Any, ranks: int, message: str) -> None:
    own = Workers(ranks)
    own.run(total, torch.ones(1))
    own.timeout = 1.0 if function is sleeps else own.timeout
    with pytest.raises(AssertionError, match=message):
        own.run(function)
    assert not own._processes, "the ranks were not stopped"
