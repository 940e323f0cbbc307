"""The registry of backends, and the choice of the one that runs a problem.

Nothing here imports a kernel framework: a backend's module is loaded when it is first needed, and a module that cannot
be loaded gives a reason, not an ImportError. If another package's backend exits at import, or raises when asked for its
reasons, this is also just a reason why that backend cannot run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from cce import plugins
from cce.backends.base import Backend, OnePass, asks_one_pass
from cce.backends.problem import Problem
from cce.errors import BackendUnavailable
from cce.spec import Spec

#: Backends that ``backend="auto"`` tries, by device and in this order; it takes the first that supports the problem.
#: The reference is an oracle, and other packages' backends are for the user to choose: both run only when named.
AUTO_ORDER = {"cuda": ("triton", "cupy", "torch")}
AUTO_ELSEWHERE = ("torch",)

_BUILT_IN = {
    "triton": "cce.backends.triton:TritonBackend",
    "cupy": "cce.backends.cupy:CupyBackend",
    "numba": "cce.backends.numba:NumbaBackend",
    "torch": "cce.backends.torch:TorchBackend",
    "reference": "cce.reference.backend:ReferenceBackend",
}
_RESERVED = ("", "auto")
_registered: dict[str, Callable[[], Backend]] = {}
generation = 0  #: changes whenever a name comes to stand for another backend
_loaded: dict[str, Backend] = {}


def register_backend(name: str, factory: Callable[[], Backend], *, replace: bool = False) -> None:
    """Add a backend under ``name``.

    Args:
        name: name that users pass as ``backend=``.
        factory: called once, at first use, without arguments; usually the :class:`Backend` subclass itself.
        replace: allow an existing name.

    Raises:
        TypeError: ``name`` is not a string, or ``factory`` is not callable.
        ValueError: ``name`` is empty, "auto", or taken while ``replace`` is False.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {name!r} of type {type(name).__name__}, expected a string")
    if name in _RESERVED:
        raise ValueError(f"name: got {name!r}, expected a non-empty name other than 'auto'")
    if not callable(factory):
        raise TypeError(f"factory: got {factory!r}, expected a callable that returns a Backend")
    if name in list_backends() and not replace:
        raise ValueError(f"name: a backend called {name!r} exists already, expected another name or replace=True")
    _registered[name] = factory
    _forget(name)


def unregister_backend(name: str) -> None:
    """Remove a backend added by :func:`register_backend`; ValueError if there is none with this name."""
    if not isinstance(name, str):
        raise TypeError(f"name: got {name!r} of type {type(name).__name__}, expected a string")
    if name not in _registered:
        raise ValueError(f"name: got {name!r}, expected one of {sorted(_registered)}")
    del _registered[name]
    _forget(name)


def _forget(name: str) -> None:
    global generation
    _loaded.pop(name, None)
    generation += 1


def list_backends() -> list[str]:
    """Names of all backends: built-in ones, those of entry points, and registered ones.

    >>> "torch" in list_backends()
    True
    """
    added = (name for name in plugins.entry_points() if name not in _RESERVED)
    return list(dict.fromkeys([*_BUILT_IN, *added, *_registered]))


def passed_over() -> dict[str, list[str]]:
    """Entry points that are not backends because of their names, with the reason."""
    return {
        f"{name} ({plugins.distribution(point)})": [f"an entry point cannot be called {name!r}, which is taken by cce"]
        for name, points in plugins.entry_points().items()
        if name in _RESERVED or name in _BUILT_IN
        for point in points
    }


def check_name(name: object) -> None:
    """Raise ValueError or TypeError if ``name`` is neither "auto" nor a backend's name."""
    if not isinstance(name, str):
        raise TypeError(f"backend: got {name!r} of type {type(name).__name__}, expected a string")
    if name != "auto" and name not in list_backends():
        raise ValueError(f"backend: got {name!r}, expected 'auto' or one of {', '.join(map(repr, list_backends()))}")


def load(name: str) -> Backend:
    """Return the backend called ``name``, imported on first use.

    Raises:
        BackendUnavailable: its module, or a package it needs, cannot be loaded.
    """
    if name not in _loaded:
        try:
            backend = _factory(name)()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # anything a third party's import raises is a reason, not a crash of ours
            raise BackendUnavailable(f"backend {name!r} cannot be loaded: {described(error)}") from error
        if not isinstance(backend, Backend):
            raise BackendUnavailable(f"backend {name!r} is a {type(backend).__name__}, not a cce Backend")
        _loaded[name] = backend
    return _loaded[name]


def reasons(name: str, problem: Problem, spec: Spec) -> list[str]:
    """Reasons why backend ``name`` cannot run ``problem``; empty if it can."""
    try:
        backend = load(name)
    except BackendUnavailable as error:
        return [str(error)]
    found = refusals(backend, problem, spec)
    ours = name in _BUILT_IN and name not in _registered
    if found or ours or not asks_one_pass(problem):
        return found
    try:
        steps = backend.one_pass(problem, spec)  # as the front end will ask
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return [f"its method one_pass raised {described(error)}"]
    if steps is None or isinstance(steps, OnePass):
        return []
    return [f"its method one_pass returned a {type(steps).__name__}, expected a cce.backends.base.OnePass or None"]


def refusals(backend: Backend, problem: Problem, spec: Spec) -> list[str]:
    """Reasons why a backend cannot run ``problem``: those from the environment first, then those from the problem."""
    return [*_reasons_of(backend, "unavailable", problem.device), *_reasons_of(backend, "unsupported", problem, spec)]


def _reasons_of(backend: Backend, method: str, *arguments: Any) -> list[str]:
    try:
        found = getattr(backend, method)(*arguments)
        if isinstance(found, (list, tuple)) and all(isinstance(reason, str) for reason in found):
            return list(found)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return [f"its method {method} raised {described(error)}"]
    return [f"its method {method} returned a {type(found).__name__}, expected a list of strings"]


def note(name: str, problem: Problem, spec: Spec) -> str:
    """Note of the loaded backend ``name`` on how it would run ``problem``."""
    try:
        return str(load(name).note(problem, spec))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return f"(the backend's method note raised {described(error)})"


def described(error: BaseException) -> str:
    """Describe an error from any code by its type and text."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def choose_name(name: str, problem: Problem, spec: Spec) -> str:
    """Name of the backend that runs ``problem``: the one given, or for "auto" the first able one in ``AUTO_ORDER``.

    Raises:
        BackendUnavailable: it cannot; the message lists the reasons of every backend tried.
    """
    check_name(name)
    tried = {}
    for candidate in AUTO_ORDER.get(problem.device, AUTO_ELSEWHERE) if name == "auto" else (name,):
        tried[candidate] = reasons(candidate, problem, spec)
        if not tried[candidate]:
            return candidate
    lines = [f"  {candidate}: {reason}" for candidate, found in tried.items() for reason in found]
    raise BackendUnavailable("\n".join([f"no backend can run {problem} with {spec}:", *lines]))


def _factory(name: str) -> Callable[[], Backend]:
    if name in _registered:
        return _registered[name]
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    return plugins.load(name)
