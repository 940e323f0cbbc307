"""``cce`` as the loss of Hugging Face transformers' language models, without a line of their code copied.

A patched model runs its own forward. Only its head's call is different while the model trains: instead of the logits
it returns a stand-in (``logits.py``) that remembers which product they are, follows what the model does with it, and
becomes :func:`cce.loss` where the model's loss function calls ``torch.nn.functional.cross_entropy``.
"""

from cce.integrations.transformers.patch import patch, unpatch

__all__ = ["patch", "unpatch"]
