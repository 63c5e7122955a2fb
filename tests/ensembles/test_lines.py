"""Barriers on lines between a method's points, against `evaluate_path`."""

from dataclasses import replace

import torch

from lossray.connectivity.barriers import above_chord
from lossray.connectivity.curves import evaluate_path
from lossray.connectivity.paths import straight
from lossray.ensembles.lines import PLACES, line_barrier, pair_barriers

NORMED = {"name": "mlp", "widths": [6], "norm": "batch"}


def points_of(base_runs, bench):
    """The base, what it is retrained to, and its mirror image, which has another loss."""
    base = bench.base()
    return [base, bench.retrain(base, 6, cycle=0), replace(base, theta=-base.theta)]


def test_a_barrier_is_that_of_the_straight_path(make_problem, bench_of):
    for base_runs in (make_problem(), make_problem(NORMED)):
        points = points_of(base_runs, bench_of(base_runs))
        train = base_runs.dataset.train
        ts = [0.0, *PLACES, 1.0]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            a, b = points[i], points[j]
            found = line_barrier(base_runs, a, b, train)
            path = straight(a.theta, b.theta)
            ends = (a.buffers, b.buffers)  # recomputed as between: a barrier compares like with like
            loss = evaluate_path(
                path, base_runs.stack, *ends, base_runs.loss, base_runs.dataset, ts, alike=True
            )
            for r, own in enumerate(loss["train_loss"]):
                expected = above_chord(torch.tensor(ts, dtype=torch.float64), own)
                torch.testing.assert_close(float(found[r]), expected, rtol=1e-9, atol=1e-12)


def test_pairs_are_lines_in_the_order_of_combinations(base_runs, bench_of):
    points = points_of(base_runs, bench_of(base_runs))
    train = base_runs.dataset.train
    found = pair_barriers(base_runs, points, train)
    for n, (i, j) in enumerate(((0, 1), (0, 2), (1, 2))):
        assert torch.equal(found[:, n], line_barrier(base_runs, points[i], points[j], train))


def test_the_barrier_between_mirror_images_is_known(base_runs, bench_of):
    """Half-way all weights are 0, and so are the outputs: the loss -|f|^2 has its maximum there."""
    hollow = replace(base_runs, loss=lambda outputs, targets: -outputs.square().sum(dim=-1).mean())
    base = bench_of(base_runs).base()
    mirrored = replace(base, theta=-base.theta)
    train = base_runs.dataset.train
    ends = [-outputs_of_train(base_runs, point).square().sum(dim=2).mean(dim=1) for point in (base, mirrored)]
    found = line_barrier(hollow, base, mirrored, train)
    assert (found >= -(ends[0] + ends[1]) / 2 - 1e-12).all()
    assert (found > 0.01).all()
    assert (line_barrier(hollow, base, base, train) < 1e-12).all()


def outputs_of_train(base_runs, point):
    return base_runs.stack.outputs(point.theta, point.buffers, base_runs.dataset.train.inputs)
