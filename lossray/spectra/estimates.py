"""Estimates from independent probes, with the standard error and degrees of freedom that they support."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lossray.spectra.summary import Summarised, estimate_summary

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class PackedEstimate:
    """Estimates of R members; NaN for a dead member.

    Attributes:
        value: [R] float64.
        stderr: [R] of the sampling; 0 where the value is exact, NaN where one probe alone cannot tell.
        dof: degrees of freedom of the standard error; 0 where it is exact or unknown.
        bound: [R] of the error that more probes would not remove.
    """

    value: Tensor
    stderr: Tensor
    dof: int
    bound: Tensor

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Student's t interval of the sampling, wider by ``bound`` on both sides; low and high [R].

        It holds the true value with probability ``level`` or more.
        """
        half = _factor(self.dof, level) * self.stderr + self.bound
        return self.value - half, self.value + half

    def member(self, r: int) -> "Estimate":
        """The estimate of one member."""
        return Estimate(float(self.value[r]), float(self.stderr[r]), self.dof, float(self.bound[r]))

    def times(self, unit: Tensor) -> "PackedEstimate":
        """The estimate of ``unit`` [R] times as much."""
        return PackedEstimate(unit * self.value, unit * self.stderr, self.dof, unit * self.bound)


@dataclass(frozen=True, repr=False)
class Estimate(Summarised):
    """An estimate of one operator; it prints as one line.

    Attributes:
        value: the estimate.
        stderr: standard error of the sampling; 0 where the value is exact, NaN where one probe cannot tell.
        dof: degrees of freedom of the standard error; 0 where it is exact or unknown.
        bound: of the error that more probes would not remove.
    """

    value: float
    stderr: float
    dof: int
    bound: float = 0.0

    def summary(self) -> str:
        """The value with its standard error and interval."""
        return estimate_summary(self)

    def to_frame(self) -> "pd.DataFrame":
        """One row: value, stderr, dof and bound."""
        import pandas as pd

        return pd.DataFrame([vars(self)])

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's t interval of the sampling, wider by ``bound`` on both sides."""
        half = _factor(self.dof, level) * self.stderr + self.bound
        return self.value - half, self.value + half


def _factor(dof: int, level: float) -> float:
    if not dof:
        return 1.0
    from scipy.special import stdtrit  # here: half a second that training does not need

    return float(stdtrit(dof, (1 + level) / 2))


def unit_of(scales: Tensor) -> Tensor:
    """The scales [R] themselves, or 1 for an operator that is 0: nothing divided by it overflows."""
    return scales.masked_fill(scales == 0, 1)


def jackknife(
    samples: Tensor,
    function: Callable[[Tensor], Tensor] = lambda means: means[..., 0],
    *,
    exact: bool = False,
) -> PackedEstimate:
    """A function of expectations, from independent samples of what is averaged.

    For the mean itself this is the usual standard error; for other smooth functions it is the jackknife's.

    Args:
        samples: [R, n, c], n samples of c quantities.
        function: of the means [..., c], gives [...].
        exact: whether the samples are no samples but the expectation.
    """
    n = samples.shape[1]
    value = function(samples.mean(dim=1))
    zero = torch.zeros_like(value) * value  # NaN stays NaN
    if exact:
        return PackedEstimate(value, zero, 0, zero)
    if n == 1:
        return PackedEstimate(value, torch.full_like(value, float("nan")), 0, zero)
    without = function((samples.sum(dim=1, keepdim=True) - samples) / (n - 1))  # [R, n]
    spread = (without - without.mean(dim=1, keepdim=True)).square().sum(dim=1)
    return PackedEstimate(value, ((n - 1) / n * spread).sqrt(), n - 1, zero)
