"""The training loop of ``train_lm.py``: exact loss, AdamW, ended by steps or by time; hidden states of unseen text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import bpe
import lm
import numpy as np
import torch
from torch import Tensor

import cce
from cce.demo.train import precision

EXACT = cce.Spec(filter="none")
WARM_UP, LEAST = 0.05, 0.1  # share of the training, and of the rate at its end
REPORT_SECONDS = 10
JUDGED_WINDOWS = 256  # of held-out text, for the loss


@dataclass(frozen=True)
class Plan:
    """How a model is trained.

    Attributes:
        steps: at most.
        seconds: at most; the rate falls by the time then, if that is sooner over than the steps. None: no limit.
        batch: sequences a step.
        rate: learning rate at its peak.
        backend: of the loss.
        seed: of the order of the text.
    """

    steps: int
    seconds: float | None
    batch: int
    rate: float
    backend: str
    seed: int


class Progress:
    """Share of the training that is over, by steps or by time, whichever is more.

    The first step, in which kernels are compiled, costs time but no progress: else the warm-up could be over with it.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.start = plan, time.perf_counter()
        self.first_step_over: float | None = None

    def after(self, step: int) -> float:
        """In (0, 1], with ``step`` steps done or in work."""
        by_steps = step / self.plan.steps
        if self.plan.seconds is None or self.first_step_over is None:
            return by_steps
        left = self.plan.seconds - (self.first_step_over - self.start)
        return min(1.0, max(by_steps, (time.perf_counter() - self.first_step_over) / max(left, 1e-9)))


def rate_factor(progress: float) -> float:
    """A linear warm-up, then a half cosine down to a tenth.

    >>> [round(rate_factor(x), 3) for x in (0.025, 0.05, 0.525, 1.0)]
    [0.5, 1.0, 0.55, 0.1]
    """
    if progress < WARM_UP:
        return progress / WARM_UP
    return LEAST + (1 - LEAST) / 2 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def train(model: lm.LanguageModel, ids: bpe.Ids, context: int, plan: Plan) -> dict[str, object]:
    """Trains ``model``, with a line of progress every ten seconds; facts about the run."""
    device, per_step = model.table.device, plan.batch * context
    wanted, size = plan.steps * per_step, model.parameter_count / 1e6
    print(f"{size:.1f} million parameters, {plan.steps:,} steps of {per_step:,} tokens", flush=True)
    if wanted / len(ids) > 1.01:  # the last step may go a little beyond the text
        print(f"{len(ids):,} tokens are fewer than the {wanted:,} wanted: some are seen again", flush=True)
    optimizer = make_optimizer(model, plan.rate)
    tokens = torch.from_numpy(ids.astype(np.int32)).to(device)
    progress, done, report = Progress(plan), 0, _Report(per_step)
    for done, batch in enumerate(batches(tokens, context, plan.batch, plan.steps, plan.seed), 1):
        over = progress.after(done)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * rate_factor(over)
        with precision(device):
            loss = mean_loss(model(batch[:, :-1]), model.table, batch[:, 1:], plan.backend)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if done == 1:
            loss.item()  # waits for the device
            progress.first_step_over = time.perf_counter()
        report.after(done, loss, last=over >= 1)
        if over >= 1:
            break
    return {
        "steps": done,
        "steps_planned": plan.steps,
        "epochs": done * per_step / len(ids),
        "rate": plan.rate,
        "parameters": model.parameter_count,
        "training_s": time.perf_counter() - progress.start,
        "limit_s": plan.seconds,
    }


class _Report:
    """Lines of progress."""

    def __init__(self, per_step: int) -> None:
        self.per_step, self.start = per_step, time.perf_counter()
        self.before, self.step = self.start, 0

    def after(self, step: int, loss: Tensor, last: bool) -> None:
        if not last and time.perf_counter() - self.before < REPORT_SECONDS:
            return
        value, now = loss.item(), time.perf_counter()  # waits for the device, so that the time is right
        speed = (step - self.step) * self.per_step / (now - self.before)
        print(f"step {step:5}: loss {value:6.3f}  {speed:9,.0f} tokens/s  {now - self.start:4.0f} s", flush=True)
        self.before, self.step = now, step


def mean_loss(e: Tensor, c: Tensor, targets: Tensor, backend: str) -> Tensor:
    """The exact loss, through the library."""
    return cce.loss(e, c, targets, backend=backend, spec=EXACT)


def batches(tokens: Tensor, context: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """``steps`` batches of windows (B, L + 1) int64: all of the text in random order, then again in another one."""
    windows = (len(tokens) - 1) // context
    if windows < 1:
        raise ValueError(f"got {len(tokens):,} training tokens, expected more than a sequence of {context:,}")
    rng = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * batch / windows)
    order = torch.cat([torch.randperm(windows, generator=rng) for _ in range(epochs)])[: steps * batch]
    along = torch.arange(context + 1, device=tokens.device)
    for starts in (order * context).to(tokens.device).split(batch):
        yield tokens[starts[:, None] + along].long()


def make_optimizer(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW, which lets the weights of tables decay and those of norms not."""
    tables = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def enough_held_out(ids: bpe.Ids, context: int, keep: int) -> None:
    """Whether hidden states of ``keep`` tokens can be had, asked before a training.

    Raises:
        ValueError: there are too few held-out tokens.
    """
    least = math.ceil(keep / context) * context + 1
    if len(ids) < least:
        raise ValueError(f"got {len(ids):,} held-out tokens, expected at least {least:,} (--keep {keep})")


@torch.no_grad()
def held_out(
    model: lm.LanguageModel, ids: bpe.Ids, context: int, keep: int, backend: str, seed: int
) -> tuple[float, dict[str, Tensor]]:
    """The loss on held-out text, and e, c and targets. The windows are in random order: any first few are a sample."""
    tokens = torch.from_numpy(ids.astype(np.int32)).to(model.table.device)
    kept, available = math.ceil(keep / context), (len(tokens) - 1) // context
    states: list[Tensor] = []
    targets: list[Tensor] = []
    losses: list[Tensor] = []
    for windows in batches(tokens, context, 1, min(max(kept, JUDGED_WINDOWS), available), seed):
        with precision(tokens.device):
            e = model(windows[:, :-1])
            losses.append(mean_loss(e, model.table, windows[:, 1:], backend))
        if len(states) < kept:
            states.append(e[0].bfloat16().cpu())
            targets.append(windows[0, 1:].cpu())
    c = model.table.detach().bfloat16().cpu()
    return torch.stack(losses).mean().item(), {"e": torch.cat(states), "c": c, "targets": torch.cat(targets)}
