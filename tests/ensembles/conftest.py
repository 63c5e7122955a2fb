"""Base runs small enough to train in a fraction of a second, and a bench for the methods."""

from functools import partial

import pytest
import torch

from lossray.ensembles.bench import BaseRuns, Bench
from lossray.ensembles.budget import Budget
from lossray.networks.losses import get_loss
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.stack import build_stack
from lossray.training.data_settings import data_settings
from lossray.training.datasets import load_dataset
from lossray.training.loop import train
from lossray.training.settings import TrainingSettings
from lossray.training.update_rules import optimizer_settings

SEEDS = (3, 8)
STEPS = 16
MLP = {"name": "mlp", "widths": [6, 5]}
SGD = {"name": "sgd", "lr": 0.05}


@pytest.fixture(scope="session")
def make_problem():
    """``make_problem(model, optimizer, dtype=..., seeds=...)``: trained base runs on gaussians or digits."""

    def make(model=MLP, optimizer=SGD, *, dtype="float64", seeds=SEEDS, executor="vmap", data=None):
        settings = data_settings(
            data or {"source": "gaussians", "n": 120, "dim": 6, "classes": 3, "noise": 0.5}
        )
        number_format = getattr(torch, dtype)
        dataset = load_dataset(settings, dtype=number_format)
        training = TrainingSettings.model_validate(
            {"steps": STEPS, "batch_size": 16, "checkpoints": {"steps": [0, 8]}, "dtype": dtype}
        )
        build = partial(build_model, model_settings(model), dataset.input_shape, dataset.n_outputs)
        stack, theta, buffers = build_stack(build, seeds, executor=executor, dtype=number_format)
        own = optimizer_settings(optimizer)
        found = {
            checkpoint.step: checkpoint
            for checkpoint in train(
                stack, theta, buffers, own, training, dataset, pack_id="base", seeds=seeds
            )
        }

        def fresh(others):
            return build_stack(build, others, executor=executor, dtype=number_format)[1:]

        return BaseRuns(
            stack,
            fresh,
            get_loss("cross_entropy"),
            dataset,
            training,
            own,
            tuple(seeds),
            lambda step: found[max(known for known in found if known <= step)],
        )

    return make


@pytest.fixture(scope="session")
def base_runs(make_problem):
    """Plain descent in float64."""
    return make_problem()


@pytest.fixture
def bench_of():
    """``bench_of(base_runs, trainings)``: a fresh bench."""

    def make(base_runs, trainings=2.0, cycle=4):
        return Bench(base_runs, Budget(trainings, base_runs.training.steps, cycle))

    return make


@pytest.fixture(scope="session")
def outputs_of():
    """``outputs_of(base_runs, point)``: outputs on the test split, [R, N, C]."""

    def outputs(base_runs, point):
        with torch.no_grad():
            return base_runs.stack.outputs(point.theta, point.buffers, base_runs.dataset.test.inputs)

    return outputs
