"""Terms of the gradients outside the tiles: the compensation, and the weighted logit's rank-one term.

Source: docs/design.md, section 4.4.
"""

from __future__ import annotations

import numpy as np

from cce.backends.problem import Inputs, Outputs, Problem, Upstream
from cce.reference.dense import embeddings, logit_weights, masked_to_zero, softcap_derivative
from cce.reference.worklist import TileMaps, Tiling, WorkList

Array = np.ndarray


def dropped_mass(
    problem: Problem,
    tiling: Tiling,
    outputs: Outputs[Array],
    maps: TileMaps,
    upstream: Upstream[Array],
    work: WorkList,
) -> Array:
    """Sum ``m`` of dx over each dead (row, tile) pair, (T, N); 0 on live pairs.

    ``m_it = scale f_it exp(tile_lse_it - lse_i) (a_i + h_i (lse_i - H_i - (tile_lse_it - H_it)))``: the sum over
    the tile of ``p (a + h (lse - H - z))``, because ``tile_lse - H_t`` is the mean of z under the tile's softmax.
    f is the softcap's derivative at one representative logit; without a softcap m is exact.
    """
    assert outputs.lse_low is not None
    log_mass = maps.log_mass(outputs.lse, outputs.lse_low)  # [T, N]
    coefficient = np.broadcast_to(upstream.a, log_mass.shape)
    if upstream.h is not None:
        assert outputs.entropy is not None, "a gradient of the entropy needs the entropy"
        surprise = maps.tile_entropy - masked_to_zero(log_mass) - outputs.entropy
        coefficient = coefficient + upstream.h * surprise
    # A masked tile has no mass.
    dropped = ~work.row_live & ~np.isneginf(maps.tile_max)
    m: Array = problem.logit_scale * np.where(dropped, np.exp(log_mass), 0.0) * coefficient
    if problem.softcap is not None:
        # zbar = log mean_j exp(z_j), between the least and the largest logit of the tile.
        zbar = masked_to_zero(maps.tile_max) + maps.tile_log_sum - np.log(tiling.cols)[:, None]
        m = m * softcap_derivative(zbar, problem.softcap)
    return m


def compensation(
    inputs: Inputs[Array],
    problem: Problem,
    tiling: Tiling,
    outputs: Outputs[Array],
    maps: TileMaps,
    upstream: Upstream[Array],
    work: WorkList,
) -> tuple[Array, Array, Array]:
    """Gradients de, dc and dbias of the dead tiles, as if dx were m / n_t in each of their n_t columns.

    Returns:
        ``de_i = sum_t m_it cbar_t``; ``dc_v = sum_i m_it e_i / n_t`` and ``dbias_v = sum_i m_it / n_t`` for v in t.
    """
    m = dropped_mass(problem, tiling, outputs, maps, upstream, work)  # [T, N]
    cbar = np.stack([inputs.c[tiling.vocabulary(t)].mean(axis=0) for t in range(tiling.T)])  # [T, D]
    share = m / tiling.cols[:, None]  # [T, N]
    tile_of = tiling.tile_of  # [V]
    return m.T @ cbar, (share @ embeddings(inputs))[tile_of], share.sum(axis=1)[tile_of]


def weighted_logit_term(inputs: Inputs[Array], problem: Problem, s: Array) -> tuple[Array, Array, Array]:
    """Gradients de, dc and dbias of ``sum_i s_i sum_v u_v z_iv`` without a softcap: rank one, in closed form.

    The filter does not apply to it: s_i u_v is as large in a tile without probability as in any other.
    """
    u = logit_weights(inputs, problem)  # [V]
    scale = problem.logit_scale
    return (
        scale * np.outer(s, u @ inputs.c),
        scale * np.outer(u, s @ embeddings(inputs)),
        scale * u * s.sum(),
    )
