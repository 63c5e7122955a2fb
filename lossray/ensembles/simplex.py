"""Low-loss simplexes, one vertex after the other (ESPRO, Benton et al., 2102.13042)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lossray.ensembles.bench import Bench, PackedWeights
from lossray.seeds import generator
from lossray.training.batches import gradient_in_training, next_minibatch
from lossray.training.optimizers import PackedOptimizer
from lossray.training.steps import all_finite, below_limit

VOLUME = 1e-2  # weight of -log(volume) in the loss of a new vertex
START = 0.1  # distance of a new vertex from the middle of the others, in norms of the base


def grow(bench: Bench, vertices: Sequence[PackedWeights], steps: int) -> PackedWeights:
    """One more vertex: minimises the expected loss over the simplex less VOLUME times its log volume.

    Each step draws one point of the simplex, uniformly; the gradient at it reaches the new vertex by that
    vertex' share. Of the log volume only the height over the other vertices counts, whose gradient is
    (v - projection) / height^2.

    Args:
        bench: the method's, which pays for the training.
        vertices: those that stay, at least one.
        steps: of training.
    """
    base_runs = bench.base_runs
    number = len(vertices)
    fixed = torch.stack([vertex.theta for vertex in vertices])  # [V, R, d]
    middle = fixed.mean(dim=0)
    draws = [generator(seed, "ensembles/vertex", number) for seed in base_runs.seeds]
    away = torch.stack([torch.randn(base_runs.stack.dim, generator=draw, device="cpu") for draw in draws]).to(
        middle
    )
    length = START * torch.linalg.vector_norm(fixed[0], dim=1) / torch.linalg.vector_norm(away, dim=1)
    theta = middle + length[:, None] * away
    healthy = torch.stack([vertex.alive for vertex in vertices]).all(dim=0)
    seeds, rate = bench.seeds("vertex", number), bench.cosine(steps)
    initial_loss = bench.initial_loss()
    optimizer = PackedOptimizer(base_runs.optimizer, theta, base_runs.stack.layout)
    buffers = {name: tensor.clone() for name, tensor in vertices[0].buffers.items()}
    for step in range(steps):
        shares = uniform_shares(base_runs.seeds, number + 1, number, step).to(theta)  # [R, V + 1]
        here = torch.einsum("vrd,rv->rd", fixed, shares[:, :-1]) + shares[:, -1:] * theta
        batch = next_minibatch(base_runs.dataset, base_runs.training, seeds, step)
        losses, gradient = gradient_in_training(
            base_runs.stack, here, buffers, base_runs.loss, batch, seeds, step
        )
        bounded = below_limit(losses, initial_loss, base_runs.training.diverged_above, theta.dtype)
        healthy = healthy & bounded & all_finite(gradient)
        pull = shares[:, -1:] * gradient - VOLUME * _growth(theta, fixed)
        optimizer.step(torch.where(healthy[:, None], pull, 0.0), rate(step), alive=healthy)
    bench.pay(steps * base_runs.batch)
    return replace(vertices[0], theta=optimizer.theta.clone(), alive=healthy & all_finite(optimizer.theta))


def uniform_shares(seeds: Sequence[int], count: int, number: int, draw: int) -> Tensor:
    """Barycentric coordinates of a uniform point of a simplex with ``count`` vertices, [R, count] float64."""
    exponentials = torch.stack(
        [
            -torch.log1p(
                -torch.rand(
                    count,
                    generator=generator(seed, f"ensembles/simplex{number}", draw),
                    device="cpu",
                    dtype=torch.float64,
                )
            )
            for seed in seeds
        ]
    )
    return exponentials / exponentials.sum(dim=1, keepdim=True)


def _growth(theta: Tensor, fixed: Tensor) -> Tensor:
    """Gradient of the log of the height of theta [R, d] over the other vertices [V, R, d]."""
    offset = theta - fixed[0]
    if len(fixed) > 1:
        edges = (fixed[1:] - fixed[0]).permute(1, 2, 0)  # [R, d, V - 1]
        basis = torch.linalg.qr(edges).Q
        offset = offset - torch.einsum("rdk,rk->rd", basis, torch.einsum("rdk,rd->rk", basis, offset))
    return offset / offset.square().sum(dim=1, keepdim=True).clamp(min=1e-30)
