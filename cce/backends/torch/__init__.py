"""The portable backend: vocabulary chunks and library matrix products, on any PyTorch device."""

from cce.backends.torch.backend import TorchBackend

__all__ = ["TorchBackend"]
