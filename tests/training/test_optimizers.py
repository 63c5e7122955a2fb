"""Optimizers on a stack against torch.optim on separate parameters, closed forms, and their own promises."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lossray.networks.layout import Layout
from lossray.study.grids import expand_grid
from lossray.training.optimizers import PackedOptimizer, muon_names
from lossray.training.schedules import learning_rate
from lossray.training.update_rules import OPTIMIZERS, optimizer_settings

LAYOUT = Layout(
    names=("first.weight", "first.bias", "conv.weight", "table.weight", "second.weight", "last.weight"),
    shapes=tuple(map(torch.Size, [(4, 3), (4,), (2, 3, 2, 2), (3, 2), (2, 5), (3, 2)])),
    roles=("matrix", "other", "kernel", "embedding", "matrix", "matrix"),
)
MEMBERS = 3
ELEMENTWISE = [name for name, entry in OPTIMIZERS.items() if entry.elementwise]
WITH_SCALE = [name for name, entry in OPTIMIZERS.items() if callable(entry.scale)]
IDENTITY = ("sgd", "momentum", "nesterov")

TORCH = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.8}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-6}),
    "adadelta": (torch.optim.Adadelta, {"rho": 0.8, "eps": 1e-4}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-6}),
    "adam": (torch.optim.Adam, {"betas": (0.8, 0.9), "eps": 1e-6}),
    "amsgrad": (torch.optim.Adam, {"betas": (0.8, 0.9), "eps": 1e-6, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.9), "eps": 1e-6}),
    "adamax": (torch.optim.Adamax, {"betas": (0.8, 0.9), "eps": 1e-6}),
    "nadam": (torch.optim.NAdam, {"betas": (0.8, 0.9), "eps": 1e-6, "momentum_decay": 0.01}),
    "radam": (torch.optim.RAdam, {"betas": (0.8, 0.9), "eps": 1e-6}),
}


def stacked(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(MEMBERS, LAYOUT.dim, dtype=torch.float64, generator=generator)


def make(name: str, theta: Tensor, **keys: object) -> PackedOptimizer:
    return PackedOptimizer(optimizer_settings({"name": name, **keys}), theta, LAYOUT)


def take_steps(optimizer: PackedOptimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        optimizer.step(stacked(100 + step), 0.01 * (1 + step))


# ---- against torch.optim


@pytest.mark.parametrize("name", TORCH)
def test_stack_equals_solo_torch_optimizers(name: str) -> None:
    kind, keys = TORCH[name]
    theta = stacked()
    solo = [nn.ParameterList([t.clone() for t in LAYOUT.split(row).values()]) for row in theta]
    runs = [kind(member, lr=0.01, weight_decay=0.1, **keys) for member in solo]
    own = {key: value for key, value in keys.items() if key not in ("nesterov", "amsgrad")}
    optimizer = make(name, theta, weight_decay=0.1, **own)
    for step in range(8):  # radam's rectification begins at step 6 with these betas
        gradient, lr = stacked(100 + step), 0.01 * (1 + step)
        for row, member, run in zip(gradient, solo, runs, strict=True):
            for parameter, piece in zip(member, LAYOUT.split(row).values(), strict=True):
                parameter.grad = piece.clone()
            run.param_groups[0]["lr"] = lr
            run.step()
        optimizer.step(gradient, lr)
    expected = torch.stack([torch.cat([p.detach().flatten() for p in member]) for member in solo])
    assert torch.equal(theta, expected)


def test_elementwise_names_are_those_of_torch_and_lion() -> None:
    assert set(ELEMENTWISE) == {*TORCH, "lion"}
    assert set(OPTIMIZERS) == {*TORCH, "lion", "muon"}
    adaptive = {name for name, entry in OPTIMIZERS.items() if entry.adaptive}
    assert adaptive == set(TORCH) - set(IDENTITY)


def test_lion_is_its_formula() -> None:
    theta = stacked()
    expected, moment = theta.clone(), torch.zeros_like(theta)
    optimizer = make("lion", theta, betas=[0.8, 0.9], weight_decay=0.1)
    for step in range(4):
        gradient, lr = stacked(100 + step), 0.01 * (1 + step)
        expected = expected - lr * ((0.8 * moment + 0.2 * gradient).sign() + 0.1 * expected)
        moment = 0.9 * moment + 0.1 * gradient
        optimizer.step(gradient, lr)
    torch.testing.assert_close(theta, expected, rtol=1e-13, atol=1e-13)
    found = optimizer.momentum()
    assert found is not None
    torch.testing.assert_close(found, moment, rtol=1e-13, atol=1e-13)


def test_muon_is_torch_muon_and_adamw() -> None:
    theta = stacked()
    solo = [{name: t.clone() for name, t in LAYOUT.split(row).items()} for row in theta]
    hidden = ("first.weight", "conv.weight", "second.weight")
    assert muon_names(LAYOUT) == hidden
    optimizer = make("muon", theta, momentum=0.9, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.1)
    runs = []
    for member in solo:
        matrices = [member[name].view(len(member[name]), -1) for name in hidden]
        others = [tensor for name, tensor in member.items() if name not in hidden]
        muon = torch.optim.Muon(matrices, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
        runs.append((matrices, others, muon, adamw))
    for step in range(4):
        gradient, lr = stacked(100 + step), 0.01 * (1 + step)
        for row, (matrices, others, muon, adamw) in zip(gradient, runs, strict=True):
            pieces = LAYOUT.split(row)
            for leaf, name in zip(matrices, hidden, strict=True):
                leaf.grad = pieces[name].reshape(leaf.shape)
            rest = [piece for name, piece in pieces.items() if name not in hidden]
            for leaf, piece in zip(others, rest, strict=True):
                leaf.grad = piece.clone()
            for part in (muon, adamw):
                part.param_groups[0]["lr"] = lr
                part.step()
        optimizer.step(gradient, lr)
    expected = torch.stack([torch.cat([t.flatten() for t in member.values()]) for member in solo])
    assert torch.equal(theta, expected)
    momentum = optimizer.momentum()
    assert momentum is not None
    kernels = LAYOUT.split(momentum)["conv.weight"]
    for r, (_, _, muon, _) in enumerate(runs):
        buffer = muon.state[muon.param_groups[0]["params"][1]]["momentum_buffer"]
        assert torch.equal(kernels[r].flatten(1), buffer)


@pytest.mark.parametrize(
    ("roles", "hidden"),
    [
        (("matrix", "other"), ()),
        (("kernel", "kernel"), ("0",)),
        (("kernel", "matrix", "other"), ("0",)),
        (("embedding", "other"), ()),
    ],
)
def test_muon_leaves_the_output_layer_to_adamw(roles: tuple[str, ...], hidden: tuple[str, ...]) -> None:
    names = tuple(str(i) for i in range(len(roles)))
    layout = Layout(names=names, shapes=(torch.Size([2, 2]),) * len(roles), roles=roles)
    assert muon_names(layout) == hidden
    theta = torch.zeros(2, layout.dim)
    optimizer = PackedOptimizer(optimizer_settings({"name": "muon"}), theta, layout)
    optimizer.step(torch.ones_like(theta), 0.1)
    assert bool((theta < 0).all())


# ---- what the state says


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scale_and_momentum_before_the_first_step(name: str) -> None:
    optimizer = make(name, stacked())
    assert optimizer.momentum() is None
    scale = optimizer.scale()
    if name in IDENTITY:
        assert scale is not None
        assert torch.equal(scale, torch.ones(MEMBERS, LAYOUT.dim, dtype=torch.float64))
    else:
        assert scale is None


def test_muon_and_lion_have_no_scale() -> None:
    for name in ("muon", "lion"):
        optimizer = make(name, stacked())
        take_steps(optimizer, 2)
        assert optimizer.scale() is None


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adadelta", "rmsprop"])
def test_absent_momentum_is_absent(name: str) -> None:
    optimizer = make(name, stacked())
    take_steps(optimizer, 2)
    assert optimizer.momentum() is None


WARM = 7  # steps, past radam's warm-up


# nesterov and nadam mix momentum and gradient; adadelta divides by its accumulated steps as they were before.
@pytest.mark.parametrize("name", sorted({*IDENTITY, *WITH_SCALE} - {"nesterov", "nadam", "adadelta"}))
def test_update_is_the_preconditioned_momentum(name: str) -> None:
    """theta(t+1) - theta(t) = -lr P^-1 m, with P and m read after the step (theory 2.10)."""
    keys = {"betas": [0.8, 0.9]} if "betas" in OPTIMIZERS[name].settings.model_fields else {}
    theta = stacked()
    optimizer = make(name, theta, **keys, **({"weight_decay": 0.0} if name == "adamw" else {}))
    take_steps(optimizer, WARM)
    before, gradient, lr = theta.clone(), stacked(50), 0.03
    optimizer.step(gradient, lr)
    scale, momentum = optimizer.scale(), optimizer.momentum()
    assert scale is not None
    direction = gradient if momentum is None else momentum
    if keys:
        direction = direction / (1 - 0.8 ** (WARM + 1))
    torch.testing.assert_close(theta - before, -lr * direction / scale, rtol=1e-9, atol=1e-12)


def test_nadam_scale() -> None:
    """NAdam's step is -lr P^-1 (c1 g + c2 m) with its own coefficients (Dozat 2016)."""
    theta = stacked()
    optimizer = make("nadam", theta, betas=[0.8, 0.9], momentum_decay=0.01)
    take_steps(optimizer, 3)
    before, gradient = theta.clone(), stacked(50)
    optimizer.step(gradient, 0.03)
    scale, momentum = optimizer.scale(), optimizer.momentum()
    assert scale is not None
    assert momentum is not None
    mu = [0.8 * (1 - 0.5 * 0.96 ** (0.01 * t)) for t in range(1, 6)]
    direction = (1 - mu[3]) / (1 - math.prod(mu[:4])) * gradient + mu[4] / (1 - math.prod(mu)) * momentum
    # mu_product is kept in float32 by torch.
    torch.testing.assert_close(theta - before, -0.03 * direction / scale, rtol=1e-5, atol=1e-9)


