"""The bounds: ordinary arithmetic in each dtype stays inside, small mistakes do not."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from cce.reference import bounds, dense, error_norm, relative_error, tiled
from cce.reference.worklist import Tiling

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EVERY_OUTPUT = ("entropy", "weighted_logit")
# What a relative tolerance may come out as, at most, on the ordinary problems below.
LARGEST = {torch.float64: 2e-12, torch.float32: 5e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def same(x):
    return x


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """A plain backend in torch, with places to make a mistake in."""

    dtype: torch.dtype
    logits: object = same  # on z after the softcap
    dz: object = same  # on dz before it is stored
    accumulate: torch.dtype | None = None  # of de, summed in chunks of 16 entries
    slope: bool = True  # the softcap's derivative
    tf32: bool = False

    def tensor(self, x):
        acc = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.from_numpy(np.ascontiguousarray(x)).to(acc)

    def product(self, x, y):
        if self.tf32:  # truncated to 10 bits
            x, y = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (x.contiguous(), y.contiguous()))
        return x @ y

    def run(self, case, keep=None):
        """All outputs and gradients by name, float64; ``keep`` (N, V) says which pairs contribute."""
        inputs, problem = case.inputs, case.problem
        e, c = self.tensor(dense.embeddings(inputs)), self.tensor(inputs.c)
        z = self.product(e, c.T) + (0 if inputs.bias is None else self.tensor(inputs.bias))
        z = problem.logit_scale * z
        if problem.softcap is not None:
            z = problem.softcap * torch.tanh(z / problem.softcap)
        z = self.logits(z)
        lse, p = torch.logsumexp(z, 1), torch.softmax(z, 1)
        at_target = torch.log_softmax(z, 1).gather(1, torch.from_numpy(inputs.targets).clamp(min=0))
        result = {"lse": lse, "nll": at_target.neg().masked_fill(torch.from_numpy(inputs.targets < 0), 0)}
        if "entropy" in problem.outputs:
            result["entropy"] = lse - (p * z.clamp(min=-1e30)).sum(1)
        if "weighted_logit" in problem.outputs:
            result["weighted_logit"] = z @ self.tensor(dense.logit_weights(inputs, problem))
        result |= self.gradients(case, e, c, z, lse, p, result.get("entropy"), keep)
        return {name: x.double().numpy() for name, x in result.items()}

    def gradients(self, case, e, c, z, lse, p, entropy, keep):
        inputs, problem, upstream = case.inputs, case.problem, case.upstream
        largest = max(np.abs(x).max() for x in vars(upstream).values() if x is not None) or 1.0
        a, g, h, s = (None if x is None else self.tensor(x / largest) for x in vars(upstream).values())
        dz = p * (a[:, None] + (0 if h is None else h[:, None] * ((lse - entropy)[:, None] - z.clamp(min=-1e30))))
        hot = torch.zeros_like(z)
        targets = torch.from_numpy(inputs.targets)
        hot.scatter_add_(1, targets.clamp(min=0), torch.where(targets < 0, 0, g))
        dz = dz - hot
        weighted = 0 if s is None else s[:, None] * self.tensor(dense.logit_weights(inputs, problem))
        if problem.softcap is not None:  # without one it is added in closed form, below
            dz = dz + weighted
        if problem.softcap is not None and self.slope:
            dz = dz * (1 - (z / problem.softcap) ** 2)
        dz = self.dz(problem.logit_scale * dz)
        if keep is not None:
            dz = dz * torch.from_numpy(keep)
        dz = dz.to(self.dtype).to(z.dtype)
        if problem.softcap is None:
            dz = dz + problem.logit_scale * weighted
        de = self.product(dz, c)
        if self.accumulate is not None:
            de = torch.zeros_like(e).to(self.accumulate)
            for j in range(0, problem.v, 16):
                de += (dz[:, j : j + 16] @ c[j : j + 16]).to(self.accumulate)
        dc = self.product(dz.T, e)
        result = {"de": (largest * de.to(z.dtype)).to(self.dtype), "dc": (largest * dc).to(self.dtype)}
        return result if inputs.bias is None else result | {"dbias": largest * dz.sum(0)}


def judge(case, spec, result, **kwargs):
    """Error over bound, and the bound relative to the reference, by name."""
    out, maps = tiled.forward(case.inputs, case.problem, spec)
    gradients = tiled.backward(case.inputs, case.problem, spec, out, maps, case.upstream)
    limit = bounds(case.inputs, case.problem, spec, out, case.upstream, gradients, **kwargs)
    reference = {k: x for k, x in (vars(out) | vars(gradients)).items() if x is not None and k in limit}
    assert limit.keys() == reference.keys() == result.keys()
    errors = {k: error_norm(result[k], x) for k, x in reference.items()}
    norms = {k: float(np.linalg.norm(x)) for k, x in reference.items()}
    share = {k: error / limit[k] if error > 0 else 0.0 for k, error in errors.items()}
    return share, {k: limit[k] / norm if norm > 0 else math.inf for k, norm in norms.items()}


OPTIONS = {
    "plain": {"outputs": ()},
    "every output": {"outputs": EVERY_OUTPUT},
    "softcap": {"outputs": EVERY_OUTPUT, "softcap": 3.0, "logit_scale": 1.5},
    "no bias": {"outputs": (), "bias": False, "rows": False, "k": 1},
}


@pytest.fixture(scope="session")
def ordinary(make_case):
    def make(dtype, **options):
        case = make_case(48, 160, 32, dtype=dtype, **{"logit_scale": 0.3, **options})
        return case, case.spec(filter="none", block_n=8, block_v=32)

    return make


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ordinary_arithmetic_is_inside(ordinary, options, dtype):
    for seed in range(3):
        case, spec = ordinary(dtype, seed=seed, **options)
        share, tolerance = judge(case, spec, Arithmetic(dtype).run(case))
        assert max(share.values()) < 1, share
        assert max(tolerance.values()) < LARGEST[dtype], tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "v", "d"), [(1, 1, 1), (1, 2, 1), (2, 3, 1), (3, 1000, 2), (200, 5, 3)])
def test_inside_at_extreme_shapes(make_case, n, v, d, dtype):
    for seed in range(5):
        case = make_case(n, v, d, 2, dtype=dtype, outputs=EVERY_OUTPUT, seed=seed)
        share, _ = judge(case, case.spec(filter="none"), Arithmetic(dtype).run(case))
        assert max(share.values()) < 1, share


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, 1e-4])
def test_peaked_rows_are_inside_whatever_the_upstream(make_peaked, dtype, factor):
    case = make_peaked(dtype=dtype, outputs=("entropy",))
    case = dataclasses.replace(
        case, upstream=dataclasses.replace(case.upstream, **{k: factor * getattr(case.upstream, k) for k in "agh"})
    )
    share, tolerance = judge(case, case.spec(filter="none"), Arithmetic(dtype).run(case))
    assert max(share.values()) < 1, share
    assert max(tolerance.values()) < LARGEST[dtype], tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filtered_and_compensated(make_peaked, dtype):
    case = make_peaked(dtype=dtype, outputs=("entropy",), softcap=30.0)
    spec = case.spec(filter="element", threshold=2.0**-8, block_n=4, block_v=16)
    out, maps = tiled.forward(case.inputs, case.problem, spec)
    work = tiled.work_list(case.inputs, case.problem, spec, out, maps, case.upstream)
    tiling = Tiling.of(case.inputs, case.problem, spec)
    result = Arithmetic(dtype).run(case, keep=work.row_live[tiling.tile_of].T)
    # The compensation, with its mass and mean rows rounded as dz and c are.
    exact = tiled.backward(case.inputs, case.problem, spec, out, maps, case.upstream)
    off = dataclasses.replace(spec, compensate=False)
    without = tiled.backward(case.inputs, case.problem, off, out, maps, case.upstream)
    missing = judge(case, spec, result)[0]
    assert missing["de"] > 1, "dropping the compensation should be outside the bound"
    rng = np.random.default_rng(0)
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}[dtype]
    for name in ("de", "dc", "dbias"):
        term = getattr(exact, name) - getattr(without, name)
        result[name] = result[name] + term * (1 + rng.uniform(-unit, unit, term.shape))
    share, tolerance = judge(case, spec, result)
    assert max(share.values()) < 1, share
    assert max(tolerance.values()) < LARGEST[dtype], tolerance


def without_block(x):
    """The last 32 entries left out of the sum."""
    return torch.cat([x[:, :-32], torch.full_like(x[:, -32:], -1e30)], dim=1)


def zero_block(x):
    return torch.cat([x[:, :-32], torch.zeros_like(x[:, -32:])], dim=1)


def zero_tile(x):
    """One tile of 8 by 32 missing, of 30."""
    x = x.clone()
    x[8:16, 32:64] = 0
    return x


def to_bf16(x):
    return x.to(torch.bfloat16).to(x.dtype)


MUTANTS = {
    "tile missing from lse": ({"logits": without_block}, "lse"),
    "tile missing from dz, de": ({"dz": zero_block}, "de"),
    "tile missing from dz, dc": ({"dz": zero_block}, "dc"),
    "tile missing from dz, dbias": ({"dz": zero_block}, "dbias"),
    "one tile missing": ({"dz": zero_tile}, "de"),
    "logits shifted by one entry": ({"logits": lambda z: z.roll(1, 1)}, "nll"),
    "no slope of the softcap": ({"slope": False}, "dc"),
    "last tile counted twice": ({"dz": lambda x: torch.cat([x[:, :-32], 2 * x[:, -32:]], 1)}, "de"),
}
FLOAT32_MUTANTS = {
    "bf16 logits": ({"logits": to_bf16}, "lse"),
    "bf16 dz": ({"dz": to_bf16}, "de"),
    "bf16 accumulator": ({"accumulate": torch.bfloat16}, "de"),
    "fp16 accumulator": ({"accumulate": torch.float16}, "de"),
    "tf32 product": ({"tf32": True}, "nll"),
    "logits off by 1e-3": ({"logits": lambda z: z + 1e-3}, "lse"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mistake_is_outside(ordinary, mutant, dtype):
    case, spec = ordinary(dtype, **OPTIONS["softcap"])
    share, _ = judge(case, spec, Arithmetic(dtype, **mutant[0]).run(case))
    assert share[mutant[1]] > 1.5, share


@pytest.mark.parametrize("mutant", FLOAT32_MUTANTS.values(), ids=FLOAT32_MUTANTS)
def test_less_than_float32_is_outside(ordinary, mutant):
    case, spec = ordinary(torch.float32, **OPTIONS["every output"])
    share, _ = judge(case, spec, Arithmetic(torch.float32, **mutant[0]).run(case))
    assert share[mutant[1]] > 1.5, share


def test_tf32_is_inside_its_own_bound(ordinary):
    case, spec = ordinary(torch.float32, **OPTIONS["softcap"])
    share, tolerance = judge(case, spec, Arithmetic(torch.float32, tf32=True).run(case), product_roundoff=2.0**-10)
    assert max(share.values()) < 1, share
    assert max(tolerance.values()) < 0.1, tolerance


def test_masked_and_very_negative_logits_do_not_widen_the_gradients_bound(make_peaked):
    def limits(low):
        case = make_peaked(dtype=torch.float32)
        case.inputs.bias[200:] = low
        case.inputs.targets[case.inputs.targets >= 200] = 0
        spec = case.spec(filter="none")
        out = dense.forward(case.inputs, case.problem)
        gradients = dense.backward(case.inputs, case.problem, out, case.upstream)
        return bounds(case.inputs, case.problem, spec, out, case.upstream, gradients)

    masked, low = limits(-np.inf), limits(-1e4)
    for name in ("lse", "de", "dc", "dbias"):
        assert math.isfinite(masked[name]) and low[name] == pytest.approx(masked[name], rel=1e-6)


def test_error_norms():
    x = np.array([3.0, -np.inf])
    assert error_norm(x, np.array([0.0, -np.inf])) == 3.0
    assert error_norm(x, np.array([3.0, 0.0])) == math.inf
    assert error_norm(np.array([np.nan]), np.zeros(1)) == math.inf
    assert relative_error(np.zeros(2), np.zeros(2)) == 0.0
    assert relative_error(np.ones(2), np.zeros(2)) == math.inf
    assert relative_error(np.array([3.0]), np.array([2.0])) == 0.5
    with pytest.raises(ValueError, match=r"got shape \(2,\)"):
        error_norm(x, np.zeros(3))
