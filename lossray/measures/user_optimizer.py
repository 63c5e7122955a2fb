"""A user's optimizer at one point: its momentum, preconditioner, threshold and rate, and its next step."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lossray.errors import StudyError
from lossray.measures.model_point import ModelPoint
from lossray.plugins import failure
from lossray.training.readings import RecordedOptimizer, read_optimizer
from lossray.training.recognise import rate

UNTOLD = 0  # steps taken, where neither the state nor the caller tells


@dataclass(frozen=True)
class UserOptimizer:
    """An optimizer of torch's kind, read and left as it is.

    Attributes:
        optimizer: the user's.
        parameters: the trainable ones of the model, in order.
        state: what it says of itself.
        notes: what is not known of it, one line each.
    """

    optimizer: torch.optim.Optimizer
    parameters: Sequence[Parameter]
    state: RecordedOptimizer
    notes: tuple[str, ...]

    @property
    def lr(self) -> float | None:
        """The rate to which the preconditioner belongs: the groups' largest; None if they have none."""
        rates = [float(group["lr"]) for group in self.optimizer.param_groups if "lr" in group]
        return max(rates, default=None) if self.state.rate is None else self.state.rate

    @property
    def has_one_rate(self) -> bool:
        """Whether all parameter groups have the same."""
        return self.lr is not None and rate(self.optimizer) is not None

    def virtual_update(self, gradient: Tensor) -> Tensor | str:
        """The change [1, d] that the next step would make at a gradient [1, d]; a note where that fails.

        A copy of the optimizer steps copies of the parameters, weight decay included.
        """
        memo: dict[int, Any] = {}
        try:
            twin = copy.deepcopy(self.optimizer, memo)
            pieces = torch.split(gradient[0], [p.numel() for p in self.parameters])
            copies = [memo.get(id(p)) for p in self.parameters]
            for parameter, piece in zip(copies, pieces, strict=True):
                if isinstance(parameter, Parameter):
                    parameter.grad = piece.view(parameter.shape).to(parameter)
            with torch.no_grad():
                twin.step()
        except Exception as error:  # a user's own optimizer may raise anything
            return f"no update: {type(self.optimizer).__name__}.step raised {failure(error)}"
        moved = [
            (after.detach() - before.detach()) if isinstance(after, Parameter) else torch.zeros_like(before)
            for before, after in zip(self.parameters, copies, strict=True)
        ]
        return torch.cat([piece.reshape(-1).double() for piece in moved])[None]


def read_user_optimizer(optimizer: Any, point: ModelPoint) -> UserOptimizer:
    """Read an optimizer of the point's model.

    Raises:
        StudyError: it is no optimizer, or that of another model.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise StudyError(f"optimizer: found {kind}; allowed: a torch.optim.Optimizer, or None")
    parameters = dict(zip(point.layout.names, point.objective.live_parameters(), strict=True))
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not stepped & {id(p) for p in parameters.values()}:
        raise StudyError(
            f"optimizer: {type(optimizer).__name__} steps none of the parameters of "
            f"{point.objective.names['model']}; pass that of this model"
        )
    reading = read_optimizer(optimizer, parameters, UNTOLD)
    device = point.theta.device
    state = {name: value.to(device, torch.float64) for name, value in reading.state.items()}
    return UserOptimizer(optimizer, list(parameters.values()), RecordedOptimizer(state), reading.notes)
