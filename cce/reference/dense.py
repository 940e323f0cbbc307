"""The definition: what every backend must compute, with the logits written out in full.

Everything is float64 NumPy; the sizes must be small enough for (N, V) arrays. Symbols are those of
docs/design.md, section 1; the derivatives are those of :class:`cce.problem.Upstream`.
"""

from __future__ import annotations

import numpy as np

from cce.problem import Gradients, Inputs, Outputs, Problem, Upstream

Array = np.ndarray


def embeddings(inputs: Inputs[Array]) -> Array:
    """The rows of ``e`` in use, (N, D)."""
    for name, array in (("e", inputs.e), ("c", inputs.c), ("bias", inputs.bias)):
        if array is not None and array.dtype != np.float64:
            raise TypeError(f"{name}: got {array.dtype}, expected float64: the oracle does not round")
    return inputs.e if inputs.rows is None else inputs.e[inputs.rows]


def logits(inputs: Inputs[Array], problem: Problem) -> Array:
    """``z = softcap * tanh(x / softcap)`` with ``x = logit_scale * (e c^T + bias)``, (N, V)."""
    z: Array = embeddings(inputs) @ inputs.c.T
    if inputs.bias is not None:
        z = z + inputs.bias
    z = problem.logit_scale * z
    if problem.softcap is not None:
        z = problem.softcap * np.tanh(z / problem.softcap)
    return z


def masked_to_zero(x: Array) -> Array:
    """``x`` with -inf replaced by 0: what may be multiplied by the zero probability of a masked entry."""
    return np.where(np.isneginf(x), 0.0, x)


def log_sum_exp(z: Array) -> Array:
    """``log sum_j exp(z_ij)``, (N,); -inf for a row that is masked altogether."""
    m: Array = masked_to_zero(z.max(axis=1))
    with np.errstate(divide="ignore"):
        lse: Array = m + np.log(np.exp(z - m[:, None]).sum(axis=1))
    return lse


def softmax(z: Array, lse: Array) -> Array:
    """``p = exp(z - lse)``, (N, V); 0 where z is -inf, even if the whole row is."""
    return np.where(np.isneginf(z), 0.0, np.exp(z - masked_to_zero(lse)[:, None]))


def logit_weights(inputs: Inputs[Array], problem: Problem) -> Array:
    """The weights u of ``weighted_logit``, (V,)."""
    return np.full(problem.v, 1.0 / problem.v) if inputs.logit_weight is None else inputs.logit_weight


def forward(inputs: Inputs[Array], problem: Problem) -> Outputs[Array]:
    """Everything ``problem.outputs`` asks for, from the full logits.

    Args:
        inputs: e (M, D), c (V, D), targets (N, K), ...; float64 and int64.
        problem: its metadata.

    Returns:
        lse (N,), target_logits (N, K) and the extra outputs, (N,) each; None for what was not asked.

    Source: docs/design.md, sections 1 and 3; the classes of :mod:`cce.problem`.
    """
    z = logits(inputs, problem)
    lse = log_sum_exp(z)
    target_logits = np.take_along_axis(z, np.maximum(inputs.targets, 0), axis=1)
    entropy = weighted = prediction = None
    if "entropy" in problem.outputs:
        # Every term is at least 0 but for rounding; an entry without probability has none of the entropy.
        p, surprise = softmax(z, lse), masked_to_zero(lse)[:, None] - masked_to_zero(z)
        entropy = np.maximum((p * surprise).sum(axis=1), 0.0)
    if "weighted_logit" in problem.outputs:
        u = logit_weights(inputs, problem)
        weighted = np.where(u == 0, masked_to_zero(z), z) @ u
    if "prediction" in problem.outputs:
        order = np.arange(problem.v) if inputs.vocab_order is None else inputs.vocab_order
        prediction = order[z[:, order].argmax(axis=1)]
    return Outputs(lse, np.where(inputs.targets < 0, 0.0, target_logits), entropy, weighted, prediction)


def logit_gradient(
    inputs: Inputs[Array], problem: Problem, outputs: Outputs[Array], upstream: Upstream[Array]
) -> Array:
    """``dx``, the gradient of ``e c^T + bias``, (N, V): the formula of :class:`cce.problem.Upstream`."""
    z = logits(inputs, problem)
    coefficient = np.broadcast_to(upstream.a[:, None], z.shape)
    if upstream.h is not None:
        assert outputs.entropy is not None, "a gradient of the entropy needs the entropy"
        centre = masked_to_zero(outputs.lse) - outputs.entropy
        coefficient = coefficient + upstream.h[:, None] * (centre[:, None] - masked_to_zero(z))
    dz: Array = softmax(z, outputs.lse) * coefficient
    i, k = np.nonzero(inputs.targets >= 0)
    # subtract.at, because a row may name the same target twice and both count.
    np.subtract.at(dz, (i, inputs.targets[i, k]), upstream.g[i, k])
    if upstream.s is not None:
        dz += upstream.s[:, None] * logit_weights(inputs, problem)
    if problem.softcap is not None:
        dz *= 1.0 - (z / problem.softcap) ** 2
    dz *= problem.logit_scale
    return dz


def backward(
    inputs: Inputs[Array], problem: Problem, outputs: Outputs[Array], upstream: Upstream[Array]
) -> Gradients[Array]:
    """The exact gradients that ``problem`` asks for.

    Args:
        inputs, problem: as in :func:`forward`.
        outputs: what :func:`forward` returned; ``lse`` and, where ``upstream.h`` is given, ``entropy`` are read.
        upstream: a (N,), g (N, K), h and s (N,) or None.

    Returns:
        de (N, D), one row per row of the problem; dc (V, D); dbias (V,); None for what was not asked.

    Source: docs/design.md, section 4.
    """
    dx = logit_gradient(inputs, problem, outputs, upstream)
    return Gradients(
        de=dx @ inputs.c if problem.grad_e else None,
        dc=dx.T @ embeddings(inputs) if problem.grad_c else None,
        dbias=dx.sum(axis=0) if problem.grad_bias else None,
    )
