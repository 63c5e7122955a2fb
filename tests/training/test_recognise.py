"""Optimizers of the user's own loop: told apart by their rule, and read as a stack would have them."""

import copy

import pytest
import torch
from torch import nn

from lossray.networks.stack import stack_models
from lossray.training.optimizers import OPTIMIZERS, StackOptimizer, optimizer_settings
from lossray.training.recognise import base_rate, rate, recognised, same_meaning, stacked_state

OURS = [name for name, entry in OPTIMIZERS.items() if entry.build]
OWN = {
    "momentum": {"momentum": 0.8, "weight_decay": 0.01},
    "adam": {"betas": (0.8, 0.99), "eps": 1e-5},
    "rmsprop": {"alpha": 0.9},
    "nadam": {"momentum_decay": 1e-3},
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def theirs(name, model, lr=0.01):
    """The optimizer that a user would build, on separate parameters."""
    settings = optimizer_settings({"name": name, "lr": lr, **OWN.get(name, {})})
    return OPTIMIZERS[name].build(list(model.parameters()), settings), settings


def train(model, optimizer, steps=3):
    """A few steps; the gradients, flat."""
    inputs, gradients = torch.arange(15.0).view(5, 3).double().sin(), []
    for step in range(steps):
        optimizer.zero_grad()
        (model(inputs) - step).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.step()
    return gradients


@pytest.fixture(autouse=True)
def _own_generator():
    with torch.random.fork_rng(devices=[]):
        yield


# ---- which one


@pytest.mark.parametrize("name", OURS)
def test_each_optimizer_is_recognised_by_its_rule(name):
    optimizer, settings = theirs(name, net())
    found = recognised(optimizer)
    assert found.name == name
    assert found.plain() | {"lr": 0.01} == settings.plain()


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}),
        (torch.optim.SGD, {"maximize": True}),
        (torch.optim.Adam, {"maximize": True}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
        (torch.optim.Adagrad, {"lr_decay": 0.1}),
        (torch.optim.NAdam, {"decoupled_weight_decay": True}),
        (torch.optim.Rprop, {}),
        (torch.optim.LBFGS, {}),
        (torch.optim.Adam, {"betas": (0.9, 0.0), "eps": 0.0}),  # ours takes a positive eps only
    ],
)
def test_an_optimizer_with_another_rule_is_none_of_ours(optimizer, options):
    assert recognised(optimizer(net().parameters(), lr=0.1, **options)) is None


def test_a_subclass_may_do_anything():
    class Own(torch.optim.Adam):
        pass

    assert recognised(Own(net().parameters())) is None


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"capturable": False}])
def test_how_a_step_is_computed_does_not_matter(options):
    assert recognised(torch.optim.Adam(net().parameters(), **options)).name == "adam"


def test_groups_must_have_one_rule():
    model = net()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    assert recognised(torch.optim.Adam(copy.deepcopy(groups))).name == "adam"
    for key, value in {"weight_decay": 0.1, "lr": 0.5, "betas": (0.5, 0.999)}.items():
        different = [groups[0], {**groups[1], key: value}]
        assert recognised(torch.optim.Adam(different)) is None, key


def test_a_schedule_changes_neither_the_rule_nor_the_base_rate():
    optimizer = torch.optim.SGD(net().parameters(), lr=0.5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # a warm-up starts at 0
    assert recognised(optimizer).name == "sgd"
    assert (rate(optimizer), base_rate(optimizer)) == (0.0, 0.5)


def test_rates_as_tensors_and_rates_that_differ():
    model = net()
    assert rate(torch.optim.Adam(model.parameters(), lr=torch.tensor(0.25))) == 0.25
    groups = [{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), (1, 1, 1, 2), strict=True)]
    assert rate(torch.optim.SGD(groups)) is None


def test_a_state_means_the_same_under_schedules_of_rate_decay_and_momentum():
    adam = optimizer_settings({"name": "adam"})

    def like(**changes):
        return same_meaning(adam, optimizer_settings({"name": "adam", **changes}))

    assert like(lr=1.0, weight_decay=0.1, betas=(0.5, 0.999))
    assert not like(betas=(0.9, 0.9))
    assert not like(eps=1e-3)
    assert not same_meaning(adam, optimizer_settings({"name": "adamw"}))


# ---- its state


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", OURS)
def test_the_state_is_that_of_a_stack_of_one(name, steps):
    model = net()
    optimizer, settings = theirs(name, model)
    stack, theta, _ = stack_models([copy.deepcopy(model)], executor="loop", dtype=torch.float64)
    expected = StackOptimizer(settings, theta, stack.layout)
    for gradient in train(model, optimizer, steps):
        expected.step(gradient[None], 0.01)
    keys = {parameter: set(state) for parameter, state in optimizer.state.items()}
    state = stacked_state(optimizer, list(model.parameters()))
    assert {parameter: set(own) for parameter, own in optimizer.state.items()} == keys
    assert state.keys() == expected.state().keys()
    for key, value in expected.state().items():
        torch.testing.assert_close(state[key], value, rtol=1e-12, atol=1e-15)
    read = StackOptimizer(settings, theta, stack.layout)
    read.load_state(state)
    for method in ("momentum", "scale"):
        ours, wanted = getattr(read, method)(), getattr(expected, method)()
        assert (ours is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-15)


def test_a_parameter_without_a_gradient_has_zeros():
    model = net()
    unused = nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = torch.optim.Adam([*model.parameters(), unused])
    train(model, optimizer)
    state = stacked_state(optimizer, [*model.parameters(), unused])
    assert torch.equal(state["exp_avg"][0, -5:], torch.zeros(5, dtype=torch.float64))
    assert state["exp_avg"].shape == (1, 26 + 5)
    assert float(state["step"]) == 3


def test_counters_that_differ_are_left_out():
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 1)
    model[0].requires_grad_(False)
    optimizer.zero_grad()
    model(torch.ones(1, 3).double()).sum().backward()
    optimizer.step()  # of the second layer alone
    model[0].requires_grad_(True)
    state = stacked_state(optimizer, list(model.parameters()))
    assert state.keys() == {"exp_avg", "exp_avg_sq"}


def test_scalar_parameters_are_told_from_counters():
    parameter = nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.Adam([parameter])
    parameter.square().backward()
    optimizer.step()
    state = stacked_state(optimizer, [parameter])
    assert state["exp_avg"].shape == (1, 1)
    assert state["step"].shape == ()
