"""Runs one plan: the call itself, the formula, and what is wrong with their difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import dense
import torch
from compare import compare
from noise import Noise, logit_error, product_error
from plan import Plan
from recipes import RECIPES
from tensors import DTYPES, Made, lay, make
from torch import Tensor

import cce

KERNELS = ("triton", "cupy", "numba")
FILTERED = "spec: a filter with a gradient of lse or entropy"


@dataclass
class Outcome:
    """What became of a call.

    Attributes:
        failures: one line a quantity that is wrong; empty if none is.
        refused: the reasons of a backend that cannot run it.
    """

    failures: list[str] = field(default_factory=list)
    refused: str = ""


def run(plan: Plan, backend: str, device: str = "cpu") -> Outcome:
    """Runs a call and compares values, gradients, and the places of NaN and inf with the formula's."""
    made = make(plan, device)
    try:
        results, prediction, grads = _results(plan, made, backend)
    except cce.BackendUnavailable as error:
        return Outcome(refused=str(error))
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("spec: got filter=") and _unfiltered(plan):
            return Outcome(refused=f"  {backend}: {FILTERED}")
        return Outcome([f"raised {type(error).__name__}: {str(error)[:300]}"])
    found = {**{f"value {i}": x.detach() for i, x in enumerate(results)}, **{f"d{n}": g for n, g in grads.items()}}
    if plan.call in ("comp_sum", "ppo", "grpo") and bool(torch.isinf(results[0]).any()):
        found = {"value 0": results[0].detach()}  # an exponential overflows; where its gradient does is not defined
    failures = _shapes(made, found)
    found = {name: x.detach().cpu() for name, x in found.items()}
    failures += compare(found, partial(_formula, plan, made), partial(_noise, plan, made, backend in KERNELS))
    if prediction is not None:
        failures += _prediction(plan, made, prediction.cpu())
    failures += [f"{name}: written to" for name in made.written()]
    return Outcome(failures + _beside(plan, made, backend))


def _unfiltered(plan: Plan) -> bool:
    """Gradients of an lse or an entropy are wanted under a filter, which is refused."""
    o = plan.options
    asks = {"lse", "entropy"} & set(o.get("outputs", ())) or o.get("entropy_coefficient") or o.get("top_entropy", 1) < 1
    return bool(plan.spec and plan.spec["filter"] != "none" and plan.wants and (asks or plan.call == "z_loss"))


def _arguments(plan: Plan, made: Made) -> tuple[list[Tensor], dict[str, Any]]:
    """Positional and keyword arguments of the function called."""
    tensors = dict(made.tensors)
    names = [name for name in ("e", "c", "targets") if name in tensors]
    positional = [tensors.pop(name) for name in names]
    options = {**plan.options, **tensors}
    if "head_weight" in options and plan.values % 2:
        options["head_weight"] = options["head_weight"].tolist()
    spec = dict(plan.spec or {})
    if spec.get("vocab_order") == "given":
        entries = plan.lead[0] if plan.call in ("clip_contrastive", "nt_xent") else plan.v
        order = torch.randperm(entries, generator=torch.Generator().manual_seed(plan.values))
        laid = lay(order.to(positional[0].device), plan.layouts.get("c", "plain"))[0]
        spec["vocab_order"] = laid if sorted(laid.tolist()) == list(range(entries)) else order
    if plan.spec is not None:
        options["spec"] = cce.Spec(**spec)
    return positional, options


def _function(plan: Plan, positional: list[Tensor], options: dict[str, Any]) -> Callable[[], Any]:
    if plan.call != "module":
        f = getattr(cce, plan.call) if plan.call in ("loss", "terms") else getattr(cce.losses, plan.call)
        return partial(f, *positional, **options)
    e, c, targets = positional
    bias = options.pop("bias", None)
    weights = {name: options.pop(name) for name in ("token_weight", "target_weight") if name in options}
    head = cce.LinearCrossEntropy(
        c.shape[1], c.shape[0], bias=bias is not None, device=c.device, dtype=c.dtype, **options
    )
    # Views with the layouts and gradients of the plan in the parameters' places.
    for name, x in (("weight", c), ("bias", bias)):
        if x is not None:
            del head._parameters[name]
            setattr(head, name, x)
    return partial(head, e, targets, **weights)


def _results(plan: Plan, made: Made, backend: str) -> tuple[list[Tensor], Tensor | None, dict[str, Tensor]]:
    positional, options = _arguments(plan, made)
    f = _function(plan, positional, {**options, "backend": backend})
    found = f()
    if plan.values % 5 == 0:  # another way may be taken the second time
        found = f()
    prediction = getattr(found, "prediction", None)
    outputs = [found]
    if plan.call == "terms":
        outputs = [getattr(found, name) for name in plan.options["outputs"] if name != "prediction"]
    elif plan.call == "evaluate":
        outputs = [found.nll, found.loss, found.perplexity]
    wanted = {name: x for name, x in made.tensors.items() if x.requires_grad}
    differentiable = [x for x in outputs if x.requires_grad]
    if wanted and outputs and not differentiable and {"e", "c"} & set(wanted):
        raise AssertionError("no result requires a gradient")
    if not differentiable:
        return outputs, prediction, {}
    arriving = [upstream(plan, i, x) for i, x in enumerate(outputs) if x.requires_grad]
    again = plan.values % 7 == 0
    grads = torch.autograd.grad(differentiable, list(wanted.values()), arriving, allow_unused=True, retain_graph=again)
    if again:
        second = torch.autograd.grad(differentiable, list(wanted.values()), arriving, allow_unused=True)
        for name, x, y in zip(wanted, grads, second, strict=True):
            same = x is None or torch.equal(x.nan_to_num(), y.nan_to_num())
            assert same, f"d{name}: another value in a second backward"
    pairs = zip(wanted.items(), grads, strict=True)
    return outputs, prediction, {n: torch.zeros_like(x) if g is None else g for (n, x), g in pairs}


