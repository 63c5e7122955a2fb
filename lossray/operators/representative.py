"""Examples to try something on: distinct ones, with every value that their targets have."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lossray.operators.objectives import Batch, leaves_of
from lossray.seeds import generator

Rows = NDArray[np.int64]

COUNTED_VALUES = 2**20  # widest range of integers whose values are looked for
LEAST_EACH = 8  # examples of each of several batches
ROWS_AT_ONCE = 1024  # that are converted


def representative(batch: Batch, count: int) -> Batch:
    """At most ``count`` distinct examples of a batch, ordered by their targets; without weights.

    Of every value that integer targets (and then inputs) have there is one, the rare ones first; the rest
    lies evenly over the order of the targets, both ends included. Copies only where there is little else.
    """
    order, distinct = _order(batch)
    if len(distinct) > count:
        one_each = _one_of_each_value(batch)[:count]
        indices = np.linspace(0, len(distinct) - 1, count - len(one_each)).round().astype(np.int64)
        distinct = order[np.isin(order, [*one_each, *distinct[indices]])]
    if len(distinct) < min(LEAST_EACH, len(order)):  # nearly all are alike: some of them again
        distinct = order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(np.int64)]
    device = leaves_of((batch.inputs, batch.targets))[0].device
    return replace(batch, weights=None).pick(torch.from_numpy(distinct).to(device))


def representatives(batches: Iterable[Batch], n_batches: int, count: int) -> list[Batch]:
    """The like for several batches: one set of examples for each shape that they have, large ones first."""
    kinds: dict[str, list[Batch]] = {}
    each = max(LEAST_EACH, 2 * count // max(n_batches, 1))
    for batch in batches:
        shapes = [(tuple(leaf.shape[1:]), leaf.dtype) for leaf in leaves_of((batch.inputs, batch.targets))]
        kinds.setdefault(str(shapes), []).append(representative(batch, each))
    joined = [_joined(parts) for parts in kinds.values()]
    joined.sort(key=lambda batch: -(batch.size or 0))
    return [representative(batch, count) for batch in joined]


def _joined(parts: Sequence[Batch]) -> Batch:
    """Batches of one shape as one; what is no tensor is the first one's."""
    if len(parts) == 1:
        return parts[0]
    flat = [tree_flatten((part.inputs, part.targets)) for part in parts]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    leaves = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    inputs, targets = tree_unflatten(leaves, flat[0][1])
    return Batch(inputs, targets, sum(part.share for part in parts))


def _order(batch: Batch) -> tuple[Rows, Rows]:
    """The rows by the mean of their targets and random sums of all numbers, and the distinct among them."""
    targets, everything = leaves_of(batch.targets), leaves_of((batch.inputs, batch.targets))
    zeros = np.zeros(batch.size or 0)
    level = sum((_row_sums(leaf, None) for leaf in targets), zeros)
    sums = sum((_row_sums(leaf, generator(0, "examples", i)) for i, leaf in enumerate(everything)), zeros)
    order = np.lexsort([sums, level])
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(sums[order]) != 0) | (np.diff(level[order]) != 0)
    return order, order[new]


def _row_sums(leaf: Tensor, random: torch.Generator | None) -> NDArray[np.float64]:
    """The sum of each example's numbers [N], or of their products with random ones."""
    rows = leaf.detach().reshape(len(leaf), leaf[0].numel() if len(leaf) else 0)
    factors = torch.ones(rows.shape[1], dtype=torch.float64, device="cpu")
    if random is not None:
        factors = torch.randn(rows.shape[1], generator=random, device="cpu", dtype=torch.float64)
    parts = [(part.cpu().double().nan_to_num() * factors).sum(dim=1) for part in rows.split(ROWS_AT_ONCE)]
    return torch.cat(parts).numpy()


def _one_of_each_value(batch: Batch) -> Rows:
    """One row for every value of the integer targets, then inputs, without repetition: rare values first."""
    rows: list[int] = []
    for leaf in [*leaves_of(batch.targets), *leaves_of(batch.inputs)]:
        if leaf.is_floating_point() or leaf.is_complex() or leaf.numel() == 0:
            continue
        low, high = int(leaf.min()), int(leaf.max())
        if high - low < COUNTED_VALUES:
            rows += _first_rows(leaf, low, high - low + 1)
    return np.array(list(dict.fromkeys(rows)), dtype=np.int64)


def _first_rows(leaf: Tensor, low: int, width: int) -> list[int]:
    """The first row with each of the values from ``low``, rare values first."""
    first = torch.full((width,), len(leaf), dtype=torch.int64, device="cpu")
    counts = torch.zeros(width, dtype=torch.int64, device="cpu")
    start = 0
    for part in leaf.detach().reshape(len(leaf), -1).split(ROWS_AT_ONCE):
        values = part.cpu().long() - low
        numbers = torch.arange(start, start + len(part), device="cpu")[:, None].expand_as(values)
        first.scatter_reduce_(0, values.flatten(), numbers.flatten(), "amin")
        counts += torch.bincount(values.flatten(), minlength=width)
        start += len(part)
    present = counts.nonzero()[:, 0]
    rare_first: list[int] = first[present[counts[present].argsort(stable=True)]].tolist()
    return rare_first
