"""The loss layer of large-vocabulary language models: cross-entropy of ``e @ c.T`` without the logits.

>>> import cce, torch
>>> cce.loss(torch.randn(8, 16), torch.randn(1000, 16), torch.randint(1000, (8,))).shape
torch.Size([])
"""

from typing import TYPE_CHECKING, Any

from cce.diagnostics import Explanation, explain, live_fraction
from cce.distributed.vocab_parallel import VocabParallel
from cce.errors import BackendUnavailable
from cce.functional import Terms, loss, terms
from cce.modules import LinearCrossEntropy
from cce.registry import list_backends, register_backend, unregister_backend
from cce.spec import Spec
from cce.version import __version__ as __version__
from cce.vocab_order import VocabOrder

if TYPE_CHECKING:
    from cce import losses

__all__ = [
    "BackendUnavailable",
    "Explanation",
    "LinearCrossEntropy",
    "Spec",
    "Terms",
    "VocabOrder",
    "VocabParallel",
    "explain",
    "list_backends",
    "live_fraction",
    "loss",
    "losses",
    "register_backend",
    "terms",
    "unregister_backend",
]


def __getattr__(name: str) -> Any:
    if name == "losses":  # imported when it is used
        import importlib

        return importlib.import_module("cce.losses")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
