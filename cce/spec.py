"""The specification of the algorithm: one description that every backend executes."""

from __future__ import annotations

import ast
import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from cce.errors import describe

FILTERS = ("none", "element", "tile")
LSE_ACCUMULATIONS = ("tile", "online")
ROW_ORDERS = ("live", "natural")
VOCAB_ORDERS = ("mean_logit", "natural")
ACCUMULATES = ("float32", "float64")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Spec:
    """How a loss is computed, the same on every backend (design.md, sections 2 to 5).

    A field left at None is chosen for the problem (:func:`cce.explain` shows it). The default is exact for every dtype.
    A filter is asked for: its error depends on the state of the model (docs/numerics.md), and it cannot be combined
    with a gradient of the log-sum-exp or the entropy.

    Args:
        block_n: token rows of a tile of the filter.
        block_v: vocabulary entries of a tile of the filter and of the tile map.
        lse_accumulation: "tile" stores a log-sum-exp a tile and reduces them in ascending order;
            "online" carries a running maximum and sum along the vocabulary.
        filter: "none", the default, is exact; "element" skips a tile whose largest softmax value is at most
            ``threshold`` in every row (the rule of arXiv 2411.09009, section 4.3); "tile" compares the
            row's probability mass in the tile. A tile that holds a target of its rows is never skipped.
        threshold: of a filter, a probability in (0, 1); None means 2**-16 for fp16 inputs, else 2**-13, and 12 / V
            where that is less.
        compensate: replaces what is skipped by its mass times the mean row of the tile (design.md, 4.4).
        accumulate: dtype in which gradients are summed, "float32" or "float64"; never less than the inputs'. But a
            16-bit dC of a mean or sum is rounded once for each chunk of rows, in most of its rows (docs/numerics.md).
        scratch_bytes: bytes of temporary logits and their gradients a backend may hold. Where the logits of enough rows
            fit, a mean or a sum takes three products instead of four (docs/choose.md).
        row_order: "live" puts rows with equally many hits into the same block; "natural" keeps the order given.
        vocab_order: "mean_logit" sorts the vocabulary by its logits for the mean row of ``e``, anew in every call
            (one product with a vector), so that a tile's entries are alike and their mean row stands for them
            well; "natural" leaves it. Or a (V,) permutation of your own, of which the spec keeps a copy: tile t covers
            ``vocab_order[t * block_v : (t + 1) * block_v]``. None means "mean_logit" where a filter is on.

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
    scratch_bytes: int = 512 * 2**20
    row_order: str = "live"
    vocab_order: torch.Tensor | Sequence[int] | str | None = None

    def __post_init__(self) -> None:
        for name in ("block_n", "block_v", "scratch_bytes"):
            _check_positive_int(name, getattr(self, name), optional=name != "scratch_bytes")
        _check_choice("lse_accumulation", self.lse_accumulation, LSE_ACCUMULATIONS)
        _check_choice("filter", self.filter, FILTERS, optional=True)
        _check_choice("accumulate", self.accumulate, ACCUMULATES, optional=True)
        _check_choice("row_order", self.row_order, ROW_ORDERS)
        _check_threshold(self.threshold)
        if self.threshold is not None and self.filter is None:
            raise ValueError(
                f"Spec.threshold: got {self.threshold!r} without a filter, expected filter='element' or 'tile'"
            )
        if not isinstance(self.compensate, bool):
            raise TypeError(f"Spec.compensate: got {describe(self.compensate)}, expected True or False")
        if isinstance(self.vocab_order, str):
            _check_choice("vocab_order", self.vocab_order, VOCAB_ORDERS)
        elif self.vocab_order is not None:
            object.__setattr__(self, "permutation", _permutation(self.vocab_order))
            object.__setattr__(self, "vocab_order", self.permutation)
        # Read by the front end inside torch.compile, where building the string would break the graph.
        object.__setattr__(self, "key", _key(self))

    key: str = dataclasses.field(init=False, repr=False, default="")
    #: The (V,) permutation given as ``vocab_order``, if one was.
    permutation: torch.Tensor | None = dataclasses.field(init=False, repr=False, default=None)

    @classmethod
    def from_key(cls, key: str) -> Spec:
        """The spec (without its vocabulary order) whose ``key`` this is; ValueError if it is none."""
        try:
            return _from_key(key)
        except (TypeError, ValueError, SyntaxError) as error:
            raise ValueError(f"key: got {key!r}, expected the key of a cce.Spec ({error})") from error

    def with_permutation_of(self, other: Spec) -> Spec:
        """This spec with the permutation of another, checked when that was made: no GPU need be waited for again."""
        found = copy.copy(self)
        object.__setattr__(found, "vocab_order", other.permutation)
        object.__setattr__(found, "permutation", other.permutation)
        return found

    def tiles(self, v: int) -> int:
        """Number of vocabulary blocks T of a vocabulary of ``v`` entries (a resolved spec)."""
        assert self.block_v is not None, "Spec.tiles needs a resolved spec"
        return (v + self.block_v - 1) // self.block_v

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spec):
            return NotImplemented
        mine, theirs = self.permutation, other.permutation
        if mine is theirs or mine is None or theirs is None:
            return self.key == other.key and mine is theirs
        return self.key == other.key and torch.equal(mine, theirs)

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        """The fields, with a short text for a permutation."""
        fields = {name: repr(getattr(self, name)) for name in (*_KEPT, "vocab_order")}
        if self.permutation is not None:
            fields["vocab_order"] = f"<a permutation of {len(self.permutation)} entries>"
        return f"Spec({', '.join(f'{name}={text}' for name, text in fields.items())})"


#: Fields of a spec's key, in this order; after them comes the vocabulary order.
_KEPT = tuple(f.name for f in dataclasses.fields(Spec) if f.init and f.name != "vocab_order")


def _key(spec: Spec) -> str:
    """The fields as Python literals, one after the other; in a form that torch.compile can trace, too."""
    order = spec.vocab_order if spec.permutation is None else "natural"  # a permutation travels beside the key
    return ", ".join([f"{getattr(spec, name)!r}" for name in _KEPT] + [f"{order!r}"])


def fields_of(key: str) -> dict[str, Any]:
    """The fields of the spec whose key this is, by name."""
    return dict(zip((*_KEPT, "vocab_order"), ast.literal_eval(f"({key},)"), strict=True))


@lru_cache(maxsize=256)
def _from_key(key: str) -> Spec:
    return Spec(**fields_of(key))


def _check_positive_int(name: str, value: object, *, optional: bool) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Spec.{name}: got {describe(value)}, expected a positive int")
    if not 1 <= value < 2**63:
        raise ValueError(f"Spec.{name}: got {value}, expected a positive int of at most 63 bits")


def _check_choice(name: str, value: object, choices: tuple[str, ...], *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"Spec.{name}: got {describe(value)}, expected one of {', '.join(map(repr, choices))}")


def _check_threshold(value: object) -> None:
    if value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"Spec.threshold: got {describe(value)}, expected a float in (0, 1)")
    if not 0.0 < value < 1.0 or not math.isfinite(value):
        raise ValueError(f"Spec.threshold: got {value!r}, expected a probability in (0, 1)")


def _permutation(order: Any) -> torch.Tensor:
    try:
        # A list's home is the CPU, whatever the default device.
        tensor = order if isinstance(order, torch.Tensor) else torch.as_tensor(order, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"Spec.vocab_order: got a {type(order).__name__}, "
            f"expected {', '.join(map(repr, VOCAB_ORDERS))} or a permutation of range(V)"
        ) from error
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    if tensor.layout != torch.strided:
        raise TypeError(f"Spec.vocab_order: got layout {tensor.layout}, expected a dense (strided) tensor")
    if tensor.is_meta:
        raise ValueError(f"Spec.vocab_order: got a tensor on {tensor.device}, expected one with values")
    if tensor.ndim != 1 or tensor.dtype not in integers:
        raise TypeError(
            f"Spec.vocab_order: got shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected a 1-D integer tensor"
        )
    # A copy: a spec is frozen, and what it was checked for holds whatever the caller does to the tensor.
    tensor = tensor.detach().to(torch.int64, copy=True).contiguous()
    if not torch.equal(tensor.sort().values, torch.arange(tensor.numel(), device=tensor.device)):
        raise ValueError(f"Spec.vocab_order: the {tensor.numel()} values given are not a permutation of range(V)")
    return tensor
