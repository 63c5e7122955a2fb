"""Numbers that are not finite, in any example: refused by name, wherever they stand in the data."""

import math
from typing import Any

import torch
from torch import Tensor

from lossray.errors import DataError, ModelError
from lossray.operators.objectives import Batch, Objective, leaves_of


def require_finite_inputs(inputs: Any, number: int) -> None:
    """Refuse floating inputs that are not finite, also those that a finite loss would hide.

    A tensor of nothing but 0 and -inf is a mask that is added to scores, and may be.

    Args:
        inputs: of one batch, any nest of tensors [B, ...].
        number: of the batch, from 0.

    Raises:
        DataError: a number is not finite; the message names batch and example.
    """
    for leaf in leaves_of(inputs):
        if not leaf.is_floating_point() or bool(torch.isfinite(leaf).all()) or _is_mask(leaf):
            continue
        rows = leaf.reshape(len(leaf), -1)
        row = int((~torch.isfinite(rows)).any(dim=1).nonzero()[0])
        value = float(rows[row][~torch.isfinite(rows[row])][0])
        raise DataError(
            f"batch {number} of the data: found {value} in the inputs of example {row}; allowed: finite "
            "numbers"
        )


def _is_mask(leaf: Tensor) -> bool:
    return bool(((leaf == 0) | (leaf == -math.inf)).all())


def require_finite_loss(objective: Objective, loss: Tensor, gradient: Tensor | None = None) -> None:
    """Refuse a loss or gradient that is not finite.

    Args:
        objective: of one member.
        loss: over all examples, [1].
        gradient: [1, d].

    Raises:
        DataError: the loss is not finite; the message names batch and example.
        ModelError: the loss is, and its gradient is not.
    """
    finite = bool(torch.isfinite(loss).all())
    if finite and (gradient is None or bool(torch.isfinite(gradient).all())):
        return
    where = _place(objective, of_gradient=finite)
    if not finite:
        raise DataError(f"{where} of the data: the loss is {float(loss)}, which has no curvature")
    raise ModelError(
        f"{where} of the data: the loss is finite and its gradient is not, as that of a root or a norm at 0; "
        "keep away from such points, for example by adding a small number under the root"
    )


def require_finite_batches(objective: Objective) -> None:
    """Refuse a loss that is not finite over some batch; as `require_finite_loss`."""
    with torch.no_grad():
        losses = [objective.losses(objective.theta, batch) for batch in objective.batches()]
    require_finite_loss(objective, torch.stack(losses).sum())


def _place(objective: Objective, *, of_gradient: bool) -> str:
    """The first batch, and the first example in it, that by itself is not finite."""
    for number, batch in enumerate(objective.batches()):
        if _is_finite(objective, batch, of_gradient):
            continue
        if batch.targets is None:  # of a closure, which may not be divided
            return f"batch {number}"
        row, part = 0, batch
        while (size := part.size or 0) > 1:
            halves = [part.pick(slice(0, size // 2)), part.pick(slice(size // 2, size))]
            bad = [not _is_finite(objective, half, of_gradient) for half in halves]
            if not any(bad):
                return f"batch {number}"
            row, part = (row, halves[0]) if bad[0] else (row + size // 2, halves[1])
        return f"example {row} in batch {number}"
    return "some batch"


def _is_finite(objective: Objective, batch: Batch, of_gradient: bool) -> bool:
    loss = objective.losses(objective.theta, batch).sum()
    if not of_gradient:
        return bool(torch.isfinite(loss))
    (gradient,) = torch.autograd.grad(loss, objective.theta, materialize_grads=True)
    return bool(torch.isfinite(gradient).all())
