"""What the state of a user's own optimizer says: the step that torch takes is -rate P^-1 momentum."""

import copy
import math

import pytest
import torch
from torch import nn

from lossray.networks.stack import stack_models
from lossray.training.optimizers import PackedOptimizer
from lossray.training.readings import RecordedOptimizer, read_optimizer
from lossray.training.update_rules import OPTIMIZERS, optimizer_settings

OURS = [name for name, entry in OPTIMIZERS.items() if entry.optimizer]
SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
BY_GROUP = [  # an optimizer, what all of its groups have, what the second has
    (ADAMW, {"lr": 0.02}, {"weight_decay": 0.0}),
    (ADAMW, {"lr": 0.02, "amsgrad": True}, {"lr": 0.005}),
    (ADAM, {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True}, {"lr": 0.03}),
    (ADAM, {"lr": 0.02}, {"betas": (0.9, 0.5), "eps": 1e-2}),
    (ADAM, {"lr": 0.02, "maximize": True}, {"betas": (0.7, 0.99)}),
    (ADAM, {"lr": torch.tensor(0.02).double()}, {"lr": torch.tensor(0.01).double()}),
    (torch.optim.Adamax, {"lr": 0.02}, {"lr": 0.04}),
    (torch.optim.RAdam, {"lr": 0.02, "betas": (0.9, 0.9), "decoupled_weight_decay": True}, {"lr": 0.0}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}, {"momentum": 0.5}),
    (SGD, {"lr": 0.1, "momentum": 0.6}, {"lr": 0.02, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.02, "momentum": 0.8, "centered": True}, {"lr": 0.01, "alpha": 0.5}),
]


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def grouped(kind, model, shared, second):
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1]}]
    return kind([*groups, {"params": [p for p in model.parameters() if p.ndim < 2], **second}], **shared)


def gradient(model, step):
    inputs = torch.arange(15.0).view(5, 3).double().sin()
    model.zero_grad()
    (model(inputs) - step).square().mean().backward()
    return flat(p.grad for p in model.parameters())


def train(model, optimizer, steps):
    for step in range(steps):
        gradient(model, step)
        optimizer.step()


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).clone()


def read(optimizer, model, step=4):
    return read_optimizer(optimizer, dict(model.named_parameters()), step)


