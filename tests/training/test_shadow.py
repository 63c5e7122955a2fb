"""Shadow optimizers: fed the gradients of a run, they change no bit of it."""

import dataclasses

import pytest
import torch

from lossray.storage.checkpoints import dumps, loads
from lossray.training.optimizers import PackedOptimizer
from lossray.training.shadow import Shadow, load_shadow_states, make_shadows, shadow_states
from lossray.training.update_rules import OPTIMIZERS, optimizer_settings
from tests.training.test_loop import MLP, NOISY_MLP, SEEDS, assert_identical, make_stack, tensors
from tests.training.test_replay import Run


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_shadows_change_no_bit_of_a_run(optimizer):
    alone = Run(NOISY_MLP, {"name": optimizer}).train()
    watched = Run(NOISY_MLP, {"name": optimizer}, shadow=("adam", "muon", "sgd")).train()
    for step, checkpoint in alone.items():
        assert_identical(tensors(watched[step]), tensors(checkpoint))
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
    alone = PackedOptimizer(optimizer_settings({"name": "adam"}), theta, run.stack.layout)
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
    assert {name.split("/")[0] for name in resumed.shadow} == {"adam", "lion"}
    assert_identical(resumed.shadow, whole[9].shadow)
    assert_identical(tensors(resumed), tensors(whole[9]))


def test_states_of_all_optimizers_are_told_apart_by_name():
    stack, theta, _ = make_stack(MLP, SEEDS)
    gradients = [torch.randn(theta.shape, dtype=torch.float64) for _ in range(4)]
    shadows = make_shadows(tuple(OPTIMIZERS), theta, stack.layout)
    for shadow in shadows:
        for gradient in gradients[:3]:
            shadow.step(theta, gradient)
    others = make_shadows(tuple(reversed(OPTIMIZERS)), theta, stack.layout)
    load_shadow_states(others, shadow_states(shadows))
    for shadow, other in zip(shadows, reversed(others), strict=True):
        assert torch.equal(other.step(theta, gradients[3]), shadow.step(theta, gradients[3])), shadow.name


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
