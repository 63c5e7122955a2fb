"""The losses by name: functions of outputs and targets that return the mean over examples."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lossray.errors import ModelError
from lossray.names import unknown_name
from lossray.plugins import is_spec, load

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Softmax cross entropy in nats, mean over examples.

    Args:
        outputs: logits [B, C].
        targets: classes [B], int64.

    Raises:
        ModelError: the targets are not classes.
    """
    if targets.is_floating_point():  # torch would take them for class probabilities
        raise ModelError(f"loss 'cross_entropy' needs classes (int64), found {targets.dtype}; use 'mse'")
    return F.cross_entropy(outputs, targets)


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error summed over outputs, mean over examples (SCIENCE 2.8).

    Args:
        outputs: [B, C].
        targets: [B, C] floats, or classes [B] (integers), which become one-hot vectors.

    Raises:
        ModelError: float targets of another shape than the outputs (broadcasting would hide it).
    """
    if not targets.is_floating_point():
        classes = torch.arange(outputs.shape[-1], device=targets.device)
        targets = (targets.unsqueeze(-1) == classes).to(outputs.dtype)
    if targets.shape != outputs.shape:
        raise ModelError(
            f"loss 'mse': targets {list(targets.shape)} do not match outputs {list(outputs.shape)}"
        )
    return 0.5 * (outputs - targets).square().sum(dim=-1).mean()


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mse}


def get_loss(name: str) -> Loss:
    """The loss called ``name``, or the user's function ``package.module:function``.

    Returns:
        ``loss(outputs, targets) -> scalar``, the mean over examples.

    Raises:
        ModelError: there is no such loss; or, when called, a user's function returns no scalar tensor.
        StudyError: a user's function is not found.
    """
    if name in LOSSES:
        return LOSSES[name]
    if not is_spec(name):
        raise ModelError(f"loss: {unknown_name(name, [*LOSSES, 'package.module:function'])}")
    function = load(name)

    @functools.wraps(function)
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        value = function(outputs, targets)
        if not isinstance(value, Tensor) or value.ndim != 0:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(f"loss {name!r} returns {found} where a scalar tensor, the mean, is needed")
        return value

    return loss
