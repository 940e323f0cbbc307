"""Processes that differ, or one of which cannot make the call: an error on all of them, that says in what."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import Workers
from splits import N, data, split_of
from torch import Tensor
from torch import distributed as dist

import cce
from cce.distributed import agreement, vocab_parallel

OWN = {"tokens": "own"}
Arguments = dict[str, Any]


def _of_rank_1(**changes: Any) -> Callable[[Arguments, int], Arguments]:
    return lambda arguments, rank: {**arguments, **(changes if rank == 1 else {})}


def _spec(**fields: Any) -> Callable[[Arguments, int], Arguments]:
    return _of_rank_1(spec=cce.Spec(**fields))


def _tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Arguments, int], Arguments]:
    return lambda arguments, rank: {**arguments, **({name: change(arguments[name])} if rank == 1 else {})}


def _both(*changes: Callable[[Arguments, int], Arguments]) -> Callable[[Arguments, int], Arguments]:
    def change(arguments: Arguments, rank: int) -> Arguments:
        for each in changes:
            arguments = each(arguments, rank)
        return arguments

    return change


#: What rank 1 does otherwise, and what the message says.
DIFFERENCES: dict[str, tuple[Callable[[Arguments, int], Arguments], str]] = {
    "N": (
        _both(_tensor("e", lambda x: x[:-1]), _tensor("targets", lambda x: x[:-1])),
        r"in N: 45 on rank 0, 44 on rank 1; .*tokens='own'",
    ),
    "D": (_both(_tensor("e", lambda x: x[:, :-1]), _tensor("c", lambda x: x[:, :-1])), "in D: 12 on rank 0, 11 on"),
    "K": (
        _both(_tensor("targets", lambda x: x[:, None].repeat(1, 3)), _of_rank_1(target_weight=torch.ones(N, 3))),
        "in K: 1 on rank 0, 3 on rank 1; target_weight: False on rank 0, True on rank 1",
    ),
    "targets": (_tensor("targets", lambda x: x.roll(1)), "in targets; expected .*tokens='own'"),
    "dtypes": (
        _both(_tensor("e", Tensor.float), _tensor("c", Tensor.float)),
        "in e.dtype: float64 on rank 0, float32 on rank 1; c.dtype: float64",
    ),
    "dtype of c": (_tensor("c", Tensor.float), "in c.dtype: float64 on rank 0, float32 on rank 1;"),
    "dtype of c, half": (_tensor("c", Tensor.half), "in c.dtype: float64 on rank 0, float16 on rank 1;"),
    "bias": (_of_rank_1(bias=None), "in bias: float64 on rank 0, None on rank 1;"),
    "dtype of the bias": (_tensor("bias", Tensor.float), "in bias: float64 on rank 0, float32 on rank 1;"),
    **{
        f"gradient of {name}": (
            _tensor(name, lambda x: x.clone().requires_grad_()),
            rf"in {name}\.requires_grad: False on rank 0, True on rank 1;",
        )
        for name in ("e", "c", "bias")
    },
    "softcap": (_of_rank_1(softcap=1.5), "in softcap: None on rank 0, 1.5 on rank 1;"),
    "logit_scale": (_of_rank_1(logit_scale=0.5), "in logit_scale: 1 on rank 0, 0.5 on rank 1;"),
    "reduction": (_of_rank_1(reduction="none"), "in reduction: mean on rank 0, none on rank 1;"),
    "smoothing": (_of_rank_1(label_smoothing=0.1), "in label_smoothing: 0 on rank 0, 0.1 on rank 1;"),
    "z_loss": (_of_rank_1(z_loss=0.1), "in z_loss: 0 on rank 0, 0.1 on rank 1;"),
    "weight": (_of_rank_1(weight=torch.ones(203)), "in weight: False on rank 0, True on rank 1;"),
    "ignore_index": (_of_rank_1(ignore_index=-1), "in ignore_index: -100 on rank 0, -1 on rank 1;"),
    "backend": (_of_rank_1(backend="reference"), "in backend: auto on rank 0, reference on rank 1;"),
    "accumulate": (_spec(accumulate="float64"), "in spec.accumulate: None on rank 0, float64 on rank 1;"),
    "filter": (_spec(filter="element"), "in spec.filter: None on rank 0, element on rank 1;"),
    "threshold": (
        _spec(filter="element", threshold=0.5),
        "in spec.filter: None on rank 0, element on rank 1; spec.threshold: None on rank 0, 0.5 on rank 1;",
    ),
    "block_v": (_spec(block_v=64), "in spec.block_v: None on rank 0, 64 on rank 1;"),
    "scratch": (_spec(scratch_bytes=2**20), "in spec.scratch_bytes: .* on rank 0, 1048576 on rank 1;"),
    "order": (_spec(vocab_order="natural"), "in spec.vocab_order: None on rank 0, natural on rank 1;"),
    "reduce_de": (_of_rank_1(reduce_de=False), "in VocabParallel.reduce_de: True on rank 0, False on rank 1;"),
    "tokens": (_of_rank_1(tokens="own"), "in VocabParallel.tokens: same on rank 0, own on rank 1;"),
}


def arguments_of(group: dist.ProcessGroup) -> Arguments:
    whole = data()
    part, _ = split_of(group, whole)
    return {"e": whole.e, "c": whole.c[part], "targets": whole.targets, "bias": whole.bias[part]}


def call(group: dist.ProcessGroup, arguments: Arguments, **split: Any) -> Tensor:
    """``cce.loss`` of these arguments, among which are those of ``VocabParallel``."""
    split |= {name: arguments.pop(name) for name in ("tokens", "reduce_de") if name in arguments}
    return cce.loss(**arguments, vocab_parallel=cce.VocabParallel(group, **split))


def different(group: dist.ProcessGroup, split: dict[str, Any]) -> dict[str, str]:
    """Every difference in turn: the same processes go on."""
    found = {}
    for name, (change, _) in DIFFERENCES.items():
        if split and name in ("reduce_de", "tokens"):
            continue
        arguments = change(arguments_of(group), dist.get_rank(group))
        try:
            found[name] = f"{float(call(group, arguments, **split).detach().sum())}"
        except ValueError as error:
            found[name] = str(error)
    return found


def test_processes_that_differ(workers: Workers) -> None:
    """Sizes and dtypes of an exchange that differ end processes, hang them or make numbers: none of that may happen."""
    first, second = workers.run(different, {}, ranks=2)
    assert first == second
    for name, (_, message) in DIFFERENCES.items():
        assert re.search(f"^vocab_parallel: the processes of the group differ {message}", first[name]), first[name]


def test_processes_that_differ_in_their_own_tokens(workers: Workers) -> None:
    """Numbers of tokens, and the tokens, are everyone's own; all else is as before."""
    first, second = workers.run(different, OWN, ranks=2)
    for name, (_, message) in DIFFERENCES.items():
        if name in ("N", "targets"):
            assert float(first[name]) > 0 and float(second[name]) > 0
        elif name in first:
            assert first[name] == second[name] and re.search(message, first[name]), first[name]


