"""`rescale` and `balance`: another model, the same function; and which architectures are refused."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import lossray
from lossray.errors import ModelError
from lossray.networks.layout import layout_of
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.symmetry import rescaling_symmetry


def built(**settings: object) -> nn.Module:
    return build_model(model_settings(settings), (1, 8, 8), 3)


class Tokens(nn.Module):
    """[B, 1, 8, 8] as 8 tokens, which are flattened after a layer of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 5)
        self.output = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.relu(self.hidden(x)).flatten(1))


class Recurrent(nn.Module):
    """A layer that is called twice, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(64, 4), nn.Linear(4, 4)
        self.hidden, self.output = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        return self.output(torch.relu(self.hidden(x)))


class Across(nn.Module):
    """Its first linear layer mixes the pixels of a row, not the channels: those cannot be rescaled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rows, self.output = nn.Conv2d(1, 8, 1), nn.Linear(8, 8), nn.Linear(512, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.rows(torch.relu(self.conv(x))).flatten(1))


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*copy.deepcopy(layers))


conv, head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(256, 3)
NETWORKS = {
    "linear": lambda: built(name="linear", widths=[5, 4]),
    "mlp": lambda: built(name="mlp", widths=[5, 4], dropout=0.5),
    "mlp, batch norm": lambda: built(name="mlp", widths=[5, 4], norm="batch"),
    "mlp, layer norm": lambda: built(name="mlp", widths=[5, 4], norm="layer"),
    "cnn": lambda: built(name="cnn", channels=[2, 4], kernel=3, widths=[5]),
    "cnn, group norm": lambda: built(name="cnn", channels=[2, 4], kernel=3, widths=[], norm="group"),
    "resnet": lambda: built(name="resnet", width=2),
    "resnet without norm": lambda: built(name="resnet", width=2, norm="none"),
    "vit, relu": lambda: built(name="vit", dim=8, depth=1, activation="relu"),
    "depthwise": chain(
        conv, nn.LeakyReLU(), nn.Conv2d(4, 8, 3, groups=4), nn.PReLU(), nn.Flatten(), nn.Linear(288, 3)
    ),
    "layer norm on images": chain(conv, nn.LayerNorm((4, 8, 8)), nn.ReLU(), nn.Flatten(), head),
    "norm before activation": chain(
        conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), head
    ),
    "global pooling": chain(conv, nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    "tokens": Tokens,
    "one shared layer": Recurrent,
    "across rows": Across,
}


