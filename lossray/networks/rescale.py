"""The same function at other weights, by given factors: `lossray.rescale`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lossray.errors import ModelError
from lossray.names import unknown_name
from lossray.networks.layout import layout_of
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

    Example:
        The function stays, the sharpness more than doubles: at a minimum of f(x) = b max(0, a x) the largest
        eigenvalue is 2 (a^2 + b^2).

        >>> import lossray, torch
        >>> a, b = (torch.nn.Linear(1, 1, bias=False) for _ in "ab")
        >>> _ = torch.nn.init.ones_(a.weight), torch.nn.init.ones_(b.weight)
        >>> model, data = torch.nn.Sequential(a, torch.nn.ReLU(), b), (torch.ones(1, 1), torch.ones(1, 1))
        >>> other = lossray.rescale(model, {"0": 2.0})
        >>> [parameter.item() for parameter in other.parameters()]
        [2.0, 0.5]
        >>> H, K = (lossray.Hessian(own, torch.nn.functional.mse_loss, data) for own in (model, other))
        >>> [round(lossray.eigenpairs(own, k=1).values.item(), 4) for own in (H, K)]
        [4.0, 8.5]
    """
    symmetry = rescaling_symmetry(model, layout_of(model), data)
    if not isinstance(factors, Mapping):
        raise ModelError(
            f"rescale, factors: found {type(factors).__name__}; allowed: a dict, hidden layer to factors"
        )
    alpha = torch.ones(symmetry.units, dtype=torch.float64, device="cpu")
    for name, given in factors.items():
        if name not in symmetry.groups:
            raise ModelError(f"rescale, hidden layer: {unknown_name(str(name), symmetry.groups)}")
        units = symmetry.groups[name]
        alpha[units] = _checked(name, given, units.stop - units.start)
    return in_gauge(model, symmetry, alpha)


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


def in_gauge(model: nn.Module, symmetry: RescalingSymmetry, alpha: Tensor) -> nn.Module:
    """A copy of the model with the units rescaled by ``alpha``, checked to be the same function."""
    symmetry.seen.require_kept(model, lambda module: rescaled(module, symmetry, alpha), as_it_is=True)
    return rescaled(model, symmetry, alpha)