def several(group: dist.ProcessGroup) -> str:
    arguments = {**arguments_of(group), "softcap": 2.0 if dist.get_rank(group) == 1 else 3}
    with pytest.raises(ValueError, match="vocab_parallel") as error:
        call(group, arguments)
    return str(error.value)


def test_many_processes(workers: Workers) -> None:
    found = set(workers.run(several, ranks=4))
    assert len(found) == 1 and "softcap: 3 on ranks 0, 2-3, 2 on rank 1;" in found.pop()


def own_orders(group: dist.ProcessGroup) -> float:
    """Only one of the processes has an order of its entries: that is its own affair."""
    arguments = arguments_of(group)
    if dist.get_rank(group) == 1:
        arguments["spec"] = cce.Spec(vocab_order=torch.arange(len(arguments["c"])).flip(0))
    return float(call(group, arguments))


def test_a_permutation_of_one_process(workers: Workers) -> None:
    whole = data()
    expected = float(cce.loss(whole.e, whole.c, whole.targets, whole.bias))
    assert all(abs(found - expected) <= 1e-12 for found in workers.run(own_orders, ranks=2))


BAD: dict[str, tuple[Callable[[Arguments, int], Arguments], dict[str, Any], str, str]] = {
    "target": (
        _tensor("targets", lambda x: x.clone().index_fill_(0, torch.tensor(7), 203)),
        OWN,
        r"^targets: got 203 on rank 1, expected values in \[0, 203\) or ignore_index=-100",
        r"^targets: got 203 on rank 1",
    ),
    "negative target": (
        _tensor("targets", lambda x: x.clone().index_fill_(0, torch.tensor(7), -3)),
        OWN,
        r"^targets: got -3 on rank 1, expected values in \[0, 203\) or ignore_index=-100",
        r"^targets: got -3 on rank 1",
    ),
    "dtype of targets": (
        _tensor("targets", Tensor.double),
        {},
        r"^vocab_parallel: rank 1 refuses the call: TypeError: targets: got dtype torch.float64",
        "^targets: got dtype torch.float64",
    ),
    "shape": (
        _tensor("e", lambda x: x[:-1]),
        OWN,
        r"^vocab_parallel: rank 1 refuses the call: ValueError: targets: got shape",
        "^targets: got shape",
    ),
    "softcap": (_of_rank_1(softcap=-1.0), {}, "rank 1 refuses the call: ValueError: softcap: got -1", "^softcap: got"),
}


