"""The language model of ``train_lm.py``: the demo's blocks under a table that is embedding and head at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cce.demo.model import Block


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Entries of the vocabulary V, width D, layers, and tokens of a sequence."""

    vocab: int = 65_536
    width: int = 768
    layers: int = 8
    context: int = 1024

    @property
    def heads(self) -> int:
        """Attention heads, 64 wide."""
        return max(1, self.width // 64)


class LanguageModel(nn.Module):
    """Tokens (B, L) to the final hidden states e (B, L, D).

    The head is tied to the embedding, as in Gemma 2 2B, the model of the table's largest shape: with the sizes here 107
    million parameters in all, 57 of them in the blocks. An untied head would add 50, seen as often as the embedding.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.table = nn.Parameter(torch.empty(sizes.vocab, sizes.width))
        self.position = nn.Parameter(torch.empty(sizes.context, sizes.width))
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # What is added to the residual stream starts small, so that its sum does not grow with the depth.
                is_sum = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * sizes.layers) if is_sum else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        # A head wants small rows, for logits near 0 at first; an embedding rows of about unit size.
        x = nn.functional.embedding(tokens, self.table) * math.sqrt(self.table.shape[1])
        x = x + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    @property
    def parameter_count(self) -> int:
        """Of all weights, the table once."""
        return sum(parameter.numel() for parameter in self.parameters())
