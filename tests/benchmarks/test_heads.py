"""The problems have the statistics they are made for."""

from __future__ import annotations

import pytest
import torch

import cce
from cce.benchmarks import heads, shapes, statistics
from cce.benchmarks.heads import Head
from cce.benchmarks.shapes import Shape


@pytest.fixture(scope="module")
def made() -> Head:
    return heads.synthetic(256, 64, 8192)


def test_synthetic_statistics(made: Head) -> None:
    found = statistics.summary(made)
    assert found["entropy"] == pytest.approx(2.5, rel=0.15)
    assert found["nll"] == pytest.approx(found["entropy"], rel=0.15), "calibrated: the loss is the entropy"
    assert found["mean_norm_c"] == pytest.approx(0.7, abs=0.05)
    assert 0.3 < found["mean_norm_e"] < 0.7
    assert 0.005 < found["tail_mass"] < 0.3 and 20 < found["hits"] < 400


def test_synthetic_arguments_are_used() -> None:
    found = statistics.summary(heads.synthetic(256, 64, 8192, entropy=5.0, mean_norm=0.3))
    assert found["entropy"] == pytest.approx(5.0, rel=0.1)
    assert found["mean_norm_c"] == pytest.approx(0.3, abs=0.05)


def test_frequent_entries_come_first(made: Head) -> None:
    mean = (made.e.double() @ made.c.double().T).softmax(1).mean(0)
    first, second, last = mean[:819].sum(), mean[819:4096].sum(), mean[4096:].sum()
    assert first > second > last > 0
    assert not torch.equal(mean.argsort(descending=True), torch.arange(8192)), "a BPE's ids are no perfect order"


def test_a_filter_has_something_to_do(made: Head) -> None:
    by_order = [
        cce.live_fraction(made.e, made.c, made.targets, spec=cce.Spec(filter="element", vocab_order=order))
        for order in ("mean_logit", "natural")
    ]
    assert 0.05 < by_order[0] < by_order[1] < 1


def test_the_same_seed_makes_the_same_head() -> None:
    first, second, other = (heads.synthetic(8, 4, 300, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.e, second.e) and torch.equal(first.targets, second.targets)
    assert not torch.equal(first.c, other.c)
    assert heads.synthetic(8, 4, 300, torch.bfloat16).c.dtype == torch.bfloat16


def test_random_is_near_uniform() -> None:
    found = statistics.summary(heads.random(64, 32, 4096))
    assert found["entropy"] > 6 and found["mean_norm_c"] < 0.1


@pytest.mark.parametrize("text", ["gpt2:0", "gpt2:x", "2x3", "nothing", "1x2x3x4", "-1x2x3", ""])
def test_no_such_shape(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected MODEL:N or NxDxV; models: .*gemma2-2b"):
        shapes.parse(text)


def test_shapes() -> None:
    assert shapes.parse("gemma2-2b") == Shape("gemma2-2b", 8192, 2304, 256_000)
    every = shapes.all_shapes()
    assert len(every) == len(shapes.HEADS) * len(shapes.TOKENS) == len(set(every))
    assert min(x.n for x in every) == 256 and max(x.n for x in every) == 32_768
    for names in (shapes.GPU_SHAPES, shapes.CPU_SHAPES, *shapes.QUICK.values()):
        assert {shapes.parse(name).name for name in names} <= set(shapes.HEADS)
