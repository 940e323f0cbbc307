"""The decision of what a call is and how it runs: made once for each kind of call, and kept.

A call travels through the operators as its ``key``. With the shapes and dtypes of the tensors beside it, the key leads
back to the same :class:`Call`, so that the forward and the backward of a loss cannot disagree: once the front end has
decided, the key holds the chosen backend's name and the resolved spec. Compiled code holds the key of what was asked
for, and decides when it runs.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cce import registry
from cce.backends.base import Backend, OnePass, asks_one_pass
from cce.backends.problem import Problem
from cce.backends.resolve import resolve
from cce.backends.shared.weighted_logit import finest_dtype
from cce.distributed.join import Part
from cce.frontend import tracing
from cce.spec import Spec

_MOST = 256  # kinds kept; a training step has one
_SIMPLE = frozenset({int, float, str, type(None)})


class Request(NamedTuple):
    """The part of a call that is not a tensor, as numbers and strings.

    Attributes:
        backend: a name, or "auto".
        spec: its key.
        softcap, logit_scale: as in :class:`Problem`.
        outputs: comma-separated, those of ``EXTRA_OUTPUTS`` that are wanted.
        grads: comma-separated, those of "e", "c" and "bias" a gradient may be wanted for.
        part: key of the part of the vocabulary that ``c`` is, or "". Targets are counted over the whole.
        decided: which backends there were when the backend and the spec were chosen; None if they still have to be.
    """

    backend: str
    spec: str
    softcap: float | None
    logit_scale: float
    outputs: str
    grads: str
    part: str = ""
    decided: int | None = None

    @property
    def key(self) -> str:
        """The fields as Python literals, one after the other; in a form that torch.compile can trace, too."""
        numbers = f"{self.softcap!r}, {self.logit_scale!r}"
        names = f"{self.outputs!r}, {self.grads!r}, {self.part!r}"
        return f"{self.backend!r}, {self.spec!r}, {numbers}, {names}, {self.decided!r}"

    @staticmethod
    @lru_cache(maxsize=_MOST)
    def from_key(key: str) -> Request:
        """The request whose key this is."""
        return Request(*ast.literal_eval(f"({key},)"))


class Results(NamedTuple):
    """Sizes and dtypes of the results of a call's operator.

    Attributes:
        outputs: those of ``EXTRA_OUTPUTS`` that are wanted.
        wide: dtype of most outputs, the accumulation dtype.
        fine: dtype of the weighted logit.
        maps: names of the maps that the backward will read.
        map_dtype, tiles: of the maps.
        order: entries of the vocabulary order that the operator makes; 0 if it makes none.
    """

    outputs: frozenset[str]
    wide: torch.dtype
    fine: torch.dtype
    maps: frozenset[str]
    map_dtype: torch.dtype
    tiles: int
    order: int

    @classmethod
    def of(cls, problem: Problem, spec: Spec, device: torch.device) -> Results:
        """The results of a problem; sizes may be symbols."""
        wide, order = getattr(torch, str(spec.accumulate)), problem.v if spec.vocab_order == "mean_logit" else 0
        maps, map_dtype = problem.maps(spec), problem.map_dtype(spec)
        fine = finest_dtype(device)
        return cls(problem.outputs, wide, fine, maps, map_dtype, spec.tiles(problem.v) if maps else 0, order)


@dataclass(frozen=True)
class Call:
    """A decided call.

    Attributes:
        key: leads here, with the tensors' shapes and dtypes.
        problem: metadata of all rows, ignored ones too.
        spec: resolved; a permutation travels beside it.
        backend: the one that runs it.
        part: the part of the vocabulary that ``c`` is, or None.
        results: sizes and dtypes of what the operator returns.
        one_pass: computes the gradients of a mean or sum of plain losses along with it, where that is faster.
        generation: of the backends there are (``registry.generation``).
    """

    key: str
    problem: Problem
    spec: Spec
    backend: Backend
    part: Part | None
    results: Results
    one_pass: OnePass | None
    generation: int

    @cached_property
    def request(self) -> Request:
        """The request that leads back to this call, with nothing left to choose."""
        return Request.from_key(self.key)

    def stale(self, key: str) -> bool:
        """Whether a call asked for by ``key`` must be decided anew because the set of backends has changed."""
        return key != self.key and self.generation != registry.generation

    @cached_property
    def gradient_bytes(self) -> int:
        """Size of all gradients that may be wanted."""
        p = self.problem
        sizes = ((p.grad_e, p.n * p.d * p.e_dtype.itemsize), (p.grad_c, p.v * p.d * p.c_dtype.itemsize))
        return sum(size for wanted, size in sizes if wanted) + 4 * p.v * p.grad_bias

    @cached_property
    def grads(self) -> str:
        """Names of the gradients that may be wanted, comma-separated."""
        p = self.problem
        return ",".join(name for name, x in (("e", p.grad_e), ("c", p.grad_c), ("bias", p.grad_bias)) if x)

    def problem_of(self, n: int, wanted: str | None) -> Problem:
        """The call's problem for ``n`` rows in use and the gradients ``wanted`` (None: all that the call may want)."""
        p = self.problem
        if wanted is None or wanted == self.grads:
            return p if p.n == n else replace(p, n=n)
        names = wanted.split(",")
        return replace(p, n=n, grad_e="e" in names, grad_c="c" in names, grad_bias="bias" in names)


