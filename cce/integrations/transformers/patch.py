"""``patch`` and ``unpatch``: a model's forward that computes its loss without the logits."""

from __future__ import annotations

from typing import Any, TypeVar

from cce.integrations.transformers.forward import bind, patch_class, patch_of, restore
from cce.integrations.transformers.heads import find_head
from cce.integrations.transformers.others import check_loss, described
from cce.integrations.transformers.targets import Target, check_options, check_weight, find_target, name_of
from cce.integrations.transformers.watch import MARK, Watch, is_inside

Model = TypeVar("Model")


def patch(model: Model, **options: Any) -> Model:
    """Patch a causal language model of transformers, or a class of them, to train without its logits in memory.

    In training, with labels, the loss is :func:`cce.loss` of the last hidden states and the head's weight; the
    output's ``logits`` are None. Evaluation, ``torch.no_grad()``, generation and calls without labels run the
    unchanged code.

    Args:
        model: a ``PreTrainedModel``, such a model inside PEFT's or DistributedDataParallel's wrapper, or a model class,
        all of whose instances are then patched, including existing ones. **options: options of :func:`cce.loss`:
            ``backend``, ``spec``, ``label_smoothing``, ``z_loss``, ``weight``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a model of transformers, or an option is bad.
        ValueError: the model cannot be patched, or already is; the message says what is missing. Unsupported operations
            on the logits only show in the first training step, which then raises.
        ImportError: transformers is not installed, or older than 5.

    Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, ICLR 2025, section 4.

    >>> import torch
    >>> patch(torch.nn.Linear(2, 3))
    Traceback (most recent call last):
    ...
    TypeError: model: got an instance of Linear, expected a transformers.PreTrainedModel or a class of them
    """
    check_options(options)
    target = find_target(model)
    _check_unpatched(target)
    check_weight(options.get("weight"), None if isinstance(target, type) else find_head(target))
    check_loss()
    if isinstance(target, type):
        patch_class(target, dict(options))
    else:
        bind(target, dict(options), watch := Watch())
        watch.attach(target)
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`; the class or the instance is then exactly what it was before.

    Args:
        model: the argument given to ``patch``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a model of transformers.
        ValueError: it is not patched, or another library has wrapped the patched forward since.

    >>> import torch
    >>> unpatch(torch.nn.Linear(2, 3))
    Traceback (most recent call last):
    ...
    TypeError: model: got an instance of Linear, expected a transformers.PreTrainedModel or a class of them
    """
    target = find_target(model)
    forward = vars(target).get(MARK)
    if forward is None:
        if not isinstance(target, type) and patch_of(type(target).forward) is not None:
            raise ValueError(f"model: {name_of(target)} is patched as a class, expected unpatch({name_of(target)})")
        raise ValueError(f"model: {name_of(target)} is not patched, expected one that is")
    _check_in_place(target, forward)
    if not isinstance(target, type):
        forward.watch.remove()
    restore(target, getattr(forward, MARK))
    return model


def _check_in_place(target: Target, patched: Any) -> None:
    """Check that nothing else has replaced or wrapped the patched forward: it would stay, or be lost."""
    found = vars(target).get("forward")
    if found is None or patch_of(found) is getattr(patched, MARK):
        return
    if is_inside(patched, found):
        raise ValueError(
            f"model: the forward of {name_of(target)} was wrapped after patch, expected the patched one; undo that "
            "first (accelerate: accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
        )
    remedy = "set that back" if isinstance(target, type) else "undo that first: `del model.forward` restores it"
    raise ValueError(
        f"model: the forward of {name_of(target)} was replaced after patch, by {described(found)}, expected the "
        f"patched one; {remedy}"
    )


def _check_unpatched(target: Target) -> None:
    own, of_class = vars(target).get(MARK), None if isinstance(target, type) else patch_of(type(target).forward)
    patched = getattr(own, MARK, of_class)
    if patched is not None:
        where = " as a class" if own is None else ""
        raise ValueError(
            f"model: {name_of(target)} is patched already{where}, with options {patched.options}; unpatch it first"
        )
