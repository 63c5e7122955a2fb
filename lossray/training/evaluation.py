"""Loss and accuracy of every member of a pack on whole splits."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lossray.networks.function_change import EPS, LARGEST_CHANGE, LARGEST_NOISE, ROUNDINGS
from lossray.networks.losses import Loss
from lossray.networks.nests import Inputs, as_floats, chunks, rows
from lossray.networks.stack import Stack
from lossray.seeds import generator
from lossray.training.datasets import Dataset, Split

# Examples times members per forward pass, which bounds the memory that activations take.
CHUNK = 4096

CHECKED_EXAMPLES = 64  # on which it is checked that a function stays

SPLITS = ("train", "validation", "test")
METRICS = tuple(f"{split}_{metric}" for split in SPLITS for metric in ("loss", "accuracy"))


@torch.no_grad()
def evaluate_split(
    stack: Stack, theta: Tensor, buffers: Mapping[str, Tensor], loss: Loss, split: Split
) -> tuple[Tensor, Tensor]:
    """Mean loss and accuracy in eval mode, both [R] float64.

    Accuracy is NaN where the targets are not classes [N] or the outputs not [N, C] with C > 1; ids below 0
    are no classes and do not count. Both are NaN on an empty split.
    """
    members, n = len(theta), len(split.targets)
    classes = split.targets.ndim == 1 and not split.targets.is_floating_point()
    counted = int((split.targets >= 0).sum()) if classes else 0
    losses = torch.zeros(members, dtype=torch.float64, device=theta.device)
    correct = torch.zeros_like(losses)
    size = max(1, stack.limits.portion(CHUNK) // members)
    for inputs, targets in zip(chunks(split.inputs, size), split.targets.split(size), strict=True):
        if len(targets) == 0:
            continue  # an empty split has one empty chunk
        outputs = stack.outputs(theta, buffers, inputs)
        losses += len(targets) * torch.stack(
            [loss(member_outputs, targets).double() for member_outputs in outputs]
        )
        if outputs.ndim != 3 or outputs.shape[-1] < 2:
            counted = 0
        elif classes:
            correct += (outputs.argmax(dim=-1) == targets).sum(dim=1)
    nothing = torch.full_like(losses, torch.nan)
    return losses / n if n else nothing, correct / counted if counted else nothing


def evaluate(
    stack: Stack, theta: Tensor, buffers: Mapping[str, Tensor], loss: Loss, dataset: Dataset
) -> dict[str, Tensor]:
    """All of METRICS, [R] float64 each."""
    evaluation = {}
    for name in SPLITS:
        own_loss, accuracy = evaluate_split(stack, theta, buffers, loss, getattr(dataset, name))
        evaluation[f"{name}_loss"], evaluation[f"{name}_accuracy"] = own_loss, accuracy
    return evaluation


@torch.no_grad()
def keeps_function(
    stack: Stack,
    theta: Tensor,
    other: Tensor,
    buffers: Mapping[str, Tensor],
    inputs: Inputs,
    *,
    eps: float = EPS,
) -> Tensor:
    """Whether other weights give the same outputs up to rounding, in float64 on some inputs, [R] bool.

    Args:
        stack: the architecture, evaluated in eval mode.
        theta: parameters [R, d].
        other: parameters [R, d], in float64 as they were computed: rounded ones differ by more.
        buffers: of both, by name, [R, *shape].
        inputs: [N, ...], or a nest, of which the first are taken.
        eps: of the coarsest numbers that the model computes with.
    """
    double = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in buffers.items()
    }
    some = as_floats(rows(inputs, slice(CHECKED_EXAMPLES)), torch.float64)
    change = output_change(stack, theta.double(), other.double(), double, some)
    kept = change <= max(LARGEST_CHANGE, ROUNDINGS * eps)
    if bool(kept.all()):
        return kept
    draw = generator(0, "function change")
    noise = eps * torch.randn(theta.shape, generator=draw, device="cpu", dtype=torch.float64).to(theta.device)
    noisy = output_change(stack, theta.double(), theta.double() * (1 + noise), double, some)
    return kept | (change <= (ROUNDINGS * noisy).clamp(max=LARGEST_NOISE))


@torch.no_grad()
def output_change(
    stack: Stack, theta: Tensor, other: Tensor, buffers: Mapping[str, Tensor], inputs: Inputs
) -> Tensor:
    """Largest difference of the outputs at two sets of parameters over the largest output, [R] float64.

    Args:
        stack: the architecture; evaluated in eval mode and in the dtype of what it is given.
        theta: parameters [R, d].
        other: parameters [R, d].
        buffers: of both, by name, [R, *shape].
        inputs: [N, ...], or a nest.
    """
    differences, sizes = [], []
    for chunk in chunks(inputs, max(1, stack.limits.portion(CHUNK) // len(theta))):
        one, two = (
            stack.outputs(parameters, buffers, chunk).double().flatten(1) for parameters in (theta, other)
        )
        differences.append((one - two).abs().amax(dim=1))
        sizes.append(one.abs().amax(dim=1))
    largest = torch.stack(sizes).amax(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.stack(differences).amax(dim=0) / largest
