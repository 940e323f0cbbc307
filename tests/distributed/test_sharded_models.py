"""A head sharded as models have it: a DTensor, beside DDP and FSDP2 along another dimension, or sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from harness import Workers
from splits import data, relative_errors, split_of
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import cce
from cce.tuning import autotune

OPTIONS = {"softcap": 5.0, "label_smoothing": 0.1}


def alone(names: tuple[str, ...] = ("e", "c", "bias")) -> list[Tensor]:
    """Loss and gradients of one process."""
    whole = data()
    leaves = {name: getattr(whole, name).clone().requires_grad_() for name in names}
    loss = cce.loss(leaves["e"], leaves["c"], whole.targets, leaves["bias"], **OPTIONS)
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


def dtensors(group: dist.ProcessGroup) -> tuple[list[float], list[str]]:
    """``c`` says itself how it is split: unevenly, 203 entries over 4 ranks."""
    whole, mesh = data(), DeviceMesh.from_group(group, "cpu")
    c, bias = (distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (whole.c, whole.bias))
    e = distribute_tensor(whole.e, mesh, [Replicate()]).requires_grad_()
    loss = cce.loss(e, c, whole.targets, bias, **OPTIONS)
    grads = torch.autograd.grad(loss, (e, c, bias))
    assert all(isinstance(x, DTensor) for x in grads)
    errors = relative_errors([loss.detach(), *(x.full_tensor() for x in grads)], alone())
    return errors, [str(x.placements) for x in grads]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_dtensors(workers: Workers, ranks: int) -> None:
    for errors, placements in workers.run(dtensors, ranks=ranks):
        assert max(errors) <= 1e-12
        assert placements == [str((Replicate(),)), str((Shard(0),)), str((Shard(0),))]


def explained(group: dist.ProcessGroup) -> tuple[float, int]:
    """The default threshold and the entries that ``explain`` shows of a vocabulary of 400 000 split in halves."""
    mesh = DeviceMesh.from_group(group, "cpu")
    c = distribute_tensor(torch.zeros(400_000, 2, dtype=torch.bfloat16), mesh, [Shard(0)])
    e, targets = torch.zeros(3, 2, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64)
    found = cce.explain(e, c, targets, spec=cce.Spec(filter="element"))
    return float(found.spec.threshold or 0), found.problem.v


def test_explained(workers: Workers) -> None:
    """A DTensor knows how large the whole vocabulary is, whose threshold the loss has."""
    assert workers.run(explained, ranks=2) == [(12 / 400_000, 200_000)] * 2


def of_a_part(group: dist.ProcessGroup) -> list[str]:
    """The errors of what looks at one process alone."""
    mesh, found = DeviceMesh.from_group(group, "cpu"), []
    c = distribute_tensor(torch.zeros(8, 4), mesh, [Shard(0)])
    with pytest.raises(TypeError) as error:
        cce.live_fraction(torch.zeros(3, 4), c, torch.zeros(3, dtype=torch.int64), spec=cce.Spec(filter="element"))
    found.append(str(error.value))
    with pytest.raises(ValueError, match="vocab_parallel") as refusal:
        autotune(torch.zeros(3, 4), c, torch.zeros(3, dtype=torch.int64), timer=lambda trial: 1.0)
    return [*found, str(refusal.value)]


def test_a_part_is_not_taken_for_the_whole(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    for fraction, tuned in workers.run(of_a_part, ranks=2):
        assert fraction.startswith("c: got a DTensor")
        assert tuned.startswith("vocab_parallel: got a split vocabulary, expected None")


def unreduced(group: dist.ProcessGroup) -> tuple[list[float], str]:
    whole, mesh = data(), DeviceMesh.from_group(group, "cpu")
    c, bias = (distribute_tensor(x, mesh, [Shard(0)]) for x in (whole.c, whole.bias))
    e = distribute_tensor(whole.e, mesh, [Replicate()]).requires_grad_()
    split = cce.VocabParallel(reduce_de=False)
    (de,) = torch.autograd.grad(cce.loss(e, c, whole.targets, bias, vocab_parallel=split, **OPTIONS), e)
    return relative_errors([de.full_tensor()], alone()[1:2]), str(de.placements)


def test_unreduced_dtensors(workers: Workers) -> None:
    """What is left to the caller is a sum that has not been made: Partial."""
    for errors, placement in workers.run(unreduced, ranks=2):
        assert max(errors) <= 1e-12 and placement == str((Partial(),))


def module(group: dist.ProcessGroup) -> list[float]:
    """A head whose parameters were distributed; the loss is that of the head before."""
    whole, mesh = data(), DeviceMesh.from_group(group, "cpu")
    head = cce.LinearCrossEntropy(*whole.c.T.shape, bias=True, dtype=torch.float64, **OPTIONS)
    head.load_state_dict({"weight": whole.c, "bias": whole.bias})
    for name, x in list(head.named_parameters()):
        setattr(head, name, nn.Parameter(distribute_tensor(x.detach(), mesh, [Shard(0)])))
    e = whole.e.clone().requires_grad_()
    loss = head(e, whole.targets)
    loss.backward()
    found = [loss.detach(), e.grad, head.weight.grad.full_tensor(), head.bias.grad.full_tensor()]
    return relative_errors(found, alone())


def test_module(workers: Workers) -> None:
    for errors in workers.run(module, ranks=3):
        assert max(errors) <= 1e-12


def module_of_a_part(group: dist.ProcessGroup) -> list[float]:
    """A head of this rank's entries, with class weights of all."""
    whole = data()
    part, split = split_of(group, whole)
    options = {"weight": whole.class_weight, "label_smoothing": 0.1}
    head = cce.LinearCrossEntropy(
        whole.c.shape[1], len(whole.c[part]), dtype=torch.float64, vocab_parallel=split, **options
    )
    head.load_state_dict({"weight": whole.c[part]})
    loss = head(whole.e, whole.targets)
    loss.backward()
    c = whole.c.clone().requires_grad_()
    alone = cce.loss(whole.e, c, whole.targets, **options)
    alone.backward()
    return relative_errors([loss.detach(), head.weight.grad], [alone.detach(), c.grad[part]])