def test_adadelta_scale_after_one_step() -> None:
    theta, gradient = stacked(), stacked(1)
    optimizer = make("adadelta", theta, rho=0.75, eps=1e-4)
    optimizer.step(gradient, 1.0)
    square = 0.25 * gradient**2
    step = gradient * math.sqrt(1e-4) / (square + 1e-4).sqrt()
    torch.testing.assert_close(theta, stacked() - step, rtol=1e-13, atol=1e-13)
    expected = (square + 1e-4).sqrt() / (0.25 * step**2 + 1e-4).sqrt()
    found = optimizer.scale()
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["adam", "adamw", "amsgrad", "nadam", "rmsprop", "adagrad", "adamax"])
def test_scale_after_one_step_is_the_size_of_the_gradient(name: str) -> None:
    """Bias correction makes it exactly |g|; RMSprop and Adagrad have none."""
    gradient = stacked(1)
    keys: dict[str, object] = {"eps": 1e-12}
    optimizer = make(name, stacked(), **(keys | {"alpha": 0.75} if name == "rmsprop" else keys))
    optimizer.step(gradient, 0.01)
    found = optimizer.scale()
    assert found is not None
    factor = 0.5 if name == "rmsprop" else 1.0
    torch.testing.assert_close(found, factor * gradient.abs(), rtol=1e-9, atol=1e-10)


