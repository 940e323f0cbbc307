"""What defines the algorithm: the one description every backend executes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from cce.problem import Problem

FILTERS = ("none", "element", "tile")
LSE_ACCUMULATIONS = ("tile", "online")
ROW_ORDERS = ("live", "natural")
ACCUMULATES = ("float32", "float64")

# Below these thresholds what is skipped, once compensated, is no larger than the rounding of a dense
# computation in the dtype (docs/numerics.md has the measurements; float32 is filtered only on request).
_THRESHOLD = {torch.bfloat16: 2.0**-12, torch.float16: 2.0**-15, torch.float32: 2.0**-12, torch.float64: 2.0**-12}

# (block_n, block_v) by device type. A GPU's tile is what its matrix unit works on. On a CPU a tile's rows
# are gathered one by one, so narrow blocks cost nothing and skip more.
_BLOCKS = {"cpu": (8, 128)}
_GPU_BLOCKS = (128, 128)


@dataclass(frozen=True, kw_only=True, eq=False)
class Spec:
    """How a loss is computed, the same on every backend (design.md, sections 2 to 5).

    A field left at None is chosen for the problem by :meth:`resolve`. The default is what a user should
    have: bf16 and fp16 inputs are filtered and compensated, to the accuracy of a dense computation in that
    dtype; float32 and float64 are exact.

    Args:
        block_n: token rows of a tile of the filter.
        block_v: vocabulary entries of a tile of the filter and of the tile map.
        lse_accumulation: "tile" stores a log-sum-exp a tile and reduces them in ascending order;
            "online" carries a running maximum and sum along the vocabulary.
        filter: "none" is exact; "element" skips a tile whose largest softmax value is at most
            ``threshold`` in every row (the rule of arXiv 2411.09009, section 4.3); "tile" compares the
            row's probability mass in the tile. A tile that holds a target of its rows is never skipped.
        threshold: probability, in (0, 1).
        compensate: replaces what is skipped by its mass times the mean row of the tile (design.md, 4.4).
        accumulate: dtype in which gradients are summed, "float32" or "float64"; never less than the inputs'.
        scratch_bytes: bytes of temporary logits and their gradients a backend may hold.
        row_order: "live" puts rows with equally many hits into the same block; "natural" keeps the order given.
        vocab_order: (V,) permutation: tile t covers ``vocab_order[t * block_v : (t + 1) * block_v]``.

    Raises:
        TypeError, ValueError: a field has the wrong type, or is outside what is listed above.

    >>> Spec(filter="element", threshold=2**-10).threshold
    0.0009765625
    """

    block_n: int | None = None
    block_v: int | None = None
    lse_accumulation: str = "tile"
    filter: str | None = None
    threshold: float | None = None
    compensate: bool = True
    accumulate: str | None = None
    scratch_bytes: int = 128 * 2**20
    row_order: str = "live"
    vocab_order: torch.Tensor | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("block_n", "block_v", "scratch_bytes"):
            _check_positive_int(name, getattr(self, name), optional=name != "scratch_bytes")
        _check_choice("lse_accumulation", self.lse_accumulation, LSE_ACCUMULATIONS)
        _check_choice("filter", self.filter, FILTERS, optional=True)
        _check_choice("accumulate", self.accumulate, ACCUMULATES, optional=True)
        _check_choice("row_order", self.row_order, ROW_ORDERS)
        _check_threshold(self.threshold)
        if not isinstance(self.compensate, bool):
            raise TypeError(f"Spec.compensate: got {self.compensate!r}, expected True or False")
        if self.vocab_order is not None:
            object.__setattr__(self, "vocab_order", _permutation(self.vocab_order))
        # Read by the front end inside torch.compile, where building the string would break the graph.
        object.__setattr__(self, "key", _key(self))

    key: str = dataclasses.field(init=False, repr=False, default="")

    @classmethod
    def auto(cls, problem: Problem, **fields: Any) -> Spec:
        """The spec with every field chosen for ``problem``, except those given."""
        return cls(**fields).resolve(problem)

    @classmethod
    def from_key(cls, key: str) -> Spec:
        """The spec (without its vocabulary order) whose ``key`` this is."""
        return _from_key(key)

    def resolve(self, problem: Problem) -> Spec:
        """This spec with no field left at None; what the backends receive."""
        block_n, block_v = _BLOCKS.get(problem.device, _GPU_BLOCKS)
        return dataclasses.replace(
            self,
            block_n=self.block_n or block_n,
            block_v=self.block_v or block_v,
            filter=_resolve_filter(self.filter, problem),
            threshold=self.threshold or _THRESHOLD[problem.dtype],
            accumulate=_resolve_accumulate(self.accumulate, problem),
        )

    def tiles(self, v: int) -> int:
        """Number of vocabulary blocks T of a vocabulary of ``v`` entries (a resolved spec)."""
        assert self.block_v is not None, "Spec.tiles needs a resolved spec"
        return (v + self.block_v - 1) // self.block_v

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spec):
            return NotImplemented
        mine, theirs = self.vocab_order, other.vocab_order
        if mine is None or theirs is None:
            return self.key == other.key and mine is theirs
        return self.key == other.key and torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))

    def __hash__(self) -> int:
        return hash(self.key)


def _resolve_filter(filter: str | None, problem: Problem) -> str:
    # A weighted sum of capped logits has a gradient of the same size in every tile: nothing may be skipped.
    if problem.softcap is not None and "weighted_logit" in problem.outputs:
        return "none"
    if filter is not None:
        return filter
    return "element" if problem.dtype in (torch.bfloat16, torch.float16) else "none"


def _resolve_accumulate(accumulate: str | None, problem: Problem) -> str:
    return "float64" if problem.dtype == torch.float64 else accumulate or "float32"


def _key(spec: Spec) -> str:
    fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.init}
    del fields["vocab_order"]
    return json.dumps(fields)


@lru_cache(maxsize=256)
def _from_key(key: str) -> Spec:
    return Spec(**json.loads(key))


def _check_positive_int(name: str, value: object, *, optional: bool) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Spec.{name}: got {value!r} of type {type(value).__name__}, expected a positive int")
    if value < 1:
        raise ValueError(f"Spec.{name}: got {value}, expected a positive int")


def _check_choice(name: str, value: object, choices: tuple[str, ...], *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if value not in choices:
        raise ValueError(f"Spec.{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def _check_threshold(value: object) -> None:
    if value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"Spec.threshold: got {value!r} of type {type(value).__name__}, expected a float in (0, 1)")
    if not 0.0 < value < 1.0 or not math.isfinite(value):
        raise ValueError(f"Spec.threshold: got {value!r}, expected a probability in (0, 1)")


def _permutation(order: Any) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(order)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"Spec.vocab_order: got a {type(order).__name__}, expected a permutation of range(V)"
        ) from error
    if tensor.ndim != 1 or tensor.dtype.is_floating_point or tensor.dtype in (torch.bool, torch.complex64):
        raise TypeError(
            f"Spec.vocab_order: got shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected a 1-D integer tensor"
        )
    tensor = tensor.detach().to(torch.int64)
    if not torch.equal(tensor.sort().values, torch.arange(tensor.numel(), device=tensor.device)):
        raise ValueError(f"Spec.vocab_order: the {tensor.numel()} values given are not a permutation of range(V)")
    return tensor
