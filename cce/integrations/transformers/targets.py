"""Arguments of ``patch``: the model to be patched, and the options."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import nn

from cce.frontend import checks

OPTIONS = ("backend", "spec", "label_smoothing", "z_loss", "weight")
Target: TypeAlias = nn.Module | type[nn.Module]


def check_options(options: dict[str, Any]) -> None:
    """Check the names and values of ``patch``'s options, except the length of ``weight``."""
    for name, value in options.items():
        if name not in OPTIONS:
            raise TypeError(f"{name}: got {value!r}, expected an option out of {OPTIONS}")
    checks.check_options(
        ignore_index=-100,
        shift=0,
        softcap=None,
        logit_scale=1.0,
        backend=options.get("backend", "auto"),
        spec=options.get("spec"),
    )
    checks.check_loss_options(
        reduction="mean",
        label_smoothing=options.get("label_smoothing", 0.0),
        z_loss=options.get("z_loss", 0.0),
        weight=None,
        token_weight=None,
        v=None,
        lead=torch.Size(),
        device=torch.device("cpu"),
    )


def check_weight(weight: Any, head: nn.Module | None) -> None:
    """Check class weights: (V,) if the head is known; for a class, the first training step checks them."""
    known: Any = None if head is None else head.weight
    checks.check_class_weight(weight, None if known is None else int(known.shape[0]))


def find_target(model: Any) -> Target:
    """Find the class, or the transformers model inside PEFT's and DistributedDataParallel's wrappers."""
    base = _pretrained_model()
    found: Any = model
    while isinstance(found, nn.Module) and not isinstance(found, base):
        if "_orig_mod" in found._modules:
            raise TypeError("model: got a compiled model, expected one that is patched before torch.compile")
        peft: Any = getattr(found, "get_base_model", None)
        inside = found._modules.get("module") if peft is None else peft()
        if inside is None:
            break
        found = inside
    if isinstance(found, base) or (isinstance(found, type) and issubclass(found, base)):
        target: Target = found
        return target
    got = f"the class {found.__name__}" if isinstance(found, type) else f"an instance of {type(found).__name__}"
    raise TypeError(f"model: got {got}, expected a transformers.PreTrainedModel or a class of them")


def name_of(target: Target) -> str:
    """Name of the class, for messages."""
    return target.__name__ if isinstance(target, type) else type(target).__name__


def check_version() -> None:
    """Check the version of transformers.

    Raises:
        ImportError: transformers is not installed, or older than 5.
    """
    _pretrained_model()


def _pretrained_model() -> type[nn.Module]:
    """Base class of transformers' models, imported with the first model, which has imported it already."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "cce.integrations.transformers needs transformers: python -m pip install 'cce-kernels[transformers]'"
        ) from error
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ImportError(f"transformers: got version {transformers.__version__}, expected 5 or later")
    found: type[nn.Module] = transformers.PreTrainedModel
    return found
