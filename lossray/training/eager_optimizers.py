"""Optimizers of torch.optim made and stepped without torch._dynamo, which takes seconds to import.

torch hides two of their methods from its compiler by decorators that import the compiler first. Here the
methods are called as they stand under the decorators: what they compute is the same, bit for bit. Nothing is
changed for other optimizers, for the user's compiled models, or in torch itself.
"""

import inspect
from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor


def build_eagerly(
    kind: type[torch.optim.Optimizer], leaves: Iterable[Tensor], **options: Any
) -> torch.optim.Optimizer:
    """``kind(leaves, **options)``."""
    optimizer = kind.__new__(kind)
    # __init__ calls it: for that long an attribute of the object stands before the method of its class.
    vars(optimizer)["add_param_group"] = MethodType(inspect.unwrap(kind.add_param_group), optimizer)
    try:
        optimizer.__init__(leaves, **options)  # type: ignore[misc]
    finally:
        del vars(optimizer)["add_param_group"]
    return optimizer


def step_eagerly(optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()`` with the gradients in ``.grad``; hooks and the profiler do not hear of it."""
    step = inspect.unwrap(type(optimizer).step)
    with torch.no_grad():
        step(optimizer)
