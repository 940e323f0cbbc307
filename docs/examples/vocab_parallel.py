"""A head whose vocabulary is split over processes, trained for a few steps.

torchrun --nproc-per-node 2 docs/examples/vocab_parallel.py
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import cce

N, D, V = 64, 32, 1001


def main() -> None:
    """Trains, on every process that torchrun starts."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    if device == "cuda":
        torch.cuda.set_device(mesh.get_rank())

    # Every process has the same hidden states and targets, as after a tensor-parallel model...
    torch.manual_seed(0)
    e = torch.randn(N, D, device=device)
    targets = torch.randint(V, (N,), device=device)
    # ... and some rows of the head: a DTensor says which.
    head = distribute_tensor(torch.randn(V, D, device=device) / D**0.5, mesh, [Shard(0)]).requires_grad_()
    optimizer = torch.optim.SGD([head], lr=20.0)
    for step in range(5):
        loss = cce.loss(e, head, targets, z_loss=1e-4)  # the same number on every process
        loss.backward()  # head.grad is sharded as head is
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
