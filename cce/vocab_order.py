"""``cce.VocabOrder``: an order of the vocabulary by running counts, kept over many steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from cce.backends.shared.targets import prepare
from cce.frontend import checks
from cce.spec import Spec


class VocabOrder:
    """Order of the vocabulary by the probability of its entries, most probable first, renewed every few steps.

    ``Spec(vocab_order="mean_logit")`` sorts the vocabulary in every call. This class sorts it every ``every`` updates,
    by data seen in training so far: target counts, or mean probabilities if available. Both estimate the *expected*
    probability of an entry. The number of times an entry exceeded the filter's threshold is the wrong key: entries of
    very different probability never exceed it, and would share a tile whose mean row represents none of them
    (design.md, section 2).

    The order is made from ``counts`` at first, after the first update, and after every ``every``-th. In between,
    ``permutation`` and ``spec()`` are the same objects. Updates do not wait for a GPU; ``spec()`` does, once per order.
    Early in training, while most of the mass lies below any threshold, the order by mean logit gives smaller errors
    (docs/decisions/0001-vocabulary-order.md).

    Args:
        v: size V of the vocabulary.
        every: number of updates between two orders.
        counts: (V,) counts to start from, of an integer or float dtype, on any device; for example unigram counts of
            the training text. None means 0, and so the natural order until the first update.
        decay: factor of older counts at each update, in (0, 1]; 1 weights all steps alike.

    Attributes:
        counts: (V,) counts that the vocabulary is sorted by; float64 (float32 on MPS), on the device of the last
            update.
        permutation: (V,) int64, on the same device, for ``Spec.vocab_order``. Entries with equal counts keep their
            order.
        updates: number of updates so far.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or dtype, or is outside its range above.

    >>> order = VocabOrder(4, counts=torch.tensor([1, 5, 0, 5]))
    >>> order.permutation
    tensor([1, 3, 0, 2])
    >>> order.update(torch.tensor([[2, 2, -100], [2, 2, 2]]))
    >>> order.permutation
    tensor([1, 2, 3, 0])
    >>> order.spec(Spec(filter="element")).permutation is order.spec(Spec(filter="element")).permutation
    True
    """

    def __init__(self, v: int, *, every: int = 100, counts: Tensor | None = None, decay: float = 1.0) -> None:
        checks.check_vocab_order_options(v, every, decay)
        self.v, self.every, self.decay = v, every, float(decay)
        self.updates = 0
        if counts is None:
            counts = torch.zeros(v, dtype=torch.float64, device="cpu")  # whatever the default device is
        checks.check_counts("counts", counts, v)
        self.counts = _wide(counts)
        self.refresh()

    def update(self, targets: Tensor, ignore_index: int = -100) -> None:
        """Count the targets of a step.

        Args:
            targets: integers of any shape, in [0, V) or ``ignore_index``.
            ignore_index: targets with this value do not count.

        Raises:
            TypeError, ValueError: an argument is bad. As in :func:`cce.loss`, a target outside [0, V) on a GPU is a
                device-side assertion unless CCE_CHECK_TARGETS=1.
        """
        checks.check_integers("targets", targets)
        checks.check_ignore_index(ignore_index)
        found = prepare(targets.reshape(-1), self.v, ignore_index)
        # Entry V collects targets that do not count. Counts are exact in any order of summation, so the same on every
        # run.
        slots = found.masked_fill(found < 0, self.v)
        ones = torch.ones_like(slots, dtype=_dtype(slots.device))
        self._add(ones.new_zeros(self.v + 1).index_add_(0, slots, ones)[: self.v])

    def update_probabilities(self, probabilities: Tensor) -> None:
        """Add the mean probabilities of a step, or any other measure of each entry's probability.

        Update a ``VocabOrder`` either with these or with targets, not both: a step's mean probabilities sum to 1, its
        counts to the number of its tokens.

        Args:
            probabilities: (V,) of a floating dtype, not negative, such as ``(e @ c.T).softmax(-1).mean(0)`` of some
                rows.

        Raises:
            TypeError, ValueError: an argument is bad; values are checked on a CPU only.
        """
        checks.check_counts("probabilities", probabilities, self.v, dtypes=checks.FLOATS)
        self._add(_wide(probabilities))

    def refresh(self) -> None:
        """Sort the vocabulary now, by the counts so far."""
        self._order_is(self.counts.argsort(descending=True, stable=True))

    def spec(self, base: Spec | None = None) -> Spec:
        """Return ``base`` (``Spec()`` if None) with this order; the same object until there is a new order.

        It is meant for filtered calls: an exact call would follow the order, too, and gather rows of ``c`` for nothing.

        Raises:
            TypeError: ``base`` is not a Spec.

        >>> VocabOrder(3).spec(Spec(filter="tile")).filter
        'tile'
        """
        if base is not None and not isinstance(base, Spec):
            raise TypeError(f"base: got {base!r} of type {type(base).__name__}, expected a cce.Spec or None")
        base = base or Spec()
        if base.key not in self._specs:
            self._specs[base.key] = dataclasses.replace(base, vocab_order=self.permutation)
        return self._specs[base.key]

    def relabel(self, ids: Tensor) -> Tensor:
        """Convert ids to a vocabulary numbered by this order, whose head is ``c[order.permutation]``.

        A vocabulary that is numbered by frequency once needs no order in the loss (``Spec(vocab_order="natural")``),
        which is fastest: kernels read neighbouring rows of ``c``. ``order.permutation[new]`` gives the old ids again.

        Args:
            ids: integers of any shape and device; those outside [0, V), such as an ``ignore_index`` of -100, stay.

        Returns:
            Tensor: int64, with the shape and device of ``ids``.

        Raises:
            TypeError: ``ids`` is not an integer tensor.

        >>> order = VocabOrder(3, counts=torch.tensor([1, 2, 3]))
        >>> order.relabel(torch.tensor([0, 1, 2, -100]))
        tensor([  2,   1,   0, -100])
        """
        checks.check_integers("ids", ids)
        order, ids = self.permutation.to(ids.device), ids.to(torch.int64)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(self.v, device=order.device))
        inside = ids.clamp(0, self.v - 1)
        return torch.where(inside == ids, place[inside], ids)

    def state_dict(self) -> dict[str, Any]:
        """State for :meth:`load_state_dict`: counts, permutation and number of updates.

        ``every`` and ``decay`` are arguments of the constructor, and not part of it.
        """
        return {"counts": self.counts, "permutation": self.permutation, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the point where :meth:`state_dict` was taken; tensors stay on their device.

        Raises:
            TypeError, ValueError: it is not the state of a ``VocabOrder`` with V entries.
        """
        checks.check_vocab_order_state(state_dict, self.v)
        self.counts, self.updates = _wide(state_dict["counts"]), state_dict["updates"]
        self._order_is(state_dict["permutation"].to(self.counts.device))

    def __repr__(self) -> str:
        return f"VocabOrder({self.v}, every={self.every}, decay={self.decay}, updates={self.updates})"

    def _add(self, amounts: Tensor) -> None:
        """Make one update: add amounts (V,) to the counts, which are moved to the amounts' device."""
        # A new tensor each time, so that a state dict taken before does not change.
        self.counts = self.counts.to(amounts.device, amounts.dtype) * self.decay + amounts
        self.updates += 1
        if self.updates == 1 or self.updates % self.every == 0:
            self.refresh()
        elif self.permutation.device != amounts.device:
            self._order_is(self.permutation.to(amounts.device))

    def _order_is(self, permutation: Tensor) -> None:
        self.permutation = permutation
        self._specs: dict[str, Spec] = {}


def _dtype(device: torch.device) -> torch.dtype:
    """Dtype of the counts: float64, exact up to 2**53, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _wide(x: Tensor) -> Tensor:
    """Copy a tensor in the dtype of the counts."""
    return x.detach().to(_dtype(x.device), copy=True)
