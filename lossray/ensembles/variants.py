"""The variants of the paper's ensemble, C0 to C5 (theory 5C)."""

from dataclasses import replace
from itertools import pairwise

import torch

from lossray.connectivity.packed_align import packed_align
from lossray.connectivity.paths import Path
from lossray.ensembles.bench import Bench, PackedWeights
from lossray.ensembles.recipes import (
    EnsembleMembers,
    Options,
    along,
    chain,
    companion_steps,
    curve_steps,
    gauges_of,
    half,
    on_a_curve,
    spread,
)
from lossray.ensembles.rescaling import Rescaling


def rescaled_copies(bench: Bench, options: Options) -> EnsembleMembers:
    """C0: the base in other gauges. The same function again and again: a test of the software."""
    base, gauges = bench.base(), gauges_of(bench, options)
    points, costs = [base], [bench.spent]
    for _ in range(bench.budget.cycles):
        points.append(gauges.draw(base).apply(base))
        costs.append(bench.spent)
    return EnsembleMembers(tuple(points), tuple(costs), tuple(gauges.drawn))


def rescale_retrain(bench: Bench, options: Options) -> EnsembleMembers:
    """C1: rescale, retrain one cycle, go back to the base's gauge; again from there."""
    gauges = gauges_of(bench, options)
    points, costs = chain(
        bench, bench.budget.cycles, lambda point, k: _retrained(bench, gauges.draw(point), point, k)
    )
    return EnsembleMembers(points, costs, tuple(gauges.drawn))


def points_geometric(bench: Bench, options: Options) -> EnsembleMembers:
    """C2 along D^t theta, on which the function stays the same."""
    base, gauges = bench.base(), gauges_of(bench, options)
    diagonal = gauges.draw(base).diagonal.double()
    times = spread(bench.budget.size)
    points = [replace(base, theta=(base.theta.double() * diagonal**t).to(base.theta.dtype)) for t in times]
    return EnsembleMembers(tuple(points), (bench.spent,) * len(points), tuple(gauges.drawn))


def points_line(bench: Bench, options: Options) -> EnsembleMembers:
    """C2 along the straight line from theta to D theta."""
    base, gauges = bench.base(), gauges_of(bench, options)
    scaled = gauges.draw(base).apply(base)
    line = Path("line", torch.stack([base.theta, scaled.theta]))
    points, costs = along(bench, line, base, scaled)
    return EnsembleMembers(points, costs, tuple(gauges.drawn))


def rescale_curve(bench: Bench, options: Options) -> EnsembleMembers:
    """C3: rescale, polish (half of the extra steps), join theta and polished D theta by a trained curve."""
    base, gauges = bench.base(), gauges_of(bench, options)
    end = bench.retrain(gauges.draw(base).apply(base), half(bench), cycle=0)
    return replace(on_a_curve(bench, base, end), rescalings=tuple(gauges.drawn))


def rescale_retrain_curve(bench: Bench, options: Options) -> EnsembleMembers:
    """C4: C1 with half of the cycles, and a curve through each pair of neighbours with the other half."""
    gauges = gauges_of(bench, options)
    links = max(1, bench.budget.cycles // 2)
    steps = min(bench.budget.cycle_steps, max(1, bench.budget.extra_steps // (2 * links)))
    points, costs = chain(
        bench, links, lambda point, k: _retrained(bench, gauges.draw(point), point, k, steps)
    )
    middles, later = [], []
    for k, (a, b) in enumerate(pairwise(points)):
        path = bench.curve(a, b, steps, cycle=k)
        middles.append(bench.on_path(path, a, b, 0.5))
        later.append(bench.spent)
    return EnsembleMembers((*points, *middles), (*costs, *later), tuple(gauges.drawn))


def align_curve(bench: Bench, options: Options) -> EnsembleMembers:
    """C5: another run, aligned with the base (permutation and scale); a trained curve between them."""
    base, companion = bench.base(), bench.fresh_runs("companion", 1, companion_steps(bench.budget))
    return on_a_curve(bench, base, _aligned(bench, companion, base), curve_steps(bench.budget))


def _retrained(
    bench: Bench, rescaling: Rescaling, point: PackedWeights, cycle: int, steps: int | None = None
) -> PackedWeights:
    """One cycle in another gauge, and back; of the budget's length by default."""
    steps = bench.budget.cycle_steps if steps is None else steps
    return rescaling.undo(bench.retrain(rescaling.apply(point), steps, cycle=cycle))


def _aligned(bench: Bench, points: PackedWeights, to: PackedWeights) -> PackedWeights:
    """Permutation and scale of each run's point to another; the same functions."""
    base_runs = bench.base_runs
    alignment = packed_align(
        base_runs.stack,
        (points.theta, points.buffers),
        (to.theta, to.buffers),
        base_runs.dataset.train.inputs,
        alive=points.alive & to.alive,
    )
    return PackedWeights(alignment.theta, alignment.buffers, points.alive)
