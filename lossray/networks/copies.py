"""Copies of a user's module in which its function is measured."""

from torch import nn

from lossray.networks.as_found import copied
from lossray.networks.layout import uncompiled


def double_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode and float64; of a compiled model its inner module is copied."""
    return copied(uncompiled(model)).eval().double()
