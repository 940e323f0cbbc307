"""A head under DDP, FSDP1 and FSDP2: two ranks with half of the batch each are one process with all of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from harness import Workers
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import cce

V, D, BATCH, LENGTH, RANKS = 37, 6, 4, 5, 2
OPTIONS: dict[str, Any] = {"shift": 1, "softcap": 4.0, "label_smoothing": 0.1}
# "head": the module computes the loss; "root": the model does, with the weight of a linear head.
KINDS = ("head", "root", "tied")


class Model(nn.Module):
    """An embedding, a layer, a head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embedding = nn.Embedding(V, D)
        self.body = nn.Linear(D, D)
        # Exactness of the loss is not in question here: rounding must not hide an error of the ranks' bookkeeping.
        self.head: nn.Module = nn.Linear(D, V) if kind == "root" else cce.LinearCrossEntropy(D, V, **OPTIONS)
        if kind == "tied":
            self.head.weight = self.embedding.weight
        self.double()

    def forward(self, tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        hidden = self.body(self.embedding(tokens)).tanh()
        if self.kind == "root":
            return cce.loss(hidden, self.head.weight, targets, self.head.bias, reduction=reduction, **OPTIONS)
        self.head.options["reduction"] = reduction
        return self.head(hidden, targets)


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and targets of all ranks; the ranks ignore different numbers of them."""
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(V, (BATCH, LENGTH), generator=rng)
    targets = tokens.clone()
    targets[0, 1:] = -100
    targets[3, 2] = -100
    return tokens, targets


def ddp(model: Model, group: dist.ProcessGroup) -> nn.Module:
    return DistributedDataParallel(model, process_group=group)


def fsdp1(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    return FullyShardedDataParallel(model, process_group=group, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp1_by_layer(model: Model, group: dist.ProcessGroup) -> nn.Module:
    model.body, model.head = fsdp1(model.body, group), fsdp1(model.head, group)
    return fsdp1(model, group)


def fsdp2(model: Model, group: dist.ProcessGroup) -> nn.Module:
    return fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))


def fsdp2_by_layer(model: Model, group: dist.ProcessGroup) -> nn.Module:
    """The head is a unit of its own, whose forward gathers its weight."""
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in (model.embedding, model.body, model.head):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name, whole; the gradients of an FSDP1 model have to be gathered by its ranks."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return _named(model.named_parameters())
    return _named(model.named_parameters())


def _named(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    found = {}
    for name, parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None, f"{name} has no gradient"
        found[name.replace("module.", "").replace("_fsdp_wrapped_", "")] = (
            gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
        )
    return found


def two_steps(group: dist.ProcessGroup, wrap: str, kind: str) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of this rank's half of the batch, before and after a step."""
    model = globals()[wrap](Model(kind), group)
    rank, optimizer = dist.get_rank(group), torch.optim.SGD(model.parameters(), lr=0.1)
    tokens, targets = (x.chunk(RANKS)[rank] for x in batch())
    # The ranks' gradients are averaged: the sum over this rank, over the tokens of all ranks, times the ranks.
    count = (targets[:, 1:] != -100).sum()
    dist.all_reduce(count, group=group)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(tokens, targets, "sum") * RANKS / count
        loss.backward()
        found.append((float(loss.detach()), gradients(model)))
        optimizer.step()
    return found


def one_process(kind: str) -> list[tuple[float, dict[str, Tensor]]]:
    model = Model(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(*batch())
        loss.backward()
        found.append((float(loss.detach()), _named(model.named_parameters())))
        optimizer.step()
    return found


@pytest.mark.parametrize(
    ("wrap", "kind"),
    # "root" by layer uses the head's weight outside of the unit that gathers it: test_weight_of_another_unit.
    [
        *((wrap.__name__, kind) for wrap in (ddp, fsdp1, fsdp2) for kind in KINDS),
        ("fsdp1_by_layer", "head"),
        ("fsdp2_by_layer", "head"),
    ],
)
def test_two_ranks_are_one_process(workers: Workers, wrap: str, kind: str) -> None:
    found = workers.run(two_steps, wrap, kind, ranks=RANKS)
    for step, (loss, expected) in enumerate(one_process(kind)):
        mean = sum(rank[step][0] for rank in found) / RANKS
        assert abs(mean - loss) <= 1e-12 * loss, f"step {step}"
        assert abs(found[0][step][0] - loss) > 1e-3, "both halves have the same loss: this tests nothing"
        for rank in found:
            assert rank[step][1].keys() == expected.keys()
            for name, gradient in rank[step][1].items():
                error = (gradient - expected[name]).norm() / expected[name].norm()
                assert error <= 1e-12, f"step {step}, {name}: relative error {error:.3g}"


def weight_of_another_unit(group: dist.ProcessGroup, kind: str) -> str:
    model = fsdp2_by_layer(Model(kind), group)
    try:
        model(*(x.chunk(RANKS)[dist.get_rank(group)] for x in batch()))
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_weight_of_another_unit(workers: Workers) -> None:
    """A weight that is still in shards says that the vocabulary is split: tokens that differ then need a word."""
    for message in workers.run(weight_of_another_unit, "root", ranks=RANKS):
        assert "the processes of the group differ in targets" in message and "tokens='own'" in message


def compiled_step(group: dist.ProcessGroup, wrap: str) -> list[tuple[float, dict[str, Tensor]]]:
    model = globals()[wrap](Model("head"), group)
    tokens, targets = (x.chunk(RANKS)[dist.get_rank(group)] for x in batch())
    found = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        loss = run(tokens, targets)
        loss.backward()
        found.append((float(loss.detach()), gradients(model)))
    return found


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_compiled(workers: Workers, wrap: str) -> None:
    """torch.compile around the wrapped model, whose hooks break its graph, changes nothing."""
    for (loss, eager), (again, compiled) in workers.run(compiled_step, wrap, ranks=RANKS):
        assert abs(again - loss) <= 1e-12 * loss
        for name, gradient in eager.items():
            assert (compiled[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


def in_bfloat16(group: dist.ProcessGroup, kind: str) -> tuple[float, Tensor, torch.dtype]:
    model = Model(kind).float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"), mp_policy=policy)
    tokens, targets = (x.chunk(RANKS)[dist.get_rank(group)] for x in batch())
    loss = model(tokens, targets, "sum") * RANKS / (batch()[1][:, 1:] != -100).sum()
    loss.backward()
    return float(loss.detach()), gradients(model)["head.weight"], loss.dtype


@pytest.mark.parametrize("kind", ["head", "root"])
def test_mixed_precision_of_fsdp2(workers: Workers, kind: str) -> None:
    """Weights gathered in bfloat16, losses and gradients in float32."""
    expected, gradients = one_process(kind)[0]
    found = workers.run(in_bfloat16, kind, ranks=RANKS)
    assert abs(sum(loss for loss, _, _ in found) / RANKS - expected) <= 2e-2 * expected
    for _, gradient, dtype in found:
        assert gradient.dtype == dtype == torch.float32
        error = (gradient.double() - gradients["head.weight"]).norm() / gradients["head.weight"].norm()
        assert 1e-4 < error <= 3e-2
