"""Other implementations of the same loss: each as a function of (e, c, targets), and what it lacks.

A peer is compared in the plain case all of them have; ``lacks`` names the arguments of ``cce.loss`` and the outputs of
``cce.terms`` for which it has no counterpart, from its signature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

#: ``loss(e, c, targets)``: e (N, D), c (V, D), targets (N,) to the mean loss.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

_HIDDEN = ("lse", "entropy", "prediction")  # outputs
_SPLIT = ("vocab_parallel",)
_EXTRAS = ("token_weight", "target_weight", "shift", "logit_scale")


@dataclass(frozen=True)
class Peer:
    """An implementation to compare with.

    Attributes:
        name: in tables.
        make: the loss function; imports what it needs. Called once a head.
        lacks: what ``cce`` has and it does not.
        package: distribution that has to be installed; "" for torch's own.
        products: of the size of ``e @ c.T`` that a forward and backward takes at least.
        approximate: leaves gradients out by design, so that its error is told but not held against it.
        note: for readers.
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
        """Why it cannot be compared here, or ""."""
        if self._has and not hasattr(F, self._has):
            return f"torch {torch.__version__} has no F.{self._has}"
        module = self.package.replace("-", "_")
        if module and find_spec(module) is None:
            return f"{self.package} is not installed: pip install 'cce-kernels[peers]'"
        return ""

    @property
    def version(self) -> str:
        """Of its package; torch's for its own functions."""
        try:
            return metadata.version(self.package or "torch")
        except metadata.PackageNotFoundError:  # a copy on the path, without metadata
            return "unknown"


def dense(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
    """``F.cross_entropy(F.linear(e, c))`` as training loops write it, with logits in float32 at least."""
    logits = F.linear(e, c)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets)


def _compiled() -> Loss:
    torch.compiler.reset()  # sizes of heads before would make it compile for any size, or give up
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
_BY_HAND = "what it lacks can be computed by hand, from the logits"

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
