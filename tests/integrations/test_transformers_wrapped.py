"""A patched model inside others: compiled, in mixed precision, on several devices."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from tiny_models import LENGTH, V, assert_same_step, error, make_batch, make_model, step

from cce.integrations.transformers import patch, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")


def test_who_kept_the_forward_of_a_class() -> None:
    """As accelerate's wrapper does: after unpatch it is the class's own again."""
    model, batch = make_model(), make_batch()
    patch(type(model))
    kept = model.forward
    logits = kept(**batch).logits
    unpatch(type(model))
    assert logits is None
    assert kept(**batch).logits.shape == (3, LENGTH, V)


def test_compile() -> None:
    """The model is compiled once, up to its head; a second step compiles nothing. Evaluation is one graph."""
    model = make_model()
    expected = step(model)
    compiled = torch.compile(patch(model), backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's, about what it meets in transformers
        first = step(compiled)
        with torch._dynamo.config.patch(error_on_recompile=True):
            second = step(compiled)
        with torch.no_grad():
            one_graph = torch.compile(model.eval(), backend="aot_eager", fullgraph=True)
            assert one_graph(**make_batch()).logits.shape == (3, LENGTH, V)
    torch.compiler.reset()
    for found in (first, second):
        assert found.output.logits is None
        gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in found.gradients.items()}
        assert_same_step(found._replace(gradients=gradients), expected)
    with pytest.raises(TypeError, match=r"got a compiled model, expected one that is patched before torch.compile"):
        patch(compiled)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Trainer has set its process-wide state, in other tests."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate() -> None:
    """Its mixed precision wraps the forward; unwrap_model leaves the patched one."""
    import accelerate

    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = make_model()
    exact = step(model)
    prepared = accelerator.prepare(patch(model))
    found = step(prepared)
    assert found.output.logits is None and 1e-5 < error(found.loss, exact.loss) < 0.01
    with pytest.raises(ValueError, match="wrapped after patch"):
        unpatch(prepared)
    with pytest.raises(ValueError, match="patched already"):
        patch(prepared)
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert_same_step(step(model), exact)
    assert "forward" not in vars(unpatch(model))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One process that takes part in collectives with itself."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel() -> None:
    """patch and unpatch find the model inside."""
    model = make_model()
    expected = step(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    assert patch(parallel) is parallel
    found = step(parallel)
    gradients = {name.removeprefix("module."): gradient for name, gradient in found.gradients.items()}
    assert found.output.logits is None
    assert_same_step(found._replace(gradients=gradients), expected)
    unpatch(parallel)
    assert "forward" not in vars(model)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_fully_shard(when: str, tied: bool) -> None:
    """Blocks are units of their own, the head is in the root's, as accelerate and transformers have it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model(tie_word_embeddings=tied)
    expected = step(model)
    if when == "before":
        patch(model)
    mesh = init_device_mesh("cpu", (1,))
    for block in (*model.model.layers, model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    if when == "after":
        patch(model)
    for _ in range(2):
        found = step(model)
        assert found.output.logits is None
        full = {name: gradient.full_tensor() for name, gradient in found.gradients.items()}  # type: ignore[attr-defined]
        assert_same_step(found._replace(gradients=full), expected)


@pytest.mark.usefixtures("process_group")
def test_a_head_sharded_as_a_unit_of_its_own() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = patch(make_model()), init_device_mesh("cpu", (1,))
    fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"the head's weight of FSDPLlamaForCausalLM was released"):
        step(model)
