"""The portable backend: vocabulary chunks and torch's matrix products, on any PyTorch device."""

from cce.backends.torch.backend import TorchBackend

__all__ = ["TorchBackend"]
