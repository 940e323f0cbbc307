"""Runs an option on a backend, through the public interface, against the dense formula in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import cce
from cce import registry
from cce.testing.options import Option, make_data


def check_option(option: Option, backend: str, device: str) -> None:
    """Values and all gradients, or a refusal with the reasons the table shows.

    Raises:
        AssertionError: a wrong number, or another refusal than the backend's declaration.
    """
    problem = option.problem(device)
    reasons = registry.reasons(backend, problem, option.make_spec().resolve(problem))
    if reasons:
        _check_refusal(option, backend, device, reasons)
        return
    data = make_data(option, device)
    found, gradients = _differentiated(_run(option, data, backend, option.make_spec()), data)
    with option.autocasting(device):
        wide = _widened(option, data)
    expected, wanted = _differentiated(dense(option, wide), wide)
    for name, x in {**expected, **wanted}.items():
        _near(name, {**found, **gradients}[name], x, option.tolerance)
    if option.at_least:
        error = _error(gradients["e"], wanted["e"])
        assert error > option.at_least, f"e: relative error {error:.3g}: the filter has no effect"


def dense(option: Option, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same call with the logits in memory, in the dtype of the data."""
    call, shift = option.call, option.call.get("shift", 0)
    z = call.get("logit_scale", 1.0) * F.linear(data["e"], data["c"], data.get("bias"))
    if "softcap" in call:
        z = call["softcap"] * torch.tanh(z / call["softcap"])
    z, t = z[:, : z.shape[1] - shift], data["targets"][:, shift:]
    soft, token_weight = data.get("target_weight"), data.get("token_weight")
    used = t != call.get("ignore_index", -100)
    w = used.to(z.dtype) if soft is None else soft[:, shift:] * used
    t = t.where(used, 0)
    if soft is None:
        t, w, used = t[..., None], w[..., None], used[..., None]
    log_p, lse, used = z.log_softmax(-1), z.logsumexp(-1), used.any(-1)
    if option.outputs:
        entropy = -(log_p.exp() * log_p).sum(-1)
        values = {
            "nll": -(w * log_p.gather(-1, t)).sum(-1),
            "lse": lse * used,
            "entropy": entropy * used,
            "prediction": z.argmax(-1).where(used, -1),
        }
        return {name: values[name] for name in option.outputs}
    classes = data.get("weight", torch.ones_like(z[0, 0]))
    smoothing = call.get("label_smoothing", 0.0)
    target_term = -(w * classes[t] * log_p.gather(-1, t)).sum(-1)
    smooth_term = -(classes * log_p).mean(-1) * used
    losses = (1 - smoothing) * target_term + smoothing * smooth_term + call.get("z_loss", 0.0) * lse**2 * used
    tokens = used.to(z.dtype) if token_weight is None else token_weight[:, shift:] * used
    total = (tokens if soft is not None else tokens * classes[t[..., 0]]).sum()
    losses = losses * tokens
    reduced = {"mean": losses.sum() / total, "sum": losses.sum(), "none": losses}
    return {"loss": reduced[call.get("reduction", "mean")]}


def _run(option: Option, data: dict[str, Tensor], backend: str, spec: cce.Spec) -> dict[str, Tensor]:
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


def _differentiated(outputs: dict[str, Tensor], data: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The outputs, and the gradients of their sum with weights of order 1."""
    rng = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64, device=data["e"].device)
    for x in outputs.values():
        if x.requires_grad:
            weights = torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.device)
            total = total + (weights * x).sum() + x.sum()
    names = [name for name, x in data.items() if x.requires_grad]
    return outputs, dict(zip(names, torch.autograd.grad(total, [data[name] for name in names]), strict=True))


def _widened(option: Option, data: dict[str, Tensor]) -> dict[str, Tensor]:
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
        _run(option, make_data(option, device), backend, option.make_spec())
    except cce.BackendUnavailable as error:
        message = str(error)
    missing = [reason for reason in reasons if reason not in message]
    assert not missing, f"refused without the reasons {missing}: {message}"


def _near(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    error = _error(found, expected)
    assert error <= tolerance, f"{name}: relative error {error:.3g}, allowed {tolerance:.3g}"


def _error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))
