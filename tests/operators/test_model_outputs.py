"""Models that return more than a tensor: `outputs=` says which part of it the loss gets."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossray
from lossray.errors import ModelError

X = torch.randn(14, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(14) % 3


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


class ModelOutput(OrderedDict):
    """Keys that are attributes too, as those of a language model."""

    def __getattr__(self, name):
        return self[name]


Pair = namedtuple("Pair", "logits hidden")
FORMS = {
    "attributes": (Output, "logits"),
    "mapping": (lambda logits, hidden: {"logits": logits, "hidden": hidden}, "logits"),
    "keys that are attributes": (
        lambda logits, hidden: ModelOutput(hidden=hidden, logits=logits),
        "logits",
    ),
    "named tuple": (Pair, "logits"),
    "place": (lambda logits, hidden: (hidden, logits), 1),
    "function": (lambda logits, hidden: [hidden, {"deep": logits}], lambda found: found[1]["deep"]),
}


class Returning(nn.Module):
    """A network that returns its logits in some form, beside its hidden layer."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.form = nn.Linear(5, 4).double(), nn.Linear(4, 3).double(), form

    def forward(self, x):
        hidden = self.first(x).tanh()
        return self.form(self.last(hidden), hidden)


def plain():
    return Returning(lambda logits, hidden: logits)


@pytest.mark.parametrize("kind", [lossray.GaussNewton, lossray.EmpiricalFisher, lossray.Hessian])
@pytest.mark.parametrize("form", FORMS)
def test_the_matrix_is_that_of_the_plain_model(kind, form):
    make, outputs = FORMS[form]
    found = kind(Returning(make), F.cross_entropy, (X, Y), outputs=outputs)
    expected = kind(plain(), F.cross_entropy, (X, Y))
    identity = torch.eye(found.shape[0], dtype=torch.float64)
    assert torch.equal(found @ identity, expected @ identity)
    assert torch.equal(found.gradient, expected.gradient)
    assert found.loss == expected.loss


def test_softmax_regression_at_zero_in_closed_form():
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(5, 3, bias=False).double()
            nn.init.zeros_(self.map.weight)

        def forward(self, x):
            return {"loss": None, "logits": self.map(x)}

    centred = torch.eye(3, dtype=torch.float64) - 1 / 3
    covariance = X.T @ X / len(X)
    batches = [(X[:9], Y[:9]), (X[9:], Y[9:])]
    matrix = lossray.GaussNewton(Regression(), F.cross_entropy, batches, outputs="logits")
    dense = matrix @ torch.eye(15, dtype=torch.float64)
    torch.testing.assert_close(dense, torch.kron(centred, covariance) / 3, atol=1e-15, rtol=1e-12)
    slopes = 1 / 3 - F.one_hot(Y, 3).double()
    gradients = torch.einsum("nc,nd->ncd", slopes, X).flatten(1)
    fisher = lossray.EmpiricalFisher(Regression(), F.cross_entropy, (X, Y), outputs="logits")
    dense = fisher @ torch.eye(15, dtype=torch.float64)
    torch.testing.assert_close(dense, gradients.T @ gradients / len(X), atol=1e-15, rtol=1e-12)


def test_without_outputs_the_remedy_is_named():
    for kind in (lossray.GaussNewton, lossray.EmpiricalFisher):
        with pytest.raises(ModelError, match=r"outputs='logits' or 'hidden', and a loss of that tensor"):
            kind(Returning(Output), lambda out, y: F.cross_entropy(out.logits, y), (X, Y))
    with pytest.raises(ModelError, match=r"was given a Output .*; pass outputs='logits' or 'hidden'"):
        lossray.Hessian(Returning(Output), F.cross_entropy, (X, Y))
    with pytest.raises(ModelError, match=r"pass outputs=0 or 1"):
        lossray.Hessian(Returning(lambda *both: both), F.cross_entropy, (X, Y))
    scalar = Returning(lambda logits, hidden: logits.mean())
    with pytest.raises(ModelError, match=r"pass outputs=, a function that takes"):
        lossray.GaussNewton(scalar, lambda out, y: out, (X, Y))


@pytest.mark.parametrize(
    ("form", "outputs", "says"),
    [
        (Output, "logit", "found 'logit'; Returning returns a Output with logits, hidden; .*'logits'"),
        (lambda *both: both, 2, "found 2; Returning returns a tuple with 0, 1"),
        (lambda logits, hidden: logits, "logits", r"returns a tensor \[14, 3\], which has no parts"),
        (Output, 1.5, "outputs: found float; allowed: an attribute"),
        (Output, lambda out: out.logit, "AttributeError"),
        (Output, lambda out: [out.logits], r"given a list of 1 .*; pass outputs=0"),
    ],
)
def test_what_is_no_part_is_refused(form, outputs, says):
    with pytest.raises(ModelError, match=says):
        lossray.GaussNewton(Returning(form), F.cross_entropy, (X, Y), outputs=outputs)


def test_a_closure_takes_no_outputs():
    with pytest.raises(ModelError, match="both closure and outputs"):
        lossray.Hessian(plain(), closure=lambda m, b: (m(b).mean(), 1.0), data=[X], outputs="logits")


def test_what_is_forced_on_such_a_model_is_not_known():
    found = lossray.degeneracy(lossray.Hessian(Returning(Output), F.cross_entropy, (X, Y), outputs="logits"))
    assert found.structural_nullity is None
    assert "outputs=" in found.structural_note
