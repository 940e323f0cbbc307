"""Gradients in float16: what comes out is in its range, though the product of scaled factors would not be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import cce
from cce.backends.gpu.products import scaled_product, sums_bytes, write_product
from cce.backends.gpu.sizes import least_scratch
from cce.backends.problem import Problem
from cce.backends.resolve import resolve
from cce.testing.kernels.plain_backend import PlainBackend

pytestmark = pytest.mark.usefixtures("one_thread")
N, V, EPS = 40, 40, 2.0**-10


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    cce.register_backend("plain", PlainBackend)
    yield
    cce.unregister_backend("plain")


@pytest.mark.parametrize("backend", ["torch", "reference", "plain"])
@pytest.mark.parametrize("spec", [{"filter": "none"}, {"filter": "none", "scratch_bytes": 2**15}, {"filter": "tile"}])
def test_sums_of_large_rows(backend: str, spec: dict[str, object]) -> None:
    """The mean's dC is about 8000; of weights that are 1 instead of 1 / 40 it would be 40 times as much."""
    e, c = torch.full((N, 3), 16384.0), torch.zeros(V, 3)
    e[:, 1] = torch.linspace(-2, 2, N)
    c[:, 1] = torch.linspace(-1, 1, V)
    e, c = (x.half().requires_grad_() for x in (e, c))
    targets = torch.arange(N) % 2
    loss = cce.loss(e, c, targets, backend=backend, spec=cce.Spec(threshold=1e-30, **spec))
    wide = [x.detach().double().requires_grad_() for x in (e, c)]
    expected = torch.nn.functional.cross_entropy(wide[0] @ wide[1].T, targets)
    for found, want in zip(torch.autograd.grad(loss, (e, c)), torch.autograd.grad(expected, wide), strict=True):
        assert found.dtype == torch.float16
        assert (found.double() - want).norm() <= EPS * want.norm()


@pytest.mark.parametrize("room", [0, 4 * 3 * 33, 2**20])
def test_a_product_and_its_norm(room: int) -> None:
    """In pieces of any size, into rows of a larger tensor."""
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=rng).half() * 1000 for shape in ((70, 9), (9, 3)))
    out, norm = torch.full((72, 3), torch.nan, dtype=torch.float16), torch.tensor(2.0**-9)
    write_product(a, b, out[1:-1], norm, room)
    expected = (a.double() @ b.double()) * 2.0**-9
    assert expected.abs().max() * 2**9 > 2**17  # beyond float16
    assert ((out[1:-1].double() - expected).norm() <= EPS * expected.norm()) and out[[0, -1]].isnan().all()
    assert torch.equal(scaled_product(a, b, norm), out[1:-1])


def test_room_for_sums() -> None:
    """A share of the scratch memory, but none of what the least chunk needs; of float16's dC alone."""
    problem = Problem(64, 999, 8, e_dtype=torch.float16, c_dtype=torch.float16, grad_c=True)

    def room(scratch_bytes: int, **fields: object) -> int:
        spec = resolve(cce.Spec(filter="none", scratch_bytes=scratch_bytes), problem)
        return sums_bytes(Problem(**{**vars(problem), **fields}), spec)

    least = least_scratch(problem, resolve(cce.Spec(filter="none"), problem))
    assert [room(least + more) for more in (0, 100, 2**20)] == [0, 100, (least + 2**20) // 4]
    assert room(2**20, grad_c=False) == room(2**20, e_dtype=torch.bfloat16) == 0