def upstream(plan: Plan, place: int, x: Tensor) -> Tensor:
    """The gradient that arrives at output ``place``, of the dtype and device of ``x``."""
    g = torch.Generator().manual_seed(plan.values + 17 * place + 1)
    found = torch.randn(x.shape, generator=g).to(x)
    if plan.upstream == "expanded":
        return torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape)
    if plan.upstream in ("ones", "zero"):
        return torch.full_like(x, plan.upstream == "ones")
    if plan.upstream == "nan" and x.numel():
        found.view(-1)[plan.values % x.numel()] = torch.nan
    elif plan.upstream == "strided":
        return lay(found, ("strided", "transposed")[plan.values % 2])[0]
    return found


def _noise(plan: Plan, made: Made, apart: bool, generator: torch.Generator | None = None) -> Noise:
    e, c = (made.tensors[name].dtype for name in ("e", "c"))
    spec, problem = plan.spec or {}, e if plan.call == "nt_xent" else torch.promote_types(e, c)
    results, skipped = DTYPES[spec.get("accumulate", "float32")], spec.get("threshold", 0.0)
    plain = plan.call in ("loss", "module", "multi_token", "multi_codebook")
    one_pass = apart and plain and plan.options.get("reduction", "mean") != "none"
    return Noise(problem, generator, results, skipped, apart, one_pass, e=e, c=c)


def _formula(plan: Plan, made: Made, noise: Noise) -> dict[str, Tensor]:
    """Values and gradients in float64."""
    t = made.float64()
    for name, x in made.tensors.items():
        if x.requires_grad:
            t[name].requires_grad_()
    formulae = {"loss": dense.loss, "module": dense.loss, "terms": dense.terms}
    formula = formulae.get(plan.call) or RECIPES[plan.call].formula
    outputs = formula(t, plan.options, noise)
    found = {f"value {i}": x.detach() for i, x in enumerate(outputs)}
    wanted = {name: x for name, x in t.items() if x.requires_grad}
    differentiable = [(i, x) for i, x in enumerate(outputs) if x.requires_grad]
    if wanted and differentiable:
        arriving = [upstream(plan, i, x.detach().to(noise.results)).double() for i, x in differentiable]
        grads = torch.autograd.grad([x for _, x in differentiable], list(wanted.values()), arriving, allow_unused=True)
        found |= {f"d{n}": torch.zeros_like(wanted[n]) if g is None else g for n, g in zip(wanted, grads, strict=True)}
    return found


def _shapes(made: Made, found: dict[str, Tensor]) -> list[str]:
    """Gradients of another shape or dtype than their tensor's."""
    pairs = [(name, x, made.tensors[name[1:]]) for name, x in found.items() if name[0] == "d"]
    return [
        f"{name}: got {tuple(x.shape)} {x.dtype}, expected {tuple(of.shape)} {of.dtype}"
        for name, x, of in pairs
        if (x.shape, x.dtype) != (of.shape, of.dtype)
    ]


def _prediction(plan: Plan, made: Made, found: Tensor) -> list[str]:
    """The largest logit, up to what two logits may err; -1 where ignored."""
    problem = torch.promote_types(made.tensors["e"].dtype, made.tensors["c"].dtype)
    noise = Noise(problem, torch.Generator().manual_seed(0))
    t = made.float64()
    tokens = dense.Tokens(t, plan.options, Noise(problem))
    if found.shape != tokens.shape or bool((found.masked_fill(tokens.in_use, -1) != -1).any()):
        return [f"prediction: got {found.tolist()}, expected shape {tuple(tokens.shape)} and -1 where ignored"]
    at = found.reshape(-1)[tokens.rows]
    if not at.numel():
        return []
    if int(at.min()) < 0 or int(at.max()) >= plan.v:
        return [f"prediction: got {at.tolist()}, expected entries of range({plan.v})"]
    delta = product_error(tokens.e, tokens.c, t.get("bias"), noise)
    error = logit_error(delta, tokens.z, tokens.scale, tokens.softcap, noise)
    z, most = tokens.z.gather(1, at[:, None])[:, 0], tokens.z.amax(1)
    wrong = (z + 2 * error.nan_to_num(0, 0, 0).amax(1) < most) & torch.isfinite(most)
    return [
        f"prediction: row {int(i)} got entry {int(at[i])} of logit {z[i]:.9g}, the largest is {most[i]:.9g}"
        for i in wrong.nonzero()[:1]
    ]


def _beside(plan: Plan, made: Made, backend: str) -> list[str]:
    """``cce.explain`` and ``cce.live_fraction`` of the same arguments: they answer."""
    if plan.call != "loss" or plan.values % 4:
        return []
    positional, options = _arguments(plan, made)
    failures = []
    try:
        explained = str(cce.explain(*positional, **options, backend=backend))
        failures += [] if explained else ["explain: said nothing"]
        if "target_weight" not in options:
            names: Sequence[str] = ("bias", "spec", "ignore_index", "softcap", "logit_scale")
            live = cce.live_fraction(*positional, **{n: options[n] for n in names if n in options}, backend=backend)
            exact = plan.spec is not None and plan.spec["filter"] == "none"
            if not 0 <= live <= 1 or (exact and live != 1):
                failures.append(f"live_fraction: got {live}")
    except cce.BackendUnavailable:
        pass
    except Exception as error:
        failures.append(f"explain or live_fraction raised {type(error).__name__}: {str(error)[:200]}")
    return failures
