"""The algorithm, tile by tile, in plain code to read every kernel against.

It executes a resolved :class:`cce.Spec` in float64 NumPy, in the order of sections that the kernels keep:
tile origin, logit tile, epilogue, store. With ``filter="none"`` it computes what ``dense`` computes; with a
filter it is the oracle of the skipped tiles and of the compensation. Source: docs/design.md, sections 3 and 4;
arXiv 2411.09009, algorithms 1 to 4. ``N V D BLOCK_N BLOCK_V`` are the sizes, ``B T`` the numbers of blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cce.backends.problem import Gradients, Inputs, Outputs, Problem, Upstream
from cce.reference.compensation import compensation, weighted_logit_term
from cce.reference.dense import (
    IEEE,
    embeddings,
    logit_weights,
    logits_of,
    masked_to_zero,
    mean_logits,
    negative_log_likelihood,
    pair,
    softcap_derivative,
    softmax,
    surprise_over_entropy,
)
from cce.reference.worklist import TileMaps, Tiling, WorkList, work_list
from cce.spec import Spec

__all__ = ["backward", "forward", "work_list"]

Array = np.ndarray


@dataclass(frozen=True)
class _Partials:
    """Results the forward kernel stores besides the maps: per row and vocabulary block, and the targets' logits."""

    maps: TileMaps
    tile_argmax: Array  # [T, N] vocabulary entries
    tile_weighted: Array  # [T, N]
    target_logits: Array  # [N, K]


@IEEE
def forward(inputs: Inputs[Array], problem: Problem, spec: Spec) -> tuple[Outputs[Array], TileMaps]:
    """Compute the outputs, and the maps that the backward reads.

    Args:
        inputs: e (M, D), c (V, D), targets (N, K), ...; float64 and int64; carries the vocabulary order.
        problem: metadata of the inputs. spec: resolved spec.

    Returns:
        The outputs, as from :func:`cce.reference.dense.forward`, and the maps, (T, N).
    """
    tiling = Tiling.of(inputs, problem, spec)
    N, T, e = tiling.N, tiling.T, embeddings(inputs)
    tile_max, tile_log_sum, tile_entropy, tile_weighted = np.full((4, T, N), np.nan)
    tile_argmax = np.full((T, N), -1, dtype=np.int64)
    target_logits = np.zeros(inputs.targets.shape)
    maps = TileMaps(tile_max, tile_log_sum, tile_entropy)
    store = _Partials(maps, tile_argmax, tile_weighted, target_logits)
    for b in range(tiling.B):
        for t in range(T):
            _forward_tile(inputs, problem, tiling, e, b, t, store)
    return _reduce(inputs, problem, spec, store), maps


def _logit_tile(inputs: Inputs[Array], problem: Problem, e_tile: Array, vocabulary: Array) -> Array:
    """Logits ``z`` of one tile: product, bias, scale, softcap."""
    # A kernel sums over blocks of D, [BLOCK_N, BLOCK_V] = [BLOCK_N, D] [D, BLOCK_V], and masks the columns beyond V
    # after the softcap, like the entries whose bias is -inf: tanh(-inf) is -1.
    bias = None if inputs.bias is None else inputs.bias[vocabulary]
    return logits_of(e_tile, inputs.c[vocabulary], bias, problem)


