"""Rows of dC lent to earlier chunks: whose they are, and how many bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from cce.backends.gpu.lent import shaped, share_of_chunk, stretches


@pytest.mark.parametrize("share", [0.5, 2 / 3, share_of_chunk(100, 7)])
@pytest.mark.parametrize(("v", "d", "unit", "scratch"), [(2990, 64, 32, 2**14), (1000, 7, 16, 999), (257, 4, 256, 1)])
def test_lent_rows_come_later(v: int, d: int, unit: int, scratch: int, share: float) -> None:
    dc = torch.empty(v, d)
    found = stretches(v, dc, unit, share, scratch)
    assert found[-1].lent is None and found[-1].v1 == v and found[0].v0 == 0
    assert all(one.v1 == other.v0 for one, other in pairwise(found))
    for one in found[:-1]:
        assert one.lent is not None and one.v1 % unit == 0
        assert one.lent.data_ptr() == dc[one.v1 :].data_ptr() and one.lent.numel() == dc[one.v1 :].nbytes > scratch
    # What is not worth it: the next would be lent less than the scratch memory.
    last = found[-1].v0
    v1 = int((v - last) * share) // unit * unit
    assert (v - last - v1) * d * 4 <= scratch or v1 == 0


def test_what_is_lent_nothing() -> None:
    dc = torch.empty(900, 16)
    assert [(one.v0, one.v1) for one in stretches(900, None, 32, 0.5, 1)] == [(0, 900)]
    assert [(one.v0, one.v1) for one in stretches(900, dc, 32, 0.5, dc.nbytes)] == [(0, 900)]
    assert [(one.v0, one.v1) for one in stretches(900, dc, 32, 0.5, 1024, most=1)] == [(0, 448), (448, 900)]


def test_a_chunk_has_room_in_what_is_lent() -> None:
    n, v, d, unit = 500, 3000, 64, 32
    found = stretches(v, torch.empty(v, d, dtype=torch.bfloat16), unit, share_of_chunk(n, d), n * unit * 2)
    assert len(found) > 5
    for one in found[:-1]:
        columns = one.v1 - one.v0
        assert one.lent is not None and n * columns * 2 <= one.lent.numel() < n * (columns + 2 * unit) * 2


def test_shaped() -> None:
    memory = torch.arange(64, dtype=torch.uint8)
    x = shaped(memory, (2, 3), torch.bfloat16)
    assert x.shape == (2, 3) and x.data_ptr() == memory.data_ptr() and x.is_contiguous()
