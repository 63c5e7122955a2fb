"""Which executor a setting gets: found by trying, decided once, and frozen in the manifest."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lossray.networks.layout import Layout
from lossray.networks.nests import Inputs, as_floats, mapped
from lossray.networks.stack import Loss, Members, Stack, build_stack

LARGEST_KERNEL = 1200  # weights of a convolution up to which vmap pays on a CPU (8 x 16 x 3 x 3 still does)
SAME = 1e-8  # difference of the executors in float64 that counts as rounding


def choose_executor(
    build: Callable[[], nn.Module],
    inputs: Inputs,
    targets: Tensor,
    loss: Loss,
    *,
    device: torch.device | str,
) -> str:
    """The executor of a setting: "vmap" where it works, agrees with "loop" and pays, otherwise "loop".

    Large convolutions on a CPU run at 0.7-0.8 of a loop under vmap, so they loop; small ones, whose time goes
    into overheads, run at 1.1-1.8 of it. Every other model is tried: loss, gradient and a
    Hessian-vector product of two members in float64, in train and in eval mode, and the outputs without
    gradients, for which a layer may have a path of its own. The trial runs on the CPU, where it costs
    milliseconds; ``device`` is where the study will run.

    Args:
        build: makes a freshly initialised model.
        inputs: a few examples [B, ...].
        targets: their targets.
        loss: the loss of the study.
        device: device of the study's training.
    """
    stack, theta, buffers = build_stack(build, (0, 1), executor="loop", dtype=torch.float64)
    if torch.device(device).type == "cpu" and _largest_kernel(stack.layout) > LARGEST_KERNEL:
        return "loop"
    inputs = as_floats(inputs, torch.float64)
    targets = targets.double() if targets.is_floating_point() else targets
    batched = stack.with_executor("vmap")
    for train in (False, True):
        expected = _trial(stack, theta, buffers, inputs, targets, loss, train)
        try:
            with warnings.catch_warnings():
                # A missing batching rule is a slow loop inside vmap.
                warnings.filterwarnings("error", message=".*performance drop.*")
                actual = _trial(batched, theta, buffers, inputs, targets, loss, train)
        except Exception:  # any failure of vmap, whose errors have no common type, means: use the loop
            return "loop"
        if not all(_agree(a, b) for a, b in zip(expected, actual, strict=True)):
            return "loop"
    return "vmap"


def _agree(expected: Tensor, actual: Tensor) -> bool:
    """Whether two tensors differ by rounding alone, as a share of the largest number in them."""
    return bool(((expected - actual).abs() <= SAME * expected.abs().amax()).all())


def _largest_kernel(layout: Layout) -> int:
    """Weights of the model's largest convolution; 0 where it has none."""
    sizes = zip(layout.roles, layout.sizes, strict=True)
    return max((size for role, size in sizes if role == "kernel"), default=0)


def _trial(
    stack: Stack,
    theta: Tensor,
    buffers: Members,
    inputs: Inputs,
    targets: Tensor,
    loss: Loss,
    train: bool,
) -> tuple[Tensor, ...]:
    """What a study asks of a stack: losses [R], gradient and Hessian-vector product [R, 2 d], outputs.

    The product alone needs attention that can be differentiated twice, which fused kernels cannot.
    """
    scratch = {name: tensor.clone() for name, tensor in buffers.items()}
    losses, gradient = stack.gradients(theta, scratch, inputs, targets, loss, train=train, keys=(0, 1))
    each = mapped(lambda x: torch.stack([x, x.flip(0)]), inputs)  # batches of their own, as in training
    both = torch.stack([targets, targets.flip(0)])
    leaf = theta.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        again = stack.losses(leaf, scratch, each, both, loss, train=train, keys=(0, 1), per_member=True)
        (graph,) = torch.autograd.grad(again.sum(), leaf, create_graph=True)
        product = torch.zeros_like(gradient)
        if graph.requires_grad:
            (product,) = torch.autograd.grad(graph, leaf, gradient, materialize_grads=True)
    with torch.no_grad():
        outputs = stack.outputs(theta, buffers, inputs)
    return losses, torch.cat([gradient, product], dim=1), outputs
