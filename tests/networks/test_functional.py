"""Calls with other tensors: every place of a tied one, and nothing left behind."""

from collections import UserDict, namedtuple

import torch
from torch import nn

import lossray
from lossray.networks.functional import call_model, call_with


class Twice(nn.Module):
    """One layer under two names, one parameter in two layers, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.first.weight
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x):
        return self.tied(self.again(self.first(x))) + self.shift


def snapshot(model):
    return [
        (name, key, id(tensor))
        for name, module in model.named_modules(remove_duplicate=False)
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
    ]


def test_all_places_of_a_tensor_are_exchanged_and_set_back():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(4, 3)
    names = ["first.weight", "first.bias", "tied.bias", "shift"]
    weight, bias, last, shift = tensors = [torch.randn(3, 3), *torch.randn(3, 3)]
    before = snapshot(model)
    found = call_with(model, dict(zip(names, tensors, strict=True)), x)
    hidden = (x @ weight.T + bias) @ weight.T + bias
    torch.testing.assert_close(found, hidden @ weight.T + last + shift)
    assert snapshot(model) == before
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())


def test_what_is_not_given_stays_the_models_own():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(4, 3)
    own = model(x)
    torch.testing.assert_close(call_with(model, {"shift": torch.zeros(3)}, x), own - 1)
    torch.testing.assert_close(call_with(model, {}, x), own)


def test_a_hessian_leaves_a_layer_with_two_names_as_it_was():
    torch.manual_seed(0)
    model = Twice()
    before = snapshot(model)
    hessian = lossray.Hessian(model, nn.functional.mse_loss, (torch.randn(9, 3), torch.randn(9, 3)))
    hessian @ torch.ones(15)
    assert snapshot(model) == before
    assert hessian.shape == (15, 15)


class Product(nn.Module):
    """Two inputs of different widths."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(5, 2)

    def forward(self, user, item):
        return self.left(user) * self.right(item)


def test_mappings_are_keywords_and_tuples_and_lists_are_arguments():
    torch.manual_seed(0)
    model, user, item = Product(), torch.randn(7, 3), torch.randn(7, 5)
    expected = model(user, item)
    pair = namedtuple("Pair", "user item")(user, item)
    for inputs in (
        (user, item),
        [user, item],
        pair,
        {"item": item, "user": user},
        UserDict(user=user, item=item),
    ):
        assert torch.equal(call_model(model, inputs), expected)
    assert torch.equal(call_model(model.left, user), model.left(user))
    assert torch.equal(call_model(model.left, (user,)), model.left(user))
