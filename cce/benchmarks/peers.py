"""Other implementations of the same loss, as functions of (e, c, targets), with a list of missing features.

A peer is compared in the plain case, which all of them support; ``lacks`` names the arguments of ``cce.loss`` and the
outputs of ``cce.terms`` without a counterpart in its signature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

#: Function ``loss(e, c, targets)`` from e (N, D), c (V, D), targets (N,) to the mean loss.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

_HIDDEN = ("lse", "entropy", "prediction")  # outputs
_SPLIT = ("vocab_parallel",)
_EXTRAS = ("token_weight", "target_weight", "shift", "logit_scale")


@dataclass(frozen=True)
class Peer:
    """Implementation to compare with.

    Attributes:
        name: name in tables.
        make: makes the loss function and imports what it needs; called once per head.
        lacks: features of ``cce`` that it does not have.
        package: distribution that must be installed; "" for torch itself.
        products: least number of products of the size of ``e @ c.T`` in a forward and backward.
        approximate: whether it leaves gradients out by design, so that its error is reported but not counted as wrong.
        note: note for readers.
    """

    name: str
    make: Callable[[], Loss]
    lacks: tuple[str, ...]
    package: str = ""
    products: float = 3
    approximate: bool = False
    note: str = ""
    _has: str = field(default="", repr=False)

    def absent(self) -> str:
        """Reason why it cannot be compared here, or ""."""
        if self._has and not hasattr(F, self._has):
            return f"torch {torch.__version__} has no F.{self._has}"
        module = self.package.replace("-", "_")
        if module and find_spec(module) is None:
            return f"{self.package} is not installed: pip install 'cce-kernels[peers]'"
        return ""

    @property
    def version(self) -> str:
        """Version of its package; that of torch for torch's functions."""
        try:
            return metadata.version(self.package or "torch")
        except metadata.PackageNotFoundError:  # a copy on the path without metadata
            return "unknown"


def dense(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
    """Loss ``F.cross_entropy(F.linear(e, c))`` as in training loops, with logits in at least float32."""
    logits = F.linear(e, c)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets)


def _compiled() -> Loss:
    torch.compiler.reset()  # otherwise sizes of previous heads would make it compile for any size, or give up
    return torch.compile(dense, fullgraph=True, dynamic=False)


def _torch_chunked() -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda e, c, targets: F.linear_cross_entropy(e, c, targets, options=options)


def _liger(accumulate: torch.dtype | None) -> Callable[[], Loss]:
    def make() -> Loss:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return lambda e, c, targets: liger_fused_linear_cross_entropy(e, c, targets, accum_dtype=accumulate)

    return make


def _apple(filter_eps: str | None) -> Callable[[], Loss]:
    def make() -> Loss:
        from cut_cross_entropy import linear_cross_entropy

        return lambda e, c, targets: linear_cross_entropy(e, c, targets, filter_eps=filter_eps)

    return make


_OF_LIGER = ("lse", "entropy", "shift", "token_weight", "target_weight", "logit_scale", "vocab_parallel")
_OF_APPLE = ("bias", "label_smoothing", "weight", "z_loss", *_HIDDEN, "token_weight", "target_weight", "logit_scale")
_OF_TORCH = ("softcap", "z_loss", *_HIDDEN, *_EXTRAS, *_SPLIT)
_BY_HAND = "missing features can be computed by hand, from the logits"

PEERS = {
    peer.name: peer
    for peer in (
        Peer("eager", lambda: dense, (*_EXTRAS, *_SPLIT), note=_BY_HAND),
        Peer("compiled", _compiled, (*_EXTRAS, *_SPLIT), note=_BY_HAND),
        Peer("torch-chunked", _torch_chunked, _OF_TORCH, _has="linear_cross_entropy", note="with its default options"),
        Peer("liger", _liger(None), _OF_LIGER, "liger-kernel", note="sums in the dtype of the inputs, its default"),
        Peer("liger-float32", _liger(torch.float32), _OF_LIGER, "liger-kernel", note="sums in float32"),
        Peer(
            "cut-cross-entropy", _apple("high"), (*_OF_APPLE, *_SPLIT), "cut-cross-entropy", 4, approximate=True,
            note="its default filter, without compensation",
        ),
        Peer(
            "cut-cross-entropy-exact", _apple(None), (*_OF_APPLE, *_SPLIT), "cut-cross-entropy", 4,
            note="filter_eps=None",
        ),
    )
}  # fmt: skip
