"""Recurrent layers, whose kernels in cuDNN have no second derivative, and in eval mode not even a first."""

from torch import nn


def is_recurrent(model: nn.Module) -> bool:
    """Whether some layer of the model is one that cuDNN has a kernel for."""
    return any(isinstance(module, nn.RNNBase) for module in model.modules())
