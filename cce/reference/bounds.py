"""Allowed errors of a backend: a-priori bounds on rounding, from dtypes, sizes and magnitudes alone.

The model. u is the unit roundoff of the accumulation, u_in that of the products' inputs. The errors of the n roundings
of a sum are taken as independent, so they grow as ``LAMBDA sqrt(n) u`` (Higham and Mary, *A new approach to
probabilistic rounding error analysis*, SISC 2019) times the sum of the magnitudes of its terms:

- a logit has the error ``delta = scale (LAMBDA sqrt(D) + 2) u |e|.|c| + FEW u |z|``, entry by entry, times the slope of
  the softcap;
- ``p = exp(z - lse)`` has the relative error ``eps = delta + d_lse + FEW u (1 + |z - lse|)``, since lse is a pair of
  numbers: entries without probability count for nothing, however large their logit, and -inf has no error at all;
- ``dz`` has ``eps |p-part|`` and the error of its own arithmetic; storing it in the input dtype adds u_in |dz|,
  independent from entry to entry, so the product with c adds the root of the sum of squares, ``LAMBDA u_in sqrt(dz^2
  c^2)``;
- the products' sums add ``LAMBDA sqrt(V or N) u (|dz| |c|)``, and the result u_out of its own dtype.

A dead tile with compensation is one more column of dz, with the mean row of the tile as its row of c. Bounds apply to
the answer of the *tiled* oracle on the same live set; tiles that the filter drops are not a rounding error and not
included.
"""

from __future__ import annotations

import math

import numpy as np

from cce.backends.problem import Gradients, Inputs, Outputs, Problem, Upstream
from cce.reference.dense import IEEE, embeddings, logit_weights, logits, masked_to_zero, softcap_derivative, softmax
from cce.reference.gradient_bounds import Columns, gradient_bounds, with_tiles
from cce.reference.roundoff import FEW, LAMBDA, Roundoff
from cce.spec import Spec

Array = np.ndarray


def error_norm(x: Array, reference: Array) -> float:
    """Frobenius norm ``||x - reference||``; inf if elements that are not finite differ (NaN equals NaN).

    >>> error_norm(np.array([np.nan, -np.inf]), np.array([np.nan, -np.inf]))
    0.0
    >>> error_norm(np.array([np.nan]), np.zeros(1))
    inf
    """
    x, reference = np.asarray(x, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if x.shape != reference.shape:
        raise ValueError(f"x: got shape {x.shape}, expected the reference's {reference.shape}")
    with np.errstate(invalid="ignore"):
        same = (x == reference) | (np.isnan(x) & np.isnan(reference))
        difference = np.where(same, 0.0, x - reference)
    return float(np.linalg.norm(difference)) if np.isfinite(difference).all() else math.inf


def relative_error(x: Array, reference: Array) -> float:
    """Return ``||x - reference|| / ||reference||``, for reports; 0 if both are zero, inf if only the reference is."""
    error = error_norm(x, reference)
    norm = float(np.linalg.norm(np.where(np.isfinite(reference), reference, 0.0)))
    return error / norm if norm > 0 else (0.0 if error == 0 else math.inf)


@IEEE
def bounds(
    inputs: Inputs[Array],
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Array],
    upstream: Upstream[Array] | None = None,
    gradients: Gradients[Array] | None = None,
    product_roundoff: float = 0.0,
) -> dict[str, float]:
    """Largest allowed ``error_norm(x, reference)`` of every output and gradient.

    The bounds are absolute, so that a zero reference is no special case; divided by the reference's norm they are a
    relative tolerance.

    Args:
        inputs, problem: float64 copies of the values the backend gets; the problem's dtypes determine the roundoffs.
        spec: resolved spec; its filter and threshold determine the tiles the gradients contain.
        outputs, upstream, gradients: those of the oracle; without the last two only the outputs are bounded.
        product_roundoff: unit roundoff to which a product rounds its inputs: 2**-10 for tf32 (truncation), 0 if it does
            not.

    Returns:
        "lse", "nll", "entropy", "weighted_logit", "de", "dc", "dbias", as far as the arguments contain them.
    """
    unit = Roundoff.of(problem, spec, product_roundoff)
    z = logits(inputs, problem)
    delta = _logit_error(inputs, problem, z, unit)
    d_lse, d_entropy = _row_errors(z, delta, outputs, unit)
    at_target = np.take_along_axis(delta, np.maximum(inputs.targets, 0), axis=1)
    nll = d_lse[:, None] + at_target + FEW * unit.u * outputs.nll
    result = {"lse": d_lse + unit.u * np.abs(outputs.lse), "nll": np.where(inputs.targets < 0, 0.0, nll)}
    result |= {} if outputs.entropy is None else {"entropy": d_entropy}
    if outputs.weighted_logit is not None:
        # sum_v |u_v| (delta + rounding of a sum of V terms), over the entries that are not masked.
        error = delta + LAMBDA * math.sqrt(problem.v) * unit.u * np.abs(masked_to_zero(z))
        result["weighted_logit"] = error @ np.abs(logit_weights(inputs, problem))
    if upstream is not None and gradients is not None:
        columns = Columns.of_entries(inputs, z, delta, outputs)
        columns = with_tiles(columns, inputs, problem, spec, outputs, upstream, unit)
        rows = (d_lse, d_entropy)
        result |= gradient_bounds(columns, inputs, problem, spec, outputs, upstream, gradients, rows, unit)
    # Elements that are not finite in the reference must equal those of the backend: they have no error and no bound.
    return {name: float(np.linalg.norm(array[np.isfinite(array)])) for name, array in result.items()}


