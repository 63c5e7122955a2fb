"""One ensemble method against another at equal budget: paired by base run and test example."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lossray.findings.bootstrap import Interval, t_interval
from lossray.findings.ensemble_scores import EnsembleCell
from lossray.findings.ratios import RatioInterval, ratio_interval

Array = NDArray[np.float64]

SAME = 1e-3  # mean |difference| of an example's score over the mean score: below it, rounding


@dataclass(frozen=True)
class Contrast:
    """The control's score minus the variant's, so that positive means that the variant is better.

    Attributes:
        variant: the method in question.
        control: what it is compared with.
        budget: nominal, of both, in trainings of a run.
        metric: of `METRICS`.
        n: base runs with both ensembles.
        left_out: base runs without one of the two, or with a diverged one.
        control_mean: the control's score, mean over runs and examples.
        difference: in the metric's unit.
        relative: the difference as a share of control_mean.
        spread: mean over runs and examples of |difference|.
    """

    variant: str
    control: str
    budget: float
    metric: str
    n: int
    left_out: int
    control_mean: float
    difference: Interval
    relative: RatioInterval
    spread: float

    @property
    def p_value(self) -> float:
        """Two-sided, of "no difference"; 1 where the two are the same."""
        return 1.0 if self.same else self.difference.p_differs(0.0)

    @property
    def same(self) -> bool:
        """Whether the two agree to rounding, example by example; not where neither makes any error."""
        return self.n > 0 and self.control_mean > 0 and self.spread <= SAME * self.control_mean


def contrast(
    cell: EnsembleCell, variant: str, control: str, budget: float, *, metric: str, alpha: float
) -> Contrast:
    """The paired comparison of two methods.

    Args:
        cell: holds both methods at the budget.
        variant: the method in question.
        control: what it is compared with.
        budget: nominal, of both.
        metric: of `METRICS`.
        alpha: level of the two intervals.
    """
    variant_scores = cell.of(metric, variant, budget)  # [runs, N]
    control_scores = cell.of(metric, control, budget)
    paired = np.isfinite(variant_scores).all(axis=1) & np.isfinite(control_scores).all(axis=1)
    n = int(paired.sum())
    variant_scores, control_scores = variant_scores[paired], control_scores[paired]
    difference = control_scores - variant_scores
    estimate, mean = (float(x.mean()) if n else math.nan for x in (difference, control_scores))
    drawn = cell.resampled(metric, control, budget)[paired]  # [n, B]
    drawn_difference = drawn - cell.resampled(metric, variant, budget)[paired]
    return Contrast(
        variant=variant,
        control=control,
        budget=budget,
        metric=metric,
        n=n,
        left_out=len(cell.base_runs) - n,
        control_mean=mean,
        difference=t_interval(estimate, drawn_difference, alpha=alpha),
        relative=ratio_interval(drawn_difference, drawn, np.array([estimate, mean]), alpha=alpha),
        spread=float(np.abs(difference).mean()) if n else math.nan,
    )
