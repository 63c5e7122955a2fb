"""The same function at other weights: `rescale` by given factors, `balance` to the least norm."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lossray.errors import ModelError
from lossray.names import unknown_name
from lossray.networks.layout import layout_of, tensors_of, uncompiled
from lossray.networks.symmetry import RescalingSymmetry, rescaled, rescaling_symmetry

Factors = float | Sequence[float] | Tensor


def rescale(model: nn.Module, factors: Mapping[str, Factors], data: Any = None) -> nn.Module:
    """A copy of a ReLU network whose hidden units are rescaled: the same function in another gauge.

    Incoming weights and biases of a unit are multiplied by its factor, outgoing weights divided by it. With a
    norm layer the affine parameters carry the factor; layers whose outputs are added share their units.

    Args:
        model: left as it is.
        factors: positive factors by name of the hidden layer, one for each unit or one number for all. Layers
            without factors stay as they are.
        data: some inputs of the model, or (inputs, targets), or a list of such pairs: on the first of them it
            is checked that the function stays. Without them inputs that fit the model's layers are made up.

    Returns:
        A new model in the same mode; powers of two are exact, other factors change the outputs by rounding.

    Raises:
        ModelError: the architecture has no such symmetry, a name or a factor that cannot be used, or the
            function changes by more than rounding.
        DataError: data without inputs.
    """
    symmetry = rescaling_symmetry(model, layout_of(model), data)
    if not isinstance(factors, Mapping):
        raise ModelError(
            f"rescale, factors: found {type(factors).__name__}; allowed: a dict, hidden layer to factors"
        )
    alpha = torch.ones(symmetry.units, dtype=torch.float64)
    for name, given in factors.items():
        if name not in symmetry.groups:
            raise ModelError(f"rescale, hidden layer: {unknown_name(str(name), symmetry.groups)}")
        units = symmetry.groups[name]
        alpha[units] = _checked(name, given, units.stop - units.start)
    return _changed(model, symmetry, alpha)


def balance(model: nn.Module, data: Any = None) -> nn.Module:
    """A copy of a ReLU network in the balanced gauge: the weights of least norm that give the same function.

    There the incoming and the outgoing weights of every hidden unit have the same norm (SCIENCE 2.6). Units
    without incoming or without outgoing weights stay as they are.

    Args:
        model: left as it is.
        data: as in `rescale`.

    Raises:
        ModelError: the architecture has no rescaling symmetry, the weights are not finite, or the function
            changes by more than rounding.
        DataError: data without inputs.
    """
    layout = layout_of(model)
    theta = torch.cat([tensor.reshape(-1).double() for tensor in tensors_of(model)[0].values()])
    if not bool(torch.isfinite(theta).all()):
        raise ModelError(f"balance: {type(uncompiled(model)).__name__} has weights that are not finite")
    symmetry = rescaling_symmetry(model, layout, data)
    return _changed(model, symmetry, symmetry.balance_factors(theta[None])[0])


def _checked(name: str, given: Factors, units: int) -> Tensor:
    try:
        values = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ModelError(
            f"rescale, factors of {name!r}: found {given!r}; allowed: positive numbers"
        ) from None
    if values.shape not in ((), (units,)):
        raise ModelError(
            f"rescale, factors of {name!r}: found shape {list(values.shape)}; allowed: one number for all, "
            f"or {units}, one for each unit"
        )
    wrong = [value for value in values.reshape(-1).tolist() if not (math.isfinite(value) and value > 0)]
    if wrong:
        raise ModelError(f"rescale, factors of {name!r}: found {wrong[0]}; allowed: finite and above 0")
    return values


def _changed(model: nn.Module, symmetry: RescalingSymmetry, alpha: Tensor) -> nn.Module:
    symmetry.seen.require_kept(model, lambda own: rescaled(own, symmetry, alpha), as_it_is=True)
    return rescaled(model, symmetry, alpha)
