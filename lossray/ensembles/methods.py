"""The ensemble methods by name: the variants of the paper's claim C, and the controls (SCIENCE 5C).

Each is a function of a bench, which holds the base runs and the budget. Its ensembles have one member for
each cycle that the budget holds, and the base; other sizes are said below. A new method is one function and
one entry of METHODS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from lossray.connectivity.alignment import aligned
from lossray.connectivity.paths import Path
from lossray.ensembles.averages import averaged, gaussian_samples
from lossray.ensembles.bench import Array, Bench, Point, Problem
from lossray.ensembles.budget import Budget
from lossray.ensembles.rescaling import Gauges, Rescaling, equivalent_rates
from lossray.ensembles.simplex import grow, uniform_shares
from lossray.errors import ModelError
from lossray.networks.layout import tensors_of, uncompiled
from lossray.networks.permutations import permutation_symmetry
from lossray.networks.symmetry import rescaling_symmetry
from lossray.seeds import generator
from lossray.training.steps import LearningRates

LOWEST_RATE = 0.01  # of FGE's triangles, in those of the run
AVERAGED_RATE = 0.5  # SWA's constant learning rate, likewise
AVERAGES_PER_CYCLE = 5
COMPANION_SHARE = 0.75  # of the extra budget that goes into another run, to which a curve then leads
VERTICES = 3  # of a simplex


@dataclass(frozen=True)
class Members:
    """An ensemble for each base run, and what it has cost.

    Attributes:
        points: the members, in the order in which they would be added.
        costs: gradients of single examples that the first 1, 2, ... members take, of each base run, [R].
        rescalings: what the method has rescaled by, in order.
    """

    points: tuple[Point, ...]
    costs: tuple[Array, ...]
    rescalings: tuple[Rescaling, ...] = ()


@dataclass(frozen=True)
class Options:
    """What of [ensembles] the methods read."""

    sigma: float
    powers_of_two: bool


@dataclass(frozen=True)
class Method:
    """One entry of METHODS.

    Attributes:
        build: makes the members.
        role: a variant of the paper's method, or a control.
        words: what it does.
        steps: of training beyond the base runs, by the budget.
        needs: "rescaling", a ReLU network whose units can be rescaled; "rates", also an optimizer with
            learning rates that equal a rescaling; "alignment", units that can be permuted or rescaled.
    """

    build: Callable[[Bench, Options], Members]
    role: Literal["variant", "control"]
    words: str
    steps: Callable[[Budget], int] = lambda budget: budget.extra_steps
    needs: Literal["rescaling", "rates", "alignment"] | None = None

    def refusal(self, problem: Problem) -> str | None:
        """Why the method cannot be applied to these runs; None where it can."""
        model, optimizer = problem.stack.template, problem.optimizer
        if self.needs is not None:
            try:
                rescaling_symmetry(model, problem.stack.layout)
            except ModelError as error:
                if self.needs != "alignment" or not _can_be_permuted(model):
                    return str(error)
        if self.needs == "rates" and equivalent_rates(optimizer, torch.ones(1)) is None:
            return f"optimizer {optimizer.name!r}: no learning rates are equal to a rescaling"
        return None


# ---- variants


def rescaled_copies(bench: Bench, options: Options) -> Members:
    """C0: the base in other gauges. The same function again and again: a test of the software."""
    base, gauges = bench.base(), _gauges(bench, options)
    points, costs = [base], [bench.spent]
    for _ in range(bench.budget.cycles):
        points.append(gauges.draw(base).apply(base))
        costs.append(bench.spent)
    return Members(tuple(points), tuple(costs), tuple(gauges.drawn))


def rescale_retrain(bench: Bench, options: Options) -> Members:
    """C1: rescale, retrain one cycle, go back to the base's gauge; again from there."""
    gauges = _gauges(bench, options)
    points, costs = _chain(
        bench, bench.budget.cycles, lambda point, k: _retrained(bench, gauges.draw(point), point, k)
    )
    return Members(points, costs, tuple(gauges.drawn))


