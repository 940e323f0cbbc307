"""``cce`` as the loss of Hugging Face transformers' language models, without copying any of their code.

A patched model runs its own forward. Only its head behaves differently in training: instead of the logits it returns a
stand-in (``logits.py``) that records the product they are, follows the model's operations on it, and becomes
:func:`cce.loss` where the model's loss function calls ``torch.nn.functional.cross_entropy``.
"""

from cce.integrations.transformers.patch import patch, unpatch

__all__ = ["patch", "unpatch"]
