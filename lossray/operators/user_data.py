"""The user's data as batches: one batch, a list of them, or anything that can be read again and again."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset

from lossray.errors import DataError
from lossray.operators.objectives import Batch

REMEDY = "pass (inputs, targets), (inputs, targets, weights), or a list of such batches"
OTHER_FORMS = "closure=lambda model, batch: (mean loss, weight) takes batches of any form"
SHOWN = 4  # tensors of a tuple or list whose shapes a message names


def read_data(data: Any, *, closure: bool = False) -> Iterable[Any]:
    """The batches in ``data``, still as the user gave them.

    A tuple, a mapping, a tensor or an array is one batch. So is a list, such as a DataLoader gives, if an
    entry of it can be no batch: ``[inputs, targets]``. Any other list is one of batches, and with a closure,
    whose batches may be anything, every list is.

    Args:
        data: a batch, a list of batches, or something that gives the same batches each time it is iterated,
            such as a DataLoader without shuffling.
        closure: whether the batches are for a closure.

    Raises:
        DataError: no batch, or something that can be read only once or in two ways.
    """
    if isinstance(data, Iterator):
        raise DataError(
            f"data is a {type(data).__name__}, which can be read once, and every product reads all of it: "
            "pass a list, or a DataLoader with shuffle=False"
        )
    if isinstance(data, tuple | Mapping | Tensor | np.ndarray):
        return [data]
    if not isinstance(data, Iterable):
        wrap = "; wrap it in a DataLoader with shuffle=False" if isinstance(data, Dataset) else f"; {REMEDY}"
        raise DataError(f"data: found {type(data).__name__}{wrap}")
    if isinstance(data, list) and not data:
        raise DataError(f"data: found an empty list; {REMEDY}")
    if isinstance(data, list) and not closure and _is_one_batch(data):
        return [data]
    return data


def _is_one_batch(entries: list[Any]) -> bool:
    """Whether a list is a batch: tensors, arrays and mappings are inputs or targets, and no batches."""
    if all(isinstance(entry, Mapping) for entry in entries):
        raise DataError(
            f"data: found a list of {len(entries)} {type(entries[0]).__name__}s; a batch with inputs and "
            f"targets in one mapping needs a closure: {OTHER_FORMS}; one batch of two mappings is a tuple "
            "(inputs, targets)"
        )
    return any(entry is None or isinstance(entry, Tensor | np.ndarray | Mapping) for entry in entries)


def example_batch(raw: Any) -> Batch:
    """A batch of examples, its share still the number of examples (or the sum of their weights).

    Raises:
        DataError: it is no pair or triple, the lengths differ, or the weights are impossible.
    """
    if not isinstance(raw, tuple | list) or len(raw) not in (2, 3):
        raise DataError(f"a batch of data: found {described(raw)}; {REMEDY}; {OTHER_FORMS}")
    inputs, targets = as_tensors(raw[0]), as_tensors(raw[1])
    batch = Batch(inputs, targets, 1.0)
    if batch.size is None or any(map(_is_plain, (inputs, targets))):
        raise DataError(
            f"a batch of data: found inputs {described(inputs)} and targets {described(targets)}; needed: "
            f"tensors or arrays with one entry for each example in both; {OTHER_FORMS}"
        )
    if len(raw) == 2 or raw[2] is None:
        return Batch(inputs, targets, float(batch.size))
    weights = as_tensors(raw[2])
    if not isinstance(weights, Tensor) or weights.shape != (batch.size,):
        raise DataError(
            f"weights of a batch: found {described(weights)}; needed: one for each of {batch.size} examples"
        )
    weights = weights.double()
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise DataError("weights of a batch: found negative or non-finite ones; allowed: numbers from 0")
    return Batch(inputs, targets, float(weights.sum()), weights)


def as_tensors(tree: Any) -> Any:
    """The same nest with tensors in place of NumPy arrays, and dicts in place of other mappings.

    Raises:
        DataError: an array of something that torch has not, such as text.
    """
    return tree_map(_as_tensors, tree, is_leaf=lambda node: isinstance(node, Mapping))


def _as_tensors(leaf: Any) -> Any:
    if isinstance(leaf, Mapping):  # also those that pytree does not know, such as tokenizer outputs
        return {key: as_tensors(value) for key, value in leaf.items()}
    if not isinstance(leaf, np.ndarray):
        return leaf
    native = leaf.astype(leaf.dtype.newbyteorder("="), copy=False)  # files may hold big-endian numbers
    try:
        return torch.as_tensor(np.require(native, requirements=["C", "W"]))
    except TypeError as error:
        raise DataError(
            f"data: found an array of {leaf.dtype} {list(leaf.shape)}; torch has no such numbers: convert it"
        ) from error


def _is_plain(side: Any) -> bool:
    """Whether inputs or targets are a list without a tensor, of which no examples can be picked."""
    return isinstance(side, tuple | list) and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(side))


def described(value: Any) -> str:
    """A value in a message: shapes of tensors, entries of a mapping, length of a list, or the type."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(str, value))}"
    if isinstance(value, tuple | list):
        few = len(value) <= SHOWN and all(isinstance(entry, Tensor) for entry in value)
        shapes = f" ({', '.join(str(list(entry.shape)) for entry in value)})" if few and value else ""
        return f"a {type(value).__name__} of {len(value)}{shapes}"
    return f"a {type(value).__name__}"