def test_amsgrad_scale_keeps_the_largest_moment() -> None:
    optimizer = make("amsgrad", stacked(), betas=[0.0, 0.5], eps=1e-12)
    ones = torch.ones(MEMBERS, LAYOUT.dim, dtype=torch.float64)
    for size in (4.0, 0.0, 0.0):
        optimizer.step(size * ones, 0.0)
    # v: 8, 4, 2; the largest 8, corrected by 1 - 1/8
    found = optimizer.scale()
    assert found is not None
    torch.testing.assert_close(found, math.sqrt(8 / (7 / 8)) * ones, rtol=1e-9, atol=0)


def test_radam_scale_is_the_identity_while_it_warms_up() -> None:
    optimizer = make("radam", stacked())
    identity = torch.ones(MEMBERS, LAYOUT.dim, dtype=torch.float64)
    for step in range(1, 8):
        optimizer.step(stacked(100 + step), 0.01)
        found = optimizer.scale()
        assert found is not None
        assert torch.equal(found, identity) == (step <= 5)  # rho_t passes 5 at step 6 for beta2 = 0.999


def test_momentum_of_constant_gradient() -> None:
    gradient = stacked(1)
    heavy_ball, adam = make("momentum", stacked(), momentum=0.5), make("adam", stacked(), betas=[0.5, 0.9])
    for _ in range(3):
        heavy_ball.step(gradient, 0.01)
        adam.step(gradient, 0.01)
    for optimizer, factor in ((heavy_ball, 1.75), (adam, 0.875)):
        found = optimizer.momentum()
        assert found is not None
        torch.testing.assert_close(found, factor * gradient, rtol=1e-12, atol=1e-12)


