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
        ModelError: the targets are not classes, or the shapes are others.
    """
    if targets.is_floating_point():  # torch would take them for class probabilities
        raise ModelError(f"loss 'cross_entropy' needs classes (int64), found {targets.dtype}; use 'mse'")
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1]:
        raise ModelError(
            f"loss 'cross_entropy': found outputs {list(outputs.shape)} and targets {list(targets.shape)}; "
            "allowed: logits [B, C] and classes [B], or a function of your own as loss"
        )
    return F.cross_entropy(outputs, targets)


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error summed over outputs, mean over examples (SCIENCE 2.8).

    `torch.nn.MSELoss` is `mse_mean`.

    Args:
        outputs: [B, ...]; [B, C] with classes as targets.
        targets: floats of the outputs' shape, where [B] and [B, 1] are the same; or classes [B] (integers),
            which become one-hot vectors.

    Raises:
        ModelError: targets of another shape than the outputs (broadcasting would hide it).
    """
    found = f"outputs {list(outputs.shape)} and targets {list(targets.shape)}"
    if not targets.is_floating_point():
        if outputs.ndim != 2 or targets.shape != outputs.shape[:1] or outputs.shape[1] < 2:
            raise ModelError(
                f"loss 'mse': found {found} of {targets.dtype}; allowed: classes [B] with outputs [B, C], "
                "C at least 2, or float targets of the outputs' shape"
            )
        classes = torch.arange(outputs.shape[-1], device=targets.device)
        targets = (targets.unsqueeze(-1) == classes).to(outputs.dtype)
    outputs, targets = _as_rows(outputs), _as_rows(targets)
    if targets.shape != outputs.shape:
        raise ModelError(f"loss 'mse': {found} do not match; allowed: targets of the outputs' shape")
    return 0.5 * (outputs - targets).square().flatten(1).sum(dim=-1).mean()


def mse_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    """The squared error as `torch.nn.MSELoss` has it: mean over examples and outputs.

    Its Hessian is that of `mse` times 2/C for C outputs. Arguments and errors as of `mse`.
    """
    per_example = outputs[:1].numel()
    return mse(outputs, targets) * (2 / max(per_example, 1))


def _as_rows(values: Tensor) -> Tensor:
    """One number for each example as a column: [B] as [B, 1]."""
    return values.unsqueeze(-1) if values.ndim == 1 else values


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mse, "mse_mean": mse_mean}


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
