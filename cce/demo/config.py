"""Options and sizes of a run: two CPU cores can train the model twice in under three minutes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

import cce


@dataclass(frozen=True, kw_only=True)
class Options:
    """Choices of the demo's user.

    Attributes:
        text: file or folder; None stands for the Python standard library.
        steps: number of training steps.
        device, backend, spec: device, backend and spec of the loss of ``cce``.
        out: path of the picture, a PNG.
        save: path for hidden states, head, targets and unigram counts; .pt or .npz.
        seed: seed of the model's initial weights and of the batches.
    """

    text: Path | None = None
    steps: int = 100
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = "auto"
    spec: cce.Spec = field(default_factory=cce.Spec)
    out: Path = Path("cce-demo.png")
    save: Path | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the text, the model and a training step.

    Attributes:
        text_bytes: most bytes of text that are read.
        vocab: size of the vocabulary V.
        width, layers, heads: sizes of the transformer; ``width`` is the D of the loss.
        context: number of tokens in a sequence.
        batch: number of sequences in a training step.
        held_out: number of held-out sequences, whose hidden states ``--save`` writes.
        measured: number N of held-out tokens on which time, memory and accuracy of the loss are measured.
        repeats: number of time measurements; the median is reported.
    """

    text_bytes: int = 10_000_000
    vocab: int = 32_768
    width: int = 256
    layers: int = 4
    heads: int = 4
    context: int = 64
    batch: int = 8
    held_out: int = 128
    measured: int = 1024
    repeats: int = 5