_calls: dict[tuple[Any, ...], Call] = {}


def decide(e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, key: str) -> Call:
    """The call of these tensors whose request has this ``key``.

    Args:
        e: (M, D). c: (V, D). bias: (V,) or None.
        targets: (M, K).
        key: of a :class:`Request`.

    Raises:
        BackendUnavailable: no backend can run it; all reasons are listed.
    """
    # Reasons may depend on which GPU it is.
    kind = (key, targets.shape, c.shape, e.dtype, c.dtype, e.device, bias is None)
    call = _calls.get(kind)
    if call is None or call.stale(key):
        call = _decided(e, c, bias, targets, Request.from_key(key))
        _keep(_calls, kind, call)
        _keep(_calls, (call.key, *kind[1:]), call)
    return call


def described(
    e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, request: Request
) -> tuple[Problem, Spec, Part | None]:
    """Metadata, resolved spec and part of a call whose backend is still to be chosen; sizes may be symbols."""
    r, part = request, Part.from_key(request.part)
    problem = Problem.of(e, c, bias, targets, r.softcap, r.logit_scale, r.outputs, r.grads)
    return problem, resolve(Spec.from_key(r.spec), problem, None if part is None else part.total), part


def _decided(e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, request: Request) -> Call:
    problem, spec, part = described(e, c, bias, targets, request)
    name, backend, generation = request.backend, None, registry.generation
    if request.decided is not None:  # a call that was forgotten: its backend is what the name stood for then
        generation = request.decided
        backend = _chosen.get((name, generation))
    if backend is None:
        name = registry.choose_name(name, problem, spec)
        backend = _chosen[name, generation] = registry.load(name)
    key = request._replace(backend=name, spec=spec.key, decided=generation).key
    one_pass = backend.one_pass(problem, spec) if part is None and asks_one_pass(problem) else None
    return Call(key, problem, spec, backend, part, Results.of(problem, spec, e.device), one_pass, generation)


#: Backends that calls were decided for, by name and ``registry.generation``: one for each registration.
_chosen: dict[tuple[str, int], Backend] = {}

Kind = tuple[Any, ...]
_known: dict[Kind, Call] = {}


def kind_of(e: Any, c: Any, targets: Any, bias: Any, spec: Any, options: tuple[Any, ...]) -> Kind | None:
    """Everything that the checks and the decision of a call depend on; None if a key cannot capture all of it.

    Few rows take a GPU less than a millisecond, and the checks, which look at nothing but types, shapes, dtypes and
    options, a quarter of that: a kind of call is checked once. The values of the targets are checked in every call.

    Args:
        e, c, targets, bias, spec: as :func:`cce.loss` was given them.
        options: its other arguments; numbers and names.
    """
    types = tuple(map(type, options))
    if not isinstance(e, Tensor) or tracing.traced(e) or not _SIMPLE.issuperset(types):
        return None
    if tracing.active() or torch.is_autocast_enabled(e.device.type):
        return None
    found: list[Any] = [registry.generation, torch.is_grad_enabled(), options, types]
    for x in (e, c, targets, bias):
        if x is None:
            found.append(None)
        elif type(x) in tracing.PLAIN:
            found += (x.shape, x.dtype, x.device, x.layout, x.requires_grad)
        else:
            return None
    if spec is not None:
        if type(spec) is not Spec or spec.permutation is not None:
            return None
        found.append(spec.key)
    return tuple(found)


def recall(kind: Kind | None) -> Call | None:
    """The decided call of an earlier one of this kind, whose arguments were good; None if there was none."""
    return None if kind is None else _known.get(kind)


def remember(kind: Kind | None, call: Call | None) -> None:
    """Make :func:`recall` know the kind of a call whose arguments are good."""
    if kind is not None and call is not None:
        _keep(_known, kind, call)


def _keep(table: dict[tuple[Any, ...], Call], kind: tuple[Any, ...], call: Call) -> None:
    while len(table) >= _MOST:
        table.pop(next(iter(table)), None)  # the oldest; another thread may have been faster
    table[kind] = call