def points_geometric(bench: Bench, options: Options) -> Members:
    """C2 along D^t theta, on which the function stays the same."""
    base, gauges = bench.base(), _gauges(bench, options)
    diagonal = gauges.draw(base).diagonal.double()
    times = spread(bench.budget.size)
    points = [replace(base, theta=(base.theta.double() * diagonal**t).to(base.theta.dtype)) for t in times]
    return Members(tuple(points), (bench.spent,) * len(points), tuple(gauges.drawn))


def points_line(bench: Bench, options: Options) -> Members:
    """C2 along the straight line from theta to D theta."""
    base, gauges = bench.base(), _gauges(bench, options)
    scaled = gauges.draw(base).apply(base)
    line = Path("line", torch.stack([base.theta, scaled.theta]))
    points, costs = _along(bench, line, base, scaled)
    return Members(points, costs, tuple(gauges.drawn))


def rescale_curve(bench: Bench, options: Options) -> Members:
    """C3: rescale, polish (half of the extra steps), join theta and polished D theta by a trained curve."""
    base, gauges = bench.base(), _gauges(bench, options)
    end = bench.retrain(gauges.draw(base).apply(base), _half(bench), cycle=0)
    return replace(_curve(bench, base, end), rescalings=tuple(gauges.drawn))


def rescale_retrain_curve(bench: Bench, options: Options) -> Members:
    """C4: C1 with half of the cycles, and a curve through each pair of neighbours with the other half."""
    gauges = _gauges(bench, options)
    chain = max(1, bench.budget.cycles // 2)
    steps = min(bench.budget.cycle_steps, max(1, bench.budget.extra_steps // (2 * chain)))
    points, costs = _chain(
        bench, chain, lambda point, k: _retrained(bench, gauges.draw(point), point, k, steps)
    )
    middles, later = [], []
    for k, (a, b) in enumerate(pairwise(points)):
        path = bench.curve(a, b, steps, cycle=k)
        middles.append(bench.on_path(path, a, b, 0.5))
        later.append(bench.spent)
    return Members((*points, *middles), (*costs, *later), tuple(gauges.drawn))


def align_curve(bench: Bench, options: Options) -> Members:
    """C5: another run, aligned with the base (permutation and scale); a trained curve between them."""
    base, companion = bench.base(), bench.fresh_runs("companion", 1, _companion_steps(bench.budget))
    return _curve(bench, base, _aligned(bench, companion, base), _curve_steps(bench.budget))


# ---- controls


def snapshot(bench: Bench, options: Options) -> Members:
    """C1 without rescaling: a cosine cycle after the other (Snapshot Ensembles, 1704.00109)."""
    points, costs = _chain(
        bench, bench.budget.cycles, lambda point, k: bench.retrain(point, bench.budget.cycle_steps, cycle=k)
    )
    return Members(points, costs)


def lr_equivalent(bench: Bench, options: Options) -> Members:
    """C1 with learning rates parameter by parameter in place of rescaling (SCIENCE 2.5)."""
    gauges = _gauges(bench, options)

    def step(point: Point, k: int) -> Point:
        rates = _rates(bench, gauges.draw(point))
        return bench.retrain(point, bench.budget.cycle_steps, cycle=k, rates=rates)

    points, costs = _chain(bench, bench.budget.cycles, step)
    return Members(points, costs, tuple(gauges.drawn))


def fge(bench: Bench, options: Options) -> Members:
    """Fast geometric ensembling (1802.10026): triangular learning rates, a member at each minimum."""
    base, before = bench.base(), bench.spent
    high = bench.problem.optimizer.lr
    half = bench.budget.cycle_steps // 2
    period = max(1, 2 * half)  # a cycle of one step has no triangle

    def rate(step: int) -> float:
        place = abs((step % period) / half - 1) if half else 1.0  # 1 at the ends of a cycle, 0 in its middle
        return high * (LOWEST_RATE + (1 - LOWEST_RATE) * place)

    # The step at the lowest rate is made.
    captures = [half + 1 + period * k for k in range(bench.budget.cycles)]
    points = bench.course(base, bench.budget.extra_steps, captures, rate=rate)
    costs = [before + steps * bench.problem.batch for steps in captures]
    return Members((base, *points), (before, *costs))


def perturbed(bench: Bench, options: Options) -> Members:
    """C1 with a random displacement as long as D theta - theta at the base in place of the rescaling."""
    gauges = _gauges(bench, options)
    base = bench.base()

    def step(point: Point, k: int) -> Point:
        moved = _displaced(bench, point, gauges.draw(base).distance, k)
        return bench.retrain(moved, bench.budget.cycle_steps, cycle=k)

    points, costs = _chain(bench, bench.budget.cycles, step, base)
    return Members(points, costs, tuple(gauges.drawn))


def curve(bench: Bench, options: Options) -> Members:
    """C3 to a retrained copy without rescaling."""
    base = bench.base()
    return _curve(bench, base, bench.retrain(base, _half(bench), cycle=0))


def curve_lr_equivalent(bench: Bench, options: Options) -> Members:
    """C3 to a copy retrained with the equivalent learning rates."""
    base, gauges = bench.base(), _gauges(bench, options)
    rates = _rates(bench, gauges.draw(base))
    end = bench.retrain(base, _half(bench), cycle=0, rates=rates)
    return replace(_curve(bench, base, end), rescalings=tuple(gauges.drawn))


def curve_seeds(bench: Bench, options: Options) -> Members:
    """C5 without alignment."""
    base, companion = bench.base(), bench.fresh_runs("companion", 1, _companion_steps(bench.budget))
    return _curve(bench, base, companion, _curve_steps(bench.budget))


def long_run(bench: Bench, options: Options) -> Members:
    """One run from the same initialisation with all steps: one member."""
    steps = bench.budget.total_steps
    return Members((bench.fresh_runs("", 0, steps),), (bench.spent,))


def swa(bench: Bench, options: Options) -> Members:
    """Stochastic weight averaging (1803.05407): one member."""
    points = _iterates(bench)
    return Members((bench.refreshed(averaged(points)),), (bench.spent,))


def swag(bench: Bench, options: Options) -> Members:
    """Draws from SWA-Gaussian (1902.02476)."""
    points = _iterates(bench)
    drawn = gaussian_samples(points, bench.problem.seeds, bench.budget.size)
    found, costs = [], []
    for point in drawn:
        found.append(bench.refreshed(point))
        costs.append(bench.spent)
    return Members(tuple(found), tuple(costs))


def simplex(bench: Bench, options: Options) -> Members:
    """A low-loss simplex of three vertices (2102.13042): they, and uniform draws from it."""
    vertices = [bench.base()]
    for _ in range(1, VERTICES):
        vertices.append(grow(bench, vertices, max(1, bench.budget.extra_steps // (VERTICES - 1))))
    healthy = torch.stack([vertex.alive for vertex in vertices]).all(dim=0)
    corners = torch.stack([vertex.theta for vertex in vertices])
    points = [vertices[0], *(bench.refreshed(vertex) for vertex in vertices[1:])][: bench.budget.size]
    for k in range(len(points), bench.budget.size):
        shares = uniform_shares(bench.problem.seeds, VERTICES, 0, k).to(corners)
        theta = torch.einsum("vrd,rv->rd", corners, shares)
        points.append(bench.refreshed(replace(vertices[0], theta=theta)))
    return Members(tuple(point.where(healthy) for point in points), (bench.spent,) * len(points))


def deep_ensemble(bench: Bench, options: Options) -> Members:
    """As many independent runs as the others have members, each in full: more than the budget."""
    return _independent(bench, bench.budget.size, bench.problem.training.steps)


def deep_ensemble_equal_total(bench: Bench, options: Options) -> Members:
    """As many independent runs as the others have members, which share the budget."""
    total = bench.budget.total_steps
    return _independent(bench, bench.budget.size, max(1, total // bench.budget.size))


def independent(bench: Bench, options: Options) -> Members:
    """As many independent runs as the budget holds in full, which share all of it."""
    count = max(1, int(bench.budget.trainings))
    return _independent(bench, count, bench.budget.total_steps // count)


def _none(budget: Budget) -> int:
    return 0


def _all(budget: Budget) -> int:
    return budget.total_steps


def _full(budget: Budget) -> int:
    return budget.size * budget.run_steps


METHODS: dict[str, Method] = {
    "rescaled_copies": Method(
        rescaled_copies, "variant", "C0: rescaled copies of the base", _none, needs="rescaling"
    ),
    "rescale_retrain": Method(
        rescale_retrain, "variant", "C1: rescale and retrain, again and again", needs="rescaling"
    ),
    "points_geometric": Method(
        points_geometric, "variant", "C2: points on D^t theta", _none, needs="rescaling"
    ),
    "points_line": Method(
        points_line, "variant", "C2: points on the line from theta to D theta", _none, needs="rescaling"
    ),
    "rescale_curve": Method(
        rescale_curve, "variant", "C3: a trained curve from theta to polished D theta", needs="rescaling"
    ),
    "rescale_retrain_curve": Method(
        rescale_retrain_curve, "variant", "C4: C1, and curves between neighbours", needs="rescaling"
    ),
    "align_curve": Method(
        align_curve, "variant", "C5: a trained curve to another run, aligned", needs="alignment"
    ),
    "snapshot": Method(snapshot, "control", "C1's schedule without rescaling"),
    "lr_equivalent": Method(
        lr_equivalent, "control", "C1's schedule with learning rates eta D^-2", needs="rates"
    ),
    "perturbed": Method(
        perturbed, "control", "C1's schedule after random displacements of the same length", needs="rescaling"
    ),
    "curve": Method(curve, "control", "C3 without rescaling"),
    "curve_lr_equivalent": Method(
        curve_lr_equivalent, "control", "C3 with learning rates eta D^-2", needs="rates"
    ),
    "curve_seeds": Method(curve_seeds, "control", "C5 without alignment"),
    "fge": Method(fge, "control", "fast geometric ensembling"),
    "long_run": Method(long_run, "control", "one run with all steps", _all),
    "swa": Method(swa, "control", "stochastic weight averaging"),
    "swag": Method(swag, "control", "draws from SWA-Gaussian"),
    "simplex": Method(simplex, "control", "draws from a low-loss simplex (ESPRO)"),
    "independent": Method(independent, "control", "as many full runs as the budget holds", _all),
    "deep_ensemble": Method(deep_ensemble, "control", "as many full runs as the others have members", _full),
    "deep_ensemble_equal_total": Method(
        deep_ensemble_equal_total,
        "control",
        "as many runs as the others have members, which share the budget",
        _all,
    ),
}


# ---- what several have in common


def spread(count: int) -> list[float]:
    """Places on a path in an order in which any first few are spread out: 0, 1, then ever finer halves."""
    grid = [k / (count - 1) for k in range(count)] if count > 1 else [0.0]
    chosen = [grid[0], *grid[-1:]][:count]
    while len(chosen) < count:
        rest = [t for t in grid if t not in chosen]
        chosen.append(max(rest, key=lambda t: (min(abs(t - other) for other in chosen), -t)))
    return chosen


def _gauges(bench: Bench, options: Options) -> Gauges:
    return Gauges(bench, sigma=options.sigma, powers_of_two=options.powers_of_two)


def _rates(bench: Bench, rescaling: Rescaling) -> LearningRates:
    optimizer = bench.problem.optimizer
    rates = equivalent_rates(optimizer, rescaling.diagonal)
    assert rates is not None  # see Method.needs
    return rates


def _can_be_permuted(model: nn.Module) -> bool:
    try:
        permutation_symmetry(uncompiled(model))
    except ModelError:
        return False
    return True


def _retrained(
    bench: Bench, rescaling: Rescaling, point: Point, cycle: int, steps: int | None = None
) -> Point:
    """One cycle in another gauge, and back; of the budget's length by default."""
    steps = bench.budget.cycle_steps if steps is None else steps
    return rescaling.undo(bench.retrain(rescaling.apply(point), steps, cycle=cycle))


def _chain(
    bench: Bench, cycles: int, step: Callable[[Point, int], Point], base: Point | None = None
) -> tuple[tuple[Point, ...], tuple[Array, ...]]:
    """The base, and what ``step`` makes of each member in turn."""
    points = [base or bench.base()]
    costs = [bench.spent]
    for k in range(cycles):
        points.append(step(points[-1], k))
        costs.append(bench.spent)
    return tuple(points), tuple(costs)


def _displaced(bench: Bench, point: Point, distance: Tensor, number: int) -> Point:
    """Moved by a distance [R] in a random direction."""
    draws = [generator(seed, "ensembles/perturbation", number) for seed in bench.problem.seeds]
    dim = point.theta.shape[1]
    noise = torch.stack([torch.randn(dim, generator=draw, dtype=torch.float64) for draw in draws])
    noise = torch.nn.functional.normalize(noise.to(distance.device), dim=1) * distance[:, None]
    return replace(point, theta=point.theta + noise.to(point.theta.dtype))


def _half(bench: Bench) -> int:
    return max(1, bench.budget.extra_steps // 2)


def _companion_steps(budget: Budget) -> int:
    return max(1, min(budget.run_steps, round(COMPANION_SHARE * budget.extra_steps)))


def _curve_steps(budget: Budget) -> int:
    """What a companion leaves."""
    return max(1, budget.extra_steps - _companion_steps(budget))


def _curve(bench: Bench, a: Point, b: Point, steps: int | None = None) -> Members:
    """Members on a curve that is trained with half of the extra steps by default."""
    path = bench.curve(a, b, max(1, bench.budget.extra_steps - _half(bench)) if steps is None else steps)
    points, costs = _along(bench, path, a, b)
    return Members(points, costs)


def _along(bench: Bench, path: Path, a: Point, b: Point) -> tuple[tuple[Point, ...], tuple[Array, ...]]:
    """Members at evenly spaced places of a path, the ends first."""
    points, costs = [], []
    for t in spread(bench.budget.size):
        points.append(bench.on_path(path, a, b, t))
        costs.append(bench.spent)
    return tuple(points), tuple(costs)


def _aligned(bench: Bench, points: Point, to: Point) -> Point:
    """Permutation and scale of each run's point to another; the same functions."""
    rows, buffers = [], []
    for r in range(len(points.theta)):
        if not bool(points.alive[r] & to.alive[r]):
            rows.append(points.theta[r])
            buffers.append({name: tensor[r] for name, tensor in points.buffers.items()})
            continue
        model = aligned(bench.module(points, r), bench.module(to, r)).model
        parameters, others = tensors_of(model)
        rows.append(torch.cat([tensor.reshape(-1) for tensor in parameters.values()]).to(points.theta))
        buffers.append(others)
    stacked = {
        name: torch.stack([own[name].to(tensor) for own in buffers])
        for name, tensor in points.buffers.items()
    }
    return Point(torch.stack(rows), stacked, points.alive)


def _iterates(bench: Bench) -> Sequence[Point]:
    """Points along a training with a constant learning rate, several a cycle."""
    base = bench.base()
    every = max(1, bench.budget.cycle_steps // AVERAGES_PER_CYCLE)
    captures = list(range(every, bench.budget.extra_steps + 1, every)) or [bench.budget.extra_steps]
    rate = AVERAGED_RATE * bench.problem.optimizer.lr
    return bench.course(base, bench.budget.extra_steps, captures, rate=lambda step: rate)


def _independent(bench: Bench, count: int, steps: int) -> Members:
    """The base run's own initialisation and others, each trained for ``steps`` under the run's schedule."""
    points, costs = [], []
    for k in range(count):
        points.append(bench.fresh_runs("companion" if k else "", k, steps))
        costs.append(bench.spent)
    return Members(tuple(points), tuple(costs))
