"""The graph of a model: kinds in order, and values that equal the model's own."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossray.errors import ModelError
from lossray.networks.architecture import KINDS, graph_of
from lossray.networks.dropout import NoiseTape, replace_dropout
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings


def built(**settings: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(model_settings(settings), (1, 8, 8), 10).eval()


class Plain(nn.Module):
    """In the manner of torchvision: in-place activations and sums, one activation for all places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.conv1(x)))
        z = self.conv2(y)
        z += y
        z = F.dropout(F.max_pool2d(self.relu(z), 2), 0.5, self.training)
        return self.fc(z.view(z.size(0), -1))


class Calls(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv1(x))
        y = F.avg_pool2d(torch.tanh(self.conv2(y).relu()), 2)
        flat = torch.flatten(y, start_dim=1)
        return self.fc(flat.reshape(flat.shape[0], -1).view(-1, 64))


class Functional(Plain):
    """Weights that reach a function, a partial mean, and sizes that are computed with."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.conv1.weight, padding=1)
        batch, channels = y.size(0), y.shape[1]
        y = y.view(batch, channels // 2, -1).mean(2)
        return y.mean(dim=-1, keepdim=True) + self.fc.bias


class Branching(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x) if x.sum() > 0 else self.conv2(x)


class Counting(nn.Module):
    """Its forward changes a buffer and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) + torch.randn(2)


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    values: dict[str, Any] = {}
    for node in graph_of(model):
        values[node.name] = (
            x if node.kind == "input" else node.function(*(values[name] for name in node.inputs))
        )
    return values[next(reversed(values))]


def kinds(model: nn.Module) -> list[str]:
    return [node.kind for node in graph_of(model)]


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "linear"},
        {"name": "mlp", "norm": "batch", "dropout": 0.1},
        {"name": "cnn", "norm": "group"},
        {"name": "resnet", "dropout": 0.2},
        {"name": "vit"},
    ],
    ids=lambda settings: settings["name"],
)
def test_the_nodes_compute_what_the_built_in_models_do(settings):
    model = built(**settings)
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(evaluated(model, images), model(images))
    assert set(kinds(model)) <= set(KINDS)


@pytest.mark.parametrize("build", [Plain, Calls, Functional])
def test_the_nodes_compute_what_a_users_model_does(build):
    model = build().eval()
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(evaluated(model, images), model(images))


def test_kinds_of_a_chain_and_names_of_its_layers():
    graph = graph_of(built(name="cnn", channels=[4], widths=[5], norm="batch", dropout=0.1))
    assert [(node.name, node.kind) for node in graph[1:-1]] == [
        ("conv1", "conv"),
        ("norm1", "norm"),
        ("activation1", "homogeneous"),
        ("pool1", "pool"),
        ("flatten", "flatten"),
        ("hidden1", "linear"),
        ("hidden1_activation", "homogeneous"),
        ("dropout1", "dropout"),
        ("output", "linear"),
    ]
    assert all(after.inputs == (before.name,) for before, after in pairwise(graph))


def test_a_mean_over_the_image_is_a_pool_and_a_flatten_and_a_second_call_is_numbered():
    graph = {node.name: node for node in graph_of(built(name="resnet"))}
    assert graph["add"].inputs == ("stage1.0.norm2", "stage1.0.shortcut")
    assert graph["stage1.0.activation#2"].module is graph["stage1.0.activation"].module
    assert (graph["mean"].kind, graph["mean.flatten"].kind) == ("pool", "flatten")


def test_calls_have_the_kinds_of_the_layers():
    assert " ".join(kinds(Plain())) == (
        "input conv norm homogeneous conv add homogeneous maxpool dropout flatten linear output"
    )
    assert " ".join(kinds(Calls())) == (
        "input conv homogeneous conv homogeneous smooth pool flatten flatten flatten linear output"
    )


def test_layers_of_the_users_own_model_and_lossrays_dropout():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    replace_dropout(model, NoiseTape())
    graph = graph_of(model)
    assert [node.kind for node in graph] == ["input", "linear", "dropout", "linear", "output"]
    assert graph[1].module is model[0]
    assert kinds(nn.Linear(3, 2)) == ["input", "linear", "output"]


def test_compiled_modules_are_unwrapped():
    inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model = nn.Sequential(torch.compile(inner), nn.Linear(4, 2))
    assert [node.name for node in graph_of(model)[1:-1]] == ["0.0", "0.1", "1"]
    assert kinds(torch.compile(model)) == ["input", "linear", "homogeneous", "linear", "output"]


def test_what_is_not_the_layer_it_looks_like_is_other():
    class Squared(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 2

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    layers = (Squared(3, 3), normed, nn.Softmax(dim=1), nn.Flatten(0), nn.MultiheadAttention(3, 1))
    for layer in layers:
        assert kinds(nn.Sequential(layer)) == ["input", "other", "output"]
    assert "pool" not in kinds(Functional())  # means over other axes than the image's


def test_a_module_that_cannot_be_traced_is_one_node_and_a_model_is_refused():
    assert kinds(nn.Sequential(nn.Conv2d(1, 1, 3), Branching(), nn.ReLU())) == (
        ["input", "conv", "other", "homogeneous", "output"]
    )
    with pytest.raises(ModelError, match=r"operations of Branching .* control flow"):
        graph_of(Branching())


def test_the_model_and_torchs_generator_are_left_as_found():
    model = Counting()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    graph_of(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