# ---- virtual updates, state


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_virtual_update_is_the_step_and_changes_nothing(name: str, warm: int) -> None:
    theta = stacked()
    optimizer = make(name, theta, weight_decay=0.1)
    take_steps(optimizer, warm)
    kept, state = theta.clone(), optimizer.state()
    gradient = stacked(50)
    kept_gradient = gradient.clone()
    update = optimizer.virtual_update(gradient, 0.05)
    assert torch.equal(theta, kept)
    assert torch.equal(gradient, kept_gradient)
    assert_same_state(optimizer.state(), state)
    optimizer.step(gradient, 0.05)
    assert torch.equal(theta - kept, update)
    assert bool((update != 0).any(dim=1).all())


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lion", "muon"])
def test_virtual_update_includes_weight_decay(name: str) -> None:
    theta, gradient = stacked(), torch.zeros(MEMBERS, LAYOUT.dim, dtype=torch.float64)
    update = make(name, theta, weight_decay=0.5).virtual_update(gradient, 0.1)
    assert bool((update * theta < 0).all())
    if name != "adam":  # which normalises the decay
        torch.testing.assert_close(update, -0.05 * theta, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_round_trip_continues_identically(name: str, warm: int) -> None:
    theta = stacked()
    optimizer = make(name, theta)
    take_steps(optimizer, warm)
    saved, copy = optimizer.state(), theta.clone()
    kept = {key: value.clone() for key, value in saved.items()}
    other = make(name, copy)
    take_steps(other, 0)
    other.load_state(saved)
    assert_same_state(other.state(), saved)
    for one in (optimizer, other):
        take_steps(one, 4, start=warm)
    assert torch.equal(theta, copy)
    assert_same_state(optimizer.state(), other.state())
    assert_same_state(saved, kept)  # neither continuation wrote into the saved state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_by_member_or_shared(name: str) -> None:
    optimizer = make(name, stacked())
    take_steps(optimizer, 2)
    assert all(value.ndim == 0 or len(value) == MEMBERS for value in optimizer.state().values())


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_dead_member_stays_as_it_is_and_harms_nobody(name: str, warm: int) -> None:
    theta, undisturbed = stacked(), stacked()
    optimizer, reference = make(name, theta, weight_decay=0.1), make(name, undisturbed, weight_decay=0.1)
    take_steps(optimizer, warm)
    take_steps(reference, warm)
    frozen, state = theta[1].clone(), optimizer.state()
    alive = torch.tensor([True, False, True])
    for step in range(3):
        gradient = stacked(200 + step)
        reference.step(gradient, 0.01)
        optimizer.step(torch.where(alive[:, None], gradient, torch.nan), 0.01, alive=alive)
    assert torch.equal(theta[1], frozen)
    assert torch.equal(theta[alive], undisturbed[alive])
    expected = reference.state()
    for key, value in optimizer.state().items():
        if value.ndim == 0:
            assert torch.equal(value, expected[key])
            continue
        assert torch.equal(value[alive], expected[key][alive])
        assert torch.equal(value[1], state[key][1] if key in state else torch.zeros_like(value[1]))


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


# ---- settings


def test_settings_round_trip_through_plain_values() -> None:
    for name in OPTIMIZERS:
        for schedule in ("constant", "cosine", "step"):
            settings = optimizer_settings({"name": name, "schedule": schedule})
            assert optimizer_settings(settings.plain()) == settings


def test_whole_numbers_are_numbers() -> None:
    settings = optimizer_settings({"name": "adam", "lr": 1, "weight_decay": 0, "betas": [0, 0.5]})
    assert settings.plain()["lr"] == 1.0
    theta = stacked()
    PackedOptimizer(settings, theta, LAYOUT).step(stacked(1), 1.0)
    assert bool(torch.isfinite(theta).all())


@pytest.mark.parametrize(
    ("table", "key", "message"),
    [
        ({"name": "adamm"}, "name", "found 'adamm'; allowed: .*sgd.*; did you mean 'adam'?"),
        ({}, "name", "allowed: "),
        ({"name": ["adam"]}, "name", "allowed: "),
        ({"name": "adam", "beta": [0.9, 0.99]}, "beta", "found 'beta'; allowed: .*did you mean 'betas'?"),
        ({"name": "sgd", "momentum": 0.9}, "momentum", "allowed: "),
        ({"name": "adam", "lr": -1e-3}, "lr", "greater than 0"),
        ({"name": "adam", "lr": 0}, "lr", "greater than 0"),
        ({"name": "adam", "lr": float("inf")}, "lr", "finite"),
        ({"name": "adam", "lr": 1e40}, "lr", "less than or equal to 1000"),
        ({"name": "adam", "lr": "1e-3"}, "lr", "valid number"),
        ({"name": "adam", "lr": True}, "lr", "valid number"),
        ({"name": "adam", "lr": [1e-3]}, "lr", "valid number"),
        ({"name": "adam", "betas": [0.9, 1.0]}, "betas", "less than 1"),
        ({"name": "adam", "betas": [-0.1, 0.9]}, "betas", "greater than or equal to 0"),
        ({"name": "adam", "betas": [0.9]}, "betas", "required"),
        ({"name": "momentum", "momentum": 1.5}, "momentum", "less than 1"),
        ({"name": "nesterov", "momentum": 0}, "momentum", "greater than 0"),
        ({"name": "adam", "eps": 0}, "eps", "greater than 0"),
        ({"name": "adam", "weight_decay": 1e40}, "weight_decay", "less than or equal to 1000"),
        ({"name": "adam", "weight_decay": -1.0}, "weight_decay", "greater than or equal to 0"),
        ({"name": "adam", "schedule": "cosin"}, "schedule", "'constant', 'cosine' or 'step'"),
        ({"name": "adam", "schedule": ["cosine"]}, "schedule", "'constant', 'cosine' or 'step'"),
        ({"name": "adam", "floor": 0.1}, None, 'floor: only schedule = "cosine" takes it'),
        ({"name": "adam", "schedule": "cosine", "factor": 0.1}, None, 'factor: only schedule = "step"'),
        ({"name": "adam", "schedule": "step", "milestones": [0.5, 0.2]}, None, "must increase"),
        ({"name": "adam", "schedule": "step", "milestones": [1.5]}, "milestones", "less than 1"),
        ({"name": "adam", "schedule": "step", "milestones": []}, "milestones", "at least 1"),
        ({"name": "adam", "schedule": "cosine", "floor": 2}, "floor", "less than or equal to 1"),
    ],
)
def test_bad_settings(table: dict[str, object], key: str | None, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        optimizer_settings(table)
    location = caught.value.errors()[0]["loc"]
    assert location[:1] == (() if key is None else (key,))


def test_grid() -> None:
    assert expand_grid(
        {"name": "adam", "lr": [1e-3, 3e-3], "betas": [0.9, 0.99], "weight_decay": [0, 0.1]}
    ) == [
        {"name": "adam", "lr": lr, "betas": [0.9, 0.99], "weight_decay": decay}
        for lr in (1e-3, 3e-3)
        for decay in (0, 0.1)
    ]
    betas = [[0.9, 0.99], [0.8, 0.9]]
    assert expand_grid({"name": "adam", "betas": betas}) == [{"name": "adam", "betas": b} for b in betas]
    assert expand_grid({"name": "sgd", "milestones": [0.5, 0.75]}) == [
        {"name": "sgd", "milestones": [0.5, 0.75]}
    ]
    assert expand_grid({"name": "sgd"}) == [{"name": "sgd"}]


@pytest.mark.parametrize(
    "table", [{"lr": []}, {"lr": [0.1, 0.2, 0.1]}, {"betas": [[0.9, 0.99], [0.9, 0.99]]}]
)
def test_bad_grids(table: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(table))):
        expand_grid(table)


# ---- schedules


def test_schedules() -> None:
    def rates(steps: int, **keys: object) -> list[float]:
        settings = optimizer_settings({"name": "sgd", "lr": 2.0, **keys})
        return [learning_rate(settings, step, steps) for step in range(steps + 1)]

    assert rates(3) == [2.0] * 4
    assert rates(4, schedule="cosine") == pytest.approx([2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0])
    assert rates(2, schedule="cosine", floor=0.5) == pytest.approx([2, 1.5, 1])
    cosine = optimizer_settings({"name": "sgd", "lr": 2.0, "schedule": "cosine", "floor": 0.5})
    assert learning_rate(cosine, 3, 2) == 1  # past the end it does not rise again
    assert rates(8, schedule="step") == pytest.approx([2] * 4 + [0.2] * 2 + [0.02] * 3)
    assert rates(4, schedule="step", milestones=[0.25], factor=0.5) == pytest.approx([2, 1, 1, 1, 1])
    for milestone in (0.07, 0.28, 0.55):  # in binary, each times 100 is more than a whole number
        late = rates(100, schedule="step", milestones=[milestone], factor=0.5)
        assert late.count(2.0) == round(100 * milestone)
