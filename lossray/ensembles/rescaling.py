"""Rescalings theta -> D theta of the base runs, and the learning rates that equal them.

Gradient descent at D theta is gradient descent at theta with learning rates eta D^-2; of methods whose step
does not depend on the scale of the gradient, such as Adam, eta D^-1 (SCIENCE 2.5).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lossray.curvature.objectives import StackObjective
from lossray.curvature.operators import PackedHessian
from lossray.ensembles.bench import PRODUCT, Bench, Point, Problem
from lossray.networks.random_gauges import random_factors
from lossray.networks.symmetry import RescalingSymmetry, rescaling_symmetry
from lossray.seeds import generator
from lossray.training.evaluation import evaluate_split
from lossray.training.optimizers import OPTIMIZERS, OptimizerSettings
from lossray.training.steps import LearningRates

STABLE = 1.5  # lr times the largest eigenvalue stays below it (SCIENCE 5C): descent is stable up to 2
WORSE = 1.1  # or below what it is at theta itself, times this
HALVINGS = 6
LANCZOS_STEPS = 6
NOISE = 0.1  # of its start, beside the gradient, which lies mostly in the leading eigenvectors
SHARPNESS_EXAMPLES = 64  # on which the largest eigenvalue is estimated
EIGENVALUE_COST = (1 + PRODUCT * LANCZOS_STEPS) * SHARPNESS_EXAMPLES  # of one estimate, in gradients
LINE = (0.25, 0.5, 0.75)  # where a straight line's barrier is looked for

BY_GRADIENT = ("sgd", "momentum", "nesterov")  # D^-2 on the gradient
BY_UPDATE = ("adagrad", "rmsprop", "adam", "amsgrad", "adamw", "adamax", "nadam", "radam", "lion")  # D^-1


@dataclass(frozen=True)
class Rescaling:
    """One gauge D for each base run, and what it does; all but the first [R] float64."""

    diagonal: Tensor  # [R, d], in the dtype of theta
    sigma: Tensor
    lambda_max_before: Tensor
    lambda_max_after: Tensor
    function_change: Tensor  # max |f(D theta) - f(theta)| / max |f(theta)| on the training examples
    distance: Tensor  # |D theta - theta|
    line_barrier: Tensor
    dead_units: Tensor  # int64

    def apply(self, point: Point) -> Point:
        """D theta: the same functions."""
        return replace(point, theta=point.theta * self.diagonal)

    def undo(self, point: Point) -> Point:
        """D^-1 theta."""
        return replace(point, theta=point.theta / self.diagonal)


class Gauges:
    """Draws rescalings of the base runs, one after the other.

    The standard deviation of ln(factor) is halved, for each drawing anew, until the learning rate is stable
    at D theta.

    Args:
        bench: the method's, which pays for the estimates that decide this.
        sigma: the wanted standard deviation.
        powers_of_two: round factors to powers of two.

    Raises:
        ModelError: the architecture has no rescaling symmetry.
    """

    def __init__(self, bench: Bench, *, sigma: float, powers_of_two: bool) -> None:
        stack = bench.problem.stack
        self.bench, self.sigma, self.powers_of_two = bench, sigma, powers_of_two
        self.symmetry = rescaling_symmetry(stack.template, stack.layout)
        self.drawn: list[Rescaling] = []
        self._dead: Tensor | None = None  # [R, units]

    def draw(self, point: Point) -> Rescaling:
        """The next rescaling, at ``point``."""
        bench = self.bench
        dead = self._dead_units(point)
        before = largest_eigenvalue(bench.problem, point)
        sigma = torch.full((len(bench.problem.seeds),), self.sigma, dtype=torch.float64)
        trying = np.ones(len(sigma), dtype=bool)
        for trial in range(HALVINGS + 1):
            diagonal = self._diagonal(point, sigma, dead)
            scaled = replace(point, theta=point.theta * diagonal)
            after = largest_eigenvalue(bench.problem, scaled)
            bench.pay(EIGENVALUE_COST * trying)
            trying = trying & self._too_steep(before, after).numpy()
            if trial == 0:
                bench.pay(EIGENVALUE_COST * trying)  # now theta itself is looked at
            if trial == HALVINGS or not trying.any():
                break
            sigma = torch.where(torch.from_numpy(trying), sigma / 2, sigma)
        found = Rescaling(
            diagonal,
            sigma,
            before,
            after,
            function_change(bench, point, scaled),
            torch.linalg.vector_norm(scaled.theta.double() - point.theta.double(), dim=1),
            line_barrier(bench, point, scaled),
            dead.sum(dim=1),
        )
        self.drawn.append(found)
        return found

    def _dead_units(self, point: Point) -> Tensor:
        """Found at the first point: they get no gradient, and stay dead."""
        if self._dead is None:
            self._dead = dead_units(self.bench, self.symmetry, point)
        return self._dead

    def _diagonal(self, point: Point, sigma: Tensor, dead: Tensor) -> Tensor:
        """D [R, d]: log-normal factors; 1 for dead units."""
        factors = random_factors(
            self.bench.seeds("rescale", len(self.drawn)),
            self.symmetry.units,
            sigma=sigma,
            powers_of_two=self.powers_of_two,
        )
        return self.symmetry.diagonal(factors.masked_fill(dead.cpu(), 1.0)).to(point.theta)

    def _too_steep(self, before: Tensor, after: Tensor) -> Tensor:
        """Whether the learning rate is unstable at D theta, [R].

        Adaptive methods adapt to the gauge: their preconditioner is not known before they have made steps.
        """
        optimizer = self.bench.problem.optimizer
        if OPTIMIZERS[optimizer.name].scale != "identity":
            return torch.zeros_like(after, dtype=torch.bool)
        limit = torch.clamp(WORSE * optimizer.lr * before, min=STABLE)
        return (optimizer.lr * after >= limit).cpu()


def equivalent_rates(optimizer: OptimizerSettings, diagonal: Tensor) -> LearningRates | None:
    """The learning rates with which training at theta is training at D theta; None where there are none.

    Exact for plain, heavy-ball and Nesterov descent, weight decay included. For the others exact in the limit
    eps -> 0 and without weight decay. Adadelta and muon have no such rates.

    Args:
        optimizer: of the run.
        diagonal: D [R, d].
    """
    if optimizer.name in BY_GRADIENT:
        return LearningRates(gradient=diagonal**-2)
    return LearningRates(update=1 / diagonal) if optimizer.name in BY_UPDATE else None


def dead_units(bench: Bench, symmetry: RescalingSymmetry, point: Point) -> Tensor:
    """Hidden units that no training example makes active, [R, units] bool.

    Their outgoing weights have no gradient, whatever the loss is: here a random combination of the outputs.
    """
    problem = bench.problem
    inputs = problem.dataset.train.inputs
    weights = torch.randn(
        len(inputs),
        problem.dataset.n_outputs,
        generator=generator(0, "ensembles/dead units"),
        dtype=torch.float64,
    ).to(point.theta)
    _, gradient = problem.stack.gradients(
        point.theta, point.buffers, inputs, weights, lambda outputs, targets: (outputs * targets).mean()
    )
    bench.pay(problem.examples)
    return symmetry.outgoing_sums(gradient.square()) == 0


@torch.no_grad()
def largest_eigenvalue(problem: Problem, point: Point) -> Tensor:
    """A lower bound of the largest Hessian eigenvalue, [R] float64: Lanczos on some examples."""
    train = problem.dataset.train
    some = min(SHARPNESS_EXAMPLES, problem.examples)
    objective = StackObjective(
        problem.stack,
        point.theta.masked_fill(~point.alive[:, None], torch.nan),
        point.buffers,
        problem.loss,
        [(train.inputs[:some], train.targets[:some])],
        dtype=point.theta.dtype,
    )
    hessian = PackedHessian(objective)
    draws = [
        torch.randn(problem.stack.dim, generator=generator(seed, "ensembles/sharpness"), dtype=torch.float64)
        for seed in problem.seeds
    ]
    noise = normalize(torch.stack(draws).to(point.theta.device), dim=1)
    basis = [normalize(normalize(hessian.gradient, dim=1) + NOISE * noise, dim=1)]
    projected = torch.zeros(len(problem.seeds), LANCZOS_STEPS, LANCZOS_STEPS, dtype=torch.float64)
    for k in range(LANCZOS_STEPS):
        image = hessian.apply(basis[k].to(point.theta.dtype)).double()
        for _ in range(2):  # full reorthogonalisation, twice
            for i, vector in enumerate(basis):
                share = (vector * image).sum(dim=1)
                projected[:, i, k] += share.cpu()
                image = image - share[:, None] * vector
        basis.append(normalize(image, dim=1))
    symmetric = projected.triu() + projected.triu(1).transpose(1, 2)
    finite = torch.isfinite(symmetric).all(dim=(1, 2))
    values = torch.linalg.eigvalsh(torch.where(finite[:, None, None], symmetric, 0.0))[:, -1]
    return torch.where(finite, values, torch.nan).to(point.theta.device)


@torch.no_grad()
def function_change(bench: Bench, before: Point, after: Point) -> Tensor:
    """Largest difference of the outputs on the training examples over the largest output, [R] float64."""
    stack, inputs = bench.problem.stack, bench.problem.dataset.train.inputs
    outputs, others = (
        stack.outputs(point.theta, point.buffers, inputs).double().flatten(1) for point in (before, after)
    )
    return (outputs - others).abs().amax(dim=1) / outputs.abs().amax(dim=1).clamp(min=1e-300)


def line_barrier(bench: Bench, a: Point, b: Point) -> Tensor:
    """Largest rise of the training loss above the chord at LINE on the straight line, [R] float64; unpaid."""
    losses = {t: _loss(bench, a, b, t) for t in (0.0, *LINE, 1.0)}
    rises = [losses[t] - ((1 - t) * losses[0.0] + t * losses[1.0]) for t in LINE]
    return torch.stack([*rises, torch.zeros_like(losses[0.0])]).amax(dim=0)


def _loss(bench: Bench, a: Point, b: Point, t: float) -> Tensor:
    """The training loss at a point of the line, batch-norm statistics recomputed between the ends."""
    problem = bench.problem
    theta = torch.lerp(a.theta, b.theta, t)
    point = Point(theta, b.buffers if t == 1 else a.buffers, a.alive & b.alive)
    with bench.unpaid():
        point = point if t in (0.0, 1.0) else bench.refreshed(point)
    loss, _ = evaluate_split(problem.stack, point.theta, point.buffers, problem.loss, problem.dataset.train)
    return loss
