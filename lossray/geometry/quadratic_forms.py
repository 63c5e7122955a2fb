"""Weighted sums of squares of independent standard normal variables, and their expected logarithms."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

LEADING = 16  # terms that are kept apart
# ln t of the trapezoid rule. The integrand is analytic up to an imaginary part of pi/2: a spacing h is off by
# about exp(-pi^2/h), 2e-6. What lies beyond either end is less.
GRID = (-12.0, 40.0, 0.75)


@dataclass(frozen=True)
class QuadraticForm:
    """Q = sum_m values_m X_m of R members, with X_m ~ chi^2(counts_m) independent.

    Attributes:
        values: [R, m] float64, >= 0.
        counts: [R, m], degrees of freedom, not necessarily whole.
    """

    values: Tensor
    counts: Tensor

    @property
    def concentration(self) -> Tensor:
        """Sum of squared weights over the square of their sum, [R]: 1/n for n equal ones."""
        shares = self.values / (self.values * self.counts).sum(dim=1, keepdim=True)
        return (self.counts * shares.square()).sum(dim=1)

    def times(self, others: "QuadraticForm") -> "QuadraticForm":
        """The form whose weights are the products of these and those, each with each."""
        values = self.values[:, :, None] * others.values[:, None, :]
        counts = self.counts[:, :, None] * others.counts[:, None, :]
        return shortened(values.flatten(start_dim=1), counts.flatten(start_dim=1))

    def expected_log(self) -> Tensor:
        """E ln Q, [R]; NaN where all weights are zero or one is NaN.

        ln Q is the integral of (exp(-t) - exp(-tQ)) / t over t > 0, and E exp(-tQ) is the product of
        (1 + 2 t values)^(-counts/2). In ln t the integrand is smooth and decays on either side.
        """
        mean = (self.values * self.counts).sum(dim=1, keepdim=True)
        first, last, spacing = GRID
        t = torch.arange(first, last, spacing, dtype=torch.float64, device=mean.device).exp()
        logs = torch.log1p(2 * (self.values / mean)[:, :, None] * t)
        transform = torch.exp(-(self.counts[:, :, None] * logs).sum(dim=1) / 2)
        return mean[:, 0].log() + spacing * (torch.exp(-t) - transform).sum(dim=1)


def form_of(weights: Tensor) -> QuadraticForm:
    """Sum of weights_m z_m^2, for weights [R, m] >= 0."""
    return shortened(weights.double(), torch.ones_like(weights, dtype=torch.float64))


def stacked(forms: Sequence[QuadraticForm]) -> QuadraticForm:
    """The forms below each other, as of one pack: one evaluation for all of them is faster."""
    width = max(form.values.shape[1] for form in forms)
    values = [pad(form.values, (0, width - form.values.shape[1])) for form in forms]
    counts = [pad(form.counts, (0, width - form.counts.shape[1])) for form in forms]
    return QuadraticForm(torch.cat(values), torch.cat(counts))


def shortened(values: Tensor, counts: Tensor) -> QuadraticForm:
    """The form with its `LEADING` largest weights as they are, and the rest as one of its mean and variance.

    E ln Q moves by 3e-5 or less in spectra from flat to geometric, and not at all where the rest are equal.
    """
    if values.shape[1] <= LEADING + 1:
        return QuadraticForm(values, counts)
    largest, index = values.topk(LEADING, dim=1)
    unit = largest[:, :1]  # squares of the rest may be too large or small for float64 otherwise
    rest = values.scatter(1, index, 0) / torch.where(unit == 0, 1, unit)
    total = (counts * rest).sum(dim=1, keepdim=True)
    squares = (counts * rest.square()).sum(dim=1, keepdim=True)
    value = torch.where(squares == 0, 0, squares / total) * unit
    count = torch.where(squares == 0, 0, total.square() / squares)
    return QuadraticForm(
        torch.cat([largest, value], dim=1), torch.cat([counts.gather(1, index), count], dim=1)
    )
