"""The oracle is PyTorch's float64 answer, and for a filter what the reference computes tile by tile."""

from __future__ import annotations

import pytest
import torch

import cce
from cce.benchmarks import float64, measure, oracle, peers
from cce.benchmarks.candidates import MODES, of_backend, of_peer
from cce.benchmarks.heads import Head

ORDERS = ("mean_logit", "natural")


def dense(head: Head) -> tuple[torch.Tensor, ...]:
    e, c = (x.double().requires_grad_() for x in (head.e, head.c))
    loss = torch.nn.functional.cross_entropy(e @ c.T, head.targets)
    return (loss.detach(), *torch.autograd.grad(loss, (e, c)))


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.double() - y).norm() / y.norm())


@pytest.mark.parametrize("v", [1000, 6000])
def test_sample_is_that_of_the_dense_gradients(small: Head, v: int) -> None:
    head = Head("cut", small.e, small.c[:v], small.targets.clamp(max=v - 1))
    loss, de, dc = dense(head)
    found = oracle.Oracle(head)
    assert found.loss == pytest.approx(float(loss), rel=1e-12)
    sample = found.sample()
    assert len(sample.entries.unique()) == (v if v == 1000 else 15 * 128 + v % 128), "a small one is sampled whole"
    assert 0 in sample.rows and len(head.e) - 1 in sample.rows
    for mine, expected in zip(sample.exact, sample.of((de, dc)), strict=True):
        assert relative(mine, expected) < 1e-12
    assert max(sample.errors((de, dc))) < 1e-12
    assert sample.errors((1.01 * de, 0.98 * dc)) == pytest.approx((0.01, 0.02))


def test_whole_reference(small: Head) -> None:
    _, de, dc = dense(small)
    found = float64.reference(small.e, small.c, small.targets)
    assert relative(found[0], de) < 1e-12 and relative(found[1], dc) < 1e-12
    assert float64.relative_error((1.5 * dc).float(), dc) == pytest.approx(0.5)


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_filter_is_that_of_the_reference(small: Head, order: str, compensate: bool) -> None:
    spec = cce.Spec(filter="element", threshold=2.0**-8, vocab_order=order, compensate=compensate)
    candidate = of_backend(small, "reference", "", spec)
    assert candidate.spec is not None and candidate.problem is not None and candidate.loss is not None
    live = oracle.live_tiles(small, "reference", candidate.problem, candidate.spec)
    fraction = live.fraction(len(small.c), 128)
    assert 0.1 < fraction < 0.9
    assert fraction == pytest.approx(cce.live_fraction(small.e, small.c, small.targets, spec=spec))
    found = oracle.Oracle(small)
    sample = found.sample(candidate.spec)
    gradients = measure.step(candidate.loss, small)()[1:]
    assert max(sample.errors(gradients, found.gradients(sample, live))) < 1e-6
    assert sample.errors(gradients)[0] > 1e-4, "the filter leaves something out"
    other = oracle.Live(live.rows, not compensate)
    assert max(sample.errors(gradients, found.gradients(sample, other))) > 1e-4


def test_dense_arithmetic_errs_as_pytorchs_does(half: Head) -> None:
    sample = oracle.Oracle(half).sample()
    expected = sample.errors(measure.step(peers.dense, half)()[1:])
    assert sample.dense == pytest.approx(expected, rel=0.3) and min(sample.dense) > 2**-11


@pytest.mark.parametrize("mode", MODES)
def test_torch_backend_is_right(half: Head, mode: str) -> None:
    entry = measure.checked(oracle.Oracle(half), of_backend(half, "torch", mode, MODES[mode]), "forward+backward")
    assert entry.row["status"] == "ok", entry.row
    assert entry.row["peak_mib"] > entry.row["over_gradients_mib"] > 0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"error_loss": 1e-3}, "the loss errs"),
        ({"error_loss": float("nan")}, "the loss errs by nan"),
        ({"error_loss": 0.0, "error_de": 0.02, "error_dc": 0.0, "dense_de": 0.001, "dense_dc": 0.001}, "dE errs"),
        ({"error_loss": 0.0, "error_de": 0.0, "error_dc": 0.05, "dense_de": 0.02, "dense_dc": 0.02}, "dC errs"),
        ({"error_loss": 0.0, "error_de": 0.03, "error_dc": 0.03, "dense_de": 0.02, "dense_dc": 0.02}, ""),
        (
            {"error_loss": 0.0, "error_de": 0.2, "error_dc": 0.1, "dense_de": 0.0, "dense_dc": 0.0}
            | {"filter_de": 0.001, "filter_dc": 0.001},
            "",
        ),
        (
            {"error_loss": 0.0, "error_de": 0.002, "error_dc": 0.002, "dense_de": 0.0, "dense_dc": 0.0}
            | {"filter_de": 0.5, "filter_dc": 0.001},
            "dE errs by 0.5",
        ),
    ],
)
def test_what_is_wrong(row: dict[str, float], said: str) -> None:
    found = measure.wrong(row, torch.bfloat16, 1000)
    assert found.startswith(said) and bool(said) == bool(found)


def test_an_approximate_peer_may_err_more(small: Head) -> None:
    row = {"error_loss": 0.0, "error_de": 0.2, "error_dc": 0.1, "dense_de": 0.0, "dense_dc": 0.0}
    apple, liger = peers.PEERS["cut-cross-entropy"], peers.PEERS["liger"]
    assert measure.wrong(row, torch.bfloat16, 1000) and measure.wrong(row, torch.bfloat16, 1000, liger)
    assert not measure.wrong(row, torch.bfloat16, 1000, apple)
    assert measure.wrong({**row, "error_de": 0.6}, torch.bfloat16, 1000, apple)


def test_the_loss_of_a_peer_may_come_from_16_bit_logits(half: Head) -> None:
    row = {"error_loss": 0.005}
    assert measure.wrong(row, torch.bfloat16, 1000) and measure.wrong(row, torch.float32, 1000, peers.PEERS["eager"])
    assert not measure.wrong(row, torch.bfloat16, 1000, peers.PEERS["eager"])
    assert measure.wrong({"error_loss": 0.02}, torch.bfloat16, 1000, peers.PEERS["eager"])
    entry = measure.checked(oracle.Oracle(half), of_peer(peers.PEERS["eager"]), "forward+backward")
    assert entry.row["status"] == "ok", entry.row
