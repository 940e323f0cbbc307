"""Options of a run, and its sizes: what two CPU cores can train twice in under three minutes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

import cce


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user of the demo chooses.

    Attributes:
        text: file or folder; None stands for the Python standard library.
        steps: training steps.
        device, backend, spec: where and how the loss of ``cce`` is computed.
        out: the picture, a PNG.
        save: where to write hidden states, head, targets and unigram counts; .pt or .npz.
        seed: of the model's initial weights and of the batches.
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
        text_bytes: bytes of text that are read at most.
        vocab: entries of the vocabulary V.
        width, layers, heads: of the transformer; ``width`` is the D of the loss.
        context: tokens of a sequence.
        batch: sequences of a training step.
        held_out: held-out sequences; ``--save`` writes their hidden states.
        measured: held-out tokens N on which time, memory and accuracy of the loss are measured.
        repeats: how often the time is measured; the median is reported.
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
