"""A whole backend in plain PyTorch: one vocabulary tile at a time, every option, the filter and its compensation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cce.backends.base import Backend
from cce.compensation import columns_of_tiles, dead_mass
from cce.problem import LEAST_HIT, Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.spec import Spec
from cce.worklist import target_positions


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
        return z if problem.softcap is None else problem.softcap * torch.tanh(z / problem.softcap)

    def tile_sums(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maximum, log-sum-exp and entropy of one tile, (N,) each."""
        m = z.amax(1)
        gap = z - m.clamp(min=torch.finfo(z.dtype).min)[:, None]  # a masked tile has m = -inf
        s = gap.exp().sum(1)
        spread = -(gap.exp() * gap.clamp(min=-1e4)).sum(1)
        return m, m + s.clamp(min=1e-30).log(), torch.where(s > 0, s.clamp(min=1e-30).log() + spread / s, 0.0)

    def softmax_gradient(self, z: Tensor, outputs: Outputs[Tensor], upstream: Upstream[Tensor]) -> Tensor:
        """p (a + h (lse - H - z)), (N, BLOCK_V)."""
        p = (z - outputs.lse[:, None]).exp()
        weight = upstream.a[:, None]
        if upstream.h is not None and outputs.entropy is not None:
            weight = weight + upstream.h[:, None] * ((outputs.lse - outputs.entropy)[:, None] - z.clamp(min=-1e30))
        return p * weight

    def subtract_targets(self, dz: Tensor, place: Tensor, g: Tensor) -> Tensor:
        """dz - sum_k g_k [j = target_k] for targets whose place in the tile is in [0, BLOCK_V)."""
        for k in range(place.shape[1]):
            inside = (place[:, k] >= 0) & (place[:, k] < dz.shape[1])
            row = inside.nonzero()[:, 0]
            dz[row, place[row, k]] -= g[row, k]
        return dz

    def softcap_derivative(self, problem: Problem, z: Tensor) -> Tensor | float:
        return 1.0 if problem.softcap is None else 1 - (z / problem.softcap).square()

    # --- the two passes ------------------------------------------------------------------------------------

    def forward(self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]) -> Outputs[Tensor]:
        e, c, bias = self.wide(inputs, spec)
        place, rows = target_positions(inputs), torch.arange(problem.n, device=e.device)
        target_logits = e.new_zeros(place.shape)
        best, prediction = e.new_full((problem.n,), -torch.inf), torch.zeros_like(rows)
        weighted, u = e.new_zeros(problem.n), self.logit_weights(inputs, problem, e)
        parts: list[tuple[Tensor, Tensor]] = []
        quantities: list[Tensor] = []  # what the filter compares with its threshold
        for v0, v1 in tiles(problem, spec):
            z = self.logits(problem, e, c[v0:v1], None if bias is None else bias[v0:v1])
            m, tile_lse, tile_entropy = self.tile_sums(z)
            parts.append((tile_lse, tile_entropy))
            quantities.append(m if spec.filter == "element" else tile_lse)
            inside = (place >= v0) & (place < v1)
            target_logits = torch.where(inside, z.gather(1, (place - v0).clamp(0, v1 - v0 - 1)), target_logits)
            value, column = z.max(1)
            prediction = torch.where(value > best, column + v0, prediction)
            best = torch.maximum(best, value)
            if "weighted_logit" in problem.outputs:
                weighted += z @ u[v0:v1]
        lse, entropy = join(parts)
        self.fill(maps, spec, lse, parts, quantities)
        entry = prediction if inputs.vocab_order is None else inputs.vocab_order[prediction]
        extra = {"entropy": entropy, "weighted_logit": weighted, "prediction": entry}
        return Outputs(lse, target_logits, **{name: extra[name] for name in problem.outputs})

    def fill(
        self,
        maps: Maps[Tensor],
        spec: Spec,
        lse: Tensor,
        parts: list[tuple[Tensor, Tensor]],
        quantities: list[Tensor],
    ) -> None:
        """The maps, (T, N): each tile's mass, negated where the row needs the tile; each tile's entropy."""
        if maps.tile_mass is not None and spec.threshold is not None:
            for t, ((tile_lse, _), quantity) in enumerate(zip(parts, quantities, strict=True)):
                mass = (tile_lse - lse.clamp(min=-1e30)).exp()
                hit = quantity > lse + math.log(spec.threshold)
                maps.tile_mass[t] = torch.where(hit, -mass.clamp(min=LEAST_HIT), mass)
        if maps.tile_entropy is not None:
            for t, (_, tile_entropy) in enumerate(parts):
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


def join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy of all tiles: H = sum_t w_t (H_t + lse - tile_lse_t), w_t = exp(tile_lse_t - lse)."""
    tile_lse, tile_entropy = (torch.stack(column) for column in zip(*parts, strict=True))
    lse = tile_lse.logsumexp(0)
    log_w = tile_lse - lse
    return lse, (log_w.exp() * (tile_entropy - log_w.clamp(min=-1e4))).sum(0)
