"""The definition of every backend's results, with the logits written out in full.

Everything is float64 NumPy; the sizes must be small enough for (N, V) arrays. Symbols are those of
docs/design.md, section 1; the derivatives are those of :class:`cce.backends.problem.Upstream`.
"""

from __future__ import annotations

import numpy as np

from cce.backends.problem import Gradients, Inputs, Outputs, Problem, Upstream

Array = np.ndarray

#: Decorator of functions that compute: inf and NaN propagate by IEEE arithmetic, without warnings.
IEEE = np.errstate(divide="ignore", invalid="ignore", over="ignore")


def embeddings(inputs: Inputs[Array]) -> Array:
    """Rows of ``e`` in use, (N, D)."""
    for name, array in (("e", inputs.e), ("c", inputs.c), ("bias", inputs.bias)):
        if array is not None and array.dtype != np.float64:
            raise TypeError(f"{name}: got {array.dtype}, expected float64: the oracle does not round")
    return inputs.e if inputs.rows is None else inputs.e[inputs.rows]


def logits(inputs: Inputs[Array], problem: Problem) -> Array:
    """Logits ``z = softcap * tanh(x / softcap)`` with ``x = logit_scale * (e c^T + bias)``, (N, V)."""
    return logits_of(embeddings(inputs), inputs.c, inputs.bias, problem)


def logits_of(e: Array, c: Array, bias: Array | None, problem: Problem) -> Array:
    """Logits of some rows and entries; -inf where the bias is, also under a softcap, since a mask is not a number."""
    z: Array = e @ c.T
    z = problem.logit_scale * (z if bias is None else z + bias)
    if problem.softcap is not None:
        z = problem.softcap * np.tanh(z / problem.softcap)
        if bias is not None:
            z = np.where(np.isneginf(bias), -np.inf, z)
    return z


def softcap_derivative(z: Array, softcap: float) -> Array:
    """Derivative of the softcap, ``1 - (z / softcap)^2``; 0 for a masked entry."""
    derivative: Array = 1.0 - np.maximum(z / softcap, -1.0) ** 2
    return derivative


def masked_to_zero(x: Array) -> Array:
    """Replace -inf by 0, so that ``x`` may be multiplied by the zero probability of a masked entry."""
    return np.where(np.isneginf(x), 0.0, x)


def row_sums(z: Array) -> tuple[Array, Array]:
    """Maximum m of each row and ``log sum_j exp(z_ij - m_i)``, (N,) each; -inf and 0 for a row that is masked."""
    m: Array = z.max(axis=1)
    s = np.exp(z - masked_to_zero(m)[:, None]).sum(axis=1)
    return m, np.log(np.where(np.isneginf(m), 1.0, s))


def pair(m: Array, log_s: Array) -> tuple[Array, Array]:
    """Return ``m + log_s`` rounded, and the rounding error, which is NaN where the sum is not finite.

    A maximum of inf is the log-sum-exp, although the sum of its row is NaN.
    """
    high = np.where(np.isinf(m), m, m + log_s)
    part = high - m  # the two-sum of Knuth
    low = (m - (high - part)) + (log_s - part)
    return high, np.where(np.isfinite(high), low, np.nan)


@IEEE
def log_sum_exp(z: Array) -> Array:
    """Log-sum-exp ``log sum_j exp(z_ij)``, (N,); -inf for a row that is masked entirely."""
    return pair(*row_sums(z))[0]


@IEEE
def softmax(z: Array, lse: Array, lse_low: Array | None = None) -> Array:
    """Softmax ``p = exp((z - lse) - lse_low)``, (N, V); NaN in a row whose lse is not finite."""
    low = np.where(np.isfinite(lse), 0.0, np.nan) if lse_low is None else lse_low
    p: Array = np.exp((z - lse[:, None]) - low[:, None])
    return p


def logit_weights(inputs: Inputs[Array], problem: Problem) -> Array:
    """Weights u of ``weighted_logit``, (V,)."""
    return np.full(problem.v, 1.0 / problem.v) if inputs.logit_weight is None else inputs.logit_weight