def test_module_of_a_part(workers: Workers) -> None:
    for errors in workers.run(module_of_a_part, ranks=2):
        assert max(errors) <= 1e-12


class Body(nn.Module):
    """What a model has before its head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(width, width, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh() + x


def beside(group: dist.ProcessGroup, kind: str) -> list[float]:
    """Two by two ranks: the batch is split along "dp", the vocabulary along "tp"."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole, rank = data(), mesh.get_local_rank("dp")
    rows = (slice(0, 22), slice(22, 44))
    head = distribute_tensor(whole.c, mesh["tp"], [Shard(0)]).requires_grad_()
    body = Body(whole.e.shape[1])
    if kind == "ddp":
        model: nn.Module = DistributedDataParallel(body, process_group=mesh.get_group("dp"))
    else:
        model = fully_shard(body, mesh=mesh["dp"])
    loss = cce.loss(model(whole.e[rows[rank]]), head, whole.targets[rows[rank]], **OPTIONS)
    loss.backward()
    assert head.grad is not None
    dc = head.grad.full_tensor()
    dist.all_reduce(dc, group=mesh.get_group("dp"))
    weight = body.layer.weight.grad
    found = [loss.detach(), weight.full_tensor() if isinstance(weight, DTensor) else weight, dc / 2]
    own, same = Body(whole.e.shape[1]), whole.c.clone().requires_grad_()
    losses = [cce.loss(own(whole.e[r]), same, whole.targets[r], **OPTIONS) for r in rows]
    (sum(losses) / 2).backward()
    return relative_errors(found, [losses[rank].detach(), own.layer.weight.grad, same.grad])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_beside_data_parallelism(workers: Workers, kind: str) -> None:
    for errors in workers.run(beside, kind):
        assert max(errors) <= 1e-12


def of_fsdp(group: dist.ProcessGroup) -> list[float]:
    """The head's weight as FSDP2 shards it, outside its forward, where it is not gathered; each rank has its tokens."""
    whole, rank = data(), dist.get_rank(group)
    rows = [slice(15 * i, 15 * i + 15) for i in range(3)]
    head = cce.LinearCrossEntropy(*whole.c.T.shape, dtype=torch.float64)
    head.load_state_dict({"weight": whole.c})
    fully_shard(head, mesh=DeviceMesh.from_group(group, "cpu"))
    assert isinstance(head.weight, DTensor)
    e = whole.e[rows[rank]].clone().requires_grad_()
    loss = cce.loss(
        e, head.weight, whole.targets[rows[rank]], vocab_parallel=cce.VocabParallel(tokens="own"), **OPTIONS
    )
    loss.backward()
    every, c = whole.e.clone().requires_grad_(), whole.c.clone().requires_grad_()
    losses = [cce.loss(every[r], c, whole.targets[r], **OPTIONS) for r in rows]
    sum(losses).backward()
    found = [loss.detach(), e.grad, head.weight.grad.full_tensor()]
    return relative_errors(found, [losses[rank].detach(), every.grad[rows[rank]], c.grad])


def test_sharded_by_fsdp2(workers: Workers) -> None:
    for errors in workers.run(of_fsdp, ranks=3):
        assert max(errors) <= 1e-12


def refused(group: dist.ProcessGroup, what: str) -> str:
    whole, mesh = data(), DeviceMesh.from_group(group, "cpu")
    e, c, targets, split = whole.e, distribute_tensor(whole.c, mesh, [Shard(0)]), whole.targets, None
    if what == "c":
        c = distribute_tensor(whole.c, mesh, [Shard(1)])
    elif what == "e":
        e = distribute_tensor(whole.e, mesh, [Shard(0)])
    elif what == "group":
        split = dist.new_group([0, 1])
    elif what == "mesh":
        c, split = whole.c, init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    with pytest.raises(ValueError, match="got") as error:
        cce.loss(e, c, targets, vocab_parallel=split)
    return str(error.value)


@pytest.fixture(scope="module")
def pair() -> Iterator[Workers]:
    """Two processes: of a group's part, a mesh and a group could not be made."""
    own = Workers(2)
    yield own
    own.stop()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("c", "c: got a DTensor with placements (Shard(dim=1),)"),
        ("e", "e: got a DTensor with placements (Shard(dim=0),), expected Replicate(); redistribute it"),
        ("group", "vocab_parallel: got a group along with a DTensor c, expected None"),
        ("mesh", "vocab_parallel: got a DeviceMesh with 2 dimensions, ('a', 'b'), expected one of them: mesh['name']"),
    ],
)
def test_refused(pair: Workers, what: str, message: str) -> None:
    found = pair.run(refused, what)
    assert all(message in text for text in found), found
