"""Optimizers of the user's own loop: told apart by their rule, whatever their parameter groups are."""

import copy

import pytest
import torch
from torch import nn

from lossray.training.recognise import base_rate, rate, recognise
from lossray.training.update_rules import OPTIMIZERS, optimizer_settings

OURS = [name for name, entry in OPTIMIZERS.items() if entry.optimizer]
OWN = {
    "momentum": {"momentum": 0.8, "weight_decay": 0.01},
    "adam": {"betas": (0.8, 0.99), "eps": 1e-5},
    "rmsprop": {"alpha": 0.9},
    "nadam": {"momentum_decay": 1e-3},
}


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.mark.parametrize("name", OURS)
def test_each_optimizer_is_recognised_by_its_rule(name):
    settings = optimizer_settings({"name": name, "lr": 0.01, **OWN.get(name, {})})
    optimizer = OPTIMIZERS[name].build(list(net().parameters()), settings)
    recognised = recognise(optimizer)
    assert (recognised.name, recognised.exact) == (name, True)
    assert optimizer_settings(recognised.settings | {"lr": 0.01}) == settings


@pytest.mark.parametrize(
    ("optimizer", "options", "name", "key", "value"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}, "momentum", "dampening", 0.1),
        (torch.optim.SGD, {"maximize": True}, "sgd", "maximize", True),
        (torch.optim.AdamW, {"amsgrad": True}, "adamw", "amsgrad", True),
        (torch.optim.Adam, {"amsgrad": True, "decoupled_weight_decay": True}, "adamw", "amsgrad", True),
        (torch.optim.RMSprop, {"centered": True}, "rmsprop", "centered", True),
        (torch.optim.RMSprop, {"momentum": 0.9}, "rmsprop", "momentum", 0.9),
        (torch.optim.Adagrad, {"lr_decay": 0.1}, "adagrad", "lr_decay", 0.1),
        (torch.optim.NAdam, {"decoupled_weight_decay": True}, "nadam", "decoupled_weight_decay", True),
        (torch.optim.RAdam, {"decoupled_weight_decay": True}, "radam", "decoupled_weight_decay", True),
        (torch.optim.Adam, {"betas": (0.9, 0.0), "eps": 0.0}, "adam", "eps", 0.0),
    ],
)
def test_options_that_a_study_cannot_name_are_described(optimizer, options, name, key, value):
    recognised = recognise(optimizer(net().parameters(), lr=0.1, **options))
    assert (recognised.name, recognised.exact) == (name, False)
    assert recognised.settings["name"] == name
    assert recognised.settings[key] == value


def test_decoupled_decay_is_adamw_by_either_name():
    adam = recognise(torch.optim.Adam(net().parameters(), weight_decay=0.03, decoupled_weight_decay=True))
    adamw = recognise(torch.optim.AdamW(net().parameters(), weight_decay=0.03))
    assert adam == adamw
    assert adam.exact


@pytest.mark.parametrize(
    "kind", [torch.optim.Rprop, torch.optim.LBFGS, torch.optim.Adafactor, torch.optim.ASGD]
)
def test_an_optimizer_with_another_rule_is_not_known(kind):
    assert recognise(kind(net().parameters(), lr=0.1)) is None


def test_a_subclass_is_known_where_it_leaves_the_step_alone():
    class Named(torch.optim.AdamW):
        def __init__(self, params):
            super().__init__(params, lr=0.1, betas=(0.8, 0.9))

    class Other(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    class Grouped(Named):
        def _init_group(self, group, *lists):
            return super()._init_group(group, *lists)

    for first in (Named, Other, Grouped):  # torch wraps a class's step when one is made
        first(net().parameters())
    recognised = recognise(Named(net().parameters()))
    assert (recognised.name, recognised.settings["betas"]) == ("adamw", [0.8, 0.9])
    assert recognise(Other(net().parameters())) is None
    assert recognise(Grouped(net().parameters())) is None


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"fused": True}, {"capturable": False}, {"lr": torch.tensor(0.1)}]
)
def test_how_a_step_is_computed_does_not_matter(options):
    recognised = recognise(torch.optim.Adam(net().parameters(), **options))
    assert (recognised.name, recognised.exact) == ("adam", True)


def test_groups_that_differ_are_listed():
    model = net()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    assert recognise(torch.optim.Adam(copy.deepcopy(groups))).exact
    for key, value in {"weight_decay": 0.1, "lr": 0.5, "betas": (0.5, 0.999), "eps": 1e-3}.items():
        recognised = recognise(torch.optim.Adam([groups[0], {**groups[1], key: value}]))
        assert (recognised.name, recognised.exact) == ("adam", False)
        assert recognised.settings[key][1] == (list(value) if key == "betas" else value)
        assert [name for name, values in recognised.settings.items() if values == [0.0, 0.1]] == (
            ["weight_decay"] if key == "weight_decay" else []
        )


def test_an_optimizer_is_called_by_the_richest_of_its_groups():
    model = net()
    groups = [
        {"params": list(model[0].parameters())},
        {"params": list(model[2].parameters()), "momentum": 0.7},
    ]
    recognised = recognise(torch.optim.SGD(groups, lr=0.1))
    assert (recognised.name, recognised.settings["momentum"]) == ("momentum", [0.0, 0.7])


def test_a_schedule_changes_neither_the_rule_nor_the_base_rate():
    optimizer = torch.optim.SGD(net().parameters(), lr=0.5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # a warm-up starts at 0
    assert recognise(optimizer).name == "sgd"
    assert (rate(optimizer), base_rate(optimizer)) == (0.0, 0.5)


def test_rates_as_tensors_and_rates_that_differ():
    model = net()
    assert rate(torch.optim.Adam(model.parameters(), lr=torch.tensor(0.25))) == 0.25
    groups = [{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), (1, 1, 1, 2), strict=True)]
    assert rate(torch.optim.SGD(groups)) is None
