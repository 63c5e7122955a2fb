"""Estimates from independent probes, with the standard error and degrees of freedom that they support."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """Estimates of R members; NaN for a dead member."""

    value: Tensor  # [R] float64
    stderr: Tensor  # [R]; 0 where the value is exact, NaN where one probe alone cannot tell
    dof: int  # degrees of freedom of the standard error; 0 where it is exact or unknown

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Student's t interval that holds the true value with probability ``level``; low and high [R]."""
        factor = float(stdtrit(self.dof, (1 + level) / 2)) if self.dof else 1.0
        return self.value - factor * self.stderr, self.value + factor * self.stderr

    def member(self, r: int) -> "MemberEstimate":
        """The estimate of one member."""
        return MemberEstimate(float(self.value[r]), float(self.stderr[r]), self.dof)


@dataclass(frozen=True)
class MemberEstimate:
    """An estimate of one operator; see `Estimate`."""

    value: float
    stderr: float
    dof: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's t interval that holds the true value with probability ``level``."""
        factor = float(stdtrit(self.dof, (1 + level) / 2)) if self.dof else 1.0
        return self.value - factor * self.stderr, self.value + factor * self.stderr


def jackknife(
    samples: Tensor,
    function: Callable[[Tensor], Tensor] = lambda means: means[..., 0],
    *,
    exact: bool = False,
) -> Estimate:
    """A function of expectations, from independent samples of what is averaged.

    For the mean itself this is the usual standard error; for other smooth functions it is the jackknife's.

    Args:
        samples: [R, n, c], n samples of c quantities.
        function: of the means [..., c], gives [...].
        exact: whether the samples are no samples but the expectation.
    """
    n = samples.shape[1]
    value = function(samples.mean(dim=1))
    if exact:
        return Estimate(value, torch.zeros_like(value) * value, 0)
    if n == 1:
        return Estimate(value, torch.full_like(value, float("nan")), 0)
    without = function((samples.sum(dim=1, keepdim=True) - samples) / (n - 1))  # [R, n]
    spread = (without - without.mean(dim=1, keepdim=True)).square().sum(dim=1)
    return Estimate(value, ((n - 1) / n * spread).sqrt(), n - 1)