@IEEE
def forward(inputs: Inputs[Array], problem: Problem) -> Outputs[Array]:
    """Compute everything ``problem.outputs`` requests, from the full logits.

    Args:
        inputs: e (M, D), c (V, D), targets (N, K), ...; float64 and int64.
        problem: metadata of the inputs.

    Returns:
        lse and lse_low (N,), nll (N, K) and the extra outputs, (N,) each; None for outputs not requested.

    Source: docs/design.md, sections 1 and 3; the classes of :mod:`cce.backends.problem`.
    """
    z = logits(inputs, problem)
    m, log_s = row_sums(z)
    lse, lse_low = pair(m, log_s)
    target_logits = np.take_along_axis(z, np.maximum(inputs.targets, 0), axis=1)
    nll = negative_log_likelihood(m, log_s, target_logits, inputs.targets)
    entropy = weighted = prediction = None
    if "entropy" in problem.outputs:
        # Every term is at least 0 except for rounding; an entry without probability adds nothing to the entropy.
        p, surprise = softmax(z, lse, lse_low), log_s[:, None] + (m[:, None] - masked_to_zero(z))
        entropy = np.maximum(np.where(p == 0, 0.0, p * surprise).sum(axis=1), 0.0)
    if "weighted_logit" in problem.outputs:
        weighted = mean_logits(z, logit_weights(inputs, problem))
    if "prediction" in problem.outputs:
        order = np.arange(problem.v) if inputs.vocab_order is None else inputs.vocab_order
        prediction = order[z[:, order].argmax(axis=1)]
    return Outputs(lse, nll, lse_low, entropy, weighted, prediction)


def negative_log_likelihood(m: Array, log_s: Array, target_logits: Array, targets: Array) -> Array:
    """Loss ``lse - z_target`` from differences to the row's maximum m, (N, K); 0 where there is no target."""
    nll = np.maximum(log_s[:, None] + (m[:, None] - target_logits), 0.0)
    return np.where(targets < 0, 0.0, nll)


def mean_logits(z: Array, u: Array) -> Array:
    """Weighted logit ``sum_v u_v z_iv``, (N,); a weight of 0 on a logit of -inf gives NaN, as in PyTorch."""
    weighted: Array = (z * u).sum(axis=1)
    return weighted


def logit_gradient(
    inputs: Inputs[Array], problem: Problem, outputs: Outputs[Array], upstream: Upstream[Array]
) -> Array:
    """Gradient ``dx`` of ``e c^T + bias``, (N, V), by the formula of :class:`cce.backends.problem.Upstream`."""
    z = logits(inputs, problem)
    coefficient = np.broadcast_to(upstream.a[:, None], z.shape)
    if upstream.h is not None:
        assert outputs.entropy is not None, "a gradient of the entropy needs the entropy"
        coefficient = coefficient + upstream.h[:, None] * surprise_over_entropy(z, outputs)
    dz: Array = softmax(z, outputs.lse, outputs.lse_low) * coefficient
    i, k = np.nonzero(inputs.targets >= 0)
    # subtract.at, because a row may name the same target twice and both count.
    np.subtract.at(dz, (i, inputs.targets[i, k]), upstream.g[i, k])
    if upstream.s is not None:
        dz += upstream.s[:, None] * logit_weights(inputs, problem)
    if problem.softcap is not None:
        dz *= softcap_derivative(z, problem.softcap)
    dz *= problem.logit_scale
    return dz


def surprise_over_entropy(z: Array, outputs: Outputs[Array]) -> Array:
    """Return ``lse - z - H`` for the rows and entries of z, from differences; arbitrary where z is -inf."""
    assert outputs.entropy is not None
    low = 0.0 if outputs.lse_low is None else outputs.lse_low
    found: Array = (outputs.lse[:, None] - masked_to_zero(z)) + (low - outputs.entropy)[:, None]
    return found


@IEEE
def backward(
    inputs: Inputs[Array], problem: Problem, outputs: Outputs[Array], upstream: Upstream[Array]
) -> Gradients[Array]:
    """Compute the exact gradients that ``problem`` requests.

    Args:
        inputs, problem: as in :func:`forward`.
        outputs: result of :func:`forward`; ``lse``, ``lse_low`` and, with ``upstream.h``, ``entropy`` are read.
        upstream: a (N,), g (N, K), h and s (N,) or None.

    Returns:
        de (N, D), one row per row of the problem; dc (V, D); dbias (V,); None for gradients not requested.

    Source: docs/design.md, section 4.
    """
    dx = logit_gradient(inputs, problem, outputs, upstream)
    return Gradients(
        de=dx @ inputs.c if problem.grad_e else None,
        dc=dx.T @ embeddings(inputs) if problem.grad_c else None,
        dbias=dx.sum(axis=0) if problem.grad_bias else None,
    )
