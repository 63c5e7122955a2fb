"""Replays: bit for bit the training, whatever happens in it."""

import dataclasses

import pytest
import torch

from lossray.networks.losses import get_loss
from lossray.storage.checkpoints import dumps, loads
from lossray.training.loop import train
from lossray.training.optimizers import PackedOptimizer
from lossray.training.replay import replay
from lossray.training.settings import TrainingSettings
from lossray.training.shadow import shadow_states
from lossray.training.steps import TrainingTask, resumed, take_step
from lossray.training.update_rules import optimizer_settings
from tests.training.test_loop import DATA, MLP, NOISY_MLP, RESNET, SEEDS, assert_identical, make_stack

STEPS = {"steps": 9, "batch_size": 8, "dtype": "float64", "checkpoints": {"steps": [0, 3, 9]}}


class Run:
    """A training with its stack, kept together."""

    def __init__(self, table, optimizer, *, executor="vmap", shadow=(), **training):
        self.stack, self.theta, self.buffers = make_stack(table, SEEDS, executor)
        self.optimizer = optimizer_settings(optimizer)
        self.training = TrainingSettings(**{**STEPS, **training})
        self.shadow = shadow

    def train(self, resume=None):
        found = train(
            self.stack,
            self.theta,
            self.buffers,
            self.optimizer,
            self.training,
            DATA,
            pack_id="p",
            seeds=SEEDS,
            resume=resume,
            shadow=self.shadow,
        )
        return {checkpoint.step: loads(dumps(checkpoint)) for checkpoint in found}

    def replay(self, checkpoint, steps):
        args = (self.stack, self.theta, checkpoint, self.optimizer, self.training, DATA)
        return list(replay(*args, steps=steps, shadow=self.shadow))


def after(run, checkpoint, steps):
    """The state of a pack some steps after a checkpoint, by the function that replays and training share."""
    loss = get_loss(run.training.loss)
    task = TrainingTask(run.stack, loss, DATA, run.training, run.optimizer, "p", SEEDS, run.shadow)
    pack = resumed(task, run.theta, checkpoint)
    for step in range(checkpoint.step, checkpoint.step + steps):
        take_step(task, pack, step)
    return pack


@pytest.mark.parametrize("executor", ["vmap", "loop"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov", "adam", "adamw", "muon", "lion"])
def test_a_replay_reaches_the_next_checkpoint_to_the_bit(optimizer, executor):
    settings = {"name": optimizer, "weight_decay": 0.01, "schedule": "cosine"}
    table = {"steps": 15, "batch_size": 4, "diverged_above": 1.4, "checkpoints": {"steps": [0, 3, 9, 15]}}
    run = Run(NOISY_MLP, settings, executor=executor, shadow=("adam", "muon"), **table)
    checkpoints = run.train()
    start, end = checkpoints[3], checkpoints[9]
    assert int(end.diverged_at[1]) == 4  # a member diverges in between, not all of them
    assert end.alive.any()
    pack = after(run, start, 6)
    assert torch.equal(pack.theta, run.stack.layout.join(end.parameters))
    assert torch.equal(pack.diverged_at, end.diverged_at)
    assert_identical(pack.buffers, end.buffers)
    assert_identical(pack.optimizer.state(), end.optimizer)
    assert_identical(shadow_states(pack.shadows), end.shadow)


@pytest.mark.parametrize("executor", ["vmap", "loop"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "muon", "lion"])
def test_a_replay_yields_the_steps_of_the_training(optimizer, executor):
    run = Run(NOISY_MLP, {"name": optimizer, "weight_decay": 0.01}, executor=executor, shadow=("adam",))
    every = {"log_every": 1, "checkpoints": {"steps": list(range(10))}}
    checkpoints = Run(
        NOISY_MLP, {"name": optimizer, "weight_decay": 0.01}, executor=executor, **every
    ).train()
    steps = run.replay(run.train()[3], 6)
    assert [step.step for step in steps] == [3, 4, 5, 6, 7, 8]
    for step in steps:
        before, following = checkpoints[step.step], checkpoints[step.step + 1]
        after_it = run.stack.layout.join(following.parameters)
        assert torch.equal(step.theta, run.stack.layout.join(before.parameters))
        assert torch.equal(step.update, after_it - step.theta)
        assert torch.equal(step.losses.double(), following.log["train_loss"][0])
        own = PackedOptimizer(run.optimizer, after_it, run.stack.layout)
        own.load_state(following.optimizer)
        for found, expected in ((step.momentum, own.momentum()), (step.scale, own.scale())):
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)


def test_a_replay_of_batch_norm_and_shortcuts_is_the_training():
    run = Run(RESNET, {"name": "momentum", "lr": 0.05})
    checkpoints = run.train()
    pack = after(run, checkpoints[3], 6)
    assert torch.equal(pack.theta, run.stack.layout.join(checkpoints[9].parameters))
    assert_identical(pack.buffers, checkpoints[9].buffers)


def test_a_replayed_step_holds_what_it_used():
    run = Run(MLP, {"name": "adam", "lr": 0.01})
    checkpoint = run.train()[3]
    for step in run.replay(checkpoint, 3):
        correction = 1 - 0.9 ** (step.step + 1)
        expected = -0.01 * step.momentum / correction / step.scale
        torch.testing.assert_close(step.update, expected, rtol=1e-9, atol=1e-13)
        assert step.alive.all()
    (sgd,) = Run(MLP, {"name": "sgd", "lr": 0.1}).replay(Run(MLP, {"name": "sgd", "lr": 0.1}).train()[0], 1)
    torch.testing.assert_close(sgd.update, -0.1 * sgd.gradient, rtol=1e-12, atol=1e-15)
    assert sgd.momentum is None


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_replay_goes_on_where_the_run_ended(optimizer):
    short = Run(MLP, {"name": optimizer})
    longer = Run(MLP, {"name": optimizer}, steps=15, checkpoints={"steps": [9, 14, 15]}).train()
    last = short.replay(short.train()[9], 6)[-1]
    before, afterwards = (short.stack.layout.join(longer[step].parameters) for step in (14, 15))
    assert torch.equal(last.theta, before)
    assert torch.equal(last.update, afterwards - before)


def test_past_the_end_of_a_cosine_nothing_moves():
    run = Run(MLP, {"name": "sgd", "schedule": "cosine"})
    steps = run.replay(run.train()[9], 3)
    assert len(steps) == 3
    for step in steps:
        assert step.gradient.abs().max() > 0
        assert not step.update.any()


def test_a_member_that_diverges_in_a_replay_leaves_the_others():
    run = Run(MLP, {"name": "sgd", "lr": 0.1})
    checkpoint = run.train()[3]
    poisoned = {name: tensor.clone() for name, tensor in checkpoint.parameters.items()}
    poisoned["hidden1.weight"][1] = torch.inf
    sick = run.replay(dataclasses.replace(checkpoint, parameters=poisoned), 4)
    sound = run.replay(checkpoint, 4)
    assert [step.alive.tolist() for step in sick] == [[True, False, True]] * 4
    for ill, well in zip(sick, sound, strict=True):
        assert torch.equal(ill.theta[[0, 2]], well.theta[[0, 2]])
    gone = dataclasses.replace(checkpoint, alive=torch.zeros(3, dtype=torch.bool))
    assert run.replay(gone, 4) == []
