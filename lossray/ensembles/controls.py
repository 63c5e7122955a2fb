"""The controls: what else the budget of a rescaled ensemble would buy (theory 5C)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lossray.ensembles.averages import averaged, gaussian_samples
from lossray.ensembles.bench import Bench, PackedWeights
from lossray.ensembles.recipes import (
    EnsembleMembers,
    Options,
    chain,
    companion_steps,
    curve_steps,
    gauges_of,
    half,
    on_a_curve,
    rates_of,
)
from lossray.ensembles.simplex import grow, uniform_shares
from lossray.seeds import generator

LOWEST_RATE = 0.01  # of FGE's triangles, in those of the run
AVERAGED_RATE = 0.5  # SWA's constant learning rate, likewise
AVERAGES_PER_CYCLE = 5
VERTICES = 3  # of a simplex


def snapshot(bench: Bench, options: Options) -> EnsembleMembers:
    """C1 without rescaling: a cosine cycle after the other (Snapshot Ensembles, 1704.00109)."""
    points, costs = chain(
        bench, bench.budget.cycles, lambda point, k: bench.retrain(point, bench.budget.cycle_steps, cycle=k)
    )
    return EnsembleMembers(points, costs)


def lr_equivalent(bench: Bench, options: Options) -> EnsembleMembers:
    """C1 with learning rates parameter by parameter in place of rescaling (theory 2.5)."""
    gauges = gauges_of(bench, options)

    def step(point: PackedWeights, k: int) -> PackedWeights:
        rates = rates_of(bench, gauges.draw(point))
        return bench.retrain(point, bench.budget.cycle_steps, cycle=k, rates=rates)

    points, costs = chain(bench, bench.budget.cycles, step)
    return EnsembleMembers(points, costs, tuple(gauges.drawn))


def fge(bench: Bench, options: Options) -> EnsembleMembers:
    """Fast geometric ensembling (1802.10026): triangular learning rates, a member at each minimum."""
    base, before = bench.base(), bench.spent
    high = bench.base_runs.optimizer.lr
    half = bench.budget.cycle_steps // 2
    period = max(1, 2 * half)  # a cycle of one step has no triangle

    def rate(step: int) -> float:
        height = abs((step % period) / half - 1) if half else 1.0  # 1 at the ends of a cycle, 0 in its middle
        return high * (LOWEST_RATE + (1 - LOWEST_RATE) * height)

    # The step at the lowest rate is made.
    captures = [half + 1 + period * k for k in range(bench.budget.cycles)]
    points = bench.course(base, bench.budget.extra_steps, captures, rate=rate)
    costs = [before + steps * bench.base_runs.batch for steps in captures]
    return EnsembleMembers((base, *points), (before, *costs))


def perturbed(bench: Bench, options: Options) -> EnsembleMembers:
    """C1 with a random displacement as long as D theta - theta at the base in place of the rescaling."""
    gauges = gauges_of(bench, options)
    base = bench.base()

    def step(point: PackedWeights, k: int) -> PackedWeights:
        moved = _displaced(bench, point, gauges.draw(base).distance, k)
        return bench.retrain(moved, bench.budget.cycle_steps, cycle=k)

    points, costs = chain(bench, bench.budget.cycles, step, base)
    return EnsembleMembers(points, costs, tuple(gauges.drawn))


def curve(bench: Bench, options: Options) -> EnsembleMembers:
    """C3 to a retrained copy without rescaling."""
    base = bench.base()
    return on_a_curve(bench, base, bench.retrain(base, half(bench), cycle=0))


def curve_lr_equivalent(bench: Bench, options: Options) -> EnsembleMembers:
    """C3 to a copy retrained with the equivalent learning rates."""
    base, gauges = bench.base(), gauges_of(bench, options)
    rates = rates_of(bench, gauges.draw(base))
    end = bench.retrain(base, half(bench), cycle=0, rates=rates)
    return replace(on_a_curve(bench, base, end), rescalings=tuple(gauges.drawn))


def curve_seeds(bench: Bench, options: Options) -> EnsembleMembers:
    """C5 without alignment."""
    base, companion = bench.base(), bench.fresh_runs("companion", 1, companion_steps(bench.budget))
    return on_a_curve(bench, base, companion, curve_steps(bench.budget))


def long_run(bench: Bench, options: Options) -> EnsembleMembers:
    """One run from the same initialisation with all steps: one member."""
    steps = bench.budget.total_steps
    return EnsembleMembers((bench.fresh_runs("", 0, steps),), (bench.spent,))


def swa(bench: Bench, options: Options) -> EnsembleMembers:
    """Stochastic weight averaging (1803.05407): one member."""
    points = _iterates(bench)
    return EnsembleMembers((bench.refreshed(averaged(points)),), (bench.spent,))


def swag(bench: Bench, options: Options) -> EnsembleMembers:
    """Draws from SWA-Gaussian (1902.02476)."""
    points = _iterates(bench)
    drawn = gaussian_samples(points, bench.base_runs.seeds, bench.budget.size)
    members, costs = [], []
    for point in drawn:
        members.append(bench.refreshed(point))
        costs.append(bench.spent)
    return EnsembleMembers(tuple(members), tuple(costs))


def simplex(bench: Bench, options: Options) -> EnsembleMembers:
    """A low-loss simplex of three vertices (2102.13042): they, and uniform draws from it."""
    vertices = [bench.base()]
    for _ in range(1, VERTICES):
        vertices.append(grow(bench, vertices, max(1, bench.budget.extra_steps // (VERTICES - 1))))
    healthy = torch.stack([vertex.alive for vertex in vertices]).all(dim=0)
    corners = torch.stack([vertex.theta for vertex in vertices])
    points = [vertices[0], *(bench.refreshed(vertex) for vertex in vertices[1:])][: bench.budget.size]
    for k in range(len(points), bench.budget.size):
        shares = uniform_shares(bench.base_runs.seeds, VERTICES, 0, k).to(corners)
        theta = torch.einsum("vrd,rv->rd", corners, shares)
        points.append(bench.refreshed(replace(vertices[0], theta=theta)))
    return EnsembleMembers(tuple(point.where(healthy) for point in points), (bench.spent,) * len(points))


def deep_ensemble(bench: Bench, options: Options) -> EnsembleMembers:
    """As many independent runs as the others have members, each in full: more than the budget."""
    return _independent(bench, bench.budget.size, bench.base_runs.training.steps)


def deep_ensemble_equal_total(bench: Bench, options: Options) -> EnsembleMembers:
    """As many independent runs as the others have members, which share the budget."""
    total = bench.budget.total_steps
    return _independent(bench, bench.budget.size, max(1, total // bench.budget.size))


def independent(bench: Bench, options: Options) -> EnsembleMembers:
    """As many independent runs as the budget holds in full, which share all of it."""
    count = max(1, int(bench.budget.trainings))
    return _independent(bench, count, bench.budget.total_steps // count)


def _displaced(bench: Bench, point: PackedWeights, distance: Tensor, number: int) -> PackedWeights:
    """Moved by a distance [R] in a random direction."""
    draws = [generator(seed, "ensembles/perturbation", number) for seed in bench.base_runs.seeds]
    dim = point.theta.shape[1]
    noise = torch.stack(
        [torch.randn(dim, generator=draw, device="cpu", dtype=torch.float64) for draw in draws]
    )
    noise = torch.nn.functional.normalize(noise.to(distance.device), dim=1) * distance[:, None]
    return replace(point, theta=point.theta + noise.to(point.theta.dtype))


def _iterates(bench: Bench) -> Sequence[PackedWeights]:
    """Points along a training with a constant learning rate, several a cycle."""
    base = bench.base()
    every = max(1, bench.budget.cycle_steps // AVERAGES_PER_CYCLE)
    captures = list(range(every, bench.budget.extra_steps + 1, every)) or [bench.budget.extra_steps]
    rate = AVERAGED_RATE * bench.base_runs.optimizer.lr
    return bench.course(base, bench.budget.extra_steps, captures, rate=lambda step: rate)


def _independent(bench: Bench, count: int, steps: int) -> EnsembleMembers:
    """The base run's own initialisation and others, each trained for ``steps`` under the run's schedule."""
    points, costs = [], []
    for k in range(count):
        points.append(bench.fresh_runs("companion" if k else "", k, steps))
        costs.append(bench.spent)
    return EnsembleMembers(tuple(points), tuple(costs))
