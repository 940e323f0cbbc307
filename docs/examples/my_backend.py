"""A whole backend in plain PyTorch: one vocabulary tile at a time, every option, the filter and its compensation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cce.backends.base import Backend
from cce.backends.problem import LEAST_HIT, Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.shared.compensation import columns_of_tiles, dead_mass
from cce.backends.shared.pair import finite, joined, pair
from cce.backends.shared.weighted_logit import weighted_logit
from cce.backends.shared.worklist import target_positions
from cce.spec import Spec


class MyBackend(Backend):
    """Widens everything to the accumulation dtype and loops over the tiles."""

    name = "my_backend"

    def unavailable(self, device: str) -> list[str]:
        return [] if device in ("cpu", "cuda") else [f"runs on CPU and CUDA tensors, not on {device!r}"]

    def unsupported(self, problem: Problem, spec: Spec) -> list[str]:
        return []

    # --- the pieces: each is one step of docs/algorithm.md ------------------------------------------------

    def wide(self, inputs: Inputs[Tensor], spec: Spec) -> tuple[Tensor, Tensor, Tensor | None]:
        """e (N, D), c (V, D) and bias (V,) in the vocabulary order, in the accumulation dtype."""
        dtype, order = getattr(torch, str(spec.accumulate)), inputs.vocab_order
        e = inputs.e if inputs.rows is None else inputs.e[inputs.rows]
        c = inputs.c if order is None else inputs.c[order]
        bias = inputs.bias if order is None or inputs.bias is None else inputs.bias[order]
        return e.to(dtype), c.to(dtype), None if bias is None else bias.to(dtype)

    def logit_weights(self, inputs: Inputs[Tensor], problem: Problem, like: Tensor) -> Tensor:
        """u (V,) in the vocabulary order."""
        if inputs.logit_weight is None:
            return like.new_full((problem.v,), 1 / problem.v)
        u = inputs.logit_weight.to(like.dtype)
        return u if inputs.vocab_order is None else u[inputs.vocab_order]

    def logits(self, problem: Problem, e: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
        """z (N, BLOCK_V) of one tile."""
        z = e @ c.T if bias is None else e @ c.T + bias
        z = z * problem.logit_scale
        if problem.softcap is None:
            return z
        z = problem.softcap * torch.tanh(z / problem.softcap)
        return z if bias is None else z.masked_fill(bias == -torch.inf, -torch.inf)  # a mask is no large number

    def tile_sums(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maximum m, log sum exp(z - m) and entropy of one tile, (N,) each; -inf, 0 and 0 where all is masked."""
        m = z.amax(1)
        gap = z - finite(m)[:, None]
        s = gap.exp().sum(1)
        spread = -(gap.exp() * gap.clamp(min=-1e4)).sum(1)  # 0 times -inf is 0 here
        masked = m == -torch.inf
        log_s = s.log().masked_fill(masked, 0)
        return m, log_s, (log_s + spread / s).masked_fill(masked, 0)

    def negative_log_likelihood(self, m: Tensor, log_s: Tensor, target_logits: Tensor) -> Tensor:
        """lse - z of the targets (N, K): from differences to the row's maximum, as m may round log_s away."""
        return (log_s[:, None] + (m[:, None] - target_logits)).clamp(min=0)

    def softmax_gradient(self, z: Tensor, outputs: Outputs[Tensor], upstream: Upstream[Tensor]) -> Tensor:
        """p (a + h (lse - H - z)), (N, BLOCK_V)."""
        assert outputs.lse_low is not None
        p = ((z - outputs.lse[:, None]) - outputs.lse_low[:, None]).exp()
        weight = upstream.a[:, None]
        if upstream.h is not None and outputs.entropy is not None:
            gap = (outputs.lse[:, None] - z) + (outputs.lse_low - outputs.entropy)[:, None]
            weight = weight + upstream.h[:, None] * gap.clamp(max=1e4)  # p is 0 long before
        return p * weight

    def subtract_targets(self, dz: Tensor, place: Tensor, g: Tensor) -> Tensor:
        """dz - sum_k g_k [j = target_k] for targets whose place in the tile is in [0, BLOCK_V)."""
        for k in range(place.shape[1]):
            inside = (place[:, k] >= 0) & (place[:, k] < dz.shape[1])
            row = inside.nonzero()[:, 0]
            dz[row, place[row, k]] -= g[row, k]
        return dz

    def softcap_derivative(self, problem: Problem, z: Tensor) -> Tensor | float:
        """1 - (z / softcap)^2; 0 of a masked entry."""
        return 1.0 if problem.softcap is None else 1 - (z / problem.softcap).clamp(min=-1).square()

    # --- the two passes ------------------------------------------------------------------------------------

    def forward(self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]) -> Outputs[Tensor]:
        e, c, bias = self.wide(inputs, spec)
        place, rows = target_positions(inputs), torch.arange(problem.n, device=e.device)
        target_logits = e.new_zeros(place.shape)
        best, prediction = e.new_full((problem.n,), -torch.inf), torch.zeros_like(rows)
        weighted, u = e.new_zeros(problem.n), self.logit_weights(inputs, problem, e)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for v0, v1 in tiles(problem, spec):
            z = self.logits(problem, e, c[v0:v1], None if bias is None else bias[v0:v1])
            parts.append(self.tile_sums(z))
            inside = (place >= v0) & (place < v1)
            target_logits = torch.where(inside, z.gather(1, (place - v0).clamp(0, v1 - v0 - 1)), target_logits)
            value, column = z.max(1)
            prediction = torch.where(value > best, column + v0, prediction)
            best = torch.maximum(best, value)
            if "weighted_logit" in problem.outputs:
                weighted += z @ u[v0:v1]
        m, log_s, entropy = join(parts)
        lse, lse_low = pair(m, log_s)
        nll = self.negative_log_likelihood(m, log_s, target_logits).masked_fill(place < 0, 0)
        self.fill(maps, spec, lse, lse_low, parts)
        if "weighted_logit" in problem.outputs and problem.softcap is None:
            weighted = weighted_logit(inputs, problem, spec)  # in float64, since it may be large like lse
        entry = prediction if inputs.vocab_order is None else inputs.vocab_order[prediction]
        extra = {"entropy": entropy, "weighted_logit": weighted, "prediction": entry}
        return Outputs(lse, nll, lse_low, **{name: extra[name] for name in problem.outputs})

    def fill(
        self,
        maps: Maps[Tensor],
        spec: Spec,
        lse: Tensor,
        lse_low: Tensor,
        parts: list[tuple[Tensor, Tensor, Tensor]],
    ) -> None:
        """The maps, (T, N): each tile's mass, negated where the row needs the tile; each tile's entropy."""
        for t, (m, log_s, tile_entropy) in enumerate(parts):
            if maps.tile_mass is not None and spec.threshold is not None:
                log_max = (m - lse) - lse_low  # of the largest p
                log_mass = log_max + log_s
                quantity = log_max if spec.filter == "element" else log_mass
                mass = log_mass.exp()
                below = quantity <= math.log(spec.threshold)  # NaN is not: its tile is computed
                maps.tile_mass[t] = torch.where(below, mass, -mass.clamp(min=LEAST_HIT))
            if maps.tile_entropy is not None:
                maps.tile_entropy[t] = tile_entropy

    def backward(
        self,
        inputs: Inputs[Tensor],
        problem: Problem,
        spec: Spec,
        outputs: Outputs[Tensor],
        maps: Maps[Tensor],
        upstream: Upstream[Tensor],
    ) -> Gradients[Tensor]:
        e, c, bias = self.wide(inputs, spec)
        place, u = target_positions(inputs), self.logit_weights(inputs, problem, e)
        live = None
        if spec.filter != "none":
            live = self.work_list(inputs, problem, spec, maps, upstream).row_live  # (T, N)
        de, dc, dbias = torch.zeros_like(e), torch.empty_like(c), e.new_empty(problem.v)
        for t, (v0, v1) in enumerate(tiles(problem, spec)):
            z = self.logits(problem, e, c[v0:v1], None if bias is None else bias[v0:v1])
            dz = self.softmax_gradient(z, outputs, upstream)
            dz = self.subtract_targets(dz, place - v0, upstream.g)
            if upstream.s is not None:
                dz = dz + upstream.s[:, None] * u[v0:v1]
            dx = dz * self.softcap_derivative(problem, z) * problem.logit_scale
            if live is not None:
                dx = self.drop_dead(dx, live[t])
            de += dx @ c[v0:v1]
            dc[v0:v1] = dx.T @ e
            dbias[v0:v1] = dx.sum(0)
        if live is not None:
            self.add_skipped(inputs, problem, spec, outputs, maps, upstream, live, e, c, (de, dc, dbias))
        if inputs.vocab_order is not None:
            dc = torch.empty_like(dc).index_copy_(0, inputs.vocab_order, dc)
            dbias = torch.empty_like(dbias).index_copy_(0, inputs.vocab_order, dbias)
        return Gradients(
            de if problem.grad_e else None,
            dc.to(inputs.c.dtype) if problem.grad_c else None,
            dbias if problem.grad_bias else None,
        )

    def drop_dead(self, dx: Tensor, live: Tensor) -> Tensor:
        """What the filter does. A real kernel does not compute these rows at all."""
        return dx.masked_fill(~live[:, None], 0)

    def add_skipped(
        self,
        inputs: Inputs[Tensor],
        problem: Problem,
        spec: Spec,
        outputs: Outputs[Tensor],
        maps: Maps[Tensor],
        upstream: Upstream[Tensor],
        live: Tensor,
        e: Tensor,
        c: Tensor,
        sums: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """The compensation of skipped tiles; and the rank-one term of weighted logits, which no filter touches."""
        de, dc, dbias = sums
        found = tiles(problem, spec)
        if spec.compensate:
            mass = dead_mass(problem, spec, outputs, maps, upstream, live, 0, len(found))  # (T, N)
            columns = columns_of_tiles(problem, spec, 0, len(found), mass)
            de += mass.T @ torch.stack([c[v0:v1].mean(0) for v0, v1 in found])
            for t, (v0, v1) in enumerate(found):
                dc[v0:v1] += mass[t] @ e / columns[t]
                dbias[v0:v1] += mass[t].sum() / columns[t]
        if upstream.s is not None:
            # The tiles above added s u where they were live; dead rows still lack it.
            u = self.logit_weights(inputs, problem, e) * problem.logit_scale
            for t, (v0, v1) in enumerate(found):
                lacking = upstream.s.masked_fill(live[t], 0)
                de += lacking[:, None] * (u[v0:v1] @ c[v0:v1])
                dc[v0:v1] += u[v0:v1, None] * (lacking @ e)
                dbias[v0:v1] += u[v0:v1] * lacking.sum()


def tiles(problem: Problem, spec: Spec) -> list[tuple[int, int]]:
    """First and last column of every vocabulary tile."""
    step = spec.block_v or problem.v
    return [(v0, min(problem.v, v0 + step)) for v0 in range(0, problem.v, step)]


def join(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum M, log sum exp(z - M) and entropy of all tiles.

    H = sum_t w_t (H_t - log w_t), w_t = exp(tile_lse_t - lse).
    """
    m, log_s, tile_entropy = (torch.stack(column) for column in zip(*parts, strict=True))  # (T, N)
    row_m, row_log_s = joined(m, log_s, 0)
    log_w = torch.where(m == -torch.inf, m, ((m - row_m) + log_s) - row_log_s)
    entropy = (log_w.exp() * (tile_entropy - log_w.clamp(min=-1e4))).sum(0)
    return row_m, row_log_s, torch.where(row_m == -torch.inf, torch.nan, entropy)
