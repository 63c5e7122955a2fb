"""Mistakes that torch would answer in its own words: one line with the thing, the value and the remedy."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossray
from lossray.errors import ModelError
from lossray.networks.losses import get_loss

X = torch.randn(14, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(14) % 3
REFUSED = r"TorchScript|meta device|lazy"


def net(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs))


def dropped_targets(outputs, targets):
    return F.cross_entropy(F.dropout(outputs, 0.5), targets)


class Energy(nn.Module):
    """Forces that can be differentiated in train mode alone, beside an energy or by themselves."""

    def __init__(self, *, alone):
        super().__init__()
        self.net, self.alone = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)), alone

    def forward(self, x):
        x = x.detach().requires_grad_()
        energy = self.net(x)
        (force,) = torch.autograd.grad(energy.sum(), x, create_graph=self.training)
        return force if self.alone else torch.cat([energy, force], 1)


class Changed(nn.Module):
    """A network with something done to its outputs."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = net(), change

    def forward(self, *inputs):
        return self.change(self.net(inputs[0]))


def on_meta():
    model = net()
    model[2] = nn.Linear(4, 3, device="meta")
    return model


def scripted_part():
    model = net()
    model[0] = torch.jit.trace(model[0], X)
    return model


CASES = {
    "a loss that draws": (net(), dropped_targets, (X, Y), "loss 'dropped_targets' is random.*without random"),
    "a model that draws": (Changed(F.dropout), F.cross_entropy, (X, Y), "Changed is random.*self.training"),
    "script": (torch.jit.script(net()), F.cross_entropy, (X, Y), "TorchScript.*it was made from"),
    "a traced part": (scripted_part(), F.cross_entropy, (X, Y), "layer '0' of Sequential is a TorchScript"),
    "meta": (on_meta(), F.cross_entropy, (X, Y), "'2.weight' of Sequential is on the meta device.*to_empty"),
    "lazy": (nn.LazyLinear(3), F.cross_entropy, (X, Y), "lazy layers.*run it once"),
    "no graph": (
        Energy(alone=False),
        F.mse_loss,
        (X, X.repeat(1, 2)[:, :6]),
        "create_graph=True.*train=True",
    ),
    "detached": (Energy(alone=True), F.mse_loss, (X, X.sin()), "create_graph=True.*train=True"),
    "one logit": (net(1), nn.CrossEntropyLoss(), (X, 0 * Y), r"\[14, 1\].*softmax over one.*with_logits"),
    "one logit by name": (net(1), get_loss("cross_entropy"), (X, 0 * Y), "'cross_entropy'.*softmax over one"),
    "one logit, two classes": (
        net(1),
        F.cross_entropy,
        (X, Y % 2),
        r"out of bounds.*softmax over one output",
    ),
    "a dict of outputs": (
        Changed(lambda o: {"logits": o}),
        F.cross_entropy,
        (X, Y),
        r"'cross_entropy' raised .*given a dict with logits and targets a tensor \[14\] of int64",
    ),
    "no outputs": (Changed(lambda o: None), F.cross_entropy, (X, Y), "was given a NoneType and targets"),
    "integer inputs": (net(), F.cross_entropy, (X.long(), Y), r"was given a tensor \[14, 5\] of int64"),
    "two inputs": (
        net(),
        F.cross_entropy,
        ((X, X), Y),
        "was given 2 arguments, as the inputs are a tuple of 2",
    ),
    "float": (net(), lambda o, t: float(o.mean()), (X, Y), "returns a float where a scalar tensor"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_message_names_the_thing_and_the_remedy(case):
    model, loss, data, message = CASES[case]
    with pytest.raises(ModelError, match=message) as caught:
        lossray.Hessian(model, loss, data)
    assert "\n" not in str(caught.value)


def test_a_closure_that_draws_is_named():
    def drawing(model, batch):
        return dropped_targets(model(batch[0]), batch[1]), 14.0

    with pytest.raises(ModelError, match=r"closure 'drawing' \(or Sequential\) is random"):
        lossray.Hessian(net(), closure=drawing, data=[(X, Y)])


def test_a_loss_of_zero_at_its_minimum_is_no_mistake():
    model = net()
    targets = model(X).detach()
    assert lossray.Hessian(model, F.mse_loss, (X, targets)).loss == 0
    assert lossray.Hessian(model, lambda o, t: (0 * o).mean(), (X, Y)).loss == 0
    assert lossray.Hessian(net(1), F.mse_loss, (X, net(1)(X).detach())).loss == 0
    margins = nn.MultiMarginLoss(margin=1e-6)
    assert lossray.Hessian(model, margins, (X, targets.argmax(1)), dtype=torch.float64).loss == 0


def test_other_functions_refuse_the_same_models():
    for model in (scripted_part(), on_meta(), nn.LazyLinear(3)):
        with pytest.raises(ModelError, match=REFUSED):
            lossray.connect(model, net(), F.cross_entropy, (X, Y))
        with pytest.raises(ModelError, match=REFUSED):
            lossray.align(model, net())
        with pytest.raises(ModelError, match=REFUSED):
            lossray.balance(model)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_loss_that_torch_differentiates_once_has_a_fisher_matrix_alone(parts: int) -> None:
    x, labels = torch.randn(24, 4, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3
    data = list(zip(x.split(24 // parts), labels.split(24 // parts), strict=True))
    model, loss = nn.Linear(4, 3).double(), nn.MultiMarginLoss()
    for kind in (lossray.Hessian, lossray.GaussNewton):
        with pytest.raises(ModelError, match="differentiating it twice failed"):
            lossray.trace(kind(model, loss, data))
    rows = []
    for n in range(24):
        each = loss(model(x[n : n + 1].double()), labels[n : n + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(each, list(model.parameters()))]))
    expected = torch.linalg.svdvals(torch.stack(rows))[0] ** 2 / 24
    found = lossray.eigenpairs(lossray.EmpiricalFisher(model, loss, data), k=1, tol=1e-8).values[0]
    assert torch.allclose(found, expected.detach(), rtol=1e-6)
