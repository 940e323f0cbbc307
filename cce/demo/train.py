"""Training, the same for every loss function, including the batches and the initial weights."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import cce
from cce.demo.config import Options, Size
from cce.demo.model import LanguageModel

#: Function ``loss(e, c, targets)`` from e (N, D), c (V, D), targets (N,) to the mean loss.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# Peak learning rates of AdamW. A short run visits each row of the embedding table and the head only once or twice, so
# these take larger steps than the blocks.
TABLE_RATE, BLOCK_RATE = 3e-3, 1e-3


def dense_loss(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
    """Ordinary cross-entropy, which keeps all logits (N, V)."""
    return F.cross_entropy(F.linear(e, c), targets)


def cce_loss(backend: str, spec: cce.Spec) -> Loss:
    """Make a function with the arguments of :func:`dense_loss` from ``cce.loss`` with a backend and a spec."""

    def loss(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
        return cce.loss(e, c, targets, backend=backend, spec=spec)

    return loss


def training_dtype(device: torch.device) -> torch.dtype:
    """Dtype of training: bfloat16, through autocast, on GPUs that have it; float32 elsewhere."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def precision(device: torch.device) -> torch.autocast:
    """Autocast context for :func:`training_dtype`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=training_dtype(device) == torch.bfloat16)


class Training:
    """A model in training. Two of them with the same options and size differ only in ``loss``.

    Args:
        loss: loss function.
        tokens: (L,) training text.
        options, size: those of the run.
        start: weights to continue from; None stands for new ones.
        rate: factor of all learning rates.

    Attributes:
        model: model, trained by the steps so far.
        losses: loss of every step's batch, before the step.
        seconds: duration of every step.
    """

    def __init__(
        self,
        loss: Loss,
        tokens: Tensor,
        options: Options,
        size: Size,
        start: Mapping[str, Tensor] | None = None,
        rate: float = 1.0,
    ) -> None:
        torch.manual_seed(options.seed)
        self.model = LanguageModel(size).to(options.device)
        if start is not None:
            self.model.load_state_dict(start)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._loss, self._tokens, self._size, self._device = loss, tokens, size, options.device
        self._batches = torch.Generator().manual_seed(options.seed)
        self._optimizer, self._schedule = _optimizer(self.model, options.steps, rate)

    def step(self) -> None:
        """Train on one batch: forward, backward, update."""
        start = time.perf_counter()
        inputs, targets = _batch(self._tokens, self._size, self._batches, self._device)
        with precision(self._device):
            loss = self._loss(self.model(inputs).flatten(0, 1), self.model.head, targets.flatten())
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()
        self.losses.append(loss.item())  # waits for the device, so that the measured time is right
        self.seconds.append(time.perf_counter() - start)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of a step of median duration."""
        return self._size.batch * self._size.context / statistics.median(self.seconds)

    @property
    def final_loss(self) -> float:
        """Mean of the last tenth of the steps: a single batch is noisy."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])


def _optimizer(
    model: LanguageModel, steps: int, rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW and its schedule: a linear warm-up over a tenth of the steps, then a half cosine to zero."""
    blocks = list(model.blocks.parameters())
    tables = [p for p in model.parameters() if all(p is not other for other in blocks)]
    groups = [{"params": tables, "lr": rate * TABLE_RATE}, {"params": blocks, "lr": rate * BLOCK_RATE}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    warm_up = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _batch(tokens: Tensor, size: Size, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(tokens) - size.context, (size.batch,), generator=generator)
    windows = tokens[starts[:, None] + torch.arange(size.context + 1)].to(device)  # [B, L + 1]
    return windows[:, :-1], windows[:, 1:]
