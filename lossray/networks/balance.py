"""The same function at the weights of least norm: `lossray.balance`."""

from typing import Any

import torch
from torch import nn

from lossray.errors import ModelError
from lossray.networks.layout import layout_of, tensors_of, uncompiled
from lossray.networks.rescale import in_gauge
from lossray.networks.symmetry import rescaling_symmetry


def balance(model: nn.Module, data: Any = None) -> nn.Module:
    """A copy of a ReLU network in the balanced gauge: the weights of least norm that give the same function.

    There the incoming and the outgoing weights of every hidden unit have the same norm (theory 2.6). Units
    without incoming or without outgoing weights stay as they are.

    Args:
        model: left as it is.
        data: as in `rescale`.

    Raises:
        ModelError: the architecture has no rescaling symmetry, the weights are not finite, or the function
            changes by more than rounding.
        DataError: data without inputs.

    Example:
        However its unit is scaled, f(x) = 4 max(0, x) has one form in which both weights have the same size.

        >>> import lossray, torch
        >>> a, b = (torch.nn.Linear(1, 1, bias=False) for _ in "ab")
        >>> _ = torch.nn.init.constant_(a.weight, 8.0), torch.nn.init.constant_(b.weight, 0.5)
        >>> balanced = lossray.balance(torch.nn.Sequential(a, torch.nn.ReLU(), b))
        >>> [round(parameter.item(), 4) for parameter in balanced.parameters()]
        [2.0, 2.0]
    """
    layout = layout_of(model)
    theta = torch.cat([tensor.reshape(-1).double() for tensor in tensors_of(model)[0].values()])
    if not bool(torch.isfinite(theta).all()):
        raise ModelError(f"balance: {type(uncompiled(model)).__name__} has weights that are not finite")
    symmetry = rescaling_symmetry(model, layout, data)
    return in_gauge(model, symmetry, symmetry.balance_factors(theta[None])[0])
