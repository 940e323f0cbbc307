"""Calls of the backend by its interface, and the same by dense float64 formulae."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cce.backends.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.resolve import resolve
from cce.backends.triton import TritonBackend
from cce.spec import Spec

BACKEND = TritonBackend()
#: Smallest blocks, so that small problems have several; what is left out is beyond the accuracy of float32.
BLOCKS = {"block_n": 16, "block_v": 16, "threshold": 1e-12}
SPECS = {
    "exact": Spec(filter="none"),
    "filtered": Spec(filter="element", **BLOCKS),
    "filtered by mass, online": Spec(filter="tile", compensate=False, lse_accumulation="online", **BLOCKS),
}


@dataclass(frozen=True)
class Call:
    """A problem with all it takes.

    Attributes:
        inputs, upstream: what the backend reads; the gradients tell which outputs there are.
        spec: or None for one pass, whose weights are ``upstream.g``.
    """

    inputs: Inputs[Tensor]
    upstream: Upstream[Tensor]
    spec: Spec | None
    softcap: float | None = None
    logit_scale: float = 1.0
    prediction: bool = False

    @property
    def problem(self) -> Problem:
        x = self.inputs
        optional = {"entropy": self.upstream.h is not None, "weighted_logit": self.upstream.s is not None}
        names = [name for name, wanted in {**optional, "prediction": self.prediction}.items() if wanted]
        grads = "e,c" if x.bias is None else "e,c,bias"
        return Problem.of(x.e, x.c, x.bias, x.targets, self.softcap, self.logit_scale, ",".join(names), grads)

    def forward(self) -> tuple[Outputs[Tensor], Maps[Tensor], Spec]:
        assert self.spec is not None
        problem = self.problem
        spec = resolve(self.spec, problem)
        assert not BACKEND.unsupported(problem, spec)
        shape, dtype = (spec.tiles(problem.v), problem.n), problem.map_dtype(spec)
        maps = Maps(**{name: torch.empty(shape, dtype=dtype) for name in problem.maps(spec)})
        return BACKEND.forward(self.inputs, problem, spec, maps), maps, spec

    def backward(self, outputs: Outputs[Tensor], maps: Maps[Tensor], spec: Spec) -> Gradients[Tensor]:
        return BACKEND.backward(self.inputs, self.problem, spec, outputs, maps, self.upstream)

    def run(self) -> dict[str, Tensor]:
        """All results by name."""
        if self.spec is None:
            spec = resolve(Spec(), self.problem)
            assert BACKEND.one_pass(self.problem, spec)
            outputs, gradients = BACKEND.loss_and_gradients(self.inputs, self.problem, spec, self.upstream.g)
            if gradients.de is not None:  # as the front end does, with the upstream gradient's factor
                gradients.de.masked_fill_((self.inputs.targets < 0).all(1, keepdim=True), 0)
        else:
            outputs, maps, spec = self.forward()
            gradients = self.backward(outputs, maps, spec)
        return {name: x for name, x in {**vars(outputs), **vars(gradients)}.items() if x is not None}


def loss_of(
    e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None, spec: Spec | None = None, **options: object
) -> Call:
    """The sum of the losses of ``targets`` (N,)."""
    g = (targets >= 0).float()
    return replace(Call(Inputs(e, c, targets[:, None], bias), Upstream(g, g[:, None]), spec), **options)


def dense(call: Call) -> dict[str, Tensor]:
    """The definition, in float64, of what ``call`` computes; of the outputs those per row that are no choice."""
    x, up = call.inputs, call.upstream
    e, c = x.e.double(), x.c.double()
    x_logits = e @ c.T if x.bias is None else e @ c.T + x.bias.double()
    z, slope = x_logits * call.logit_scale, torch.ones_like(x_logits)
    if call.softcap is not None:
        z = call.softcap * torch.tanh(z / call.softcap)
        slope = 1 - (z / call.softcap).square()
        if x.bias is not None:
            z, slope = z.masked_fill(x.bias == -math.inf, -math.inf), slope.masked_fill(x.bias == -math.inf, 0)
    used = (x.targets >= 0).any(1)
    lse = z.logsumexp(1)
    softmax = torch.log_softmax(z, 1)  # NaN in rows of infinite lse
    centre = torch.where(lse.isfinite(), lse, math.nan)
    nll = (centre[:, None] - z.gather(1, x.targets.clamp(min=0))).masked_fill(x.targets < 0, 0)
    p = softmax.exp()
    surprise = torch.where(p == 0, 0, -softmax)
    entropy = (p * surprise).sum(1)
    dz = p * up.a[:, None].double()
    if up.h is not None:
        dz = dz + up.h[:, None].double() * p * (surprise - entropy[:, None])
    for k in range(x.targets.shape[1]):
        at = x.targets[:, k : k + 1]
        dz = dz.scatter_add(1, at.clamp(min=0), torch.where(at >= 0, -up.g[:, k : k + 1].double(), 0))
    dx = torch.where(used[:, None], call.logit_scale * slope * dz, 0)
    kept = torch.where(used[:, None], e, 0)
    found = {"lse": lse, "nll": nll, "entropy": entropy}
    found = {name: torch.where(used if y.ndim == 1 else used[:, None], y, 0) for name, y in found.items()}
    return {**found, "de": torch.where(used[:, None], dx @ c, 0), "dc": dx.T @ kept, "dbias": dx.sum(0)}


def check(call: Call) -> None:
    """Infinities and NaN stand where those of the definition do; the other numbers have float32's accuracy."""
    expected = dense(call)
    logits = call.inputs.e.double() @ call.inputs.c.double().T
    largest = logits.abs().nan_to_num(0, 0, 0).amax().item() * call.logit_scale
    unit = 2 * call.inputs.e.shape[1] * torch.finfo(torch.float32).eps * max(1.0, largest)
    for name, x in call.run().items():
        if name not in expected:
            continue
        y = expected[name]
        x = x.double()
        assert torch.equal(x.isnan(), y.isnan()), f"{name}: NaN at\n{x}\nexpected\n{y}"
        assert torch.equal(x.masked_fill(x.isfinite(), 0).nan_to_num(0), y.masked_fill(y.isfinite(), 0).nan_to_num(0))
        gap, size = ((t).nan_to_num(0, 0, 0).abs().amax().item() for t in (torch.where(y.isfinite(), x - y, 0), y))
        assert gap <= unit * max(1.0, size), f"{name}: off by {gap:.1e}, expected at most {unit * max(1.0, size):.1e}"
