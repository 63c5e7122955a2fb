"""Replays and shadows: a replay is the training, bit for bit, and a shadow changes no bit of it."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from lossray.storage.checkpoints import dumps, loads
from lossray.training.loop import TrainingSettings, train
from lossray.training.optimizers import StackOptimizer, optimizer_settings
from lossray.training.replay import replay
from lossray.training.shadow import Shadow
from tests.training.test_loop import DATA, MLP, NOISY_MLP, RESNET, SEEDS, make_stack, tensors

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


def moved(run, checkpoint, steps):
    """Parameters after a replay from a checkpoint, [R, d]."""
    last = run.replay(checkpoint, steps)[-1]
    return last.theta + last.update


@pytest.mark.parametrize("executor", ["vmap", "loop"])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw", "muon", "lion"])
def test_a_replay_takes_the_steps_of_the_training_to_the_bit(optimizer, executor):
    settings = {"name": optimizer, "weight_decay": 0.01, "schedule": "cosine"}
    run = Run(NOISY_MLP, settings, executor=executor)
    checkpoints = run.train()
    steps = run.replay(checkpoints[3], 6)
    assert [step.step for step in steps] == [3, 4, 5, 6, 7, 8]
    for one, following in pairwise(steps):
        # In float64 theta + (theta' - theta) is theta' but for its last bit, so theta itself is compared.
        torch.testing.assert_close(one.theta + one.update, following.theta, rtol=1e-14, atol=1e-15)
    every = Run(NOISY_MLP, settings, executor=executor, checkpoints={"steps": list(range(10))}).train()
    for step in steps:
        assert torch.equal(step.theta, run.stack.layout.join(every[step.step].parameters))


def test_a_replay_starts_from_batch_norm_and_dropout_as_they_were():
    run = Run(RESNET, {"name": "momentum", "lr": 0.05})
    checkpoints = run.train()
    first = run.replay(checkpoints[3], 1)[0]
    again = run.replay(checkpoints[3], 1)[0]
    assert torch.equal(first.losses, again.losses)
    assert torch.equal(first.update, again.update)


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


def test_a_replay_goes_on_where_the_run_ended():
    short = Run(MLP, {"name": "adam"})
    longer = Run(MLP, {"name": "adam"}, steps=15, checkpoints={"steps": [9, 15]})
    found = moved(short, short.train()[9], 6)
    expected = short.stack.layout.join(longer.train()[15].parameters)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)


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


# ---- shadows


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_shadows_change_no_bit_of_a_run(optimizer):
    alone = Run(NOISY_MLP, {"name": optimizer}).train()
    watched = Run(NOISY_MLP, {"name": optimizer}, shadow=("adam", "muon", "sgd")).train()
    for step, checkpoint in alone.items():
        for name, value in tensors(checkpoint).items():
            assert torch.equal(value, tensors(watched[step])[name]) or value.isnan().any(), name
        assert checkpoint.shadow == {}


def test_a_shadow_of_the_same_optimizer_makes_the_same_updates():
    run = Run(MLP, {"name": "adamw"}, shadow=("adamw",))  # with decay, which needs the true parameters
    for step in run.replay(run.train()[3], 5):
        torch.testing.assert_close(step.shadows["adamw"], step.update, rtol=1e-12, atol=1e-16)


def test_a_shadow_is_fed_the_gradients_of_the_run():
    run = Run(MLP, {"name": "sgd", "lr": 0.2}, shadow=("adam",))
    checkpoints = run.train()
    steps = run.replay(checkpoints[0], 9)
    theta = steps[0].theta.clone()
    alone = StackOptimizer(optimizer_settings({"name": "adam"}), theta, run.stack.layout)
    for step in steps:
        theta.copy_(step.theta)
        alone.step(step.gradient, 1e-3)
        torch.testing.assert_close(step.shadows["adam"], theta - step.theta, rtol=0, atol=0)
    for name, value in alone.state().items():
        assert torch.equal(value, checkpoints[9].shadow[f"adam/{name}"]), name


def test_shadows_are_resumed_to_the_bit():
    run = Run(MLP, {"name": "momentum"}, shadow=("adam", "lion"))
    whole = run.train()
    resumed = run.train(resume=whole[3])[9]
    assert whole[9].shadow.keys() == resumed.shadow.keys() != set()
    for name, value in whole[9].shadow.items():
        assert torch.equal(value, resumed.shadow[name]), name


def test_a_virtual_update_of_a_shadow_leaves_it_as_it_is():
    run = Run(MLP, {"name": "sgd"})
    shadow = Shadow("adam", run.theta, run.stack.layout)
    gradient = torch.randn(run.theta.shape, dtype=torch.float64)
    shadow.step(run.theta, gradient)
    before = shadow.state()
    expected = shadow.virtual_update(run.theta, 2 * gradient)
    assert all(torch.equal(value, before[name]) for name, value in shadow.state().items())
    assert torch.equal(shadow.step(run.theta, 2 * gradient), expected)


def test_a_dead_member_leaves_the_shadows_of_the_others():
    run = Run(MLP, {"name": "sgd", "lr": 0.1}, shadow=("adam",))
    checkpoint = run.train()[3]
    poisoned = {name: tensor.clone() for name, tensor in checkpoint.parameters.items()}
    poisoned["hidden1.weight"][1] = torch.nan
    sick = run.replay(dataclasses.replace(checkpoint, parameters=poisoned), 3)
    for ill, well in zip(sick, run.replay(checkpoint, 3), strict=True):
        assert torch.equal(ill.shadows["adam"][[0, 2]], well.shadows["adam"][[0, 2]])


def test_files_of_checkpoints_without_shadows_are_still_read():
    data = dumps(Run(MLP, {"name": "sgd"}).train()[3])
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    old = header.replace(b', \\"shadow\\": []', b"").replace(b',\\"shadow\\":[]', b"")
    assert old != header
    changed = len(old).to_bytes(8, "little") + old + data[8 + length :]
    assert loads(changed).shadow == {}