def _unable(arguments: Arguments, rank: int) -> Arguments:
    """On rank 1, a backend that cannot run this."""
    return {**arguments, "spec": cce.Spec(scratch_bytes=2**20 if rank == 0 else 1)}


def unable(group: dist.ProcessGroup) -> tuple[str, str]:
    """Which backends there are is a matter of the process; here, of rank 1's scratch."""
    with pytest.raises((ValueError, cce.BackendUnavailable)) as error:
        call(group, _unable(arguments_of(group), dist.get_rank(group)))
    return type(error.value).__name__, str(error.value)


def test_a_backend_that_one_process_does_not_have(workers: Workers) -> None:
    (other, told), (own, reason) = workers.run(unable, ranks=2)
    assert own == "BackendUnavailable" and "scratch_bytes=1 is less than" in reason
    assert other == "ValueError" and told.startswith("vocab_parallel: rank 1 refuses the call: BackendUnavailable: ")


def refused_by_one(group: dist.ProcessGroup) -> dict[str, str]:
    found = {}
    for name, (change, split, _, _) in BAD.items():
        with pytest.raises((ValueError, TypeError)) as error:
            call(group, change(arguments_of(group), dist.get_rank(group)), **split)
        found[name] = str(error.value)
    found["good"] = str(float(call(group, arguments_of(group))))  # nobody is left waiting, or one exchange behind
    return found


def test_a_call_that_one_process_refuses(workers: Workers) -> None:
    """The others do not wait for it until time is up."""
    others, own = workers.run(refused_by_one, ranks=2)
    for name, (_, _, message, of_its_own) in BAD.items():
        assert re.search(message, others[name]), others[name]
        assert re.search(of_its_own, own[name]), own[name]
    assert others["good"] == own["good"]


def count(exchanges: list[int]) -> Any:
    """A patch that counts exchanges."""
    patch = pytest.MonkeyPatch()
    gather = agreement.gather
    patch.setattr(agreement, "gather", lambda *arguments: exchanges.append(1) or gather(*arguments))
    return patch