def by_parameter(optimizer, model, value):
    """A number of each parameter's group, for each coordinate."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return flat(torch.full_like(p, float(value(groups[id(p)]))) for p in model.parameters())


# ---- the step


@pytest.mark.parametrize(("kind", "shared", "second"), BY_GROUP)
def test_the_step_is_the_momentum_over_the_preconditioner(kind, shared, second):
    model = net()
    optimizer = grouped(kind, model, shared, second)
    train(model, optimizer, 6)
    theta, rate = flat(model.parameters()), RecordedOptimizer(read(optimizer, model).state).rate
    gradient(model, 9)
    optimizer.step()
    found = RecordedOptimizer(read(optimizer, model).state)
    decoupled = [bool(group.get("decoupled_weight_decay")) for group in optimizer.param_groups]
    decay = by_parameter(optimizer, model, lambda g: float(g["lr"]) * g["weight_decay"] * decoupled[0])
    corrected = by_parameter(
        optimizer, model, lambda g: 1 - float(g["betas"][0]) ** 7 if "betas" in g else 1.0
    )
    expected = -rate * found.momentum()[0] / corrected / found.scale()[0]
    torch.testing.assert_close(
        flat(model.parameters()) - theta * (1 - decay), expected, rtol=1e-9, atol=1e-14
    )
    assert rate == max(float(group["lr"]) for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("kind", "shared", "second"),
    [
        (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.1, "lr_decay": 0.2}, {"lr": 0.05}),
        (torch.optim.RMSprop, {"lr": 0.02, "centered": True, "maximize": True}, {"lr": 0.01}),
        (SGD, {"lr": 0.1}, {"lr": 0.3}),
    ],
)
def test_without_a_momentum_it_is_the_gradient_over_the_preconditioner(kind, shared, second):
    model = net()
    optimizer = grouped(kind, model, shared, second)
    train(model, optimizer, 6)
    theta, rate = flat(model.parameters()), RecordedOptimizer(read(optimizer, model).state).rate
    sign = -1 if shared.get("maximize") else 1
    uphill = gradient(model, 9)
    optimizer.step()
    found = RecordedOptimizer(read(optimizer, model).state)
    assert found.momentum() is None
    expected = -sign * rate * uphill / found.scale()[0]
    torch.testing.assert_close(flat(model.parameters()) - theta, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", OURS)
def test_one_group_reads_as_a_stack_of_one_does(name, steps):
    model, settings = net(), optimizer_settings({"name": name, "lr": 0.01})
    stack, theta, _ = stack_models([copy.deepcopy(model)], executor="loop", dtype=torch.float64)
    expected = PackedOptimizer(settings, theta, stack.layout)
    optimizer = OPTIMIZERS[name].build(list(model.parameters()), settings)
    for step in range(steps):
        expected.step(gradient(model, step)[None], 0.01)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    found = RecordedOptimizer(read(optimizer, model, steps).state)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    for method in ("momentum", "scale"):
        ours, wanted = getattr(found, method)(), getattr(expected, method)()
        assert (ours is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-15)
    threshold = OPTIMIZERS[name].threshold
    assert found.threshold == (pytest.approx(threshold(settings, steps)) if threshold else None)
    assert found.rate == pytest.approx(0.01)


@pytest.mark.parametrize("kind", [ADAMW, SGD])
def test_groups_that_differ_in_nothing_read_as_one_group(kind):
    model = net()
    one, two = kind(model.parameters(), lr=0.1), grouped(kind, model, {"lr": 0.1}, {})
    train(model, one, 3)
    for parameter in model.parameters():
        two.state[parameter] = one.state[parameter]
    a, b = read(one, model), read(two, model)
    assert a.state.keys() == b.state.keys()
    assert all(torch.equal(value, b.state[name]) for name, value in a.state.items())


# ---- rates


def test_the_rates_of_groups_go_into_the_preconditioner():
    model = net()
    optimizer = grouped(ADAMW, model, {"lr": 0.02}, {})
    train(model, optimizer, 3)
    alike = read(optimizer, model).state["scale"]
    optimizer.param_groups[1]["lr"] = 0.005
    share = by_parameter(optimizer, model, lambda group: group["lr"] / 0.02)
    torch.testing.assert_close(read(optimizer, model).state["scale"][0], alike[0] / share, rtol=1e-15, atol=0)
    optimizer.param_groups[1]["lr"] = 0.0
    assert read(optimizer, model).state["scale"][0][share < 1].isinf().all()
    optimizer.param_groups[1]["lr"] = 0.08  # now the largest: rate / P is what it was, but for this group's
    found = read(optimizer, model).state
    assert float(found["rate"]) == 0.08
    own = by_parameter(optimizer, model, lambda group: group["lr"])
    torch.testing.assert_close(0.08 / found["scale"][0], own / alike[0], rtol=1e-12, atol=0)


def test_before_a_warm_up_the_rates_to_which_it_leads_count():
    model = net()
    optimizer = grouped(ADAMW, model, {"lr": 0.02}, {"lr": 0.01})
    train(model, optimizer, 2)
    expected = read(optimizer, model).state["scale"]
    for group in optimizer.param_groups:
        group["initial_lr"], group["lr"] = group["lr"], 0.0
    found = read(optimizer, model).state
    assert torch.equal(found["scale"], expected)
    assert float(found["rate"]) == 0


# ---- thresholds


@pytest.mark.parametrize(
    ("kind", "shared", "second", "expected"),
    [
        (SGD, {"momentum": 0.5, "dampening": 0.25}, {}, 3 / 0.75),
        (SGD, {"momentum": 0.5}, {"lr": 0.1}, 3.0),
        (torch.optim.RMSprop, {"momentum": 0.5}, {"alpha": 0.5}, 3.0),
        (ADAMW, {"betas": (0.5, 0.9)}, {"weight_decay": 0.0}, 6.0),
        (ADAM, {"amsgrad": True, "betas": (0.5, 0.9)}, {"betas": (0.5, 0.99)}, 6.0),
        (ADAM, {}, {"betas": (0.5, 0.999)}, None),
        (SGD, {"momentum": 0.5}, {"momentum": 0.25}, None),
    ],
)
def test_one_threshold_for_all_groups_or_a_line(kind, shared, second, expected):
    model = net()
    optimizer = grouped(kind, model, {"lr": 0.01, **shared}, second)
    train(model, optimizer, 2)
    found = read(optimizer, model)
    assert RecordedOptimizer(found.state).threshold == (expected and pytest.approx(expected))
    assert found.notes == (
        () if expected else ("no threshold: the parameter groups differ in momentum, and so in theirs",)
    )


# ---- what is not known


def test_an_unknown_optimizer_is_a_line():
    class Sophia(torch.optim.Adam):
        def step(self, closure=None):
            return super().step(closure)

    model = net()
    found = read(Sophia(model.parameters()), model)
    assert (found.name, found.settings, dict(found.state)) == ("Sophia", None, {})
    assert found.notes == ("optimizer Sophia is not known: no momentum, preconditioner, threshold",)


def test_trainable_parameters_in_no_group_are_a_line():
    model = net()
    found = read(ADAM(model[2].parameters()), model)
    assert not found.state
    (note,) = found.notes
    assert "2 of 4 trainable parameters (such as 0.weight) are in no group of the optimizer" in note
    model[0].requires_grad_(False)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert read_optimizer(ADAM(model[2].parameters()), trainable, 0).notes == ()


def test_what_has_no_state_yet_counts_as_not_moved():
    model = net()
    optimizer = ADAM(model[0].parameters(), lr=0.1)
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    found = read(optimizer, model)
    assert found.state["scale"][0, -12:].isinf().all()
    assert torch.isfinite(found.state["scale"][0, :-12]).all()
    assert torch.equal(found.state["momentum"][0, -12:], torch.zeros(12, dtype=torch.float64))
    assert found.notes == (
        "2 of 4 trainable parameters (such as 2.weight) are without a step so far, and counted as not moved",
    )
    train(model, optimizer, 1)  # each parameter has its own count of steps, and its own correction
    own = {name: optimizer.state[p] for name, p in model.named_parameters()}
    expected = (own["2.bias"]["exp_avg_sq"] / (1 - 0.999)).sqrt() + 1e-8
    torch.testing.assert_close(read(optimizer, model).state["scale"][0, -2:], expected, rtol=1e-12, atol=0)


def test_groups_without_a_momentum_beside_some_with_one_are_a_line():
    model = net()
    optimizer = grouped(SGD, model, {"lr": 0.1, "momentum": 0.5}, {"momentum": 0.0})
    train(model, optimizer, 2)
    found = read(optimizer, model)
    assert "momentum" not in found.state
    assert torch.equal(found.state["scale"], torch.ones(1, 32, dtype=torch.float64))
    assert found.notes[0] == "no momentum: some of the parameter groups have none"


def test_a_step_that_is_not_a_number_gives_no_preconditioner():
    model = net()
    optimizer = ADAM(model.parameters(), eps=0.0)
    gradient(model, 0)
    model[0].bias.grad.zero_()
    optimizer.step()
    found = read(optimizer, model)
    assert "scale" not in found.state
    assert found.notes[0].startswith("no preconditioner: it is zero or not a number somewhere")


def test_maximising_is_a_line():
    model = net()
    found = read(SGD(model.parameters(), maximize=True), model)
    assert "its optimizer maximises" in found.notes[0]


@pytest.mark.parametrize("options", [{}, {"nesterov": False}])
def test_muon_has_a_momentum_and_no_preconditioner(options):
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.Muon(model.parameters(), **options)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    found = read(optimizer, model)
    assert found.state.keys() == {"momentum", "rate"}
    assert torch.equal(found.state["momentum"][0], optimizer.state[model.weight]["momentum_buffer"].view(-1))
    assert found.notes == ("no preconditioner and threshold: muon has none",)


def test_weights_in_half_precision_have_a_preconditioner_in_single():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    optimizer = ADAM(model.parameters())
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    scale = read(optimizer, model).state["scale"]
    assert scale.dtype == torch.float32
    assert math.isfinite(float(scale.sum()))
