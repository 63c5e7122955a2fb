"""By how much a model's outputs change where its weights change and its function should not.

Measured in float64, where what rounding does lies orders of magnitude below what a mistake does. That holds
for any model, whatever its operations show.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lossray.errors import ModelError
from lossray.networks.ambient import seeded
from lossray.networks.as_found import copied
from lossray.networks.functional import call_model
from lossray.plugins import failure
from lossray.seeds import generator

EPS = torch.finfo(torch.float64).eps
LARGEST_CHANGE = 1e-9  # of the outputs, relative, that rounding in float64 is always granted
ROUNDINGS = 1e3  # times the change that a relative change of all weights by eps makes, where that is more
LARGEST_NOISE = 1e-4  # where that says nothing any more


def require_kept(model: nn.Module, other: nn.Module, batches: Sequence[Any], *, eps: float = EPS) -> float:
    """Refuse a change of the weights that changes the function by more than rounding.

    Args:
        model: in eval mode and float64, as ``other``; both are left as they are.
        other: what has been made of it.
        batches: inputs, as `call_model` takes them.
        eps: of the coarsest numbers that the model computes with.

    Returns:
        The largest difference of the outputs over the largest output.

    Raises:
        ModelError: they differ by more, are not finite, or the model cannot take the inputs.
    """
    before = torch.cat([outputs_of(model, inputs) for inputs in batches])
    change = distance(before, torch.cat([outputs_of(other, inputs) for inputs in batches]))
    if change <= max(LARGEST_CHANGE, ROUNDINGS * eps):
        return change
    noisy = copied(model)
    _disturb(noisy, lambda tensor, draw: tensor * (1 + eps * _normal(tensor, draw)))
    noise = distance(before, torch.cat([outputs_of(noisy, inputs) for inputs in batches]))
    if change <= min(ROUNDINGS * noise, LARGEST_NOISE):
        return change
    raise ModelError(
        f"the outputs of {type(model).__name__} change by {change:.2g} of the largest, where its function "
        f"should stay and {max(LARGEST_CHANGE, ROUNDINGS * eps):.1g} is allowed for rounding: they depend on "
        "more than its layers show"
    )


def generic(model: nn.Module) -> nn.Module:
    """A copy with other weights, and other statistics of norms: where nothing is the same by chance.

    Fresh models have many equal numbers (affine parameters 1, biases and running means 0), which would hide
    that they belong to other channels. Signs stay; zeros become positive.
    """
    other = copied(model)
    _disturb(other, _moved)
    return other


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Any) -> Tensor:
    """All outputs, flat, [n] float64; torch's generators start alike in each call.

    Raises:
        ModelError: the model cannot take the inputs, or returns no floating-point tensor, or one not finite.
    """
    device = next(model.parameters()).device
    try:
        with seeded(0, device):
            outputs = call_model(model, inputs)
    except Exception as error:  # a user's forward may raise anything
        shapes = [list(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        raise ModelError(
            f"{type(model).__name__} on inputs {', '.join(map(str, shapes))}: {failure(error)}"
        ) from error
    flat_outputs = flat(outputs, type(model).__name__)
    if not bool(flat_outputs.isfinite().all()):
        raise ModelError(
            f"{type(model).__name__} has outputs that are not finite: no change of them is known"
        )
    return flat_outputs


def flat(outputs: Any, name: str) -> Tensor:
    """The floating-point tensors of a nest as one, [n] float64.

    Raises:
        ModelError: there is none.
    """
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors:
        raise ModelError(f"{name} returns {type(outputs).__name__} without any floating-point tensor")
    return torch.cat([leaf.detach().reshape(-1).double() for leaf in tensors])


def distance(before: Tensor, after: Tensor) -> float:
    """Largest difference of outputs [n] over the largest of ``before``; NaN where any is.

    0 where nothing differs, though all may be 0, and infinity where there are not as many.
    """
    if before.shape != after.shape:
        return torch.inf
    difference, largest = float((after - before).abs().max()), float(before.abs().max())
    if difference == 0:
        return 0.0
    return difference / largest if largest else torch.inf


Disturbance = Callable[[Tensor, torch.Generator], Tensor]


@torch.no_grad()
def _disturb(model: nn.Module, change: Disturbance) -> None:
    """Change all floating-point parameters and buffers in place."""
    draw = generator(0, "function change")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(change(tensor, draw))


def _moved(tensor: Tensor, draw: torch.Generator) -> Tensor:
    factors, shifts = (0.3 * _normal(tensor, draw)).exp(), 0.1 * (1 + _normal(tensor, draw).abs())
    regular = torch.isfinite(tensor) & (tensor != 0)
    infinite = torch.isinf(tensor)  # masks of attention
    return torch.where(regular, tensor * factors, torch.where(infinite, tensor, shifts))


def _normal(tensor: Tensor, draw: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=draw, device="cpu", dtype=torch.float64).to(tensor)
