"""Training in another gauge is training with other learning rates (theory 2.5); how gauges are drawn."""

from dataclasses import replace

import pytest
import torch

from lossray.ensembles.rescaling import (
    LANCZOS_STEPS,
    SHARPNESS_EXAMPLES,
    Gauges,
    dead_units,
    equivalent_rates,
    largest_eigenvalue,
)
from lossray.networks.symmetry import rescaling_symmetry

DESCENT = [
    {"name": "sgd", "lr": 0.05},
    {"name": "sgd", "lr": 0.05, "weight_decay": 0.01},
    {"name": "momentum", "lr": 0.02},
    {"name": "momentum", "lr": 0.02, "weight_decay": 0.01},
    {"name": "nesterov", "lr": 0.02, "weight_decay": 0.01},
]
BY_SIGN = [
    {"name": "adam", "lr": 0.01, "eps": 1e-30},
    {"name": "adamw", "lr": 0.01, "eps": 1e-30, "weight_decay": 0.0},
    {"name": "rmsprop", "lr": 0.01, "eps": 1e-30},
    {"name": "adamax", "lr": 0.01, "eps": 1e-30},
    {"name": "radam", "lr": 0.01, "eps": 1e-30},  # its first five steps go by the gradient
    {"name": "lion", "lr": 0.001},
]


def both(bench, diagonal):
    """One cycle at D theta, taken back, and one at theta with the equivalent learning rates."""
    base = bench.base()
    rates = equivalent_rates(bench.base_runs.optimizer, diagonal)
    there = bench.retrain(replace(base, theta=base.theta * diagonal), 12, cycle=0)
    here = bench.retrain(base, 12, cycle=0, rates=rates)
    assert (here.theta != base.theta).any(dim=1).all()
    return there.theta / diagonal, here.theta


def gauge(base_runs, *, powers_of_two):
    symmetry = rescaling_symmetry(base_runs.stack.template, base_runs.stack.layout)
    draws = torch.randn(len(base_runs.seeds), symmetry.units, generator=torch.Generator().manual_seed(4))
    octaves = draws.double().round() if powers_of_two else draws.double()
    return symmetry.diagonal(torch.exp2(octaves)).to(
        base_runs.checkpoint(0).parameters["output.weight"].dtype
    )


@pytest.mark.parametrize("optimizer", DESCENT, ids=str)
def test_with_powers_of_two_both_are_the_same_bit_for_bit(make_problem, bench_of, optimizer):
    base_runs = make_problem(optimizer=optimizer, dtype="float32")
    there, here = both(bench_of(base_runs), gauge(base_runs, powers_of_two=True))
    assert torch.equal(there, here)


@pytest.mark.parametrize("optimizer", DESCENT + BY_SIGN, ids=str)
def test_with_other_factors_to_rounding(make_problem, bench_of, optimizer):
    base_runs = make_problem(optimizer=optimizer)
    there, here = both(bench_of(base_runs), gauge(base_runs, powers_of_two=False))
    torch.testing.assert_close(there, here, rtol=1e-7, atol=1e-9)


def test_decay_inside_the_rates_would_not_be_the_same(make_problem, bench_of):
    base_runs = make_problem(optimizer={"name": "sgd", "lr": 0.05, "weight_decay": 0.1})
    bench, diagonal = bench_of(base_runs), gauge(base_runs, powers_of_two=True)
    there, _ = both(bench, diagonal)
    undecayed = replace(base_runs, optimizer=base_runs.optimizer.model_copy(update={"weight_decay": 0.0}))
    other = bench_of(undecayed)
    rates = equivalent_rates(base_runs.optimizer, diagonal)
    here = other.retrain(bench_of(base_runs).base(), 12, cycle=0, rates=rates).theta
    assert not torch.allclose(there, here, rtol=1e-4)


@pytest.mark.parametrize("name", ["muon", "adadelta"])
def test_some_optimizers_have_no_equal_rates(make_problem, name):
    base_runs = make_problem(optimizer={"name": name})
    assert equivalent_rates(base_runs.optimizer, torch.ones(3)) is None


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_a_rescaled_copy_is_the_same_function(base_runs, bench_of, outputs_of, powers_of_two):
    bench = bench_of(base_runs)
    base = bench.base()
    found = Gauges(bench, sigma=1.0, powers_of_two=powers_of_two).draw(base)
    copy = found.apply(base)
    assert (copy.theta != base.theta).any()
    if powers_of_two:
        assert torch.equal(outputs_of(base_runs, copy), outputs_of(base_runs, base))
        assert found.function_change.max() == 0
    torch.testing.assert_close(
        outputs_of(base_runs, copy), outputs_of(base_runs, base), rtol=1e-12, atol=1e-12
    )
    assert found.function_change.max() < 1e-13
    torch.testing.assert_close(found.undo(copy).theta, base.theta)
    distance = torch.linalg.vector_norm(copy.theta - base.theta, dim=1)
    torch.testing.assert_close(found.distance, distance.double())


