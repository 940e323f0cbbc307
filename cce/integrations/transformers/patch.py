"""``patch`` and ``unpatch``: a model's forward, around which the loss is computed without the logits."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from cce.integrations.transformers.heads import find_head, is_replaced, without_logits
from cce.integrations.transformers.logits import Call, Logits
from cce.integrations.transformers.targets import Target, check_options, check_weight, find_target, name_of

_MARK = "_cce_patch"
Model = TypeVar("Model")


@dataclass
class _Patch:
    """What is behind a patched forward.

    Attributes:
        original: the forward it calls, a function whose first argument is the model.
        own: whether the class (the instance) had a forward of its own, which unpatch puts back.
        replaced: that forward.
        options: of ``cce.loss``.
        warned: a training step without labels has been met.
        active: False after unpatch, for those who kept the forward of a class.
    """

    original: Callable[..., Any]
    own: bool
    replaced: Any
    options: dict[str, Any] = field(default_factory=dict)
    warned: bool = False
    active: bool = True


def patch(model: Model, **options: Any) -> Model:
    """Lets a causal language model of transformers, or a class of them, train without its logits in memory.

    In training, with labels, the loss is :func:`cce.loss` of the last hidden states and the head's weight; the
    output's ``logits`` are None. Evaluation, ``torch.no_grad()``, generation and calls without labels run the
    unchanged code.

    Args:
        model: a ``PreTrainedModel``, such a model inside PEFT's or DistributedDataParallel's, or a model class, whose
            instances are then all patched, those that exist too.
        **options: of :func:`cce.loss`: ``backend``, ``spec``, ``label_smoothing``, ``z_loss``, ``weight``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: not a model of transformers, or a bad option.
        ValueError: the model cannot be patched, or is already; the message says what is missing. What a model does
            with its logits is seen in the first training step, which raises then.
        ImportError: transformers is not installed, or older than 5.

    Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, ICLR 2025, section 4.

    >>> patch(torch.nn.Linear(2, 3))
    Traceback (most recent call last):
    ...
    TypeError: model: got an instance of Linear, expected a transformers.PreTrainedModel or a class of them
    """
    check_options(options)
    target = find_target(model)
    _check_unpatched(target)
    check_weight(options.get("weight"), None if isinstance(target, type) else find_head(target))
    forward = target.forward
    signature = inspect.signature(forward)
    if "labels" not in signature.parameters:
        raise ValueError(
            f"model: {name_of(target)}.forward has no argument labels, expected a model that computes a loss"
        )
    own = "forward" in vars(target)
    patched = _Patch(_unbound(target, forward), own, vars(target).get("forward"), dict(options))
    wrapper = _wrap(patched, forward, signature)
    _set(target, wrapper if isinstance(target, type) else MethodType(wrapper, target))
    return model


def unpatch(model: Model) -> Model:
    """Undoes :func:`patch`; the class or the instance is exactly what it was before.

    Args:
        model: what was given to ``patch``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: not a model of transformers.
        ValueError: it is not patched, or another library has wrapped the patched forward since.

    >>> unpatch(torch.nn.Linear(2, 3))
    Traceback (most recent call last):
    ...
    TypeError: model: got an instance of Linear, expected a transformers.PreTrainedModel or a class of them
    """
    target = find_target(model)
    patched = _patch_of(vars(target).get("forward"))
    if patched is None:
        if not isinstance(target, type) and _patch_of(type(target).forward) is not None:
            raise ValueError(f"model: {name_of(target)} is patched as a class, expected unpatch({name_of(target)})")
        if any(_patch_of(f) for f in _wrapped(vars(target).get("forward"))):
            raise ValueError(
                f"model: the forward of {name_of(target)} was wrapped after patch, expected the patched one; undo that "
                "first (accelerate: accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
            )
        raise ValueError(f"model: {name_of(target)} is not patched, expected one that is")
    patched.active = not isinstance(target, type)
    if patched.own:
        _set(target, patched.replaced)
    else:
        delattr(target, "forward")
    return model


def _set(target: Target, forward: Any) -> None:
    """Past ``nn.Module.__setattr__``, which is for parameters and modules."""
    if isinstance(target, type):
        target.forward = forward
    else:
        target.__dict__["forward"] = forward


def _patch_of(forward: Any) -> _Patch | None:
    """What is behind ``forward`` if it is a patched one itself."""
    found: _Patch | None = getattr(getattr(forward, "__func__", forward), _MARK, None)
    return found


def _unbound(target: Target, forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` as a function of the model and its arguments."""
    if isinstance(target, type):
        return forward
    if getattr(forward, "__self__", None) is target:
        found: Callable[..., Any] = forward.__func__  # type: ignore[attr-defined]
        return found
    return lambda _, *args, **kwargs: forward(*args, **kwargs)


