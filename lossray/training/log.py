"""The log of a training segment: rows of the `training` table, as columns of tensors.

The row of step t describes the minibatch loss and gradient (without weight decay) at the parameters of step
t and the update from t to t + 1. NaN stands for what does not exist.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Row = Mapping[str, Tensor]  # column -> [R]; absent columns are NaN
EVALUATED = ("validation_loss", "test_loss", "test_accuracy")  # where the step is a checkpoint
MEASURED = ("train_loss", "gradient_norm", "update_norm")


def measured(losses: Tensor, gradient: Tensor, update: Tensor | None, alive: Tensor) -> Row:
    """The row of a step from its losses [R], gradient [R, d] and update [R, d] (None: no step was taken)."""
    row = {"train_loss": losses, "gradient_norm": _norms(gradient)}
    if update is not None:
        row["update_norm"] = _norms(update)
    return {name: masked(values, alive) for name, values in row.items()}


def masked(values: Tensor, alive: Tensor) -> Tensor:
    """The values [R] as float64; NaN for members that are not alive, and for infinities."""
    return torch.where(alive & torch.isfinite(values), values.double(), torch.nan)


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms


@dataclass(frozen=True)
class LogShape:
    """What every row has in common, and what the step alone decides.

    Attributes:
        nothing: [R] float64 NaN, on the pack's device.
        batch: examples of one step.
    """

    nothing: Tensor
    batch: int

    def columns(self, steps: Sequence[int], rates: Sequence[float], rows: Sequence[Row]) -> dict[str, Tensor]:
        """`step` and `examples_seen` (before the step) [n] int64, `lr` [n] and the others [n, R] float64."""
        counts = torch.tensor(steps, dtype=torch.int64, device="cpu")
        lists = {name: [row.get(name, self.nothing) for row in rows] for name in MEASURED + EVALUATED}
        empty = self.nothing.new_empty(0, len(self.nothing))
        return {
            "step": counts,
            "examples_seen": counts * self.batch,
            "lr": torch.tensor(rates, dtype=torch.float64, device="cpu"),
            **{name: torch.stack(values) if values else empty for name, values in lists.items()},
        }
