"""The user's data as batches: one batch, a list of them, or anything that can be read again and again."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lossray.curvature.objectives import Batch
from lossray.errors import DataError

REMEDY = "pass (inputs, targets), (inputs, targets, weights), or a list of such batches"


def read_data(data: Any, *, closure: bool = False) -> Iterable[Any]:
    """The batches in ``data``, still as the user gave them.

    Args:
        data: a batch (a tuple, or a list that starts with a tensor or a mapping), a list of batches, or
            something that gives the same batches each time it is iterated, such as a DataLoader without
            shuffling.
        closure: whether the batches are for a closure: a list is then always one of batches.

    Raises:
        DataError: no batch, or something that can be read only once.
    """
    if isinstance(data, Iterator):
        raise DataError(
            f"data is a {type(data).__name__}, which can be read once, and every product reads all of it: "
            "pass a list, or a DataLoader with shuffle=False"
        )
    single = isinstance(data, tuple) or (
        isinstance(data, list) and not closure and data and _is_inputs(data[0])
    )
    if single or isinstance(data, Mapping | Tensor | np.ndarray):
        return [data]
    if not isinstance(data, Iterable):
        raise DataError(f"data: found {type(data).__name__}; {REMEDY}")
    if isinstance(data, list) and not data:
        raise DataError(f"data: found an empty list; {REMEDY}")
    return data


def example_batch(raw: Any) -> Batch:
    """A batch of examples, its share still the number of examples (or the sum of their weights).

    Raises:
        DataError: it is no pair or triple, the lengths differ, or the weights are impossible.
    """
    if not isinstance(raw, tuple | list) or len(raw) not in (2, 3):
        raise DataError(f"a batch of data: found {described(raw)}; {REMEDY}; other forms need closure=")
    inputs, targets = as_tensors(raw[0]), as_tensors(raw[1])
    batch = Batch(inputs, targets, 1.0)
    if batch.size is None:
        lengths = [len(t) if t.ndim else "a scalar" for t in tree_leaves((inputs, targets)) if _is_tensor(t)]
        raise DataError(
            f"a batch of data: found tensors of lengths {lengths}; inputs and targets need one entry for "
            "each example; other forms need closure="
        )
    if len(raw) == 2 or raw[2] is None:
        return Batch(inputs, targets, float(batch.size))
    weights = as_tensors(raw[2])
    if not _is_tensor(weights) or weights.shape != (batch.size,):
        raise DataError(
            f"weights of a batch: found {described(weights)}; needed: one for each of {batch.size} examples"
        )
    weights = weights.double()
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise DataError("weights of a batch: found negative or non-finite ones; allowed: numbers from 0")
    return Batch(inputs, targets, float(weights.sum()), weights)


def as_tensors(tree: Any) -> Any:
    """The same nest with tensors in place of NumPy arrays."""
    if isinstance(tree, Mapping):  # also those that pytree does not know, such as tokenizer outputs
        return {key: as_tensors(value) for key, value in tree.items()}
    return tree_map(lambda leaf: torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf, tree)


def described(value: Any) -> str:
    """A value in a message: the shape of a tensor, the length of a tuple or list, or the type."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_inputs(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray | Mapping)
