"""Dividing examples into parts of exact sizes, stratified by class: a function of labels, sizes and seed."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from lossray.seeds import generator

Indices = npt.NDArray[np.int64]


def exact_sizes(n: int, fractions: Sequence[float]) -> list[int]:
    """Whole numbers that sum to ``n`` and lie within one of ``fractions * n`` (largest remainders)."""
    # Decimal fractions as written in the study file: in binary, 0.15 * 20 would not be 3 everywhere.
    exact = [Fraction(str(fraction)) * n for fraction in fractions]
    sizes = [int(value) for value in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda part: sizes[part] - exact[part])
    for part in by_remainder[: n - sum(sizes)]:
        sizes[part] += 1
    return sizes


def partition(targets: npt.NDArray[np.generic], sizes: Sequence[int], seed: int) -> list[Indices]:
    """Divide examples at random into parts of exactly these sizes.

    Integer targets of shape [N] are stratified: the number of examples of a class in a part is the
    proportional share, rounded up or down, and where rounding leaves the choice, a class is put into a
    part that would otherwise lack it. Other targets are divided without regard to their values.

    Args:
        targets: [N] integer class ids, or [N, C] floats.
        sizes: the sizes of the parts; they sum to N.
        seed: names the random stream; nothing else enters, so the division is the same everywhere.

    Returns:
        One ascending array of indices per part; disjoint, together all of 0..N-1.
    """
    n = len(targets)
    if sum(sizes) != n:
        raise ValueError(f"the parts sum to {sum(sizes)}, but there are {n} examples")
    if targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer):
        members = [np.flatnonzero(targets == label) for label in np.unique(targets)]
    else:
        members = [np.arange(n)]
    counts = stratified_counts([len(group) for group in members], sizes)
    parts: list[list[Indices]] = [[] for _ in sizes]
    for label, group in enumerate(members):
        shuffled = group[_permutation(len(group), seed, label)]
        for part, piece in enumerate(np.split(shuffled, np.cumsum(counts[label])[:-1])):
            parts[part].append(piece)
    return [np.sort(np.concatenate(part)).astype(np.int64) for part in parts]


def stratified_counts(class_sizes: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """A table [classes, parts] of whole numbers with the given row and column sums, close to proportional.

    Every entry is ``class_size * size / N`` rounded down or up (a controlled rounding, which always exists).
    All arithmetic is on integers, so ties fall alike on every machine.
    """
    n = sum(class_sizes)
    floors = [[count * size // n for size in sizes] for count in class_sizes]
    remainders = [[count * size % n for size in sizes] for count in class_sizes]
    extras = [[0] * len(sizes) for _ in class_sizes]
    for row, count in enumerate(class_sizes):
        # An empty cell goes first: it is the difference between a class that is absent and one that is there.
        wishes = sorted(range(len(sizes)), key=lambda part: (floors[row][part] > 0, -remainders[row][part]))
        granted = [part for part in wishes if remainders[row][part]][: count - sum(floors[row])]
        for part in granted:
            extras[row][part] = 1
    _balance(extras, floors, remainders, sizes)
    return [[low + up for low, up in zip(*rows, strict=True)] for rows in zip(floors, extras, strict=True)]


def _balance(
    extras: list[list[int]], floors: list[list[int]], remainders: list[list[int]], sizes: Sequence[int]
) -> None:
    """Move units between the parts of a class, in place, until the parts have their exact sizes."""

    def surplus() -> list[int]:
        columns = zip(*floors, strict=True), zip(*extras, strict=True)
        return [sum(low) + sum(up) - size for low, up, size in zip(*columns, sizes, strict=True)]

    over = surplus()
    while any(over):
        path = _path(extras, floors, remainders, over)
        for row, source, target in path:
            extras[row][source], extras[row][target] = 0, 1
        over = surplus()


def _path(
    extras: list[list[int]], floors: list[list[int]], remainders: list[list[int]], over: list[int]
) -> list[tuple[int, int, int]]:
    """The shortest chain of moves (class, from, to) that leads from a part too large to one too small.

    Breadth-first search over the parts; the moves of one chain are of different classes or leave different
    cells, so they can be made together.
    """
    chains: dict[int, list[tuple[int, int, int]]] = {part: [] for part, value in enumerate(over) if value > 0}
    queue = list(chains)
    for source in queue:
        if over[source] < 0:
            return chains[source]
        for target in range(len(over)):
            rows = [
                row
                for row, extra in enumerate(extras)
                if extra[source] and not extra[target] and remainders[row][target]
            ]
            if target in chains or not rows:
                continue
            # Prefer the class that loses least by the move: never the last example of a class in a part
            # where another can be moved, then the one with the smallest loss in proportionality.
            best = min(
                rows,
                key=lambda row: (
                    (floors[row][source] == 0) - (floors[row][target] == 0),
                    remainders[row][source] - remainders[row][target],
                ),
            )
            chains[target] = [*chains[source], (best, source, target)]
            queue.append(target)
    raise AssertionError("no controlled rounding found, though one always exists")


def _permutation(n: int, seed: int, label: int) -> Indices:
    return torch.randperm(n, generator=generator(seed, "split", label), device="cpu").numpy()
