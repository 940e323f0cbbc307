"""Bounds on the gradients, for ``bounds.py``, which has the model: the logits' errors carried to de, dc and dbias."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from cce.backends.problem import Gradients, Inputs, Outputs, Problem, Upstream
from cce.reference import tiled
from cce.reference.dense import embeddings, logit_weights, masked_to_zero, softmax
from cce.reference.roundoff import FEW, LAMBDA, Roundoff
from cce.reference.worklist import Tiling, work_list
from cce.spec import Spec

Array = np.ndarray


@dataclass(frozen=True)
class Columns:
    """The columns of dz: V vocabulary entries, then, with compensation, T tiles that stand for their dead rows.

    Attributes:
        z: (N, W) logit in the entropy's coefficient ``lse - H - z``; 0 where p is 0.
        z_cap: (N, W) logit at which the softcap's derivative is taken.
        p: (N, W) probability, or mass of the tile.
        delta: (N, W) error of z, and relative error of p without that of lse.
        kept: (N, W) bool, whether the pair contributes to the gradients.
        c: (W, D) row of c, or mean row.
    """

    z: Array
    z_cap: Array
    p: Array
    delta: Array
    kept: Array
    c: Array

    @classmethod
    def of_entries(cls, inputs: Inputs[Array], z: Array, delta: Array, outputs: Outputs[Array]) -> Columns:
        finite = masked_to_zero(z)
        return cls(
            finite, finite, softmax(z, outputs.lse, outputs.lse_low), delta, np.ones(z.shape, dtype=bool), inputs.c
        )


def with_tiles(
    entries: Columns,
    inputs: Inputs[Array],
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Array],
    upstream: Upstream[Array],
    unit: Roundoff,
) -> Columns:
    """Return ``entries`` without the dead pairs, plus a column for each tile if they are compensated, (N, V + T)."""
    tiling = Tiling.of(inputs, problem, spec)
    maps = tiled.forward(inputs, problem, spec)[1]
    work = work_list(inputs, problem, spec, outputs, maps, upstream)
    kept = dataclasses.replace(entries, kept=work.row_live[tiling.tile_of].T)
    if spec.filter == "none" or not spec.compensate:
        return kept
    tile_lse = masked_to_zero(maps.tile_max.T) + maps.tile_log_sum.T  # [N, T]
    mass, delta = _tile_error(entries, tiling, tile_lse, outputs, unit)
    if upstream.h is not None or problem.softcap is not None:
        # The tile's mean logit comes from its stored mass and entropy, both rounded.
        delta = delta + unit.map * (1.0 + maps.tile_entropy.T)
    delta = delta + np.minimum(1.0, unit.map_underflow / np.maximum(mass, 1e-290))
    tiles = Columns(
        z=tile_lse - maps.tile_entropy.T,
        z_cap=tile_lse - np.log(tiling.cols),
        p=mass,
        delta=delta,
        kept=~work.row_live.T & ~np.isneginf(maps.tile_max.T),
        c=np.stack([inputs.c[tiling.vocabulary(t)].mean(axis=0) for t in range(tiling.T)]),
    )
    pairs = ((getattr(kept, f.name), getattr(tiles, f.name), f.name == "c") for f in dataclasses.fields(Columns))
    return Columns(*(np.concatenate([x, y], axis=0 if is_c else 1) for x, y, is_c in pairs))


def _tile_error(
    entries: Columns, tiling: Tiling, tile_lse: Array, outputs: Outputs[Array], unit: Roundoff
) -> tuple[Array, Array]:
    """Mass of each tile, error of its mean logit, and relative error of its mass, (N, T) each."""
    starts = np.arange(tiling.T) * tiling.BLOCK_V
    spread = 1.0 + np.abs(tile_lse[:, tiling.tile_of] - entries.z)
    exponent = 1 + np.abs(masked_to_zero(outputs.lse)[:, None] - entries.z)
    error = (entries.delta + FEW * unit.u * exponent) * spread
    # Both have the p-weighted mean of the entries' errors, and the error of a sum of BLOCK_V terms.
    mass, total = (np.add.reduceat(x[:, tiling.order], starts, axis=1) for x in (entries.p, entries.p * error))
    return mass, total / np.where(mass > 1e-290, mass, np.inf) + LAMBDA * math.sqrt(tiling.BLOCK_V) * unit.u


def _p_part(
    columns: Columns,
    outputs: Outputs[Array],
    upstream: Upstream[Array],
    d_lse: Array,
    d_entropy: Array,
    unit: Roundoff,
) -> tuple[Array, Array]:
    """Return ``p (a + h (lse - H - z))`` and its error, (N, W) each."""
    difference = masked_to_zero(outputs.lse)[:, None] - columns.z
    eps = columns.delta + d_lse[:, None] + FEW * unit.u * (1 + np.abs(difference))
    coefficient = np.broadcast_to(upstream.a[:, None], columns.z.shape)
    error = FEW * unit.u * np.abs(coefficient)
    if upstream.h is not None:
        assert outputs.entropy is not None
        h, entropy = upstream.h[:, None], outputs.entropy[:, None]
        coefficient = coefficient + h * (difference - entropy)
        d_difference = columns.delta + (d_lse + d_entropy)[:, None]
        error = error + np.abs(h) * (d_difference + FEW * unit.u * (np.abs(difference) + entropy))
    return columns.p * coefficient, columns.p * (eps * np.abs(coefficient) + error)


def _dx(
    columns: Columns,
    inputs: Inputs[Array],
    problem: Problem,
    outputs: Outputs[Array],
    upstream: Upstream[Array],
    rows: tuple[Array, Array],
    unit: Roundoff,
) -> tuple[Array, Array, Array]:
    """Return dx as a backend stores it, the sum of the magnitudes of its parts, and its error; (N, W) each."""
    dz, error = _p_part(columns, outputs, upstream, *rows, unit)
    size = np.abs(dz)
    i, k = np.nonzero(inputs.targets >= 0)
    at = (i, inputs.targets[i, k])
    np.subtract.at(dz, at, upstream.g[i, k])
    np.add.at(size, at, np.abs(upstream.g[i, k]))
    dz, size, error = (x * columns.kept for x in (dz, size, error))
    if upstream.s is not None:
        weighted = upstream.s[:, None] * logit_weights(inputs, problem)
        size[:, : problem.v] += np.abs(weighted)
        if problem.softcap is not None:  # without a softcap it is added in closed form, in the accumulation dtype
            dz[:, : problem.v] += weighted
    factor, d_factor = np.ones_like(dz), np.zeros_like(dz)
    if problem.softcap is not None:
        factor = 1.0 - (columns.z_cap / problem.softcap) ** 2
        d_factor = 2 * np.abs(columns.z_cap) / problem.softcap**2 * columns.delta + FEW * unit.u
    scale = problem.logit_scale
    error = abs(scale) * (error * np.abs(factor) + size * (d_factor + 2 * unit.u * np.abs(factor)))
    dx, size = scale * factor * dz, np.abs(scale * factor) * size
    # dz divided by the largest upstream gradient is stored: below the least normal number its error is absolute, and at
    # most its own size. Small values have one sign, so these errors do not average out.
    vectors = (upstream.a, upstream.g, upstream.h, upstream.s)
    largest = max(float(np.abs(x).max(initial=0.0)) for x in vectors if x is not None)
    error += np.minimum(np.abs(dx), unit.dz_underflow * largest * max(1.0, abs(scale)))
    return dx, size, error


def gradient_bounds(
    columns: Columns,
    inputs: Inputs[Array],
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Array],
    upstream: Upstream[Array],
    gradients: Gradients[Array],
    rows: tuple[Array, Array],
    unit: Roundoff,
) -> dict[str, Array]:
    """Largest error of each entry of the gradients in ``gradients``.

    Args:
        columns: those of dz, from :func:`with_tiles`.
        inputs, problem, spec, outputs, upstream, gradients: those of :func:`cce.reference.bounds.bounds`.
        rows: errors of lse and entropy, (N,) each.
        unit: the roundoffs.

    Returns:
        "de" (N, D), "dc" (V, D), "dbias" (V,).
    """
    dx, size, error = _dx(columns, inputs, problem, outputs, upstream, rows, unit)
    # dz rounded, and the other factor too if the product rounds it, or if it is the mean row of a tile; a tile's
    # mass has been rounded once before.
    tile = np.arange(len(columns.c)) >= problem.v
    unit_dz = max(unit.dz, unit.product)
    roundings = np.where(tile | (unit.product > 0), math.sqrt(2), 1.0) * unit_dz
    errors = (error, size, dx * np.hypot(roundings, np.where(tile, unit.map, 0.0)))
    tiling = Tiling.of(inputs, problem, spec)
    result = {}
    if gradients.de is not None:
        stored = (unit.de + 2 * unit.product) * np.abs(gradients.de) + unit.de_underflow
        result["de"] = _product_error(errors, columns.c, unit) + stored
    errors = (errors[0].T, errors[1].T, errors[2].T)
    if gradients.dc is not None:
        stored = (unit.dc + 2 * unit.product) * np.abs(gradients.dc) + unit.dc_underflow
        result["dc"] = _of_entries(_product_error(errors, embeddings(inputs), unit), tiling) + stored
    if gradients.dbias is not None:
        stored = unit.u * np.abs(gradients.dbias)
        result["dbias"] = _of_entries(_product_error(errors, np.ones((problem.n, 1)), unit), tiling)[:, 0] + stored
    return result


def _product_error(errors: tuple[Array, Array, Array], right: Array, unit: Roundoff) -> Array:
    """Error of ``dx right``, from the error of dx, the magnitude of its parts, and its independent rounding."""
    error, size, rounded = errors
    total: Array = error @ np.abs(right)
    total += LAMBDA * math.sqrt(len(right)) * unit.u * (size @ np.abs(right))
    total += LAMBDA * np.sqrt(rounded**2 @ right**2)
    return total


def _of_entries(by_column: Array, tiling: Tiling) -> Array:
    """Map columns to vocabulary entries: every entry of a tile gets the same share of the tile's column."""
    entries, tiles = by_column[: tiling.V], by_column[tiling.V :]
    return entries if len(tiles) == 0 else entries + (tiles / tiling.cols[:, None])[tiling.tile_of]
