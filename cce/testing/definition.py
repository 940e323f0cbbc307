"""The definition of a call: PyTorch's dense formula, in the dtype of the data (float64 in the kit), with all logits.

Where NaN and infinities stand is part of it: ignored tokens are left out before anything is computed, 0 times an
infinity is NaN, a row without a finite logit or with an infinite one has no softmax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def dense(call: Mapping[str, Any], data: Mapping[str, Tensor], outputs: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Dense results of ``cce.loss``, as "loss", or the ``outputs`` of ``cce.terms``.

    Args:
        call: options of either, but for backend and spec.
        data: e (..., D), c (V, D), targets, and those of bias, weight, token_weight and target_weight that are given.
    """
    shift, ignored = call.get("shift", 0), call.get("ignore_index", -100)
    e, t = _before(data["e"], shift, data["e"].ndim - 2), _after(data["targets"], shift, data["e"].ndim - 2)
    named = t != ignored
    soft = "target_weight" in data
    used = named.any(-1) if soft else named
    z = logits(call, e[used], data["c"], data.get("bias"))  # (rows, V)
    t, named = t[used], named[used]
    w = _after(data["target_weight"], shift, e.ndim - 2)[used] if soft else None
    t, named = (t, named) if soft else (t[:, None], named[:, None])
    t = t.where(named, 0)
    rows = _terms(z, t, named, w, outputs) if outputs else {"loss": _losses(call, data, z, t, named, w)}
    if outputs:
        return {name: _placed(x, used, -1 if name == "prediction" else 0) for name, x in rows.items()}
    return {"loss": _reduced(call, data, rows["loss"], t, used, soft, shift)}


def logits(call: Mapping[str, Any], e: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """(..., V) ``z = softcap tanh(logit_scale (e c^T + bias) / softcap)``, and -inf where the bias is."""
    z = call.get("logit_scale", 1.0) * F.linear(e, c, bias)
    if call.get("softcap") is None:
        return z
    z = call["softcap"] * torch.tanh(z / call["softcap"])
    # A mask is added, not filled in: where a row has no softmax, its NaN reaches the masked entries.
    return z if bias is None else z + torch.zeros_like(bias).masked_fill(bias == -torch.inf, -torch.inf)


class _LogSumExp(torch.autograd.Function):
    """``logsumexp(-1)`` whose gradient is the softmax also where there is none: NaN there, not 0."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.logsumexp(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad[..., None] * ctx.saved_tensors[0].softmax(-1)


def _terms(z: Tensor, t: Tensor, named: Tensor, w: Tensor | None, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """Each output, one value a row in use."""
    log_p = z.log_softmax(-1)
    found = {}
    if "nll" in outputs:
        found["nll"] = _weighted(-log_p.gather(-1, t), named, w)
    if "lse" in outputs:
        found["lse"] = _LogSumExp.apply(z)  # type: ignore[no-untyped-call]
    if "entropy" in outputs:
        found["entropy"] = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)  # 0 log 0 = 0
    if "prediction" in outputs:
        found["prediction"] = z.argmax(-1)
    return {name: found[name] for name in outputs}


def _losses(
    call: Mapping[str, Any], data: Mapping[str, Tensor], z: Tensor, t: Tensor, named: Tensor, w: Tensor | None
) -> Tensor:
    """(rows,) the loss of each row in use, before its token weight."""
    log_p, smoothing, z_loss = z.log_softmax(-1), call.get("label_smoothing", 0.0), call.get("z_loss", 0.0)
    nll, classes = -log_p.gather(-1, t), data.get("weight")
    losses = _weighted(nll if classes is None else nll * classes[t], named, w)
    if smoothing:
        smooth = -(log_p if classes is None else classes * log_p).mean(-1)
        losses = (1 - smoothing) * losses + smoothing * smooth
    if z_loss:
        losses = losses + z_loss * _LogSumExp.apply(z).square()  # type: ignore[no-untyped-call]
    return losses


def _reduced(
    call: Mapping[str, Any], data: Mapping[str, Tensor], losses: Tensor, t: Tensor, used: Tensor, soft: bool, shift: int
) -> Tensor:
    tokens = torch.ones_like(losses)
    if "token_weight" in data:
        tokens = _after(data["token_weight"], shift, used.ndim - 1)[used]
    losses, reduction = losses * tokens, call.get("reduction", "mean")
    if reduction == "none":
        return _placed(losses, used, 0)
    if reduction == "sum":
        return losses.sum()
    classes = data.get("weight")
    return losses.sum() / (tokens if soft or classes is None else tokens * classes[t[:, 0]]).sum()


def _weighted(values: Tensor, named: Tensor, w: Tensor | None) -> Tensor:
    """(rows,) sum over K of the targets that are there, with their weights."""
    values = values.masked_fill(~named, 0)
    return (values if w is None else values * w.masked_fill(~named, 0)).sum(-1)


def _placed(rows: Tensor, used: Tensor, fill: int) -> Tensor:
    """One value a token: ``rows`` in order where ``used``, ``fill`` elsewhere."""
    return rows.new_full(used.shape, fill).index_put((used,), rows)


def _before(x: Tensor, shift: int, dim: int) -> Tensor:
    return x.narrow(dim, 0, x.shape[dim] - shift) if shift else x


def _after(x: Tensor, shift: int, dim: int) -> Tensor:
    return x.narrow(dim, shift, x.shape[dim] - shift) if shift else x
