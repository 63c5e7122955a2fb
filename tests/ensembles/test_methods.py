"""The methods: what their members are, and what they cost."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lossray.ensembles.averages import averaged, gaussian_samples
from lossray.ensembles.bench import FORWARD
from lossray.ensembles.methods import METHODS
from lossray.ensembles.recipes import Options, spread
from lossray.ensembles.refusals import refusal
from lossray.ensembles.simplex import _growth, uniform_shares
from lossray.training.evaluation import evaluate_split

OPTIONS = Options(sigma=0.5, powers_of_two=True)
SINGLE = ("long_run", "swa")


@pytest.fixture
def built(base_runs, bench_of):
    """``built(method, trainings)``: members of the plain base runs, and the bench."""

    def make(method, trainings=2.0, *, base_runs=base_runs, options=OPTIONS):
        bench = bench_of(base_runs, trainings)
        return METHODS[method].build(bench, options), bench

    return make


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_size_and_pays_for_its_steps(built, method):
    members, bench = built(method)
    expected = 1 if method in SINGLE else 2 if method == "independent" else bench.budget.size
    assert len(members.points) == len(members.costs) == expected
    assert (np.diff(np.stack(members.costs), axis=0) >= 0).all()
    assert all(point.alive.all() for point in members.points)
    assert all(torch.isfinite(point.theta).all() for point in members.points)
    needs = METHODS[method].needs
    base = 0 if METHODS[method].steps(bench.budget) >= bench.budget.total_steps else bench.budget.base_steps
    steps = (base + METHODS[method].steps(bench.budget)) * bench.base_runs.batch
    slack = 4 * bench.base_runs.batch  # FGE ends at a minimum, SWA at its last average
    rescales = needs in ("rescaling", "rates")
    if not rescales:
        assert ((steps - slack <= members.costs[-1]) & (members.costs[-1] <= steps)).all()
    else:
        assert (steps < members.costs[-1]).all()
    assert bool(members.rescalings) == rescales


@pytest.mark.parametrize("method", METHODS)
def test_a_run_does_not_depend_on_its_pack(make_problem, built, method):
    many, _ = built(method)
    one, _ = built(method, base_runs=make_problem(seeds=(8,)))
    assert [own[1] for own in many.costs] == [own[0] for own in one.costs]
    for together, alone in zip(many.points, one.points, strict=True):
        torch.testing.assert_close(together.theta[1], alone.theta[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["rescaled_copies", "points_geometric"])
@pytest.mark.parametrize("powers_of_two", [True, False])
def test_copies_and_points_of_the_orbit_compute_what_the_base_computes(
    built, outputs_of, method, powers_of_two
):
    members, bench = built(method, options=Options(1.0, powers_of_two))
    base = outputs_of(bench.base_runs, members.points[0])
    for point in members.points[1:]:
        torch.testing.assert_close(outputs_of(bench.base_runs, point), base, rtol=1e-12, atol=1e-12)
        assert (point.theta != members.points[0].theta).any()


@pytest.mark.parametrize(
    "optimizer", [{"name": "momentum", "lr": 0.02}, {"name": "sgd", "weight_decay": 0.01}], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rescaling_and_retraining_is_the_equivalent_learning_rates_bit_for_bit(
    make_problem, built, optimizer, dtype
):
    base_runs = make_problem(optimizer=optimizer, dtype=dtype)
    for variant, control in (("rescale_retrain", "lr_equivalent"), ("rescale_curve", "curve_lr_equivalent")):
        ours, theirs = (built(name, base_runs=base_runs)[0] for name in (variant, control))
        ends = range(len(ours.points)) if variant == "rescale_retrain" else [0]
        for k in ends:
            assert torch.equal(ours.points[k].theta, theirs.points[k].theta)
    assert not torch.equal(ours.points[-1].theta, theirs.points[-1].theta)  # a curve to another gauge


def test_the_polished_end_of_a_curve_is_the_retrained_function(built, outputs_of):
    ours, bench = built("rescale_curve")
    theirs, _ = built("curve_lr_equivalent")
    assert not torch.equal(ours.points[1].theta, theirs.points[1].theta)
    torch.testing.assert_close(
        outputs_of(bench.base_runs, ours.points[1]), outputs_of(bench.base_runs, theirs.points[1])
    )


def test_members_of_a_chain_follow_each_other(built):
    members, bench = built("snapshot")
    point = members.points[0]
    for k, member in enumerate(members.points[1:]):
        point = bench.retrain(point, bench.budget.cycle_steps, cycle=k)
        assert torch.equal(point.theta, member.theta)


def test_curves_begin_at_the_base_and_end_at_the_other(built):
    members, bench = built("curve")
    assert torch.equal(members.points[0].theta, bench.base().theta)
    half = bench.budget.extra_steps // 2
    assert torch.equal(members.points[1].theta, bench.retrain(members.points[0], half, cycle=0).theta)


def test_base_runs_are_those_of_the_study(base_runs, bench_of):
    for trainings, step in ((1.0, 8), (2.0, 16)):
        base = bench_of(base_runs, trainings).base()
        expected = base_runs.stack.layout.join(base_runs.checkpoint(step).parameters)
        assert torch.equal(base.theta, expected)
    between = bench_of(base_runs, 1.5).base()  # 12 steps, from the checkpoint at 8
    assert not torch.equal(between.theta, base_runs.stack.layout.join(base_runs.checkpoint(8).parameters))


def test_one_training_is_one_long_run_is_the_base_run(base_runs, built):
    trained = base_runs.stack.layout.join(base_runs.checkpoint(16).parameters)
    for method in ("long_run", "independent"):
        members, _ = built(method, 1.0)
        torch.testing.assert_close(members.points[0].theta, trained, rtol=0, atol=0)
        assert (members.costs[0] == 16 * base_runs.batch).all()


def test_deep_ensembles_are_independent_runs(built):
    members, bench = built("deep_ensemble")
    assert (members.costs[-1] == bench.budget.size * 16 * bench.base_runs.batch).all()
    shared, _ = built("deep_ensemble_equal_total")
    assert (shared.costs[-1] <= bench.budget.total_steps * bench.base_runs.batch).all()
    distances = [(members.points[0].theta - point.theta).norm() for point in members.points[1:]]
    assert min(distances) > 0.5


def test_alignment_brings_the_other_run_closer(built):
    ours, theirs = (built(name)[0] for name in ("align_curve", "curve_seeds"))
    assert torch.equal(ours.points[0].theta, theirs.points[0].theta)
    distances = [(m.points[1].theta - m.points[0].theta).norm(dim=1) for m in (ours, theirs)]
    assert (distances[0] < distances[1]).all()


def test_perturbations_are_as_long_as_the_rescaling(base_runs, built, bench_of):
    bench = bench_of(base_runs)
    starts = []
    bench.retrain = lambda point, steps, **_: starts.append(point) or point
    members = METHODS["perturbed"].build(bench, OPTIONS)
    for start, before, rescaling in zip(starts, members.points, members.rescalings, strict=False):
        moved = torch.linalg.vector_norm(start.theta - before.theta, dim=1)
        torch.testing.assert_close(moved.double(), rescaling.distance)


def test_fge_takes_its_members_at_the_lowest_rates(base_runs, bench_of):
    bench = bench_of(base_runs)
    seen = {}

    def course(start, steps, captures, *, rate):
        seen.update(rates=[rate(step) for step in range(max(captures) + 2)], captures=captures)
        return [start] * len(captures)

    bench.course = course
    METHODS["fge"].build(bench, OPTIONS)
    for capture in seen["captures"]:
        last = seen["rates"][capture - 1]
        assert last == min(seen["rates"])
        assert last == pytest.approx(0.01 * base_runs.optimizer.lr)
    assert max(seen["rates"]) == base_runs.optimizer.lr


def test_dead_runs_leave_the_others_as_they_are(make_problem, built):
    base_runs = make_problem()
    clean = {
        name: built(name, base_runs=base_runs)[0] for name in ("snapshot", "rescale_curve", "simplex", "swag")
    }
    original = base_runs.checkpoint

    def buried(step):
        checkpoint = original(step)
        return replace(checkpoint, alive=torch.tensor([False, True]))

    hurt = replace(base_runs, checkpoint=buried)
    for name, expected in clean.items():
        members, _ = built(name, base_runs=hurt)
        for point, before in zip(members.points, expected.points, strict=True):
            assert point.alive.tolist() == [False, True]
            torch.testing.assert_close(point.theta[1], before.theta[1], rtol=1e-9, atol=1e-11)


def test_methods_that_cannot_be_applied_say_why(make_problem):
    smooth = make_problem({"name": "mlp", "widths": [4], "activation": "tanh"})
    muon = make_problem(optimizer={"name": "muon", "lr": 0.01})
    assert "not positively homogeneous" in refusal(METHODS["rescale_retrain"], smooth)
    assert "muon" in refusal(METHODS["lr_equivalent"], muon)
    assert refusal(METHODS["rescale_retrain"], muon) is None
    assert {refusal(METHODS[name], smooth) for name in ("snapshot", "align_curve", "swag")} == {None}


def test_nothing_is_aligned_without_hidden_units(make_problem):
    linear = make_problem({"name": "mlp", "widths": []})
    assert "no hidden layer" in refusal(METHODS["align_curve"], linear)
    assert refusal(METHODS["curve_seeds"], linear) is None


@pytest.mark.parametrize("cycle", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("trainings", [0.5, 1.0, 1.75])
@pytest.mark.parametrize("method", ["snapshot", "fge", "rescale_retrain_curve"])
def test_no_cycle_exceeds_the_budget(base_runs, bench_of, method, trainings, cycle):
    bench, steps = bench_of(base_runs, trainings, cycle), []

    def course(start, count, captures, **_):
        steps.append(captures[-1])
        return [start] * len(captures)

    bench.course = course
    bench.curve = lambda a, b, count, **_: steps.append(count)
    bench.on_path = lambda path, a, b, t: a
    METHODS[method].build(bench, OPTIONS)
    assert 0 < sum(steps) <= bench.budget.extra_steps


def test_a_vertex_that_diverges_is_not_a_member(base_runs, bench_of):
    """Its loss is finite throughout, as in training where `diverged_above` decides."""
    steep = replace(base_runs, optimizer=base_runs.optimizer.model_copy(update={"lr": 1e4}))
    members = METHODS["simplex"].build(bench_of(steep), OPTIONS)
    assert not any(point.alive.any() for point in members.points)


NORMED = {"name": "mlp", "widths": [6], "norm": "batch"}


@pytest.mark.parametrize("method", ["curve", "swa", "points_line", "rescaled_copies", "simplex"])
def test_batch_norm_is_refreshed_and_paid_for(make_problem, built, outputs_of, method):
    base_runs = make_problem(NORMED)
    members, bench = built(method, base_runs=base_runs)
    plain, _ = built(method, base_runs=make_problem({"name": "mlp", "widths": [6]}))
    refreshed = {"curve": 3, "swa": 1, "points_line": 3, "rescaled_copies": 0, "simplex": 4}[method]
    np.testing.assert_allclose(bench.spent - plain.costs[-1], refreshed * FORWARD * base_runs.examples)
    if method == "rescaled_copies":
        base = outputs_of(base_runs, members.points[0])
        torch.testing.assert_close(outputs_of(base_runs, members.points[1]), base)
    for point in members.points:
        loss, _ = evaluate_split(
            base_runs.stack, point.theta, point.buffers, base_runs.loss, base_runs.dataset.train
        )
        assert (loss < 1.5).all()


# ---- what they are made of


def test_the_first_places_of_a_path_are_spread_out():
    assert spread(5) == [0.0, 1.0, 0.5, 0.25, 0.75]
    assert spread(2) == [0.0, 1.0]
    assert sorted(spread(9)) == [k / 8 for k in range(9)]


def test_an_average_is_the_mean_of_the_weights(base_runs, bench_of):
    base = bench_of(base_runs).base()
    points = [replace(base, theta=base.theta + shift) for shift in (0.0, 1.0, 5.0)]
    torch.testing.assert_close(averaged(points).theta, base.theta + 2)


def test_swag_draws_have_the_moments_of_its_gaussian(base_runs, bench_of):
    base = bench_of(base_runs).base()
    noise = torch.randn(
        12, *base.theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    points = [replace(base, theta=base.theta + 0.1 * own) for own in noise]
    drawn = torch.stack([point.theta for point in gaussian_samples(points, base_runs.seeds, 3000)])
    rows = torch.stack([point.theta for point in points])
    running = rows.cumsum(0) / torch.arange(1, 13)[:, None, None]
    variance = rows.var(dim=0, correction=0) / 2 + (rows - running).square().sum(dim=0) / 22
    torch.testing.assert_close(drawn.mean(dim=0), rows.mean(dim=0), rtol=0, atol=0.012)
    ratio = drawn.var(dim=0) / variance
    assert (ratio.mean() - 1).abs() < 0.02
    assert (ratio - 1).abs().max() < 0.25


def test_shares_of_a_simplex_are_uniform():
    shares = torch.cat([uniform_shares(range(500), 3, 1, draw) for draw in range(4)])
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2000, dtype=torch.float64))
    torch.testing.assert_close(
        shares.mean(dim=0), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=0.02
    )
    assert shares.var(dim=0).mean() == pytest.approx(1 / 18, rel=0.1)  # Dirichlet(1, 1, 1)


@pytest.mark.parametrize("others", [1, 3])
def test_a_vertex_grows_along_the_gradient_of_the_log_volume(others):
    generator = torch.Generator().manual_seed(1)
    fixed = torch.randn(others, 2, 7, generator=generator, dtype=torch.float64)
    theta = torch.randn(2, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    edges = torch.stack([*(fixed[1:] - fixed[0]), theta - fixed[0]], dim=1)
    volume = torch.linalg.det(edges @ edges.transpose(1, 2)).sqrt()
    (expected,) = torch.autograd.grad(volume.log().sum(), theta)
    torch.testing.assert_close(_growth(theta.detach(), fixed), expected)
