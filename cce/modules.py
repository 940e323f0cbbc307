"""``cce.LinearCrossEntropy``: a language model's head and its loss in one module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cce.distributed.vocab_parallel import VocabParallel
from cce.frontend import checks
from cce.functional import LOSS_OPTIONS, SHARED_DEFAULTS, loss


class LinearCrossEntropy(nn.Module):
    """A linear head that returns the loss of its logits without computing them in memory.

    Its parameters have the names, shapes and initial values of those of ``nn.Linear(in_features, out_features)``: it
    loads the state dict of such a head, and its ``weight`` can be tied to that of an embedding.

    Args:
        in_features: width D of the hidden states.
        out_features: size V of the vocabulary; with ``vocab_parallel``, the number of this process's entries.
        bias: whether to add a learnable (V,) bias.
        device, dtype: device and dtype of the parameters. **options: keyword options of :func:`cce.loss`, for example
            ``softcap``, ``spec`` or ``backend``.

    Raises:
        TypeError, ValueError: a size is not a positive int, or an option is unknown or has a bad value.

    >>> head = LinearCrossEntropy(16, 100, label_smoothing=0.1)
    >>> head(torch.randn(4, 7, 16), torch.randint(100, (4, 7))).shape
    torch.Size([])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        checks.check_head(in_features, out_features, dtype)
        _check_options(options, out_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        # Class weights follow the module to its device, but are not part of a head's state dict.
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", options.pop("weight", None), persistent=False)
        self.options = options
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters like those of ``nn.Linear``."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, e: Tensor, targets: Tensor, *, token_weight: Tensor | None = None, target_weight: Tensor | None = None
    ) -> Tensor:
        """Compute the loss of hidden states ``e`` (..., D) against ``targets``; arguments as for :func:`cce.loss`."""
        return loss(
            e,
            self.weight,
            targets,
            self.bias,
            weight=self.class_weight,
            token_weight=token_weight,
            target_weight=target_weight,
            **self.options,
        )

    def logits(self, e: Tensor) -> Tensor:
        """Compute the logits (..., V), after scale and softcap, for generation."""
        z = nn.functional.linear(e, self.weight, self.bias) * self.options.get("logit_scale", 1.0)
        softcap = self.options.get("softcap")
        if softcap is None:
            return z
        capped = softcap * torch.tanh(z / softcap)
        # A bias of -inf masks an entry; the softcap alone would undo that.
        return capped if self.bias is None else capped.masked_fill(self.bias == -math.inf, -math.inf)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{options}"
        )


def _check_options(options: dict[str, Any], out_features: int) -> None:
    """Check the options of :func:`cce.loss` that a module keeps."""
    checks.check_option_names(options, LOSS_OPTIONS - {"token_weight", "target_weight"})
    shared = {name: options.get(name, x) for name, x in SHARED_DEFAULTS.items()}
    split = shared.pop("vocab_parallel")
    checks.check_options(**shared)
    if shared["spec"] is not None:
        checks.check_vocab_order(shared["spec"], out_features)
    if split is not None and not isinstance(split, VocabParallel):
        VocabParallel(split)
    weight = options.get("weight")
    checks.check_loss_options(
        reduction=options.get("reduction", "mean"),
        label_smoothing=options.get("label_smoothing", 0.0),
        z_loss=options.get("z_loss", 0.0),
        weight=weight,
        token_weight=None,
        # With a split vocabulary, ``out_features`` counts this process's entries, and class weights cover all entries.
        v=out_features if split is None else None,
        lead=torch.Size(),
        device=weight.device if isinstance(weight, Tensor) else torch.device("cpu"),  # it moves with the module
    )
