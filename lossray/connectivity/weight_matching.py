"""Which hidden channel of one model stands for which of another, by their weights.

Weight matching is algorithm 1 of "Git Re-Basin" (Ainsworth et al., arXiv 2209.04836): each group of channels
in turn is assigned optimally while the others stay, until none improves.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce

import torch
from torch import Tensor

from lossray.networks.permutations import ChannelUse, PermutationSymmetry
from lossray.seeds import generator

SWEEPS = 100  # of all groups, at most; a descent ends after some five
RESTARTS = 3  # from random permutations
ROUNDING = 1e-12  # relative gain of an assignment that counts as none

Permutations = dict[
    str, Tensor
]  # group -> what channel of the model becomes channel 0, 1, ..., [count] int64
Weights = Mapping[str, Tensor]  # trainable parameters by name, float64 on the CPU


def assignment(gain: Tensor) -> Tensor:
    """The permutation p [C] int64 that maximises sum_c gain[c, p(c)], for a finite gain [C, C]."""
    from scipy.optimize import linear_sum_assignment  # here: half a second that few tasks need

    columns = linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1]
    return torch.as_tensor(columns, dtype=torch.int64, device="cpu")


def weight_matching(symmetry: PermutationSymmetry, source: Weights, target: Weights) -> Permutations:
    """Permutations of ``source`` that bring it close to ``target``: the best of several local optima.

    The starts are the identity, the groups matched one after the other from inputs and outputs on, and random
    ones. The groups are swept in random order; all draws are the same in each call.

    Args:
        symmetry: of the model.
        source: what is permuted.
        target: of the same names and shapes.
    """
    starts = (*_starts(symmetry), _successive(symmetry, source, target))
    ends = [
        _descended(symmetry, source, target, start, generator(0, "alignment/order", counter))
        for counter, start in enumerate(starts)
    ]
    return max(ends, key=lambda end: _product(symmetry.apply(source, end), target, target))


def _starts(symmetry: PermutationSymmetry) -> Iterator[Permutations]:
    yield {group: torch.arange(count, device="cpu") for group, count in symmetry.groups.items()}
    for counter in range(RESTARTS):
        draw = generator(0, "alignment/start", counter)
        yield {
            group: torch.randperm(count, generator=draw, device="cpu")
            for group, count in symmetry.groups.items()
        }


def _descended(
    symmetry: PermutationSymmetry,
    source: Weights,
    target: Weights,
    start: Permutations,
    draw: torch.Generator,
) -> Permutations:
    """Coordinate descent over the groups, until a sweep improves none of them."""
    permutations = dict(start)
    moved = symmetry.apply(source, permutations)
    names = list(symmetry.groups)
    for _ in range(SWEEPS):
        improved = False
        for index in torch.randperm(len(names), generator=draw, device="cpu").tolist():
            group = names[index]
            better = _better(symmetry, group, moved, target)
            if better is not None:
                step, moved = better
                permutations[group] = permutations[group][step]
                improved = True
        if not improved:
            break
    return permutations


def _better(
    symmetry: PermutationSymmetry, group: str, moved: Weights, target: Weights
) -> tuple[Tensor, dict[str, Tensor]] | None:
    """A permutation of one group that brings the weights closer, and the weights then.

    The gain is exact unless a weight joins the group to itself; hence the second look.
    """
    uses = [use for use in symmetry.uses[group] if use.tensor in target]
    step = assignment(_gain(uses, moved, target, symmetry.groups[group]))
    new = symmetry.apply(moved, {group: step})
    names = {use.tensor for use in uses}
    gained = _product(new, target, names) - _product(moved, target, names)
    size = sum(float(moved[name].norm() * target[name].norm()) for name in names)
    return (step, new) if gained > ROUNDING * size else None


def _product(one: Weights, other: Weights, names: Iterable[str]) -> float:
    """Inner product: the larger, the smaller the distance, as permutations keep the norm."""
    return sum(float((one[name] * other[name]).sum()) for name in names)


def _gain(uses: list[ChannelUse], source: Weights, target: Weights, count: int) -> Tensor:
    """Inner products of the weights of every channel of ``target`` with those of every one of ``source``."""
    products = (
        target[use.tensor].reshape(-1)[use.elements] @ source[use.tensor].reshape(-1)[use.elements].T
        for use in uses
    )
    return reduce(torch.add, products, torch.zeros(count, count, dtype=torch.float64, device="cpu"))


def _successive(symmetry: PermutationSymmetry, source: Weights, target: Weights) -> Permutations:
    """Each group matched by the weights that join it to groups before it, to the inputs and the outputs.

    It finds the permutation of a permuted copy, where a descent may stay in a local optimum.
    """
    waiting = Counter(use.tensor for uses in symmetry.uses.values() for use in uses)
    moved = dict(source)
    permutations = {}
    for group, count in symmetry.groups.items():
        uses = [use for use in symmetry.uses[group] if use.tensor in target]
        anchored = [use for use in uses if waiting[use.tensor] == 1]
        permutations[group] = assignment(_gain(anchored, moved, target, count))
        moved = symmetry.apply(moved, {group: permutations[group]})
        waiting.subtract(use.tensor for use in symmetry.uses[group])
    return permutations