def _logit_error(inputs: Inputs[Array], problem: Problem, z: Array, unit: Roundoff) -> Array:
    """Largest error ``delta`` of each logit, (N, V); 0 where it is -inf."""
    e, c = embeddings(inputs), inputs.c
    delta = (LAMBDA * math.sqrt(problem.d) + 2) * unit.u * (np.abs(e) @ np.abs(c).T)
    if inputs.bias is not None:
        delta += 2 * unit.u * np.abs(masked_to_zero(inputs.bias))
    if unit.product > 0:
        # Rounding of both inputs of each product: an independent part, and that of truncation, which shrinks all alike.
        delta += unit.product * (LAMBDA * np.sqrt(2 * (e**2 @ (c**2).T)) + 2 * np.abs(e @ c.T))
    delta *= abs(problem.logit_scale)
    if problem.softcap is not None:
        # tanh shrinks the error by its slope, to second order, and adds a few u of its own value.
        slope = softcap_derivative(z, problem.softcap)
        delta = (slope + 2 * delta / problem.softcap) * delta + FEW * unit.u * np.abs(masked_to_zero(z))
    delta = delta + FEW * unit.u * np.abs(masked_to_zero(z))
    return np.where(np.isneginf(z), 0.0, delta)


def _row_errors(z: Array, delta: Array, outputs: Outputs[Array], unit: Roundoff) -> tuple[Array, Array]:
    """Largest errors of the pair (lse, lse_low) and of the entropy, (N,) each."""
    p = softmax(z, outputs.lse, outputs.lse_low)
    sums = LAMBDA * math.sqrt(z.shape[1]) * unit.u
    surprise = 1 + np.abs(masked_to_zero(outputs.lse)[:, None] - masked_to_zero(z))
    # d lse = sum_j p_j (d z_j + rounding of exp's argument, a difference) + the sum's and its logarithm's.
    exponent = delta + FEW * unit.u * surprise
    d_lse = (p * exponent).sum(axis=1) + sums + FEW * unit.u * np.log(z.shape[1])
    # H = sum_j p_j (lse - z_j): each term has an error from its p and one from its logit.
    d_entropy = d_lse + (p * (exponent + sums) * surprise).sum(axis=1)
    return d_lse, d_entropy
