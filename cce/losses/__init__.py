"""Losses from the literature, each a few lines on top of the results of :func:`cce.terms`; no logits are kept.

>>> import torch
>>> from cce import losses
>>> losses.focal(torch.randn(8, 16), torch.randn(1000, 16), torch.randint(1000, (8,)), gamma=2.0).shape
torch.Size([])
"""

from cce.losses.call import Options
from cce.losses.candidates import top_k_distillation, unlikelihood
from cce.losses.classification import comp_sum, dice, focal, generalized_cross_entropy, ldr, z_loss
from cce.losses.contrastive import clip_contrastive, nt_xent
from cce.losses.heads import multi_codebook, multi_token
from cce.losses.metrics import Evaluation, evaluate
from cce.losses.policy import group_advantages, grpo, ppo
from cce.losses.sequences import dpo, pass_at_n, sequence_log_prob

__all__ = [
    "Evaluation",
    "Options",
    "clip_contrastive",
    "comp_sum",
    "dice",
    "dpo",
    "evaluate",
    "focal",
    "generalized_cross_entropy",
    "group_advantages",
    "grpo",
    "ldr",
    "multi_codebook",
    "multi_token",
    "nt_xent",
    "pass_at_n",
    "ppo",
    "sequence_log_prob",
    "top_k_distillation",
    "unlikelihood",
    "z_loss",
]
