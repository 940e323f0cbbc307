"""The plan by torch operations is that of loops, to the last table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cce.backends.gpu import plan as plans
from cce.backends.gpu.plan import Plan
from cce.testing.kernels.plans import NOBODY, make_plan, random_live

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("pack", [1, 2, 3])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize(("tiles", "blocks"), [(1, 1), (1, 5), (9, 1), (7, 4), (23, 6)])
def test_plan(tiles: int, blocks: int, density: float, pack: int) -> None:
    live = random_live(tiles, blocks, density, torch.Generator().manual_seed(tiles + blocks))
    for slots in (2 * blocks, 2 * blocks + 3, 10_000):
        check(plans.make(live, slots, pack), make_plan(live, slots, pack))


def check(found: Plan, expected: Plan) -> None:
    assert (found.chunks, found.max_items) == (expected.chunks, expected.max_items)
    for name, x in vars(expected).items():
        if isinstance(x, Tensor):
            y = getattr(found, name)
            assert y.dtype == torch.int32 and y.is_contiguous() and y.shape == x.shape, name
            told = x != NOBODY  # elsewhere a table may hold anything
            assert torch.equal(y[told], x[told]), name


def test_a_tile_has_a_slot_of_its_own() -> None:
    """And no chunk has more of them than there are."""
    live = random_live(40, 5, 0.5, torch.Generator().manual_seed(1))
    plan = plans.make(live, 13, 2)
    chunk_of = torch.searchsorted(plan.chunk_start[1:], torch.arange(40, dtype=torch.int32), right=True)
    taken = {
        (int(chunk_of[t]), int(plan.slot_list[t, nth])) for t in range(40) for nth in range(int(plan.live_count[t]))
    }
    assert len(taken) == int(live.sum()) == int(plan.live_count.sum())
    assert max(slot for _, slot in taken) < plan.max_items == 13
