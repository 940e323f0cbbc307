"""A patched forward: the function, its binding to a model, and its state in a pickle."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from cce.integrations.transformers.others import check_forward
from cce.integrations.transformers.state import Patch
from cce.integrations.transformers.step import train, warn_of_logits
from cce.integrations.transformers.targets import Target, check_version, name_of
from cce.integrations.transformers.watch import MARK, Watch, watch_instance

#: Attributes that patch may set in a class; in an instance, the first two.
PLACES = (MARK, "forward", "__reduce_ex__", "__setattr__")


class _Forward:
    # No docstring: help(model.forward) shows the one of the model's forward.
    # Like a MethodType, with two differences. The model is held by a weak reference: a model that holds a method of
    # itself is freed only by the garbage collector, some time after `del model`. And pickle keeps the patch: of a
    # method it keeps only a name, which in the copy would be the class's forward.
    __slots__ = ("__doc__", "__func__", "__weakref__", "_model", "watch")

    def __init__(self, function: Callable[..., Any], model: nn.Module, watch: Watch) -> None:
        self.__doc__ = function.__doc__
        self.__func__ = function
        self._model = weakref.ref(model)
        self.watch = watch

    @property
    def __self__(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise ReferenceError(
                "model: the patched model of this forward no longer exists, expected one that is still referenced; "
                "unpatch a shallow copy (copy.copy) and patch it anew"
            )
        return model

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.__func__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __getattr__(self, name: str) -> Any:
        """Attributes of the function: __name__, __qualname__."""
        return getattr(self.__func__, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        patched = cast(Patch, patch_of(self))
        return restored, (self.__self__, patched.options, patched.before, self.watch)


def bind(model: nn.Module, options: dict[str, Any], watch: Watch) -> _Forward:
    """Patch an instance; the patched forward calls its current one."""
    own = vars(model)
    before = {"forward": own["forward"]} if "forward" in own else {}
    forward = _Forward(wrap(model, before, options), model, watch)
    # Set MARK first: if the function has been made a method (as by accelerate's unwrap_model), a pickle keeps its name,
    # and the copy must be able to find the patched forward by it.
    own.pop("forward", None)
    own.update({MARK: forward, "forward": forward})
    return forward


def restored(model: nn.Module, options: dict[str, Any], before: dict[str, Any], watch: Watch) -> _Forward:
    """Forward of a copy that pickle or deepcopy is making, of which only the class is set so far.

    Raises:
        ValueError: the class, as it is in this process, cannot be patched. ImportError: models of the installed
            transformers cannot be patched.
    """
    check_version()
    vars(model).update(before)
    watch.model = weakref.ref(model)
    return bind(model, options, watch)


def restored_of_class(make: Callable[..., nn.Module], args: Any, options: dict[str, Any]) -> nn.Module:
    """Begin a copy of a patched class's instance: if the class is not patched there, the copy is."""
    model = make(*args)
    if patch_of(type(model).forward) is None:
        restored(model, options, {}, Watch())
    return model


def patch_class(target: type[nn.Module], options: dict[str, Any]) -> None:
    """Patch a class: its forward, the pickling of its instances, and the setting of their attributes.

    Another process may not have patched the class, so copies there are patched themselves. A forward that replaces the
    patched one in an instance is noticed when it is set; one that replaces it in the class, at the next ``train()``.
    """
    before = {name: vars(target)[name] for name in PLACES if name in vars(target)}
    function, reduce_ex, set_attribute = wrap(target, before, options), target.__reduce_ex__, target.__setattr__

    def reduced(self: nn.Module, protocol: Any) -> Any:
        found = reduce_ex(self, protocol)
        if isinstance(found, str) or type(self).forward is not function:  # a subclass with its own forward
            return found
        return restored_of_class, (*found[:2], options), *found[2:]

    def watched(self: nn.Module, name: str, value: Any) -> None:
        set_attribute(self, name, value)
        seen = name in ("forward", "training") and type(self).forward is target.forward
        if seen and getattr(self.forward, "__func__", None) is not function:
            watch_instance(self)

    for name, value in zip(PLACES, (function, function, reduced, watched), strict=True):
        setattr(target, name, value)


def restore(target: Target, patched: Patch) -> None:
    """Restore the attributes of the class or the instance; an attribute that is already gone stays so."""
    patched.active = not isinstance(target, type)
    for name in PLACES:
        if name not in vars(target):
            continue
        if name not in patched.before:
            delattr(target, name)
        elif isinstance(target, type):
            setattr(target, name, patched.before[name])
        else:  # bypass nn.Module.__setattr__, which is for parameters and modules
            vars(target)[name] = patched.before[name]


def patch_of(forward: Any) -> Patch | None:
    """Patch of ``forward`` if it is itself patched, rather than a wrapper that has copied its attributes."""
    function = getattr(forward, "__func__", forward)
    written_here = getattr(function, "__globals__", None) is globals()
    found: Patch | None = getattr(function, MARK, None) if written_here else None
    return found


def wrap(target: Target, before: dict[str, Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Make a forward with the name, documentation and signature of ``target``'s: Trainer reads the signature."""
    forward: Callable[..., Any] = target.forward
    signature = inspect.signature(forward)
    check_forward(name_of(target), forward)
    if "labels" not in signature.parameters:
        raise ValueError(
            f"model: {name_of(target)}.forward has no argument labels, expected a model that computes a loss"
        )
    patched = Patch(_unbound(target, forward), before, options)
    original = patched.original
    position = [name for name in signature.parameters if name != "self"].index("labels")

    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not patched.active or not (self.training and torch.is_grad_enabled()):
            return original(self, *args, **kwargs)
        if (args[position] if len(args) > position else kwargs.get("labels")) is None:
            warn_of_logits(patched, type(self).__name__)
            return original(self, *args, **kwargs)
        return train(self, patched, args, kwargs)

    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(wrapper, name, getattr(forward, name, getattr(wrapper, name)))
    # Not functools.wraps: accelerate's unwrap_model follows __wrapped__ to the end and would unpatch the model.
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    wrapper.__signature__ = signature.replace(parameters=[own, *parameters])  # type: ignore[attr-defined]
    setattr(wrapper, MARK, patched)
    return wrapper


def _unbound(target: Target, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Turn ``forward`` into a function of the model and its arguments."""
    if isinstance(target, type):
        return forward
    if getattr(forward, "__self__", None) is target:
        found: Callable[..., Any] = forward.__func__  # type: ignore[attr-defined]
        return found
    return lambda _, *args, **kwargs: forward(*args, **kwargs)
