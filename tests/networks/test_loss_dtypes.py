"""A loss that holds tensors of another dtype than the outputs is the same loss in theirs."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossray
from lossray.errors import ModelError
from lossray.networks.losses import get_loss, in_dtype_of_outputs, loss_name

W = torch.tensor([1.0, 4.0, 0.1])
X = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3
D = torch.float64


def weighted(outputs, targets, weight=W):
    return F.cross_entropy(outputs, targets, weight=weight)


def matrix_product(outputs, targets):
    return (outputs @ W[:, None]).square().mean()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


LOSSES = {
    "module": (nn.CrossEntropyLoss(weight=W), partial(weighted, weight=W.double())),
    "function": (weighted, partial(weighted, weight=W.double())),
    "partial": (partial(F.nll_loss, weight=W), partial(F.nll_loss, weight=W.double())),
    "product": (matrix_product, lambda o, t: (o @ W.double()[:, None]).square().mean()),
}


@pytest.mark.parametrize("kind", [lossray.Hessian, lossray.GaussNewton])
@pytest.mark.parametrize("name", LOSSES)
def test_class_weights_in_float32_under_a_float64_hessian(name, kind):
    loss, double = LOSSES[name]
    found, expected = (kind(net(), own, (X, Y), dtype=D) for own in (loss, double))
    vector = torch.linspace(-1, 1, found.shape[0], dtype=D)
    assert torch.equal(found @ vector, expected @ vector)
    assert W.dtype == torch.float32
    if isinstance(loss, nn.Module):
        assert loss.weight.dtype == torch.float32


def test_weights_in_a_closure():
    found, expected = (
        lossray.Hessian(
            net(),
            closure=lambda m, b, w=w: (weighted(m(b[0]), b[1], w), float(w[b[1]].sum())),
            data=[(X, Y)],
            dtype=D,
        )
        for w in (W, W.double())
    )
    vector = torch.linspace(-1, 1, found.shape[0], dtype=D)
    assert torch.equal(found @ vector, expected @ vector)


def test_a_loss_that_fails_for_another_reason_fails_with_it():
    def wrong(outputs, targets):
        raise RuntimeError("my own words", W)

    with pytest.raises(RuntimeError, match="my own words"):
        in_dtype_of_outputs(wrong)(X, Y)
    with pytest.raises(
        ModelError, match=r"my own words.*given a tensor \[16, 3\] and targets a tensor \[16\] of"
    ):
        lossray.Hessian(net(), wrong, (X, Y))


def test_a_users_loss_in_a_study(tmp_path, monkeypatch):
    (tmp_path / "own_weighted_loss.py").write_text(
        "import torch\nW = torch.tensor([1.0, 3.0, 0.5])\n"
        "def loss(o, t): return torch.nn.functional.cross_entropy(o, t, weight=W)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loss, outputs = get_loss("own_weighted_loss:loss"), torch.randn(16, 3, dtype=D)
    expected = F.cross_entropy(outputs, Y, weight=torch.tensor([1.0, 3.0, 0.5], dtype=D))
    assert torch.equal(loss(outputs, Y), expected)
    batched = torch.func.vmap(loss, in_dims=(0, None))(torch.stack([outputs, 2 * outputs]), Y)
    torch.testing.assert_close(batched[0], expected)


def test_losses_have_the_names_that_their_users_gave_them():
    assert loss_name(weighted) == "weighted"
    assert loss_name(partial(partial(F.mse_loss))) == "mse_loss"
    assert loss_name(nn.BCEWithLogitsLoss()) == "BCEWithLogitsLoss"
    assert loss_name(lambda o, t: o) == "lambda"
    assert loss_name(in_dtype_of_outputs(nn.NLLLoss())) == "NLLLoss"


def test_degeneracy_of_a_model_whose_loss_holds_float32():
    """Its floor is looked for in float64."""
    found, expected = (
        lossray.degeneracy(lossray.Hessian(net(), own, (X, Y), dtype=D)) for own in LOSSES["module"]
    )
    assert found.structural_nullity is not None
    assert (found.structural_nullity, found.nullity) == (expected.structural_nullity, expected.nullity)
