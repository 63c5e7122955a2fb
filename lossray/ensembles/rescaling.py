"""Rescalings theta -> D theta of the base runs, and the learning rates that equal them.

Gradient descent at D theta is gradient descent at theta with learning rates eta D^-2; of methods whose step
does not depend on the scale of the gradient, such as Adam, eta D^-1 (theory 2.5).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lossray.ensembles.bench import PRODUCT, BaseRuns, Bench, PackedWeights
from lossray.ensembles.lines import line_barrier
from lossray.errors import ModelError
from lossray.networks.nests import chunks, count, rows
from lossray.networks.random_gauges import random_factors
from lossray.networks.symmetry import RescalingSymmetry, rescaling_symmetry
from lossray.operators.objectives import PackedObjective
from lossray.operators.packed import PackedHessian
from lossray.seeds import generator
from lossray.spectra.ritz_values import largest_ritz_values
from lossray.training.evaluation import CHUNK, keeps_function, output_change
from lossray.training.steps import LearningRates
from lossray.training.update_rules import OPTIMIZERS, OptimizerSettings

# Lr times the largest eigenvalue stays below it (theory 5C). Plain descent is stable up to 2; where an
# optimizer is stable up to less (Nesterov: 1.36), the limit is as large a share of that.
STABLE = 1.5
WORSE = 1.1  # or below what it is at theta itself, times this
HALVINGS = 6
LANCZOS_STEPS = 6
NOISE = 0.1  # of its start, beside the gradient, which lies mostly in the leading eigenvectors
SHARPNESS_EXAMPLES = 64  # on which the largest eigenvalue is estimated

BY_GRADIENT = ("sgd", "momentum", "nesterov")  # D^-2 on the gradient
BY_UPDATE = ("adagrad", "rmsprop", "adam", "amsgrad", "adamw", "adamax", "nadam", "lion")  # D^-1
BY_BOTH = ("radam",)  # D^-1 each: its first steps go by the gradient, the others do not depend on its scale


@dataclass(frozen=True)
class Rescaling:
    """One gauge D for each base run, and what it does; all but the first [R] float64.

    Attributes:
        diagonal: D [R, d], in the dtype of theta.
        sigma: standard deviation of ln(factor) of the hidden units, after halvings.
        lambda_max_before: largest Hessian eigenvalue at theta: a lower bound, by Lanczos.
        lambda_max_after: the same at D theta.
        function_change: max |f(D theta) - f(theta)| / max |f(theta)| on the training examples.
        distance: |D theta - theta|.
        line_barrier: of the training loss on the straight line from theta to D theta.
        dead_units: [R] int64, hidden units that no training example makes active.
    """

    diagonal: Tensor
    sigma: Tensor
    lambda_max_before: Tensor
    lambda_max_after: Tensor
    function_change: Tensor
    distance: Tensor
    line_barrier: Tensor
    dead_units: Tensor

    def apply(self, point: PackedWeights) -> PackedWeights:
        """D theta: the same functions."""
        return replace(point, theta=point.theta * self.diagonal)

    def undo(self, point: PackedWeights) -> PackedWeights:
        """D^-1 theta."""
        return replace(point, theta=point.theta / self.diagonal)


class Gauges:
    """Draws rescalings of the base runs, one after the other.

    The standard deviation of ln(factor) is halved, for each drawing anew, until the learning rate is stable
    at D theta; never for adaptive methods, which adapt to the gauge.

    Args:
        bench: the method's, which pays for the estimates where they decide this.
        sigma: the wanted standard deviation.
        powers_of_two: round factors to powers of two.

    Raises:
        ModelError: the architecture has no rescaling symmetry, or a run's function changes.
    """

    def __init__(self, bench: Bench, *, sigma: float, powers_of_two: bool) -> None:
        stack = bench.base_runs.stack
        self.bench, self.sigma, self.powers_of_two = bench, sigma, powers_of_two
        self.inputs = bench.base_runs.dataset.train.inputs
        self.symmetry = rescaling_symmetry(stack.template, stack.layout, (self.inputs, None))
        self.drawn: list[Rescaling] = []
        self._dead: Tensor | None = None  # [R, units]

    def draw(self, point: PackedWeights) -> Rescaling:
        """The next rescaling, at ``point``."""
        bench = self.bench
        stack, train = bench.base_runs.stack, bench.base_runs.dataset.train
        dead = self._dead_units(point)
        before = largest_eigenvalue(bench.base_runs, point)
        sigma = torch.full((len(bench.base_runs.seeds),), self.sigma, dtype=torch.float64, device="cpu")
        trying = np.ones(len(sigma), dtype=bool)
        for trial in range(HALVINGS + 1):
            exact = self._diagonal(sigma, dead).to(point.theta.device)
            diagonal = exact.to(point.theta.dtype)
            scaled = replace(point, theta=point.theta * diagonal)
            after = largest_eigenvalue(bench.base_runs, scaled)
            bench.pay(self._estimate * trying)
            trying = trying & self._too_steep(before, after).numpy()
            if trial == 0:
                bench.pay(self._estimate * trying)  # now theta itself is looked at
            if trial == HALVINGS or not trying.any():
                break
            sigma = torch.where(torch.from_numpy(trying), sigma / 2, sigma)
        self._require_kept(point, exact)
        rescaling = Rescaling(
            diagonal,
            sigma,
            before,
            after,
            output_change(stack, point.theta, scaled.theta, point.buffers, train.inputs),
            torch.linalg.vector_norm(scaled.theta.double() - point.theta.double(), dim=1),
            line_barrier(bench.base_runs, point, scaled, train),
            dead.sum(dim=1),
        )
        self.drawn.append(rescaling)
        return rescaling

    def _require_kept(self, point: PackedWeights, diagonal: Tensor) -> None:
        """Refuse a rescaling that changes the function of a run by more than rounding."""
        stack, scaled = self.bench.base_runs.stack, point.theta.double() * diagonal
        eps = self.symmetry.seen.eps
        kept = keeps_function(stack, point.theta, scaled, point.buffers, self.inputs, eps=eps)
        if bool((point.alive & ~kept).any()):
            seed = self.bench.base_runs.seeds[int((point.alive & ~kept).nonzero()[0])]
            raise ModelError(
                f"the run of seed {seed}: its outputs change by more than rounding where its units are "
                "rescaled: they depend on more than its layers show; take the methods that rescale out of "
                "ensembles.methods"
            )

    def _dead_units(self, point: PackedWeights) -> Tensor:
        """Those at the first point. They get no gradient; one that wakes up later keeps its gauge."""
        if self._dead is None:
            self._dead = dead_units(self.bench, self.symmetry, point)
        return self._dead

    def _diagonal(self, sigma: Tensor, dead: Tensor) -> Tensor:
        """D [R, d] float64: log-normal factors; 1 for dead units."""
        factors = random_factors(
            self.bench.seeds("rescale", len(self.drawn)),
            self.symmetry.units,
            sigma=sigma,
            powers_of_two=self.powers_of_two,
        )
        return self.symmetry.diagonal(factors.masked_fill(dead.cpu(), 1.0))

    @property
    def _limit(self) -> float | None:
        """Of lr times the largest eigenvalue; None where there is none.

        Adaptive methods adapt to the gauge: their preconditioner is not known before they have made steps.
        """
        optimizer = self.bench.base_runs.optimizer
        entry = OPTIMIZERS[optimizer.name]
        if entry.scale != "identity" or entry.threshold is None:
            return None
        return STABLE * min(1.0, entry.threshold(optimizer, 0) / 2)

    @property
    def _estimate(self) -> float:
        """What one estimate of the largest eigenvalue costs; nothing where it decides nothing."""
        examples = min(SHARPNESS_EXAMPLES, self.bench.base_runs.examples)
        return 0.0 if self._limit is None else (1 + PRODUCT * LANCZOS_STEPS) * examples

    def _too_steep(self, before: Tensor, after: Tensor) -> Tensor:
        """Whether the learning rate is unstable at D theta, [R]."""
        if self._limit is None:
            return torch.zeros(len(after), dtype=torch.bool, device="cpu")
        lr = self.bench.base_runs.optimizer.lr
        return (lr * after >= torch.clamp(WORSE * lr * before, min=self._limit)).cpu()


def equivalent_rates(optimizer: OptimizerSettings, diagonal: Tensor) -> LearningRates | None:
    """The learning rates with which training at theta is training at D theta; None where there are none.

    Exact for plain, heavy-ball and Nesterov descent, weight decay included. For the others exact in the limit
    eps -> 0 and without weight decay. Radam's first steps are not preconditioned: they have D^-2, the others
    D^-1. Adadelta and muon have no such rates.

    Args:
        optimizer: of the run.
        diagonal: D [R, d].
    """
    if optimizer.name in BY_GRADIENT:
        return LearningRates(gradient=diagonal**-2)
    if optimizer.name in BY_BOTH:
        return LearningRates(gradient=1 / diagonal, update=1 / diagonal)
    return LearningRates(update=1 / diagonal) if optimizer.name in BY_UPDATE else None


def dead_units(bench: Bench, symmetry: RescalingSymmetry, point: PackedWeights) -> Tensor:
    """Hidden units that no training example makes active, [R, units] bool.

    Their outgoing weights have no gradient, whatever the loss is: here a random combination of the outputs.
    """
    base_runs = bench.base_runs
    inputs = base_runs.dataset.train.inputs
    weights = torch.randn(
        count(inputs),
        base_runs.dataset.n_outputs,
        generator=generator(0, "ensembles/dead units"),
        device="cpu",
        dtype=torch.float64,
    ).to(point.theta)
    size = _at_once(point)
    active = torch.zeros(len(point.theta), symmetry.units, dtype=torch.bool, device=point.theta.device)
    for some, some_weights in zip(chunks(inputs, size), weights.split(size), strict=True):
        _, gradient = base_runs.stack.gradients(
            point.theta,
            point.buffers,
            some,
            some_weights,
            lambda outputs, targets: (outputs * targets).mean(),
        )
        active |= symmetry.outgoing_sums(gradient.abs()) != 0
    bench.pay(base_runs.examples)
    return ~active


@torch.no_grad()
def largest_eigenvalue(base_runs: BaseRuns, point: PackedWeights) -> Tensor:
    """A lower bound of the largest Hessian eigenvalue, [R] float64: Lanczos on some examples."""
    train = base_runs.dataset.train
    some = min(SHARPNESS_EXAMPLES, base_runs.examples)
    objective = PackedObjective(
        base_runs.stack,
        point.theta.masked_fill(~point.alive[:, None], torch.nan),
        point.buffers,
        base_runs.loss,
        [(rows(train.inputs, slice(some)), train.targets[:some])],
        dtype=point.theta.dtype,
    )
    hessian = PackedHessian(objective)
    draws = [
        torch.randn(
            base_runs.stack.dim,
            generator=generator(seed, "ensembles/sharpness"),
            device="cpu",
            dtype=torch.float64,
        )
        for seed in base_runs.seeds
    ]
    noise = normalize(torch.stack(draws).to(point.theta.device), dim=1)
    start = normalize(hessian.gradient, dim=1) + NOISE * noise
    return largest_ritz_values(hessian, start, LANCZOS_STEPS)


def _at_once(point: PackedWeights) -> int:
    """Examples of one forward pass of all runs."""
    return max(1, CHUNK // len(point.theta))
