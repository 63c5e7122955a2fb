"""A module with weights that hooks compute is left as it was, and has the curvature of its own function."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import lossray
from lossray.networks.as_found import copied
from lossray.networks.stack import stack_models

D = torch.float64
X = torch.randn(18, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(18) % 3


def pruned(layer):
    prune.random_unstructured(layer, "weight", 0.4)
    prune.l1_unstructured(layer, "bias", 1)


def spectral(layer):
    nn.utils.spectral_norm(layer)
    layer(X)  # a power iteration


MAKERS = {
    "pruning": pruned,
    "weight norm": nn.utils.weight_norm,
    "spectral norm": spectral,
    "parametrised": parametrizations.orthogonal,
}


def hooked(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    MAKERS[name](model[0])
    return model.eval()


def plain_state(model):
    weight = model[0].weight
    return id(weight), weight.dtype, weight.requires_grad, weight.grad_fn, weight.detach().clone()


def explicit(model, x, y):
    """The loss in float64 without hooks, as a function of the parameters by name."""
    own = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    buffers = {name: b.double() for name, b in model.named_buffers()}
    if "0.weight_mask" in buffers:
        weight, bias = (
            own["0.weight_orig"] * buffers["0.weight_mask"],
            own["0.bias_orig"] * buffers["0.bias_mask"],
        )
    elif "0.weight_g" in own:
        v = own["0.weight_v"]
        weight, bias = own["0.weight_g"] * v / v.square().sum(1, keepdim=True).sqrt(), own["0.bias"]
    else:
        v = own["0.weight_orig"]
        weight, bias = v / (buffers["0.weight_u"] @ v @ buffers["0.weight_v"]), own["0.bias"]
    hidden = torch.tanh(x.double() @ weight.T + bias)
    return nn.functional.cross_entropy(hidden @ own["2.weight"].T + own["2.bias"], y), list(own.values())


@pytest.mark.parametrize("name", ["pruning", "weight norm", "spectral norm"])
def test_weights_that_hooks_compute(name):
    model = hooked(name)
    with torch.no_grad():
        model(X)
    before = plain_state(model)
    matrix = lossray.Hessian(model, nn.functional.cross_entropy, (X, Y), dtype=D)
    vector = torch.linspace(-1, 1, matrix.shape[0], dtype=D)
    product = matrix @ vector
    assert plain_state(model)[:4] == before[:4]
    assert torch.equal(plain_state(model)[4], before[4])
    copy.deepcopy(model)

    loss, weights = explicit(model, X, Y)
    gradient = torch.autograd.grad(loss, weights, create_graph=True)
    flat = torch.cat([part.reshape(-1) for part in gradient])
    rows = torch.autograd.grad(flat, weights, vector)
    torch.testing.assert_close(product, torch.cat([row.reshape(-1) for row in rows]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", MAKERS)
def test_a_model_that_was_called_with_a_graph_is_copied_all_the_same(name):
    model = hooked(name)
    model(X).sum().backward()
    twin = copied(model)
    with torch.no_grad():
        assert torch.equal(twin(X), model(X))
    assert all(a is not b for a, b in zip(twin.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_a_stack_holds_no_weight_of_its_members(name):
    stack, theta, buffers = stack_models([hooked(name)], executor="loop", dtype=torch.float32)
    losses = stack.losses(theta.requires_grad_(), buffers, X, Y, nn.functional.cross_entropy)
    torch.testing.assert_close(losses[0], nn.functional.cross_entropy(hooked(name)(X), Y))
    module = stack.module(theta.detach()[0], {key: value[0] for key, value in buffers.items()})
    torch.testing.assert_close(module(X), hooked(name)(X))


class Remembers(nn.Module):
    """Keeps what it computed, as models do that are looked into."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.seen = None
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.hidden = self.seen = self.layer(x)
        return self.hidden


def test_what_a_forward_pass_keeps_is_what_the_users_own_call_kept():
    model = Remembers()
    lossray.Hessian(model, nn.functional.cross_entropy, (X, Y), dtype=D)
    assert model.seen is None
    assert not hasattr(model, "hidden")
    assert model.calls > 0  # what is no tensor is the model's own business
    own = model(X)
    lossray.Hessian(model, nn.functional.cross_entropy, (X, Y), dtype=D)
    assert model.seen is own
    assert model.hidden is own
