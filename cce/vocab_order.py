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
    """Orders the vocabulary by how probable its entries are, most probable first, anew every few steps.

    ``Spec(vocab_order="mean_logit")`` sorts the vocabulary in every call. This sorts it every ``every`` updates, by
    what the training has seen so far: target counts, or mean probabilities where they are at hand. Both estimate
    the *expected* probability of an entry. How often an entry exceeded the filter's threshold estimates something
    else and is the wrong key: entries of very different probability never exceed it, and share a tile in which the
    mean row stands for none of them (design.md, section 2).

    The order is made from ``counts``, after the first update, and after every ``every``-th. In between
    ``permutation`` and ``spec()`` are the same objects. Updates do not wait for a GPU; ``spec()`` does, once an order.
    Early in training, while most of the mass lies below any threshold, the order by mean logit errs less
    (docs/decisions/0001-vocabulary-order.md).

    Args:
        v: V, entries of the vocabulary.
        every: updates between two orders.
        counts: (V,) counts to start from, of an integer or float dtype, on any device; unigram counts of the
            training text, say. None means 0, and so the natural order until the first update.
        decay: in (0, 1], what older counts are multiplied by at each update; 1 weighs all steps alike.

    Attributes:
        counts: (V,) what the vocabulary is sorted by; float64 (float32 on MPS), on the device of the last update.
        permutation: (V,) int64, on the same device: what ``Spec.vocab_order`` takes. Entries alike keep their order.
        updates: number of updates so far.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or dtype, or is outside what is listed above.

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
            counts = torch.zeros(v, dtype=torch.float64, device="cpu")  # whatever the default is
        checks.check_counts("counts", counts, v)
        self.counts = _wide(counts)
        self.refresh()

    def update(self, targets: Tensor, ignore_index: int = -100) -> None:
        """Counts the targets of a step.

        Args:
            targets: integers of any shape, in [0, V) or ``ignore_index``.
            ignore_index: targets of this value do not count.

        Raises:
            TypeError, ValueError: a bad argument. As in :func:`cce.loss`, a target outside [0, V) on a GPU is a
                device-side assertion unless CCE_CHECK_TARGETS=1.
        """
        checks.check_integers("targets", targets)
        checks.check_ignore_index(ignore_index)
        found = prepare(targets.reshape(-1), self.v, ignore_index)
        # Entry V takes what does not count. A count is exact in the order of any sum, so the same on every run.
        slots = found.masked_fill(found < 0, self.v)
        ones = torch.ones_like(slots, dtype=_dtype(slots.device))
        self._add(ones.new_zeros(self.v + 1).index_add_(0, slots, ones)[: self.v])

    def update_probabilities(self, probabilities: Tensor) -> None:
        """Adds the mean probabilities of a step, or any other measure of how probable each entry is.

        One ``VocabOrder`` should see either these or targets: a step's mean probabilities sum to 1, its counts to
        the number of its tokens.

        Args:
            probabilities: (V,) of a floating dtype, not negative; ``(e @ c.T).softmax(-1).mean(0)`` of some rows.

        Raises:
            TypeError, ValueError: a bad argument; values are looked at on a CPU only.
        """
        checks.check_counts("probabilities", probabilities, self.v, dtypes=checks.FLOATS)
        self._add(_wide(probabilities))

    def refresh(self) -> None:
        """Sorts the vocabulary now, by the counts so far."""
        self._order_is(self.counts.argsort(descending=True, stable=True))

    def spec(self, base: Spec | None = None) -> Spec:
        """``base`` (``Spec()`` if None) with this order; the same object until there is a new one.

        For filtered calls: an exact one would follow the order, too, and gather rows of ``c`` for nothing.

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
        """The ids in a vocabulary numbered by this order, whose head is ``c[order.permutation]``.

        A vocabulary numbered once by frequency needs no order in the loss, which is fastest: kernels read
        neighbouring rows of ``c`` (``Spec(vocab_order="natural")``). ``order.permutation[new]`` are the ids again.

        Args:
            ids: integers of any shape and device; those outside [0, V), such as an ``ignore_index`` of -100, stay.

        Returns:
            Tensor: int64, of the shape and on the device of ``ids``.

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

        ``every`` and ``decay`` are arguments, and not part of it.
        """
        return {"counts": self.counts, "permutation": self.permutation, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from where :meth:`state_dict` was taken; tensors stay on the device they are on.

        Raises:
            TypeError, ValueError: it is not the state of a ``VocabOrder`` of V entries.
        """
        checks.check_vocab_order_state(state_dict, self.v)
        self.counts, self.updates = _wide(state_dict["counts"]), state_dict["updates"]
        self._order_is(state_dict["permutation"].to(self.counts.device))

    def __repr__(self) -> str:
        return f"VocabOrder({self.v}, every={self.every}, decay={self.decay}, updates={self.updates})"

    def _add(self, amounts: Tensor) -> None:
        """One update: (V,) amounts onto the counts, which follow to their device."""
        # A new tensor each time: a state dict taken before does not change.
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
    """float64 counts are exact to 2**53; MPS has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _wide(x: Tensor) -> Tensor:
    """A copy as counts are kept."""
    return x.detach().to(_dtype(x.device), copy=True)
