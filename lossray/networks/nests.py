"""Inputs of a model: one tensor [N, ...], or a tuple or mapping of tensors that share their first axis.

A tuple holds the arguments of a model in their order, a mapping its keywords (`call_model`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

SEVERAL_INPUTS = "the model takes several inputs: its symmetries are not known"
Inputs = Any  # Tensor | tuple[Tensor, ...] | dict[str, Tensor]; arrays likewise while data are read


def mapped(function: Callable[[Any], Any], inputs: Inputs) -> Any:
    """The nest with ``function(tensor)`` in place of every tensor."""
    return tree_map(function, inputs)


def tensors_in(inputs: Inputs) -> list[Any]:
    """The tensors, in a fixed order."""
    leaves: list[Any] = tree_leaves(inputs)
    return leaves


def count(inputs: Inputs) -> int:
    """Number of examples N."""
    return len(tensors_in(inputs)[0])


def rows(inputs: Inputs, index: Any) -> Inputs:
    """The examples at an index or slice of the first axis."""
    return mapped(lambda tensor: tensor[index], inputs)


def chunks(inputs: Inputs, size: int) -> list[Inputs]:
    """Parts of ``size`` examples, in order; one empty part where there are none, as `torch.split` gives."""
    starts = range(0, max(count(inputs), 1), size)
    return [rows(inputs, slice(start, start + size)) for start in starts]


def shapes(inputs: Inputs) -> Any:
    """The shape of one example: a tuple of numbers, or a nest of such tuples."""
    return mapped(lambda tensor: tuple(tensor.shape[1:]), inputs)


def as_floats(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same with floating tensors in ``dtype``."""
    return mapped(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, inputs)


def described(inputs: Inputs) -> str:
    """For messages: ``[2, 5]``, or ``{user: [2, 4], item: [2, 3]}``."""
    if isinstance(inputs, dict):
        return f"{{{', '.join(f'{name}: {described(part)}' for name, part in inputs.items())}}}"
    if isinstance(inputs, tuple):
        return f"({', '.join(described(part) for part in inputs)})"
    return str(list(inputs.shape))


def is_tensor(inputs: Inputs) -> bool:
    """Whether there is one tensor, not a nest."""
    return isinstance(inputs, Tensor)
