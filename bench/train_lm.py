"""Trains a language model of 107 million parameters in about two minutes on an H100, for the filter's benchmarks.

    python bench/train_lm.py --out /tmp/lm/trained.pt --prepare-only   # text and tokens: CPU only, about a minute
    python bench/train_lm.py --out /tmp/lm/trained.pt                  # trains; makes the tokens if they are missing

The text is what lies on the machine: sources of installed packages, headers, documentation. Written are, for
``torch.load``: hidden states e (N, D) bf16 and targets (N,) of text the model has not seen, the head c (V, D) bf16,
unigram counts of the training tokens (V,), and facts about the run. The loss is exact, so that no filter has
shaped what a filter is measured on.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import bpe
import corpus
import lm
import numpy as np
import torch
from torch import Tensor

import cce
from cce.demo.train import precision

EXACT = cce.Spec(filter="none")
REPORT_STEPS = 50
JUDGED_WINDOWS = 256  # of held-out text, for the loss


def main(argv: list[str] | None = None) -> None:
    """Text, tokens, training, record."""
    options = parse(argv)
    start = time.perf_counter()
    roots = tuple(str(path.resolve()) for path in options.roots or corpus.default_roots())
    ids = bpe.load_or_prepare(bpe.Recipe(roots, options.tokens, options.vocab, options.seed), options.out.parent)
    print(f"tokens ready after {time.perf_counter() - start:.0f} s", flush=True)
    if options.prepare_only:
        return
    sizes = lm.Sizes(vocab=options.vocab, width=options.width, layers=options.layers, context=options.context)
    torch.manual_seed(options.seed)
    model = lm.LanguageModel(sizes).to(options.device)
    facts = train(model, ids.training, sizes, options)
    result = held_out(model, ids.held_out, sizes, options)
    facts |= {"held_out_loss": result.pop("loss"), **asdict(sizes), **ids.facts, "torch": str(torch.__version__)}
    counts = torch.from_numpy(np.bincount(ids.training, minlength=sizes.vocab))
    torch.save({**result, "unigram_counts": counts, "facts": facts}, options.out)
    print(f"held-out loss {facts['held_out_loss']:.3f}; {options.out}; {time.perf_counter() - start:.0f} s in all")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the result; the tokens are cached beside it")
    parser.add_argument("--roots", type=Path, nargs="+", help="folders of text; default: packages, headers, docs")
    parser.add_argument("--tokens", type=int, default=50_000_000, help="training tokens")
    parser.add_argument("--prepare-only", action="store_true", help="make the tokens, do not train")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", help="of the loss; default: triton on a GPU, torch elsewhere")
    parser.add_argument("--compile", action="store_true", help="the model's body, which takes longer than it saves")
    parser.add_argument("--steps", type=int, help="default: as many as see --tokens tokens")
    parser.add_argument("--batch", type=int, default=32, help="sequences a step")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate at its peak")
    parser.add_argument("--keep", type=int, default=16_384, help="held-out tokens whose hidden states are kept")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in asdict(lm.Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    options.backend = options.backend or ("triton" if options.device.type == "cuda" else "torch")
    return options


def train(model: lm.LanguageModel, ids: bpe.Ids, sizes: lm.Sizes, options: argparse.Namespace) -> dict[str, object]:
    """Trains ``model``; facts about the run."""
    per_step = options.batch * sizes.context
    steps = options.steps or math.ceil(options.tokens / per_step)
    epochs = steps * per_step / len(ids)
    print(f"{model.parameter_count / 1e6:.1f} million parameters, {steps:,} steps of {per_step:,} tokens", flush=True)
    if epochs > 1.01:  # the last step may go a little beyond the text
        print(f"{len(ids):,} tokens are fewer than the {steps * per_step:,} wanted: {epochs:.2f} epochs")
    optimizer, schedule = make_optimizer(model, options.rate, steps)
    body = torch.compile(model) if options.compile else model
    tokens = torch.from_numpy(ids.astype(np.int32)).to(options.device)
    start = before = time.perf_counter()
    for step, batch in enumerate(batches(tokens, sizes.context, options.batch, steps, options.seed), 1):
        with precision(options.device):
            loss = mean_loss(body(batch[:, :-1]), model.table, batch[:, 1:], options.backend)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % REPORT_STEPS == 0 or step == steps:
            value, now = loss.item(), time.perf_counter()  # waits for the device, so that the time is right
            speed = ((step - 1) % REPORT_STEPS + 1) * per_step / (now - before)
            print(f"step {step:5}: loss {value:6.3f}  {speed:9,.0f} tokens/s  {now - start:4.0f} s", flush=True)
            before = now
    seconds = time.perf_counter() - start
    return {"steps": steps, "epochs": epochs, "parameters": model.parameter_count, "training_s": seconds}


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


def make_optimizer(
    model: torch.nn.Module, rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with a linear warm-up over a twentieth of the steps, then a half cosine to a tenth of the rate."""
    tables = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    warm_up = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def held_out(model: lm.LanguageModel, ids: bpe.Ids, sizes: lm.Sizes, options: argparse.Namespace) -> dict[str, object]:
    """The loss on held-out text, and e, targets and c. The windows are in random order: any first few are a sample."""
    tokens = torch.from_numpy(ids.astype(np.int32)).to(options.device)
    kept, available = math.ceil(options.keep / sizes.context), (len(tokens) - 1) // sizes.context
    if available < kept:
        raise ValueError(f"got {len(tokens):,} held-out tokens, expected at least {kept * sizes.context + 1:,}")
    judged = min(max(kept, JUDGED_WINDOWS), available)
    states: list[Tensor] = []
    targets: list[Tensor] = []
    losses: list[Tensor] = []
    for windows in batches(tokens, sizes.context, 1, judged, options.seed):
        with precision(options.device):
            e = model(windows[:, :-1])
            losses.append(mean_loss(e, model.table, windows[:, 1:], options.backend))
        if len(states) < kept:
            states.append(e[0].bfloat16().cpu())
            targets.append(windows[0, 1:].cpu())
    c = model.table.detach().bfloat16().cpu()
    mean = torch.stack(losses).mean().item()
    return {"e": torch.cat(states), "c": c, "targets": torch.cat(targets), "loss": mean}


if __name__ == "__main__":
    main()
