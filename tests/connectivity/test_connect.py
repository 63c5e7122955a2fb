"""lossray.connect on modules of the user's: exact ends, batch norm, losses and data of any kind, errors."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lossray
from lossray.errors import DataError, ModelError, StudyError
from lossray.networks.losses import cross_entropy, mse


class Own(nn.Module):
    """A module of a user's: batch norm, dropout, tied weights, a buffer, two inputs by keyword."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.1)
        self.again = self.norm
        self.last = nn.Linear(width, 3)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        hidden = self.drop(torch.tanh(self.norm(self.first(x))))
        outputs = self.scale * self.last(hidden)
        return outputs if shift is None else outputs + shift[:, None]


def plain(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


def examples(n: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    inputs = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return inputs, (inputs[:, :3] + inputs[:, 1:]).argmax(dim=1)


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    chosen = outputs.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    return (-((1 - chosen.exp()) ** 2) * chosen).mean()


def trained(make: Callable[[], nn.Module], seed: int, *, steps: int = 80) -> nn.Module:
    model = seeded(make, seed)
    inputs, targets = examples()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            focal(model(inputs), targets).backward()
            optimizer.step()
    return model


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "grads": [p.grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "trainable": [p.requires_grad for p in model.parameters()],
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    weights = all(torch.equal(a["weights"][name], tensor) for name, tensor in b["weights"].items())
    rest = all(x is y for key in ("grads",) for x, y in zip(a[key], b[key], strict=True))
    return weights and rest and a["modes"] == b["modes"] and a["trainable"] == b["trainable"]


def test_a_users_module_with_batch_norm_and_a_loss_of_its_own():
    a, b = trained(Own, 1), trained(Own, 2)
    a.train()
    b.eval()
    inputs, targets = examples()
    before, random = (state(a), state(b)), torch.get_rng_state()
    curve = lossray.connect(a, b, focal, (inputs, targets), steps=100, lr=0.02, batch_size=20)
    line = lossray.connect(a, b, focal, (inputs, targets), "line")
    table = curve.evaluate(points=9)
    middle = curve.at(0.5)
    assert torch.equal(torch.get_rng_state(), random)
    assert same(before[0], state(a))
    assert same(before[1], state(b))

    for t, end in ((0, a), (1, b)):
        model = curve.at(t)
        assert not model.training
        assert torch.equal(model(inputs), copy.deepcopy(end).eval()(inputs))
    assert type(middle) is Own
    assert middle.again is middle.norm
    assert not any(module.training for module in middle.modules())
    hidden = middle.first(inputs)
    torch.testing.assert_close(middle.norm.running_mean, hidden.mean(dim=0))
    torch.testing.assert_close(middle.norm.running_var, hidden.var(dim=0))
    assert table.t.tolist() == [i / 8 for i in range(9)]
    for t, loss in zip(table.t, table.loss, strict=True):
        assert loss == pytest.approx(focal(curve.at(t)(inputs), targets).item(), rel=1e-9)
    assert curve.barrier < 0.5 * line.barrier
    assert line.barrier > 0.05


def test_parameters_at_t_are_those_of_the_path():
    a, b = seeded(plain, 1), seeded(plain, 2)
    curve = lossray.connect(a, b, mse, examples(), "polychain", bends=2, steps=3)
    flat = nn.utils.parameters_to_vector(curve.at(0.4).parameters())
    assert torch.equal(flat, curve.path.at(0.4)[0])
    assert curve.path.points.shape == (4, 1, flat.numel())
    assert all(p.requires_grad and p.grad is None for p in curve.at(0.4).parameters())
    table = curve.evaluate(5)
    points = torch.stack([curve.path.at(t)[0] for t in [i / 3 for i in range(4)]])
    assert table.arc_length.iloc[-1] == pytest.approx(float(points.diff(dim=0).norm(dim=1).sum()))


def test_training_is_repeatable_and_the_seed_counts():
    a, b = seeded(Own, 1), seeded(Own, 2)
    first, second, other = (
        lossray.connect(a, b, focal, examples(), steps=5, batch_size=16, seed=seed).path.points
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_later_changes_of_the_models_do_not_count():
    a, b = seeded(plain, 1), seeded(plain, 2)
    inputs, _ = examples()
    line = lossray.connect(a, b, mse, examples(), "line")
    before = [line.at(t)(inputs) for t in (0, 0.5)]
    with torch.no_grad():
        for parameter in a.parameters():
            parameter.zero_()
    assert all(torch.equal(line.at(t)(inputs), own) for t, own in zip((0, 0.5), before, strict=True))


def test_the_orbit_of_a_rescaling_has_no_barrier():
    model = seeded(plain, 1)
    copied = lossray.rescale(model, {"0": [0.1, 0.2, 0.5, 1, 2, 4, 6, 8]})
    inputs, _ = examples()
    targets = model(inputs).detach()  # so that the loss is 0 at both ends
    orbit = lossray.connect(model, copied, mse, (inputs, targets), "geometric")
    assert orbit.barrier == pytest.approx(0, abs=1e-20)
    torch.testing.assert_close(orbit.at(0.3)(inputs), model(inputs), rtol=1e-11, atol=1e-12)
    assert lossray.connect(model, copied, mse, (inputs, targets), "line").barrier > 0.01
    other = seeded(plain, 2)
    with pytest.raises(ModelError, match="same signs"):
        lossray.connect(model, other, mse, (inputs, targets), "geometric")


def test_batches_weights_keywords_and_nests_mean_the_same():
    a, b = seeded(Own, 1), seeded(Own, 2)
    (inputs, targets), shift = examples(), torch.linspace(-1, 1, 60, dtype=torch.float64)

    def weighted(outputs: Tensor, given: dict[str, Tensor]) -> Tensor:
        rows = nn.functional.cross_entropy(outputs, given["class"], reduction="none")
        return (rows * given["weight"]).mean()

    weights = torch.linspace(0, 2, 60, dtype=torch.float64)
    whole = {"x": inputs, "shift": shift}
    nest = {"class": targets, "weight": weights}
    parts = [
        ({name: own[rows] for name, own in whole.items()}, targets[rows], weights[rows])
        for rows in (slice(0, 25), slice(25, 60))
    ]
    found = [
        lossray.connect(a, b, weighted, (whole, nest), steps=4, batch_size=16),
        lossray.connect(a, b, cross_entropy, (whole, targets, weights), steps=4, batch_size=16),
        lossray.connect(a, b, cross_entropy, parts, steps=4, batch_size=16),
    ]
    for other in found[1:]:
        torch.testing.assert_close(other.path.points, found[0].path.points, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other.losses([0, 0.5, 1]), found[0].losses([0, 0.5, 1]))


def test_frozen_parameters_stay_and_float32_is_kept():
    a, b = (seeded(plain, seed).float() for seed in (1, 2))
    for model in (a, b):
        model[0].bias.requires_grad_(False).zero_()
    inputs, targets = examples()
    curve = lossray.connect(a, b, cross_entropy, (inputs.float(), targets), steps=3)
    middle = curve.at(0.5)
    assert middle[0].weight.dtype == torch.float32
    assert not middle[0].bias.requires_grad
    assert torch.equal(middle[0].bias, torch.zeros(8))
    assert curve.path.points.shape[2] == 4 * 8 + 8 * 3 + 3


def test_gradients_that_are_switched_off_are_no_obstacle():
    a, b = seeded(plain, 1), seeded(plain, 2)
    points = lossray.connect(a, b, mse, examples(), steps=3).path.points
    with torch.no_grad():
        assert torch.equal(lossray.connect(a, b, mse, examples(), steps=3).path.points, points)
        assert not torch.is_grad_enabled()
    with torch.inference_mode(), pytest.raises(ModelError, match="inference_mode"):
        lossray.connect(a, b, mse, examples(), steps=3)


# ---- errors


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: plain(9), r"parameter '0.weight' is \[8, 4\] in model_a and \[9, 4\] in model_b"),
        (lambda: nn.Sequential(*plain()[:2]), "model_a has parameter '2.weight' and model_b has not"),
        (
            lambda: nn.Sequential(nn.Identity(), *plain()),
            "parameter '0.weight' where model_b has parameter '1.",
        ),
        (
            lambda: nn.Sequential(*plain(), nn.BatchNorm1d(3, affine=False)),
            "model_b has buffer '3.running_mean'",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
            "weights in model_a's architecture",
        ),
        (lambda: plain().requires_grad_(False), r"is \[8, 4\] in model_a and \[8, 4\] \(frozen\) in model_b"),
    ],
)
def test_models_of_different_architectures_are_refused(other, message):
    with pytest.raises(ModelError, match=message):
        lossray.connect(seeded(plain, 1), seeded(other, 2), mse, examples(), "line")


def test_frozen_parameters_must_agree():
    a, b = seeded(plain, 1), seeded(plain, 2)
    for model in (a, b):
        model[0].bias.requires_grad_(False)
    with pytest.raises(ModelError, match=r"the frozen parameter '0.bias' differs"):
        lossray.connect(a, b, mse, examples(), "line")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "beziers"}, "kind: found 'beziers'; .*did you mean 'bezier'"),
        ({"bends": 0}, "bends: found 0"),
        ({"bends": 1.5}, "bends: found 1.5"),
        ({"bends": "2"}, "bends: found '2'"),
        ({"steps": 0}, "steps: "),
        ({"batch_size": 0}, "batch_size: .*found 0"),
        ({"lr": -1.0}, "lr: "),
        ({"optimizer": "adamm"}, "optimizer: found 'adamm'; .*did you mean 'adam'"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(StudyError, match=message):
        lossray.connect(seeded(plain, 1), seeded(plain, 2), mse, examples(), **arguments)


def test_places_and_points_out_of_range():
    line = lossray.connect(seeded(plain, 1), seeded(plain, 2), mse, examples(), "line")
    with pytest.raises(StudyError, match=r"t: found 1.5; allowed: 0 to 1"):
        line.at(1.5)
    with pytest.raises(StudyError, match="points: found 1"):
        line.evaluate(1)


def test_data_and_losses_that_cannot_be_used():
    a, b = seeded(plain, 1), seeded(plain, 2)
    with pytest.raises(DataError, match="one entry for each example"):
        lossray.connect(a, b, mse, (torch.zeros(4, 4), torch.zeros(3, 3)))
    with pytest.raises(ModelError, match="a mean over minibatches would be wrong"):
        lossray.connect(a, b, lambda y, t: mse(y, t) * len(y), examples(), batch_size=16)
    with pytest.raises(ModelError, match="model: found int"):
        lossray.connect(a, 3, mse, examples())
    with pytest.raises(ModelError, match="connect, loss: found NoneType"):
        lossray.connect(a, b, None, examples())
    broken = copy.deepcopy(b)
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"parameter '0.weight' of model_b has values that are not finite"):
        lossray.connect(a, broken, mse, examples())
    inputs, targets = examples()
    wide = [(torch.zeros(3, 2, 4).double(), torch.zeros(3, 2, 3).double()), (inputs, targets)]
    with pytest.raises(DataError, match=r"examples of the shapes \[2, 4\], \[4\]"):
        lossray.connect(a, b, lambda y, t: y.square().flatten(1).sum(dim=1).mean(), wide)


def test_a_training_that_diverges_is_an_error():
    a, b = seeded(plain, 1), seeded(plain, 2)
    with pytest.raises(ModelError, match="diverged at lr = 1e\\+09; pass less"):
        lossray.connect(a, b, mse, examples(), optimizer="sgd", lr=1e9, steps=20)


class _Product(nn.Module):
    """Two inputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, user, item):
        return self.left(user) * self.right(item)


def test_inputs_in_every_form_give_one_path():
    """Class weights in float32 beside models in float64 too."""
    torch.manual_seed(0)
    ends = [_Product().double() for _ in "ab"]
    user, item, y = torch.randn(15, 3), torch.randn(15, 4), torch.arange(15) % 2
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0]))
    forms = ((user, item), [user, item], {"item": item, "user": user})
    losses = [lossray.connect(*ends, loss, (form, y), "line").losses([0.0, 0.3, 1.0]) for form in forms]
    assert all(torch.equal(own, losses[0]) for own in losses)
    expected = nn.functional.cross_entropy(ends[1](user.double(), item.double()), y)
    torch.testing.assert_close(losses[0][2], expected.detach())
