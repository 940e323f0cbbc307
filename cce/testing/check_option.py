"""Runs an option on a backend, through the public interface, against the dense formula in float64."""

from __future__ import annotations

import torch
from torch import Tensor

import cce
from cce import registry
from cce.backends.resolve import resolve
from cce.testing.definition import dense
from cce.testing.options import Option, make_data


def check_option(option: Option, backend: str, device: str) -> None:
    """Values and all gradients, or a refusal with the reasons the table shows.

    Raises:
        AssertionError: a wrong number, or another refusal than the backend's declaration.
    """
    problem = option.problem(device)
    reasons = registry.reasons(backend, problem, resolve(option.make_spec(), problem))
    if reasons:
        _check_refusal(option, backend, device, reasons)
        return
    data = make_data(option, device)
    outputs = run_option(option, data, backend, option.make_spec())
    upstream = make_upstream(outputs)
    found, gradients = outputs, differentiate(outputs, data, upstream)
    with option.autocasting(device):
        wide = widened(option, data)
    expected = dense(option.call, wide, option.outputs)
    wanted = differentiate(expected, wide, upstream)
    for name, x in {**expected, **wanted}.items():
        near(name, {**found, **gradients}[name], x, option.tolerance)
    if option.at_least:
        error = _error(gradients["e"], wanted["e"])
        assert error > option.at_least, f"e: relative error {error:.3g}: the filter has no effect"


def run_option(option: Option, data: dict[str, Tensor], backend: str, spec: cce.Spec) -> dict[str, Tensor]:
    """Run the call, and return its results by name: "loss", or the outputs."""

    def call(e: Tensor, c: Tensor, targets: Tensor, **tensors: Tensor) -> dict[str, Tensor]:
        options = {**option.call, **tensors, "backend": backend, "spec": spec}
        if not option.outputs:
            return {"loss": cce.loss(e, c, targets, **options)}
        found = cce.terms(e, c, targets, outputs=option.outputs, **options)
        return {name: getattr(found, name) for name in option.outputs}

    if option.compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    with option.autocasting(data["e"].device.type):
        return call(**data)


def make_upstream(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gradient of order 1 for every output that has one."""
    rng = torch.Generator().manual_seed(7)
    found = {}
    for name, x in outputs.items():
        if x.requires_grad:
            found[name] = (1 + torch.randn(x.shape, generator=rng, dtype=torch.float64)).to(x.device, x.dtype)
    return found


def differentiate(
    outputs: dict[str, Tensor], data: dict[str, Tensor], upstream: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The gradients of all tensors of ``data`` that have one."""
    leaves = {name: x for name, x in data.items() if x.requires_grad}
    roots = [outputs[name] for name in upstream]
    grads = [x.to(root.dtype) for x, root in zip(upstream.values(), roots, strict=True)]
    return dict(zip(leaves, torch.autograd.grad(roots, list(leaves.values()), grads), strict=True))


def widened(option: Option, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers as leaves in float64, rounded first where autocast rounds them."""
    found = {}
    for name, x in data.items():
        wide = x.detach()
        if option.autocast is not None and name in ("e", "c", "bias"):
            wide = wide.to(option.autocast)
        found[name] = wide.double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
    return found


def _check_refusal(option: Option, backend: str, device: str, reasons: list[str]) -> None:
    message = "nothing was raised"
    try:
        run_option(option, make_data(option, device), backend, option.make_spec())
    except cce.BackendUnavailable as error:
        message = str(error)
    missing = [reason for reason in reasons if reason not in message]
    assert not missing, f"refused without the reasons {missing}: {message}"


def near(name: str, found: Tensor, expected: Tensor, tolerance: float, size: float = 0.0) -> None:
    """Raises AssertionError if the error of a tensor, relative to its norm or to ``size``, is larger than allowed."""
    assert found.shape == expected.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    error = _error(found, expected, size)
    assert error <= tolerance, f"{name}: relative error {error:.3g}, allowed {tolerance:.3g}"


def _error(found: Tensor, expected: Tensor, size: float = 0.0) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=max(size, 1e-30)))