def _forward_tile(
    inputs: Inputs[Array], problem: Problem, tiling: Tiling, e: Array, b: int, t: int, store: _Partials
) -> None:
    """Run one program of the forward kernel: tile (b, t)."""
    # Tile origin: BLOCK_N rows from b BLOCK_N, BLOCK_V vocabulary entries from order[t BLOCK_V].
    tokens = tiling.tokens(b, np.arange(tiling.N))  # [BLOCK_N]
    vocabulary = tiling.vocabulary(t)  # [BLOCK_V], ragged in the last block

    # Logit tile: z = softcap tanh(scale (e c^T + bias) / softcap).
    z = _logit_tile(inputs, problem, e[tokens], vocabulary)  # [BLOCK_N, BLOCK_V]

    # Epilogue: m = max_j z, s = sum_j exp(z - m); a masked tile has m = -inf and s = 0, and stores log s = 0.
    m = z.max(axis=1)  # [BLOCK_N]
    safe_m = masked_to_zero(m)[:, None]  # [BLOCK_N, 1]
    exp_z = np.exp(z - safe_m)  # [BLOCK_N, BLOCK_V]
    s = np.where(np.isneginf(m), 1.0, exp_z.sum(axis=1))  # [BLOCK_N]
    log_s = np.log(s)
    # H_t = log s + sum_j exp(z - m) (m - z) / s, the entropy within the tile; 0 (-inf) is 0.
    below = np.where(np.isneginf(z), 0.0, safe_m - masked_to_zero(z))
    tile_entropy = log_s + (exp_z * below).sum(axis=1) / s
    # sum_j u_j z_ij over the tile.
    weighted = mean_logits(z, logit_weights(inputs, problem)[vocabulary])  # [BLOCK_N]

    # Store: one entry of each map per row; the logit of a target that falls into the tile, from the same z.
    store.maps.tile_max[t, tokens] = m
    store.maps.tile_log_sum[t, tokens] = log_s
    store.maps.tile_entropy[t, tokens] = tile_entropy
    store.tile_weighted[t, tokens] = weighted
    store.tile_argmax[t, tokens] = vocabulary[z.argmax(axis=1)]
    i, k, j = np.nonzero(inputs.targets[tokens][:, :, None] == vocabulary)
    store.target_logits[tokens[i], k] = z[i, j]


def _reduce(inputs: Inputs[Array], problem: Problem, spec: Spec, store: _Partials) -> Outputs[Array]:
    """Run the second kernel: one program per row block, over t in ascending order, so the same bits every run."""
    maps = store.maps
    T, N = maps.tile_max.shape
    m, log_s = _online(maps) if spec.lse_accumulation == "online" else _of_tiles(maps)
    lse, lse_low = pair(m, log_s)
    entropy, weighted, best = np.zeros(N), np.zeros(N), np.full(N, -np.inf)
    prediction = store.tile_argmax[0].copy()
    for t in range(T):
        # Chain rule of the entropy: H = sum_t w_t (H_t - log w_t), w_t = exp(tile_lse_t - lse).
        log_w = maps.log_mass(lse, lse_low, t)
        entropy += np.exp(log_w) * (maps.tile_entropy[t] - masked_to_zero(log_w))
        weighted += store.tile_weighted[t]
        # Strictly larger: in a tie, the first in the vocabulary order wins.
        larger = maps.tile_max[t] > best
        best = np.where(larger, maps.tile_max[t], best)
        prediction = np.where(larger, store.tile_argmax[t], prediction)
    return Outputs(
        lse,
        negative_log_likelihood(m, log_s, store.target_logits, inputs.targets),
        lse_low,
        entropy=np.where(np.isfinite(lse), np.maximum(entropy, 0.0), np.nan) if "entropy" in problem.outputs else None,
        weighted_logit=weighted if "weighted_logit" in problem.outputs else None,
        prediction=prediction if "prediction" in problem.outputs else None,
    )


def _of_tiles(maps: TileMaps) -> tuple[Array, Array]:
    """Largest logit M and ``log sum_t exp(tile_lse_t - M)``, (N,) each; 0 where M is -inf."""
    m: Array = maps.tile_max.max(axis=0)
    s = np.zeros_like(m)
    for t in range(len(maps.tile_max)):
        s += maps.sum_about(m, t)
    return m, np.log(np.where(np.isneginf(m), 1.0, s))