def test_draws_depend_on_the_run_and_the_cycle_alone(make_problem, base_runs, bench_of):
    alone = make_problem(seeds=(8,))
    both_runs, one = (
        [gauges.draw(bench.base()) for _ in range(2)]
        for bench, gauges in (
            (bench, Gauges(bench, sigma=0.5, powers_of_two=False))
            for bench in map(bench_of, (base_runs, alone))
        )
    )
    for many, single in zip(both_runs, one, strict=True):
        torch.testing.assert_close(many.diagonal[1], single.diagonal[0])
    assert not torch.allclose(one[0].diagonal, one[1].diagonal)


def test_sigma_is_halved_until_the_learning_rate_is_stable(make_problem, bench_of):
    calm, steep = (make_problem(optimizer={"name": "sgd", "lr": lr}) for lr in (1e-3, 0.3))
    draws = [
        Gauges(bench, sigma=3.0, powers_of_two=False).draw(bench.base())
        for bench in map(bench_of, (calm, steep))
    ]
    assert (draws[0].sigma == 3.0).all()
    assert (draws[1].sigma < 3.0).all()
    assert ((3.0 / draws[1].sigma).log2() % 1 == 0).all()
    limit = torch.clamp(1.1 * 0.3 * draws[1].lambda_max_before, min=1.5)
    assert (draws[1].lambda_max_after > 0).all()
    assert (0.3 * draws[1].lambda_max_after < limit).all()


def test_dead_units_keep_their_gauge(base_runs, bench_of):
    bench = bench_of(base_runs)
    base = bench.base()
    theta = base.theta.clone()
    views = base_runs.stack.layout.split(theta)
    views["hidden1.weight"][0, 2], views["hidden1.bias"][0, 2] = 0.0, -1.0
    dead = replace(base, theta=theta)
    gauges = Gauges(bench, sigma=1.0, powers_of_two=False)
    found = dead_units(bench, gauges.symmetry, dead)
    assert found[0, 2]
    rescaling = gauges.draw(dead)
    assert rescaling.dead_units.tolist() == found.sum(dim=1).tolist()
    diagonal = base_runs.stack.layout.split(rescaling.diagonal)
    assert (diagonal["hidden1.weight"][0, 2] == 1).all()
    assert (diagonal["hidden1.weight"][1, 2] != 1).all() or found[1, 2]


def test_the_largest_eigenvalue_is_a_close_lower_bound(base_runs, bench_of):
    bench = bench_of(base_runs)
    base, train = bench.base(), base_runs.dataset.train
    estimate = largest_eigenvalue(base_runs, base)
    for r in range(len(base_runs.seeds)):
        buffers = {name: tensor[r : r + 1] for name, tensor in base.buffers.items()}

        def loss(theta, own=buffers):
            inputs, targets = train.inputs[:64], train.targets[:64]
            return base_runs.stack.losses(theta[None], own, inputs, targets, base_runs.loss)[0]

        exact = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, base.theta[r]))[-1]
        assert 0.8 * exact < estimate[r] <= exact * (1 + 1e-6)


def test_what_halving_costs_is_the_run_s_own(make_problem, bench_of):
    optimizer = {"name": "sgd", "lr": 0.3}
    both, alone = (make_problem(optimizer=optimizer, seeds=seeds) for seeds in ((3, 8), (8,)))
    spent = []
    for bench in map(bench_of, (both, alone)):
        Gauges(bench, sigma=3.0, powers_of_two=False).draw(bench.base())
        spent.append(bench.spent[-1])
    assert spent[0] == spent[1]


def test_adaptive_methods_pay_for_no_estimate(make_problem, bench_of):
    """They are not looked at to decide anything, but they are in the table."""
    found = []
    for optimizer in ({"name": "adam", "lr": 0.01}, {"name": "sgd", "lr": 1e-3}):
        bench = bench_of(make_problem(optimizer=optimizer))
        base, before = bench.base(), bench.spent
        rescaling = Gauges(bench, sigma=0.5, powers_of_two=False).draw(base)
        assert torch.isfinite(rescaling.lambda_max_after).all()
        found.append((bench.spent - before - bench.base_runs.examples).tolist())
    examples = min(SHARPNESS_EXAMPLES, bench.base_runs.examples)
    assert found == [[0, 0], [(1 + 2 * LANCZOS_STEPS) * examples] * 2]


def test_nesterov_has_a_limit_of_its_own(make_problem, bench_of):
    """It is stable up to 3.8 / 2.8 = 1.36 only (theory 2.10)."""
    for optimizer, limit in (("sgd", 1.5), ("momentum", 1.5), ("nesterov", 0.75 * 3.8 / 2.8)):
        base_runs = make_problem(optimizer={"name": optimizer, "lr": 0.01})
        gauges = Gauges(bench_of(base_runs), sigma=0.5, powers_of_two=False)
        calm, edge = torch.zeros(2), torch.tensor([0.999, 1.001]) * limit / 0.01
        assert gauges._too_steep(calm, edge).tolist() == [False, True]


def test_the_examples_may_come_in_parts(base_runs, bench_of, monkeypatch):
    bench = bench_of(base_runs)
    base = bench.base()
    gauges = Gauges(bench, sigma=1.0, powers_of_two=False)
    whole = dead_units(bench, gauges.symmetry, base)
    monkeypatch.setattr("lossray.ensembles.rescaling.CHUNK", 14)
    assert torch.equal(dead_units(bench, gauges.symmetry, base), whole)