def agree(group: dist.ProcessGroup, n: int, device: str, tokens: str = "same", **options: Any) -> Any:
    """As for a call with n tokens on a device that need not be there."""
    e = SimpleNamespace(dtype=torch.float32, device=torch.device(device))
    c, targets = torch.zeros(10 + dist.get_rank(group), 4), torch.zeros(n, 1, dtype=torch.int64)
    split = cce.VocabParallel(group, tokens=tokens)
    found = vocab_parallel.agree(split, e, c, None, targets, cce.Spec(), "", {"ignore_index": -100, **options})
    assert found.sizes == tuple(10 + rank for rank in range(dist.get_world_size(group)))
    assert found.rank == dist.get_rank(group)
    return found


def exchanges_of_kinds(group: dist.ProcessGroup) -> dict[str, int]:
    found = {}
    for name, calls in {
        "on a CPU": [{"n": n, "device": "cpu"} for n in range(1, 6)],
        "on a GPU": [{"n": n, "device": "cuda"} for n in range(1, 30)],
        "on a GPU, other options": [{"n": 3, "device": "cuda", "softcap": x} for x in (1, 2, 1, 2)],
        "on a GPU, own tokens": [
            {"n": n + dist.get_rank(group), "device": "cuda", "tokens": "own"} for n in (5, 4, 5, 5)
        ],
    }.items():
        exchanges: list[int] = []
        patch = count(exchanges)
        for each in calls:
            rows = agree(group, **each).rows
            if each.get("tokens") == "own":  # of this call, not of one like it
                first = each["n"] - dist.get_rank(group)
                assert rows == tuple(first + rank for rank in range(dist.get_world_size(group)))
        patch.undo()
        found[name] = len(exchanges)
    return found


def test_a_gpu_asks_once_a_kind(workers: Workers) -> None:
    """Whatever the number of tokens is; but where it is each process's own, it has to be told each time.

    A process whose number was there before must not go on while one with a new number asks.
    """
    for found in workers.run(exchanges_of_kinds, ranks=2):
        assert found == {
            "on a CPU": 5,
            "on a GPU": 1,
            "on a GPU, other options": 2,
            "on a GPU, own tokens": 4,
        }


def kept(group: dist.ProcessGroup) -> list[int]:
    """Numbers of agreements: of many kinds, of numbers of tokens on a CPU, and once the group is gone."""
    own = dist.new_group([0, 1])
    before = len(vocab_parallel._known)
    for i in range(200):
        agree(own, 3, "cuda", softcap=i)
        agree(own, i + 1, "cpu")
    found = [len(vocab_parallel._known[own]), len(vocab_parallel._known) - before]
    exchanges: list[int] = []
    patch = count(exchanges)
    agree(own, 3, "cuda", softcap=199)
    agree(own, 3, "cuda", softcap=0)
    patch.undo()
    dist.destroy_process_group(own)
    del own
    gc.collect()
    return [*found, len(exchanges), len(vocab_parallel._known) - before]


def test_agreements_are_bounded() -> None:
    """The last ones stay, on all processes the same, and none outlives its group: another may get its id."""
    own = Workers(2)  # all of the default group have to come to make another
    try:
        assert own.run(kept) == [[64, 1, 1, 0]] * 2
    finally:
        own.stop()


def default_group_made_anew(group: dist.ProcessGroup, store: str) -> list[tuple[int, ...]]:
    found = []
    for i in range(2):
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{store}{i}", rank=0, world_size=1)
        e = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
        exchanges: list[int] = []
        patch = count(exchanges)
        c, targets = torch.zeros(10, 4), torch.zeros(3, 1, dtype=torch.int64)
        options = {"ignore_index": -100}
        for _ in range(2):
            vocab_parallel.agree(cce.VocabParallel(), e, c, None, targets, cce.Spec(), "", options)
        patch.undo()
        found.append((len(exchanges), len(vocab_parallel._known)))
    return found


def test_a_default_group_made_anew(tmp_path: Any) -> None:
    """It asks, whatever the one before had agreed upon."""
    own = Workers(1)
    try:
        assert own.run(default_group_made_anew, str(tmp_path / "store")) == [[(1, 1), (1, 1)]]
    finally:
        own.stop()