def _online(maps: TileMaps) -> tuple[Array, Array]:
    """Largest logit and log of the sum, from a maximum m and a sum s carried along t, rescaled whenever m grows."""
    m, s = np.full(maps.tile_max.shape[1], -np.inf), np.zeros(maps.tile_max.shape[1])
    for t in range(len(maps.tile_max)):
        m_new = np.maximum(m, maps.tile_max[t])
        s = s * np.exp(m - masked_to_zero(m_new)) + maps.sum_about(m_new, t)
        m = m_new
    return m, np.log(np.where(np.isneginf(m), 1.0, s))


@IEEE
def backward(
    inputs: Inputs[Array],
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Array],
    maps: TileMaps,
    upstream: Upstream[Array],
) -> Gradients[Array]:
    """Compute the gradients of the tiles the filter keeps, plus the compensation for those it drops.

    Args:
        inputs, problem, spec: those of the forward; ``spec`` is resolved.
        outputs, maps: results of the forward. upstream: a (N,), g (N, K), h and s (N,) or None.

    Returns:
        de (N, D), one row per row of the problem; dc (V, D); dbias (V,); None for gradients not requested.
    """
    tiling = Tiling.of(inputs, problem, spec)
    work = work_list(inputs, problem, spec, outputs, maps, upstream)
    de, dc, dbias = _live_tiles(inputs, problem, spec, outputs, upstream, work)
    parts = []  # Step 4: terms outside the tiles. A kernel adds them to its accumulators, before dc is rounded.
    if spec.compensate and spec.filter != "none":
        parts.append(compensation(inputs, problem, tiling, outputs, maps, upstream, work))
    if upstream.s is not None and problem.softcap is None:
        parts.append(weighted_logit_term(inputs, problem, upstream.s))
    for part in parts:
        for gradient, term in zip((de, dc, dbias), part, strict=True):
            gradient += term
    return Gradients(
        de=de if problem.grad_e else None,
        dc=dc if problem.grad_c else None,
        dbias=dbias if problem.grad_bias else None,
    )


def _live_tiles(
    inputs: Inputs[Array],
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Array],
    upstream: Upstream[Array],
    work: WorkList,
) -> tuple[Array, Array, Array]:
    """Gradients de, dc and dbias of the live tiles, one chunk of vocabulary blocks after the other."""
    tiling, e = Tiling.of(inputs, problem, spec), embeddings(inputs)
    de, dc, dbias = np.zeros(e.shape), np.full(inputs.c.shape, np.nan), np.full(tiling.V, np.nan)
    for chunk in _chunks(tiling, spec):
        # Step 1: dx of the live tiles of the chunk, the only logit-sized memory.
        scratch = np.full((tiling.N, len(chunk) * tiling.BLOCK_V), np.nan)  # poison: a dead tile is never read
        for b, t in itertools.product(range(tiling.B), chunk):
            if work.live[b, t]:
                out = _scratch_tile(tiling, chunk, scratch, b, t)
                _dz_tile(inputs, problem, tiling, outputs, upstream, work, e, (b, t), out)
        # Step 2: de accumulates over chunks. Step 3: dc and dbias of the chunk are complete in one pass.
        for b in range(tiling.B):
            _de_block(inputs, tiling, work, b, chunk, scratch, de)
        for t in chunk:
            _dc_block(tiling, work, e, t, chunk, scratch, dc, dbias)
    return de, dc, dbias


