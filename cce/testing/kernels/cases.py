"""The cases of the kernels' contract: as data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cce.testing.kernels.case import Case

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def _targets() -> list[Case]:
    plain = Case("target_logits", n=37, v=301, d=75)
    return [
        plain,
        replace(plain, name="target_logits k3 bias softcap", k=3, bias="random", softcap=2.0, scale=1.5),
        replace(plain, name="target_logits transposed scale", view="transposed", scale=0.5),
        replace(plain, name="target_logits sliced float16", view="sliced", dtype=F16, bias="random"),
        replace(plain, name="target_logits float32 nan rows", dtype=F32, nan_rows=True),
        replace(plain, name="target_logits bf16 and float32", e_dtype=BF16, c_dtype=F32, k=2),
        replace(plain, name="target_logits float16 and bf16", e_dtype=F16, c_dtype=BF16),
        replace(plain, name="target_logits wide", d=2500, n=5),
        replace(plain, name="target_logits one column", d=1, n=3, v=2),
        replace(plain, name="target_logits softcap large", softcap=1e6, bias="random", dtype=F32),
        replace(plain, name="target_logits softcap masked", softcap=3.0, bias="masked", k=3),
        replace(plain, name="target_logits strange", strange=True),
    ]


def _statistics() -> list[Case]:
    plain = Case("statistics")
    every = ("entropy", "weighted_logit", "prediction")
    mapped = replace(plain, filter="element")
    exact: dict[str, Any] = {"integers": True, "d": 24, "outputs": ("entropy",)}
    return [
        plain,
        replace(plain, name="statistics one row", n=1, v=7, d=8, splits=1),
        replace(plain, name="statistics one class", n=5, v=1, d=3, splits=1),
        replace(plain, name="statistics aligned sizes", n=128, v=1024, d=128, splits=2),
        replace(plain, name="statistics many rows", n=300, v=600, d=40, splits=2),
        replace(plain, name="statistics float16", dtype=F16, bias="random"),
        replace(plain, name="statistics float32", dtype=F32, d=33, outputs=("entropy",)),
        replace(plain, name="statistics tf32", dtype=F32, d=33, ieee=False, outputs=("entropy",)),
        replace(plain, name="statistics online", accumulation="online", outputs=("entropy",), bias="large"),
        replace(plain, name="statistics large bias", bias="large", outputs=("entropy",)),
        replace(plain, name="statistics masked", bias="masked", outputs=("entropy", "prediction")),
        replace(plain, name="statistics masked low", bias="masked low", outputs=("entropy",), splits=1),
        replace(plain, name="statistics softcap scale", softcap=2.0, scale=1.5, bias="random"),
        replace(plain, name="statistics prediction", outputs=("prediction",)),
        replace(plain, name="statistics ties", outputs=("prediction",), integers=True, d=16, windows=2),
        replace(plain, name="statistics everything", outputs=every, softcap=3.0, scale=0.5, bias="random"),
        replace(plain, name="statistics windows", outputs=every, softcap=3.0, bias="random", windows=2),
        replace(plain, name="statistics windows masked", outputs=("entropy",), bias="masked", windows=3, splits=2),
        replace(plain, name="statistics windows online", accumulation="online", outputs=every, softcap=9.0, windows=2),
        replace(plain, name="statistics nan rows", nan_rows=True, outputs=("entropy", "prediction")),
        replace(plain, name="statistics wide d", n=20, v=300, d=1030, splits=1),
        replace(plain, name="statistics narrow d", n=20, v=300, d=1, splits=1),
        replace(mapped, name="statistics maps element"),
        replace(mapped, name="statistics maps tile", filter="tile"),
        replace(mapped, name="statistics maps entropy", outputs=("entropy",), bias="random"),
        replace(mapped, name="statistics maps online", outputs=("entropy",), accumulation="online"),
        replace(mapped, name="statistics maps masked low", outputs=("entropy",), bias="masked low"),
        replace(mapped, name="statistics maps masked", outputs=("entropy",), bias="masked"),
        replace(
            mapped, name="statistics maps masked online", outputs=("entropy",), bias="masked", accumulation="online"
        ),
        replace(mapped, name="statistics maps windows", windows=2, outputs=("entropy", "prediction"), nan_rows=True),
        replace(mapped, name="statistics maps softcap", softcap=4.0, filter="tile", dtype=F16),
        replace(mapped, name="statistics maps float32", dtype=F32),
        replace(plain, name="statistics offset 2^13", offset=2.0**13, dtype=F16, **exact),
        replace(plain, name="statistics offset 2^20", offset=2.0**20, windows=2, **exact),
        replace(plain, name="statistics softcap large", softcap=1e6, outputs=every, dtype=F32, bias="random"),
        replace(plain, name="statistics softcap masked", softcap=3.0, outputs=("entropy",), bias="masked", scale=0.5),
        replace(plain, name="statistics weighted masked", softcap=3.0, outputs=("weighted_logit",), bias="few masked"),
        replace(plain, name="statistics strange", strange=True, outputs=("entropy", "prediction"), windows=2),
        replace(mapped, name="statistics maps offset 2^20", offset=2.0**20, **exact),
        replace(mapped, name="statistics maps online offset", offset=2.0**20, accumulation="online", **exact),
        replace(mapped, name="statistics maps strange", strange=True, outputs=("entropy",)),
        *(
            replace(mapped, name=f"statistics maps block_v={block_v}", block_v=block_v, outputs=("entropy",), n=40)
            for block_v in (16, 64, 128, 256)
        ),
    ]


def _gradient() -> list[Case]:
    plain = Case("gradient", v=700)
    every: dict[str, Any] = {"outputs": ("entropy", "weighted_logit"), "softcap": 3.0, "bias": "random"}
    return [
        plain,
        replace(plain, name="gradient one row", n=1, v=60, d=8),
        replace(plain, name="gradient aligned sizes", n=256, v=773, d=128),
        replace(plain, name="gradient many rows", n=300, v=100, d=40),
        replace(plain, name="gradient float16 k3", dtype=F16, k=3, bias="random"),
        replace(plain, name="gradient float32", dtype=F32, d=33, k=2),
        replace(plain, name="gradient tf32", dtype=F32, d=33, ieee=False),
        replace(plain, name="gradient without sums", dbias=False, scale=0.5),
        replace(plain, name="gradient entropy", outputs=("entropy",), bias="masked"),
        replace(plain, name="gradient softcap", softcap=2.0, bias="random", scale=0.7),
        replace(plain, name="gradient entropy softcap", outputs=("entropy",), softcap=2.0, scale=1.5, k=3),
        replace(plain, name="gradient masked k3", bias="masked", k=3),
        replace(plain, name="gradient weighted", outputs=("weighted_logit",), softcap=2.0),
        replace(plain, name="gradient everything", k=3, scale=1.5, **every),
        replace(plain, name="gradient everything float16", k=2, dtype=F16, **every),
        replace(plain, name="gradient nan rows", nan_rows=True, dbias=False),
        replace(plain, name="gradient wide d", n=20, v=100, d=1030),
        replace(plain, name="gradient offset 2^13", offset=2.0**13, integers=True, d=24, dtype=F16),
        replace(plain, name="gradient offset 2^20", offset=2.0**20, integers=True, d=24, outputs=("entropy",), k=2),
        replace(plain, name="gradient softcap large", softcap=1e6, dtype=F32, outputs=("entropy",)),
        replace(plain, name="gradient softcap masked", softcap=3.0, bias="masked", outputs=("entropy",), k=2),
        replace(plain, name="gradient strange", strange=True, dbias=False),
        replace(plain, name="gradient strange softcap", strange=True, dbias=False, softcap=3.0, outputs=("entropy",)),
    ]


def _live() -> list[Case]:
    plain = Case("live", v=600)
    options: dict[str, Any] = {
        "k": 3,
        "scale": 1.5,
        "bias": "random",
        "softcap": 5.0,
        "outputs": ("entropy",),
        "ordered": True,
    }
    shapes = ((16, 16), (16, 32), (32, 64), (64, 32), (64, 128), (128, 16), (128, 128), (128, 256), (16, 256))
    return [
        plain,
        replace(plain, name="live sorted", sorted_rows=True),
        replace(plain, name="live ordered", ordered=True),
        replace(plain, name="live sorted ordered", sorted_rows=True, ordered=True, bias="random"),
        replace(plain, name="live nan rows", nan_rows=True, ordered=True, k=3),
        replace(plain, name="live nan rows sorted", nan_rows=True, sorted_rows=True),
        replace(plain, name="live dead", density=0.0),
        replace(plain, name="live dense one chunk", density=1.0, slots=10_000),
        replace(plain, name="live sparse", density=0.05),
        replace(plain, name="live uncompensated", compensate=False),
        replace(plain, name="live float16 norm", dtype=F16, norm=True),
        replace(plain, name="live float32", dtype=F32, d=33),
        replace(plain, name="live tf32", dtype=F32, d=33, ieee=False),
        replace(plain, name="live mixed", e_dtype=F32, c_dtype=BF16, dtype=F32, d=33),
        replace(plain, name="live masked", bias="masked", k=3),
        replace(plain, name="live only de", wanted=("de",)),
        replace(plain, name="live only dc", wanted=("dc",), d=75),
        replace(plain, name="live only dbias", wanted=("dbias",), bias="random"),
        replace(plain, name="live odd d", d=75, ordered=True),
        replace(plain, name="live odd d sorted", d=75, sorted_rows=True, dtype=F16),
        replace(plain, name="live wide d", n=40, v=200, d=1030),
        replace(plain, name="live offset 2^20", offset=2.0**20, integers=True, d=24, outputs=("entropy",)),
        replace(plain, name="live softcap masked", softcap=3.0, bias="masked", k=2, dtype=F32),
        replace(plain, name="live strange", strange=True, outputs=("entropy",), ordered=True),
        replace(plain, name="live strange sorted", strange=True, sorted_rows=True, n=40),
        replace(plain, name="live everything", **options),
        replace(plain, name="live everything sorted", sorted_rows=True, **options),
        replace(plain, name="live everything float16", dtype=F16, norm=True, nan_rows=True, **options),
        *(
            replace(plain, name=f"live blocks {n} x {v}", block_n=n, block_v=v, n=2 * n + 17, v=4 * v + 21, **options)
            for n, v in shapes
        ),
        *(
            replace(
                plain, name=f"live blocks {n} x {v} plain", block_n=n, block_v=v, n=3 * n + 5, v=6 * v + 9,
                sorted_rows=True, d=128, wanted=("de", "dc"),
            )
            for n, v in ((128, 128), (64, 128), (128, 256))
        ),
    ]  # fmt: skip


def _mean_rows() -> list[Case]:
    plain = Case("mean_rows", v=600)
    return [
        plain,
        replace(plain, name="mean_rows ordered", ordered=True, block_v=128),
        replace(plain, name="mean_rows odd d", d=75, ordered=True, dtype=F16),
        replace(plain, name="mean_rows float32", dtype=F32, d=33, block_v=256),
        replace(plain, name="mean_rows wide", d=1030, v=70, block_v=16, ordered=True),
    ]


def _dead_mass() -> list[Case]:
    plain = Case("dead_mass", v=600)
    return [
        plain,
        replace(plain, name="dead_mass float16 big blocks", dtype=F16, block_n=64, block_v=128, n=150),
        replace(plain, name="dead_mass entropy", outputs=("entropy",), scale=1.5),
        replace(plain, name="dead_mass softcap", softcap=9.0),
        replace(plain, name="dead_mass entropy softcap float32", outputs=("entropy",), softcap=9.0, dtype=F32, d=33),
        replace(plain, name="dead_mass all live", density=1.0),
    ]


def _lists() -> list[Case]:
    plan, work, fill = Case("plan", v=3000), Case("work_list", n=300), Case("fill_maps", filter="element")
    gather, scatter = Case("gather_rows", d=128), Case("scatter_rows", d=128)
    return [
        plan,
        *(
            replace(plan, name=f"plan density={x:g} pack={pack}", density=x, pack=pack)
            for x in (0, 0.05, 1)
            for pack in (1, 3)
        ),
        replace(plan, name="plan one block", n=9, v=9000),
        replace(plan, name="plan one tile", v=20),
        replace(plan, name="plan many blocks", n=1100, v=300),
        work,
        replace(work, name="work_list of few", sorted_rows=True, density=0.1, block_n=32),
        replace(work, name="work_list of targets alone", sorted_rows=True, density=0, k=3, ordered=True),
        replace(work, name="work_list of parts", sorted_rows=True, density=0.1, nan_rows=True, outputs=("entropy",)),
        replace(work, name="work_list strange", sorted_rows=True, density=0.1, strange=True, outputs=("entropy",)),
        replace(work, name="work_list float32", sorted_rows=True, dtype=F32, n=1, v=2000),
        replace(work, name="work_list many rows", sorted_rows=True, density=0.1, n=17_000, v=70, block_n=128),
        gather,
        replace(gather, name="gather_rows odd d float32", dtype=F32, d=33),
        scatter,
        replace(scatter, name="scatter_rows odd d", d=75, norm=True),
        replace(scatter, name="scatter_rows float32", dtype=F32, norm=True),
        replace(scatter, name="scatter_rows float16 odd d", dtype=F16, d=33),
        Case("statistics_ahead", v=2000, splits=2),
        Case("statistics_ahead many rows", n=700, d=136, dtype=F16, splits=1),
        Case("joined", n=301),
        Case("joined k3", n=33, k=3, splits=17),
        Case("joined one split", n=3, splits=1),
        Case("joined offset", n=301, offset=2.0**20),
        Case("joined offset k3", n=33, k=3, splits=5, offset=2.0**13),
        Case("joined strange", n=301, k=3, strange=True),
        fill,
        replace(fill, name="fill_maps tile entropy", filter="tile", outputs=("entropy",), n=700),
        replace(fill, name="fill_maps float32", dtype=F32, outputs=("entropy",), block_v=128),
        replace(fill, name="fill_maps offset", offset=2.0**20),
        replace(fill, name="fill_maps tile offset", filter="tile", offset=2.0**20, dtype=F32),
        replace(fill, name="fill_maps strange", strange=True),
        replace(fill, name="fill_maps tile strange", filter="tile", strange=True, dtype=F32),
    ]


CASES: tuple[Case, ...] = (
    *_targets(), *_statistics(), *_gradient(), *_mean_rows(), *_dead_mass(), *_lists(), *_live()
)  # fmt: skip