def random_factors(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    groups = rescaling_symmetry(model, layout_of(model)).groups
    sizes = {name: units.stop - units.start for name, units in groups.items()}
    return {name: torch.randn(size, generator=generator).exp() for name, size in sizes.items()}


def shaken(build: Callable[[], nn.Module]) -> nn.Module:
    """In float64, with biases, affine parameters and running statistics away from their defaults."""
    model = build().double()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.train(model(images()) is None)


def images() -> Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_function_stays_and_the_weights_do_not(network):
    model = shaken(NETWORKS[network])
    before = copy.deepcopy(model.state_dict())
    expected = model(images())
    for other in (lossray.rescale(model, random_factors(model)), lossray.balance(model)):
        assert not other.training
        torch.testing.assert_close(other(images()), expected, rtol=1e-12, atol=1e-12)
        moved = [not torch.equal(p, before[name]) for name, p in other.named_parameters()]
        assert sum(moved) >= 2
        assert all(torch.equal(b, before[name]) for name, b in other.named_buffers())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("network", ["mlp, batch norm", "cnn, group norm", "resnet"])
def test_the_function_stays_in_train_mode_too(network):
    model = shaken(NETWORKS[network]).train()
    other = lossray.rescale(model, random_factors(model))
    assert other.training
    torch.testing.assert_close(other(images()), model(images()), rtol=1e-12, atol=1e-12)


def test_powers_of_two_are_exact_and_numbers_sequences_and_tensors_the_same():
    model = built(name="mlp", widths=[3, 2])
    first = lossray.rescale(model, {"hidden1": 4, "hidden2": [0.5, 8.0]})
    second = lossray.rescale(model, {"hidden2": torch.tensor([0.5, 8.0]), "hidden1": (4.0, 4.0, 4.0)})
    x = images().float()
    assert torch.equal(first(x), model(x))
    assert torch.equal(first.hidden1.weight, 4 * model.hidden1.weight)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.hidden1.weight.dtype == torch.float32


def test_with_a_norm_the_affine_parameters_carry_the_factor():
    model = built(name="cnn", channels=[2], kernel=3, widths=[], norm="batch")
    other = lossray.rescale(model, {"norm1": 2})
    assert torch.equal(other.conv1.weight, model.conv1.weight)
    assert torch.equal(other.norm1.weight, 2 * model.norm1.weight)
    assert torch.equal(other.output.weight, model.output.weight / 2)


def test_balance_undoes_rescale_and_has_the_least_norm():
    model = shaken(NETWORKS["resnet"])
    balanced = lossray.balance(model)
    again = lossray.balance(lossray.rescale(model, random_factors(model)))
    for one, other in zip(balanced.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
    norms = [sum(float(p.detach().square().sum()) for p in m.parameters()) for m in (balanced, model)]
    assert norms[0] < norms[1]


def test_modes_and_requires_grad_stay_and_a_compiled_model_gives_a_plain_one():
    model = shaken(NETWORKS["mlp, batch norm"])
    model.norm1.train()
    model.output.bias.requires_grad_(False)  # no hidden unit's
    model(images()).sum().backward()
    other = lossray.balance(torch.compile(model))
    assert type(other) is nn.Sequential
    assert (other.training, other.norm1.training, other.norm2.training) == (False, True, False)
    assert not other.output.bias.requires_grad
    assert other.hidden1.weight.requires_grad
    assert other.hidden1.weight.grad is None


@pytest.mark.parametrize(
    ("network", "cause"),
    [
        (lambda: built(name="mlp", activation="gelu"), r"activation1 \(GELU\) is not positively homogeneous"),
        (lambda: built(name="cnn", activation="tanh"), r"activation1 \(Tanh\)"),
        (lambda: built(name="resnet", activation="gelu"), r"activation \(GELU\)"),
        (lambda: built(name="vit"), r"VisionTransformer has no .* blocks.0.activation \(GELU\)"),
        (lambda: built(name="mlp", widths=[]), "no hidden layer to rescale"),
        (chain(conv, nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten(), head), "no affine parameters"),
        (chain(conv, nn.ReLU(), nn.Softmax(dim=1), nn.Flatten(), head), r"2 \(Softmax\) is not known"),
        (chain(nn.Flatten(), weight_norm(nn.Linear(64, 4)), nn.ReLU(), nn.Linear(4, 3)), "Parametrized"),
    ],
)
def test_architectures_without_the_symmetry_are_refused_by_name(network, cause):
    model = network()
    for function in (lossray.balance, lambda m: lossray.rescale(m, {})):
        with pytest.raises(ModelError, match=cause):
            function(model)


def test_a_norm_over_several_axes_is_refused_without_asking_for_inputs_that_are_there():
    model = chain(conv, nn.LayerNorm([8, 8]), nn.ReLU(), nn.Flatten(), head)()
    with pytest.raises(ModelError, match=r"LayerNorm\) normalises along axes other than") as refused:
        lossray.balance(model, images())
    assert "data=" not in str(refused.value)


def test_layers_with_frozen_shared_or_misaligned_weights_are_no_hidden_units():
    model = built(name="mlp", widths=[5, 4])
    model.hidden1.bias.requires_grad_(False)
    with pytest.raises(ModelError, match=r"found 'hidden1'; allowed: hidden2"):
        lossray.rescale(model, {"hidden1": 2})
    model.output.weight.requires_grad_(False)
    with pytest.raises(ModelError, match="not trainable"):
        lossray.balance(model)
    tied = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    tied[3].weight = tied[1].weight
    with pytest.raises(ModelError, match=r"1.weight is used in more than one place"):
        lossray.balance(tied)
    for network, layers in ((Recurrent(), ["hidden"]), (Across(), ["rows"])):
        assert list(rescaling_symmetry(network, layout_of(network)).groups) == layers


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"hiden1": 2.0}, r"found 'hiden1'; allowed: hidden1, hidden2; did you mean 'hidden1'\?"),
        ({"hidden1": [1.0, 2.0]}, r"'hidden1': found shape \[2\]; allowed: one number for all, or 3"),
        ({"hidden2": [1.0, -2.0]}, r"'hidden2': found -2.0; allowed: finite and above 0"),
        ({"hidden1": 0}, "found 0.0; allowed"),
        ({"hidden1": float("inf")}, "found inf; allowed"),
        ({"hidden1": float("nan")}, "found nan; allowed"),
        ({"hidden1": "two"}, "found 'two'; allowed: positive numbers"),
        ({0: 2.0}, "found '0'; allowed: hidden1, hidden2"),
        ([2.0], "factors: found list; allowed: a dict"),
    ],
)
def test_factors_that_cannot_be_used_are_refused(factors, message):
    with pytest.raises(ModelError, match=message):
        lossray.rescale(built(name="mlp", widths=[3, 2]), factors)


def test_what_is_no_module_is_refused():
    for change in (lossray.balance, lambda model: lossray.rescale(model, {})):
        with pytest.raises(ModelError, match=r"model: found int; allowed: a torch\.nn\.Module"):
            change(3)


def test_weights_that_are_not_finite_have_no_balanced_gauge():
    model = built(name="mlp", widths=[3])
    model.hidden1.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        lossray.balance(model)
