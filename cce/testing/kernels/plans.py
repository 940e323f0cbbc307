"""Plans and arguments of a filtered backward at random: the plan by loops, as its docstring has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Rows
from cce.backends.gpu.plan import Plan
from cce.backends.problem import LEAST_HIT, Maps, Problem
from cce.spec import Spec

NOBODY = -1_000_000  # what no kernel may read


def make_plan(live: Tensor, slots: int, pack: int) -> Plan:
    """The plan of the live tiles (T, B) for ``slots`` tiles of scratch memory, at least one column's."""
    tiles, blocks = live.shape
    slots = min(slots, blocks * tiles + blocks)
    step = slots - blocks + 1
    chunks = -(-(blocks * tiles + 1) // step)
    on = live.tolist()
    shapes = {
        "tile_list": (blocks, tiles), "live_count": (tiles,), "block_list": (tiles, blocks),
        "slot_list": (tiles, blocks), "chunk_start": (chunks + 1,), "block_slot": (chunks, blocks),
        "block_tiles": (chunks, blocks), "block_first": (chunks, blocks), "item_block": (chunks, slots),
        "item_first": (chunks, slots), "item_slot": (chunks, slots), "item_tiles": (chunks, slots), "items": (chunks,),
    }  # fmt: skip
    found = {name: torch.full(shape, NOBODY, dtype=torch.int32) for name, shape in shapes.items()}
    lists = [[t for t in range(tiles) if on[t][b]] for b in range(blocks)]
    for b, mine in enumerate(lists):
        found["tile_list"][b, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
    before = [sum(map(sum, on[:t])) for t in range(tiles)]  # live tiles of earlier vocabulary blocks
    starts = [sum(x < k * step for x in before) for k in range(chunks)] + [tiles]
    found["chunk_start"][:] = torch.tensor(starts)
    for k in range(chunks):
        _chunk(found, on, lists, k, starts[k], starts[k + 1], pack)
    return Plan(chunks, slots, **found)


def _chunk(
    found: dict[str, Tensor], on: list[list[bool]], lists: list[list[int]], k: int, t0: int, t1: int, pack: int
) -> None:
    """Write the plan of chunk k, the vocabulary blocks t0 to t1."""
    slot_of: dict[tuple[int, int], int] = {}
    for b, mine in enumerate(lists):
        here = [t for t in mine if t0 <= t < t1]
        found["block_slot"][k, b] = len(slot_of)
        found["block_tiles"][k, b] = len(here)
        found["block_first"][k, b] = sum(t < t0 for t in mine)
        slot_of |= {(b, t): len(slot_of) + nth for nth, t in enumerate(here)}
    items = []
    for t in range(t0, t1):
        blocks = [b for b, is_live in enumerate(on[t]) if is_live]
        found["live_count"][t] = len(blocks)
        for nth, b in enumerate(blocks):
            found["block_list"][t, nth], found["slot_list"][t, nth] = b, slot_of[b, t]
            slot, first = int(found["block_slot"][k, b]), int(found["block_first"][k, b])
            rank = slot_of[b, t] - slot
            if rank % pack == 0:
                items.append((b, first + rank, slot + rank, min(pack, int(found["block_tiles"][k, b]) - rank)))
    found["items"][k] = len(items)
    for name, column in zip(("block", "first", "slot", "tiles"), zip(*items, strict=True), strict=False):
        found[f"item_{name}"][k, : len(items)] = torch.tensor(column, dtype=torch.int32)


def plan_to(plan: Plan, device: str) -> Plan:
    """The same plan on a device."""
    moved: dict[str, Any] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in vars(plan).items()}
    return Plan(**moved)


def random_live(tiles: int, blocks: int, density: float, rng: torch.Generator) -> Tensor:
    """(T, B) bool; some vocabulary blocks, and the first row block, have no live tile; other row blocks have one."""
    live = torch.rand(tiles, blocks, generator=rng) < density
    live[1::4] = False
    live[0] |= density > 0
    if blocks > 1:
        live[:, 0] = False
    live[-1, -1] = True  # the ragged corner
    return live


def random_rows(problem: Problem, z: Tensor, rng: torch.Generator, entropy: bool, weighted: bool) -> Rows:
    """Targets, a row's true lse and entropy for the logits ``z`` (N, V) by place, gradients of order 1; on the CPU.

    Every seventh row has a gradient of 0 in all.
    """
    n, v, k = problem.n, problem.v, problem.k
    targets = torch.randint(v, (n, k), generator=rng)
    targets[-1, -1] = v - 1
    if k > 1:
        targets[::3, 1] = targets[::3, 0]
        targets[1::4, -1] = -1
    lse = z.logsumexp(1)
    high = lse.float()
    log_p = (z - lse[:, None]).clamp(min=-1e4)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=rng)
        x[3::7] = 0
        return x * problem.logit_scale

    return Rows(
        lse=high,
        lse_low=(lse - high.double()).float(),  # NaN where there is no softmax
        a=draw(n),
        g=torch.where(targets < 0, 0.0, draw(n, k)),
        targets=targets.to(torch.int32),
        entropy=-(log_p.exp() * log_p).sum(1).float() if entropy else None,
        h=draw(n) if entropy else None,
        s=draw(n) if weighted else None,
    )


def random_maps(problem: Problem, spec: Spec, device: str, rng: torch.Generator) -> Maps[Tensor]:
    """Maps of masses in (0, 1), some of them hit, some of them 0; their rows are longer than N, and end with NaN."""
    n = problem.n
    shape, dtype = (spec.tiles(problem.v), n + 3), problem.map_dtype(spec)
    mass = torch.rand(shape, generator=rng).pow(4)
    mass = torch.where(torch.rand(shape, generator=rng) < 0.2, -mass.clamp(min=LEAST_HIT), mass)
    mass[torch.rand(shape, generator=rng) < 0.1] = 0
    entropy = torch.rand(shape, generator=rng) * 3
    mass[:, n:], entropy[:, n:] = torch.nan, torch.nan
    mass, entropy = (x.to(device, dtype)[:, :n] for x in (mass, entropy))
    return Maps(mass, entropy if "entropy" in problem.outputs else None)
