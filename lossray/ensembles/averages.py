"""Averages of weights along a training: SWA (1803.05407) and SWAG (1902.02476)."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lossray.ensembles.bench import PackedWeights
from lossray.seeds import generator

RANK = 20  # deviations that SWAG keeps, as in the paper


def averaged(points: Sequence[PackedWeights]) -> PackedWeights:
    """The mean of the weights, float64 sums; the buffers are those of the last point."""
    mean = torch.stack([point.theta.double() for point in points]).mean(dim=0)
    last = points[-1]
    return replace(last, theta=mean.to(last.theta.dtype))


def gaussian_samples(
    points: Sequence[PackedWeights], seeds: Sequence[int], count: int
) -> list[PackedWeights]:
    """Draws from SWAG's Gaussian, half of its covariance diagonal and half of low rank.

    theta = mean + sqrt(variance / 2) z1 + D z2 / sqrt(2 (K - 1)), D the K last deviations from running means.

    Args:
        points: the iterates, at least two.
        seeds: of the runs, [R].
        count: how many draws.
    """
    rows = torch.stack([point.theta.double() for point in points])  # [n, R, d]
    mean = rows.mean(dim=0)
    variance = (rows.square().mean(dim=0) - mean.square()).clamp(min=0)
    running = rows.cumsum(dim=0) / torch.arange(1, len(rows) + 1, device=rows.device)[:, None, None]
    deviations = (rows - running)[-RANK:]
    last = points[-1]
    samples = []
    for k in range(count):
        z1, z2 = _draws(seeds, k, mean, len(deviations))
        low = torch.einsum("krd,rk->rd", deviations, z2) / math.sqrt(2 * max(1, len(deviations) - 1))
        theta = mean + (variance / 2).sqrt() * z1 + low
        samples.append(replace(last, theta=theta.to(last.theta.dtype)))
    return samples


def _draws(seeds: Sequence[int], k: int, like: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Standard normal numbers [R, d] and [R, rank] of each run's own generator."""
    draws = [generator(seed, "ensembles/swag", k) for seed in seeds]
    z1 = torch.stack(
        [torch.randn(like.shape[1], generator=draw, device="cpu", dtype=torch.float64) for draw in draws]
    )
    z2 = torch.stack([torch.randn(rank, generator=draw, device="cpu", dtype=torch.float64) for draw in draws])
    return z1.to(like.device), z2.to(like.device)