def _chunks(tiling: Tiling, spec: Spec) -> Iterator[range]:
    """Runs of vocabulary blocks whose dz, if all tiles are live, fits into ``scratch_bytes``; one block at least."""
    blocks = max(1, spec.scratch_bytes // max(1, tiling.N * tiling.BLOCK_V * np.dtype(np.float64).itemsize))
    for first in range(0, tiling.T, blocks):
        yield range(first, min(first + blocks, tiling.T))


def _scratch_tile(tiling: Tiling, chunk: range, scratch: Array, b: int, t: int) -> Array:
    """View of the memory for dz of tile (b, t): rows in ``row_order``, columns from the chunk's first block."""
    start = (t - chunk.start) * tiling.BLOCK_V
    return scratch[b * tiling.BLOCK_N : (b + 1) * tiling.BLOCK_N, start : start + len(tiling.vocabulary(t))]


def _of_rows(outputs: Outputs[Array], tokens: Array) -> Outputs[Array]:
    """Outputs of some rows."""
    return Outputs(**{name: None if x is None else x[tokens] for name, x in vars(outputs).items()})


def _dz_tile(
    inputs: Inputs[Array],
    problem: Problem,
    tiling: Tiling,
    outputs: Outputs[Array],
    upstream: Upstream[Array],
    work: WorkList,
    e: Array,
    tile: tuple[int, int],
    out: Array,
) -> None:
    """Run one program of the dz kernel: live tile (b, t)."""
    b, t = tile
    # Tile origin: BLOCK_N rows of the *live* order, BLOCK_V entries of the vocabulary order.
    tokens = tiling.tokens(b, work.row_order)  # [BLOCK_N]
    vocabulary = tiling.vocabulary(t)  # [BLOCK_V]

    # Logit tile: recomputed, as in the forward.
    z = _logit_tile(inputs, problem, e[tokens], vocabulary)  # [BLOCK_N, BLOCK_V]

    # Epilogue: p = exp((z - lse) - lse_low); dz = p (a + h (lse - H - z)), where 0 (-inf) is 0.
    row = _of_rows(outputs, tokens)
    p = softmax(z, row.lse, row.lse_low)  # [BLOCK_N, BLOCK_V]
    coefficient = np.broadcast_to(upstream.a[tokens][:, None], z.shape)
    if upstream.h is not None:
        coefficient = coefficient + upstream.h[tokens][:, None] * surprise_over_entropy(z, row)
    dz = p * coefficient
    for k in range(problem.k):  # dz -= sum_k g_k [j = targets_k]; one k at a time: a target may come twice
        dz -= upstream.g[tokens, k][:, None] * (inputs.targets[tokens, k][:, None] == vocabulary)
    # dx = dz scale (1 - (z / softcap)^2); with a softcap the gradient of weighted_logit is part of dz.
    if problem.softcap is not None:
        if upstream.s is not None:
            dz += upstream.s[tokens][:, None] * logit_weights(inputs, problem)[vocabulary]
        dz *= softcap_derivative(z, problem.softcap)

    # Store: a kernel rounds to the input dtype here.
    out[:] = problem.logit_scale * dz


def _de_block(
    inputs: Inputs[Array], tiling: Tiling, work: WorkList, b: int, chunk: range, scratch: Array, de: Array
) -> None:
    """Run one program of the de product: ``de += sum_t dx c`` over the live tiles of block b, [BLOCK_N, D]."""
    tokens = tiling.tokens(b, work.row_order)  # [BLOCK_N]
    for t in chunk:
        if work.live[b, t]:
            dx = _scratch_tile(tiling, chunk, scratch, b, t)  # [BLOCK_N, BLOCK_V]
            de[tokens] += dx @ inputs.c[tiling.vocabulary(t)]  # [BLOCK_N, D]


def _dc_block(
    tiling: Tiling, work: WorkList, e: Array, t: int, chunk: range, scratch: Array, dc: Array, dbias: Array
) -> None:
    """Run one program of the dc product: ``dc = sum_b dx^T e`` over the live tiles of block t, [BLOCK_V, D]."""
    vocabulary = tiling.vocabulary(t)  # [BLOCK_V]
    sum_dc, sum_dbias = np.zeros((len(vocabulary), e.shape[1])), np.zeros(len(vocabulary))
    for b in range(tiling.B):
        if work.live[b, t]:
            dx = _scratch_tile(tiling, chunk, scratch, b, t)  # [BLOCK_N, BLOCK_V]
            sum_dc += dx.T @ e[tiling.tokens(b, work.row_order)]
            sum_dbias += dx.sum(axis=0)
    # Store: written once, so a kernel rounds once, from its accumulator to the dtype of c.
    dc[vocabulary], dbias[vocabulary] = sum_dc, sum_dbias
