"""Trained curves: packs against solo members, divergence, barriers between independent runs, batch norm."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from lossray.connectivity import curves as module
from lossray.connectivity.barriers import Barrier, barriers
from lossray.connectivity.curves import Curves, evaluate_path, train_curves
from lossray.connectivity.paths import Path, bent, straight
from lossray.networks.batch_norm import refresh_statistics
from lossray.networks.losses import cross_entropy
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.stack import Stack, build_stack
from lossray.training.data_settings import data_settings
from lossray.training.datasets import Dataset, Split, load_dataset
from lossray.training.evaluation import METRICS, evaluate
from lossray.training.loop import train
from lossray.training.settings import TrainingSettings
from lossray.training.steps import TrainingTask
from lossray.training.update_rules import optimizer_settings

SEEDS = (1, 4, 6)
MLP = {"name": "mlp", "widths": [5]}
NOISY = {"name": "mlp", "widths": [6, 5], "norm": "batch", "dropout": 0.3}
SGD = {"name": "sgd", "lr": 0.05}
OPTIMIZERS = [SGD, {"name": "momentum", "lr": 0.02, "weight_decay": 0.1}, {"name": "adam", "lr": 0.01}]


@cache
def data() -> Dataset:
    settings = data_settings({"source": "gaussians", "n": 120, "dim": 4, "classes": 3})
    return load_dataset(settings, dtype=torch.float64)


def make(
    model: dict[str, Any],
    optimizer: dict[str, Any],
    *,
    seeds: tuple[int, ...] = SEEDS,
    executor: str = "vmap",
    steps: int = 6,
    dataset: Dataset | None = None,
) -> tuple[TrainingTask, Tensor, dict[str, Tensor]]:
    dataset = dataset or data()
    build = lambda: build_model(model_settings(model), dataset.input_shape, dataset.n_outputs)  # noqa: E731
    stack, theta, buffers = build_stack(build, seeds, executor=executor, dtype=torch.float64)
    training = TrainingSettings(steps=steps, batch_size=16, dtype="float64")
    task = TrainingTask(stack, cross_entropy, dataset, training, optimizer_settings(optimizer), "pack", seeds)
    return task, theta, buffers


def ends(theta: Tensor) -> tuple[Tensor, Tensor]:
    return theta, theta + 0.5 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(9)).double()


def curve(task: TrainingTask, theta: Tensor, buffers: dict[str, Tensor], kind: str = "bezier") -> Curves:
    limit = torch.full((len(theta),), 5.0, dtype=torch.float64)
    return train_curves(task, bent(kind, *ends(theta), 2), buffers, initial_loss=limit)


@pytest.mark.parametrize("executor", ["loop", "vmap"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda table: table["name"])
@pytest.mark.parametrize("model", [MLP, NOISY], ids=["mlp", "noisy"])
def test_a_member_of_a_pack_is_trained_as_it_would_be_alone(model, optimizer, executor):
    task, theta, buffers = make(model, optimizer, executor=executor)
    together = curve(task, theta, buffers).path.points
    own = replace(task, seeds=SEEDS[1:2])
    start = bent("bezier", *(end[1:2] for end in ends(theta)), 2)
    limit = torch.full((1,), 5.0, dtype=torch.float64)
    mine = {name: tensor[1:2] for name, tensor in buffers.items()}
    alone = train_curves(own, start, mine, initial_loss=limit).path.points
    torch.testing.assert_close(together[:, 1:2], alone, rtol=1e-8, atol=1e-8)  # Adam divides rounding by 1e-8
    assert (together[1:-1] - bent("bezier", *ends(theta), 2).bends).abs().max() > 1e-4


def test_one_step_is_the_gradient_times_the_coefficient():
    task, theta, buffers = make(MLP, {**SGD, "weight_decay": 0.3}, steps=1)
    start = bent("polychain", *ends(theta), 2)
    leaf = start.points.clone().requires_grad_()
    ts = torch.cat(
        [
            torch.rand(1, generator=module.generator(seed, "curve", 0), dtype=torch.float64)
            for seed in task.seeds
        ]
    )
    batch = module.next_minibatch(task.dataset, task.training, task.seeds, 0)
    where = Path("polychain", leaf).at(ts)
    losses = task.stack.losses(where, buffers, batch.inputs, batch.targets, cross_entropy, per_member=True)
    (losses.sum() + 0.15 * leaf[1:-1].square().sum()).backward()
    found = curve(task, theta, buffers, "polychain").path
    torch.testing.assert_close(found.bends, start.bends - 0.05 * leaf.grad[1:-1])


@pytest.mark.parametrize("kind", ["polychain", "bezier"])
def test_ends_path_and_buffers_stay_as_they_are(kind):
    task, theta, buffers = make(NOISY, OPTIMIZERS[2])
    start = bent(kind, *ends(theta), 2)
    before = start.points.clone()
    kept = {name: tensor.clone() for name, tensor in buffers.items()}
    limit = torch.ones(3, dtype=torch.float64)
    found = train_curves(task, start, buffers, initial_loss=limit).path
    assert torch.equal(start.points, before)
    assert all(torch.equal(buffers[name], tensor) for name, tensor in kept.items())
    assert torch.equal(found.points[[0, -1]], before[[0, -1]])
    assert not torch.equal(found.bends, start.bends)


def test_training_is_repeatable_and_depends_on_the_seeds():
    first, second = (curve(*make(NOISY, SGD)).path.points for _ in range(2))
    assert torch.equal(first, second)
    task, theta, buffers = make(NOISY, SGD)
    other = curve(replace(task, seeds=(1, 4, 7)), theta, buffers).path.points
    assert torch.equal(other[:, :2], first[:, :2])
    assert not torch.equal(other[:, 2], first[:, 2])


def diverging(how: str) -> Curves:
    task, theta, buffers = make(MLP, OPTIMIZERS[1], steps=8)
    a, b = ends(theta)
    limit = torch.full((3,), 5.0, dtype=torch.float64)
    if how == "loss":
        limit[1] = 1e-4
    if how == "gradient":
        a[1, 0] = torch.nan
    start = bent("bezier", a, b, 2)
    return train_curves(task, start, buffers, initial_loss=limit)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_diverging_member_leaves_the_others_as_they_are_in_every_bit(how):
    found, sound = diverging(how), diverging("")
    assert found.alive.tolist() == [True, False, True]
    assert sound.alive.all()
    assert torch.equal(found.path.points[:, [0, 2]], sound.path.points[:, [0, 2]])


def test_a_member_that_diverges_keeps_its_last_bends():
    found = diverging("loss")
    _, theta, _ = make(MLP, SGD)
    assert torch.equal(found.path.points[:, 1], bent("bezier", *ends(theta), 2).points[:, 1])


def test_bends_that_overflow_are_frozen_at_their_last_finite_values():
    """The loss at the bends is finite, but a step of decay by the factor -1e36 is not."""
    decay = {"name": "sgd", "lr": 1e18, "weight_decay": 1e18}
    task, theta, buffers = make({"name": "linear", "widths": []}, decay, steps=1)
    theta[1] *= 1e290
    start = bent("bezier", theta, 2 * theta, 2)
    found = train_curves(task, start, buffers, initial_loss=torch.full((3,), torch.inf))
    assert found.alive.tolist() == [True, False, True]
    assert torch.equal(found.path.points[:, 1], start.points[:, 1])
    assert (found.path.bends[:, [0, 2]].abs() > 1e30).any(dim=2).all()


def test_paths_without_bends_are_not_trained():
    task, theta, buffers = make(MLP, SGD)
    with pytest.raises(ValueError, match=r"found a path of kind 'line'; allowed: polychain, bezier"):
        train_curves(task, straight(*ends(theta)), buffers, initial_loss=torch.ones(3))


# ---- curves between trained models


def trained(seeds: tuple[int, ...]) -> tuple[Stack, Tensor]:
    task, theta, buffers = make({"name": "mlp", "widths": [8]}, {"name": "adam", "lr": 0.03}, seeds=seeds)
    training = task.training.model_copy(update={"steps": 150})
    *_, last = train(
        task.stack, theta, buffers, task.optimizer, training, task.dataset, pack_id="pack", seeds=seeds
    )
    return task.stack, task.stack.layout.join(last.parameters)


def heights(path: Path, stack: Stack) -> list[Barrier]:
    ts = [i / 16 for i in range(17)]
    found = evaluate_path(path, stack, {}, {}, cross_entropy, data(), ts)
    lengths = path.lengths(ts)
    return [
        barriers(ts, lengths[r], {name: values[r] for name, values in found.items()})
        for r in range(path.points.shape[1])
    ]


@pytest.mark.parametrize("kind", ["polychain", "bezier"])
def test_a_trained_curve_between_independent_runs_lies_far_below_the_line(kind):
    seeds = (0, 1)
    stack, a = trained(seeds)
    _, b = trained((10, 11))
    task, _, _ = make({"name": "mlp", "widths": [8]}, {"name": "adam", "lr": 0.03, "schedule": "cosine"})
    task = replace(task, seeds=seeds, training=task.training.model_copy(update={"steps": 250}))
    limit = torch.full((2,), 3.0, dtype=torch.float64)
    curves = train_curves(task, bent(kind, a, b, 1), {}, initial_loss=limit)
    assert curves.alive.all()
    for line, bowed in zip(heights(straight(a, b), stack), heights(curves.path, stack), strict=True):
        assert line.barrier > 0.1
        assert bowed.barrier < 0.3 * line.barrier
        assert bowed.mean_loss < line.mean_loss


# ---- evaluation


@pytest.mark.parametrize("executor", ["loop", "vmap"])
@pytest.mark.parametrize("at_once", [1, 64])
def test_points_of_a_path_are_evaluated_with_statistics_of_their_own(executor, at_once, monkeypatch):
    monkeypatch.setattr(module, "MEMBERS_AT_ONCE", at_once)
    task, theta, buffers = make(NOISY, SGD, executor=executor)
    others = {name: tensor + 1 for name, tensor in buffers.items()}
    path = straight(*ends(theta))
    ts = [0.0, 0.3, 0.6, 1.0]
    found = evaluate_path(path, task.stack, buffers, others, cross_entropy, task.dataset, ts)
    assert tuple(found) == METRICS
    for i, t in enumerate(ts):
        refreshed = refresh_statistics(task.stack, path.at(t), buffers, task.dataset.train.inputs)
        own = {0.0: buffers, 1.0: others}.get(t, refreshed)
        expected = evaluate(task.stack, path.at(t), own, cross_entropy, task.dataset)
        for name in METRICS:
            assert found[name].shape == (3, 4)
            torch.testing.assert_close(found[name][:, i], expected[name], rtol=1e-9, atol=1e-12)
    kept = evaluate(task.stack, path.at(0.3), buffers, cross_entropy, task.dataset)
    assert not torch.allclose(found["train_loss"][:, 1], kept["train_loss"], rtol=1e-3)


def test_accuracies_are_nan_without_classes_or_examples():
    task, theta, _ = make(MLP, SGD)
    split = task.dataset.train
    empty = Split(split.inputs[:0], split.targets[:0])
    found = evaluate_path(
        straight(*ends(theta)),
        task.stack,
        {},
        {},
        cross_entropy,
        replace(task.dataset, test=empty),
        [0.0, 1.0],
    )
    assert found["test_loss"].isnan().all()
    assert found["train_accuracy"].isfinite().all()