def _wrap(patched: _Patch, forward: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """A forward with the name, the documentation and the signature of ``forward``: Trainer reads the latter."""
    original = patched.original
    names = [name for name in signature.parameters if name != "self"]
    position = names.index("labels")

    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not patched.active or not (self.training and torch.is_grad_enabled()):
            return original(self, *args, **kwargs)
        if (args[position] if len(args) > position else kwargs.get("labels")) is None:
            _warn_once(patched, type(self).__name__)
            return original(self, *args, **kwargs)
        return _train(self, patched, args, kwargs)

    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(wrapper, name, getattr(forward, name, getattr(wrapper, name)))
    # Not functools.wraps: accelerate's unwrap_model follows __wrapped__ to the end, and would unpatch the model.
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    wrapper.__signature__ = signature.replace(parameters=[own, *parameters])  # type: ignore[attr-defined]
    setattr(wrapper, _MARK, patched)
    return wrapper


@torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
def _train(model: nn.Module, patched: _Patch, args: Any, kwargs: Any) -> Any:
    """The forward without logits; torch.compile passes it by and compiles what it calls, up to the head."""
    head = find_head(model)
    if is_replaced(head):  # by a patched forward whose super().forward this is
        return patched.original(model, *args, **kwargs)
    call = Call(type(model).__name__, patched.options)
    with without_logits(head, call):
        output = patched.original(model, *args, **kwargs)
    return _finished(output, call)


def _finished(output: Any, call: Call) -> Any:
    """``output`` with None where the stand-in was."""
    if not call.losses:
        raise ValueError(
            f"model: {call.owner} got labels but computed no loss from its head's logits by "
            "torch.nn.functional.cross_entropy, expected a causal language model's loss"
        )
    if isinstance(output, tuple):
        return tuple(None if isinstance(x, Logits) else x for x in output)
    # A new one: a ModelOutput's items and attributes are set when it is made.
    return type(output)(**{key: None if isinstance(x, Logits) else x for key, x in output.items()})


def _warn_once(patched: _Patch, owner: str) -> None:
    if patched.warned:
        return
    patched.warned = True
    warnings.warn(
        f"{owner} is patched by cce, but was called in training without labels, so it computes its logits. Trainer "
        "takes the labels away with compute_loss_func, and with label_smoothing_factor: use "
        "patch(model, label_smoothing=...) instead of that.",
        stacklevel=3,
    )


def _check_unpatched(target: Target) -> None:
    patched = next((p for f in _wrapped(vars(target).get("forward")) if (p := _patch_of(f))), None)
    of_class = None if isinstance(target, type) else _patch_of(type(target).forward)
    if patched or of_class:
        options = (patched or of_class).options  # type: ignore[union-attr]
        where = "" if patched else " as a class"
        raise ValueError(
            f"model: {name_of(target)} is patched already{where}, with options {options}; unpatch it first"
        )


def _wrapped(forward: Any) -> Iterator[Any]:
    """``forward`` and the functions inside it."""
    while forward is not None:
        yield forward
        forward = getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)
