"""Permutations of hidden channels: the same function, which groups there are, and what is refused."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lossray.errors import ModelError
from lossray.networks.models import build_model
from lossray.networks.permutations import permutation_symmetry, permute
from lossray.networks.settings import model_settings


def built(**settings: object) -> nn.Module:
    return build_model(model_settings(settings), (1, 8, 8), 3)


class Tokens(nn.Module):
    """[B, 1, 8, 8] as 8 tokens, normalised one by one, and flattened after a layer of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.output = nn.Linear(8, 5), nn.LayerNorm(5), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.sigmoid(self.norm(self.hidden(x))).flatten(1))


class Joined(nn.Module):
    """Its inner layer joins the units to themselves, and its sum makes one group of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.output = nn.Linear(64, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        return self.output(x + torch.tanh(self.inner(x)))


class Recurrent(nn.Module):
    """A layer that is called twice, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(64, 4), nn.Linear(4, 4)
        self.hidden, self.output = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.twice(torch.tanh(self.first(x.flatten(1))))))
        return self.output(torch.tanh(self.hidden(x)))


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*copy.deepcopy(layers))


conv, head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(256, 3)
NETWORKS = {
    "linear": (lambda: built(name="linear", widths=[5, 4]), {"hidden1": 5, "hidden2": 4}),
    "mlp": (lambda: built(name="mlp", widths=[5, 4], dropout=0.5), {"hidden1": 5, "hidden2": 4}),
    "tanh": (lambda: built(name="mlp", widths=[5], activation="tanh"), {"hidden1": 5}),
    "gelu, batch norm": (
        lambda: built(name="mlp", widths=[5, 4], norm="batch", activation="gelu"),
        {"hidden1": 5, "hidden2": 4},
    ),
    "layer norm": (lambda: built(name="mlp", widths=[5, 4], norm="layer"), {"hidden1": 5, "hidden2": 4}),
    "cnn": (
        lambda: built(name="cnn", channels=[3, 4], kernel=3, widths=[5]),
        {"conv1": 3, "conv2": 4, "hidden1": 5},
    ),
    "cnn, batch norm": (
        lambda: built(name="cnn", channels=[3, 4], kernel=3, widths=[], norm="batch", activation="gelu"),
        {"conv1": 3, "conv2": 4},
    ),
    "cnn, group norm": (  # of 1 group, and of 2
        lambda: built(name="cnn", channels=[6, 8], kernel=3, widths=[5], norm="group"),
        {"conv1": 6, "hidden1": 5},
    ),
    "resnet": (
        lambda: built(name="resnet", width=2),
        {
            "conv": 2,
            "stage1.0.conv1": 2,
            "stage2.0.conv1": 4,
            "stage2.0.conv2": 4,
            "stage3.0.conv1": 8,
            "stage3.0.conv2": 8,
        },
    ),
    "deeper resnet without norm": (
        lambda: built(name="resnet", width=2, depth=14, norm="none", activation="tanh"),
        {"conv": 2}
        | {f"stage1.{i}.conv1": 2 for i in (0, 1)}
        | {"stage2.0.conv1": 4, "stage2.0.conv2": 4, "stage2.1.conv1": 4}
        | {"stage3.0.conv1": 8, "stage3.0.conv2": 8, "stage3.1.conv1": 8},
    ),
    "vit": (lambda: built(name="vit", dim=8, depth=1), {"blocks.0.hidden": 32}),
    "tokens": (Tokens, {"hidden": 5}),
    "joined": (Joined, {"first": 6}),
    "norm after flatten": (
        chain(conv, nn.PReLU(4), nn.Flatten(), nn.BatchNorm1d(256), nn.PReLU(256), head),
        {"0": 4},
    ),
    "layer norm on images": (chain(conv, nn.LayerNorm((4, 8, 8)), nn.ELU(), nn.Flatten(), head), {"0": 4}),
    "layer norm on pixels": (chain(conv, nn.LayerNorm((8, 8)), nn.PReLU(), nn.Flatten(), head), {"0": 4}),
    "instance norm": (
        chain(
            conv, nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Tanh(), nn.Flatten(), head
        ),
        {"0": 4},
    ),
    "group norm of single channels": (
        chain(conv, nn.GroupNorm(4, 4), nn.Tanh(), nn.Flatten(), head),
        {"0": 4},
    ),
    "global pooling": (
        chain(conv, nn.SiLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        {"0": 4},
    ),
    "norm of the tokens": (
        chain(nn.Linear(8, 4), nn.BatchNorm2d(1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)),
        {"0": 4},
    ),
    "recurrent": (Recurrent, {"hidden": 5}),
    "grouped convolution": (
        chain(
            conv,
            nn.Conv2d(4, 4, 3, groups=2),
            nn.ReLU(),
            nn.Conv2d(4, 5, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(180, 3),
        ),
        {"3": 5},
    ),
}


def images() -> Tensor:
    return torch.randn(6, 1, 8, 8, dtype=torch.float64)


def shaken(build: Callable[[], nn.Module]) -> nn.Module:
    """In float64 and eval mode, with biases, affine parameters and running statistics of their own."""
    model = build().double()
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    affine = {id(parameter) for norm in norms for parameter in norm.parameters()}
    for parameter in model.parameters():
        if parameter.ndim == 1 or id(parameter) in affine:
            parameter.data += 0.3 * torch.randn_like(parameter)
    for buffer in model.buffers():
        if buffer.ndim:
            buffer += torch.rand_like(buffer)
    return model.eval()


def rolled(model: nn.Module) -> dict[str, Tensor]:
    """No channel stays."""
    return {name: torch.arange(n).roll(1) for name, n in permutation_symmetry(model).groups.items()}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_function_stays_and_every_group_moves(network):
    build, groups = NETWORKS[network]
    model = shaken(build)
    before = copy.deepcopy(model.state_dict())
    symmetry, x = permutation_symmetry(model), images()
    assert symmetry.groups == groups
    for group, permutation in rolled(model).items():
        other = permute(model, {group: permutation})
        assert not other.training
        torch.testing.assert_close(other(x), model(x), rtol=1e-12, atol=1e-12)
        moved = {n for n, tensor in other.state_dict().items() if not torch.equal(tensor, before[n])}
        assert moved == {use.tensor for use in symmetry.uses[group]}
        assert {use.outgoing for use in symmetry.uses[group]} == {True, False}
    together = permute(model, rolled(model))
    torch.testing.assert_close(together(x), model(x), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("network", ["gelu, batch norm", "cnn, batch norm", "resnet", "norm after flatten"])
def test_the_function_stays_in_train_mode_too_and_running_statistics_go_with_the_channels(network):
    model = shaken(NETWORKS[network][0])
    x = images()
    other = permute(model.train(), rolled(model))
    assert other.training
    torch.testing.assert_close(other(x), model(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("network", ["gelu, batch norm", "cnn, batch norm", "resnet", "joined"])
def test_the_inverse_takes_it_back_exactly(network):
    model = shaken(NETWORKS[network][0])
    forth = rolled(model)
    other = permute(model, {name: p.tolist() for name, p in forth.items()})
    again = permute(other, {name: p.argsort() for name, p in forth.items()})
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_channel_c_becomes_what_channel_p_of_c_was():
    model = shaken(NETWORKS["gelu, batch norm"][0])
    p = [2, 0, 1, 4, 3]
    other = permute(model, {"hidden1": p})
    assert torch.equal(other.hidden1.weight, model.hidden1.weight[p])
    assert torch.equal(other.norm1.bias, model.norm1.bias[p])
    assert torch.equal(other.norm1.running_var, model.norm1.running_var[p])
    assert torch.equal(other.hidden2.weight, model.hidden2.weight[:, p])
    assert torch.equal(other.hidden2.bias, model.hidden2.bias)


def test_the_pixels_of_a_channel_lie_together_after_a_flatten_and_those_of_a_token_apart():
    uses = permutation_symmetry(NETWORKS["cnn"][0]()).uses["conv2"]
    (columns,) = [use.elements for use in uses if use.outgoing]
    assert columns[:, :4].tolist() == [[4 * c, 4 * c + 1, 4 * c + 2, 4 * c + 3] for c in range(4)]
    (columns,) = [use.elements for use in permutation_symmetry(Tokens()).uses["hidden"] if use.outgoing]
    assert columns[:, :8].tolist() == [[5 * token + c for token in range(8)] for c in range(5)]


def test_modes_dtype_and_requires_grad_stay_and_a_compiled_model_gives_a_plain_one():
    model = built(name="mlp", widths=[5, 4], norm="batch")
    model.norm1.eval()
    model.output.bias.requires_grad_(False)  # no hidden channel's
    model(images().float()).sum().backward()
    other = permute(torch.compile(model), rolled(model))
    assert type(other) is nn.Sequential
    assert (other.training, other.norm1.training, other.norm2.training) == (True, False, True)
    assert other.hidden1.weight.dtype == torch.float32
    assert not other.output.bias.requires_grad
    assert other.hidden1.weight.grad is None
    assert model.hidden1.weight.grad is not None


@pytest.mark.parametrize(
    ("network", "cause"),
    [
        (lambda: built(name="mlp", widths=[]), "it has no hidden layer"),
        (chain(conv, nn.Softmax(dim=1), nn.Flatten(), head), r"1 \(Softmax\) is not known to treat"),
        (
            chain(conv, nn.GroupNorm(2, 4), nn.Flatten(), head),
            r"1 \(GroupNorm\) does not normalise all channels",
        ),
        (
            chain(conv, nn.Conv2d(4, 4, 1, groups=4), nn.Flatten(), head),
            r"1 \(Conv2d\) is a grouped convolution",
        ),
        (chain(conv, nn.Flatten(2), nn.MultiheadAttention(64, 2)), "not known to treat all channels alike"),
        (chain(nn.Flatten(), weight_norm(nn.Linear(64, 4)), nn.ReLU(), nn.Linear(4, 3)), "Parametrized"),
        (chain(nn.Linear(8, 4), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)), "pools an axis of channels"),
        (
            chain(conv, nn.ReLU(), nn.Linear(8, 8), nn.Flatten()),
            r"2 \(Linear\) takes the channels along another",
        ),
    ],
)
def test_where_nothing_can_be_permuted_the_message_names_what_is_in_the_way(network, cause):
    model = network()
    with pytest.raises(ModelError, match=f"no hidden channels that can be permuted: .*{cause}"):
        permute(model, {})


def test_channels_with_frozen_or_shared_weights_stay():
    model = built(name="mlp", widths=[5, 4], norm="batch")
    model.norm1.bias.requires_grad_(False)
    assert permutation_symmetry(model).groups == {"hidden2": 4}
    model = built(name="mlp", widths=[4, 4, 5], norm="batch")
    model.norm2.running_var = model.norm1.running_var
    assert permutation_symmetry(model).groups == {"hidden3": 5}
    tied = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    tied[3].weight = tied[1].weight
    with pytest.raises(ModelError, match=r"1.weight is used in more than one place"):
        permutation_symmetry(tied)


@pytest.mark.parametrize(
    ("permutations", "message"),
    [
        ({"hiden1": [0, 1, 2]}, r"found 'hiden1'; allowed: hidden1, hidden2; did you mean 'hidden1'\?"),
        ({"hidden1": [0, 1]}, r"'hidden1': found \[0, 1\]; allowed: each of 0 to 2 once"),
        ({"hidden1": [0, 1, 1]}, "each of 0 to 2 once"),
        ({"hidden1": [0.0, 1.0, 2.0]}, "each of 0 to 2 once"),
        ({"hidden2": "10"}, "found '10'; allowed: each of 0 to 1 once"),
        ([0, 1, 2], "permutations: found list; allowed: a dict"),
    ],
)
def test_permutations_that_cannot_be_used_are_refused(permutations, message):
    with pytest.raises(ModelError, match=message):
        permute(built(name="mlp", widths=[3, 2]), permutations)


def test_what_is_no_module_is_refused():
    with pytest.raises(ModelError, match=r"model: found int; allowed: a torch\.nn\.Module"):
        permute(3, {})


def test_tensors_that_are_not_given_are_passed_over():
    model = built(name="mlp", widths=[3], norm="batch")
    symmetry = permutation_symmetry(model)
    own = {name: tensor.detach() for name, tensor in model.named_parameters()}
    moved = symmetry.apply(own, {"hidden1": torch.tensor([2, 0, 1])})
    assert set(moved) == set(own)
    assert torch.equal(moved["hidden1.bias"], own["hidden1.bias"][[2, 0, 1]])
