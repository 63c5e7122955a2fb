"""What several ensemble methods do: chains of retrainings, members on a path."""

from collections.abc import Callable
from dataclasses import dataclass

from lossray.connectivity.paths import Path
from lossray.ensembles.bench import Array, Bench, PackedWeights
from lossray.ensembles.budget import Budget
from lossray.ensembles.rescaling import Gauges, Rescaling, equivalent_rates
from lossray.training.steps import LearningRates

COMPANION_SHARE = 0.75  # of the extra budget that goes into another run, to which a curve then leads


@dataclass(frozen=True)
class EnsembleMembers:
    """An ensemble for each base run, and what it has cost.

    Attributes:
        points: the members, in the order in which they would be added.
        costs: gradients of single examples that the first 1, 2, ... members take, of each base run, [R].
        rescalings: what the method has rescaled by, in order.
    """

    points: tuple[PackedWeights, ...]
    costs: tuple[Array, ...]
    rescalings: tuple[Rescaling, ...] = ()


@dataclass(frozen=True)
class Options:
    """What of [ensembles] the methods read.

    Attributes:
        sigma: standard deviation of the logarithm of the units' factors.
        powers_of_two: whether factors are rounded to powers of two.
    """

    sigma: float
    powers_of_two: bool


def gauges_of(bench: Bench, options: Options) -> Gauges:
    """Where a method takes its rescalings from."""
    return Gauges(bench, sigma=options.sigma, powers_of_two=options.powers_of_two)


def rates_of(bench: Bench, rescaling: Rescaling) -> LearningRates:
    """The learning rates that equal a rescaling."""
    optimizer = bench.base_runs.optimizer
    rates = equivalent_rates(optimizer, rescaling.diagonal)
    assert rates is not None  # see Method.needs
    return rates


def chain(
    bench: Bench,
    cycles: int,
    step: Callable[[PackedWeights, int], PackedWeights],
    base: PackedWeights | None = None,
) -> tuple[tuple[PackedWeights, ...], tuple[Array, ...]]:
    """The base, and what ``step`` makes of each member in turn."""
    points = [base or bench.base()]
    costs = [bench.spent]
    for k in range(cycles):
        points.append(step(points[-1], k))
        costs.append(bench.spent)
    return tuple(points), tuple(costs)


def half(bench: Bench) -> int:
    """Half of the extra steps: for the end of a curve, where the rest is for the curve."""
    return max(1, bench.budget.extra_steps // 2)


def companion_steps(budget: Budget) -> int:
    """Of a run of its own, to which a curve leads."""
    return max(1, min(budget.run_steps, round(COMPANION_SHARE * budget.extra_steps)))


def curve_steps(budget: Budget) -> int:
    """What a companion leaves."""
    return max(1, budget.extra_steps - companion_steps(budget))


def on_a_curve(bench: Bench, a: PackedWeights, b: PackedWeights, steps: int | None = None) -> EnsembleMembers:
    """Members on a curve that is trained with half of the extra steps by default."""
    path = bench.curve(a, b, max(1, bench.budget.extra_steps - half(bench)) if steps is None else steps)
    points, costs = along(bench, path, a, b)
    return EnsembleMembers(points, costs)


def along(
    bench: Bench, path: Path, a: PackedWeights, b: PackedWeights
) -> tuple[tuple[PackedWeights, ...], tuple[Array, ...]]:
    """Members at evenly spaced places of a path, the ends first."""
    points, costs = [], []
    for t in spread(bench.budget.size):
        points.append(bench.on_path(path, a, b, t))
        costs.append(bench.spent)
    return tuple(points), tuple(costs)


def spread(count: int) -> list[float]:
    """Places on a path in an order in which any first few are spread out: 0, 1, then ever finer halves."""
    grid = [k / (count - 1) for k in range(count)] if count > 1 else [0.0]
    chosen = [grid[0], *grid[-1:]][:count]
    while len(chosen) < count:
        rest = [t for t in grid if t not in chosen]
        chosen.append(max(rest, key=lambda t: (min(abs(t - other) for other in chosen), -t)))
    return chosen
