"""Where the loss along a path would jump: buffers that differ between its ends.

A path moves the weights. Batch-norm statistics are recomputed at every point, as they are those of the
data there; all other buffers (the vectors of a spectral norm, averages of a layer of the user's) belong to
no point between, and those of the end at t = 0 are taken. If the other end needs its own, the loss jumps at
t = 1, and what stands beside the jump is no barrier.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lossray.networks.batch_norm import refresh_statistics, statistics_of
from lossray.networks.stack import Members, Stack

ROUNDINGS = 16  # of the loss's size: the same numbers are computed twice

Losses = Callable[[Tensor, Members], Tensor]  # of parameters [R, d] and buffers: [R]


def differing(stack: Stack, buffers_a: Members, buffers_b: Members) -> list[str]:
    """Names of the buffers, other than those of batch norm, that some members' ends do not have alike."""
    normal = statistics_of(stack.template)
    return [
        name
        for name, tensor in buffers_a.items()
        if name not in normal and not torch.equal(tensor, buffers_b[name].to(tensor))
    ]


def jumps(
    stack: Stack, theta: Tensor, buffers_a: Members, buffers_b: Members, inputs: Tensor, losses: Losses
) -> Tensor:
    """Whether the loss of the end at t = 1 depends on which end's buffers it is given, [R] bool.

    Args:
        stack: the architecture.
        theta: of the ends at t = 1, [R, d].
        buffers_a: of the ends at t = 0, by name, [R, *shape].
        buffers_b: of those at t = 1.
        inputs: on which batch-norm statistics are recomputed.
        losses: of the members.
    """
    if not differing(stack, buffers_a, buffers_b):
        return torch.zeros(len(theta), dtype=torch.bool, device=theta.device)
    sides = [refresh_statistics(stack, theta, buffers, inputs) for buffers in (buffers_a, buffers_b)]
    one, other = (losses(theta, buffers).double() for buffers in sides)
    rounding = ROUNDINGS * torch.finfo(theta.dtype).eps * torch.maximum(one.abs(), other.abs())
    return (one - other).abs() > rounding
