import math
import re
import sys

import pytest
import torch
from torch.func import vmap

from lossray.errors import ModelError, StudyError
from lossray.networks.losses import cross_entropy, get_loss, mse
from lossray.networks.settings import LOSSES


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian_of(loss, outputs):
    """By double backward, with respect to the outputs."""
    outputs = outputs.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(outputs), outputs, create_graph=True)
    rows = [
        torch.autograd.grad(entry, outputs, retain_graph=True)[0].flatten() for entry in gradient.flatten()
    ]
    return torch.stack(rows)


def test_mse_is_half_the_sum_over_outputs_averaged_over_examples():
    outputs = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    targets = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert mse(outputs, targets).item() == pytest.approx(((1 + 4) / 2 + 4 / 2) / 2)


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 4), (7, 2, 3)])
def test_mse_mean_is_that_of_torch_and_twice_mse_over_the_outputs(shape):
    outputs, targets = torch.linspace(-1, 2, 42)[: math.prod(shape)].view(shape), torch.ones(shape)
    found = get_loss("mse_mean")(outputs, targets)
    torch.testing.assert_close(found, torch.nn.MSELoss()(outputs, targets))
    torch.testing.assert_close(found, 2 / math.prod(shape[1:]) * mse(outputs, targets))


def test_mse_takes_classes_as_one_hot():
    outputs, classes = draws(5, 3), torch.tensor([0, 2, 1, 1, 0])
    one_hot = torch.nn.functional.one_hot(classes, 3).double()
    assert mse(outputs, classes) == mse(outputs, one_hot)
    assert mse(outputs, classes).dtype == torch.float64


def test_mse_hessian_is_the_identity_over_examples():
    hessian = hessian_of(lambda outputs: mse(outputs, draws(4, 3, seed=1)), draws(4, 3))
    torch.testing.assert_close(hessian, torch.eye(12, dtype=torch.float64) / 4)


@pytest.mark.parametrize(
    ("outputs", "targets"), [((4, 3), (4, 2)), ((4, 3), (4,)), ((4, 1, 2), (4, 2)), ((4, 2), (2, 4))]
)
def test_mse_refuses_to_broadcast(outputs, targets):
    with pytest.raises(
        ModelError, match=re.escape(f"outputs {list(outputs)} and targets {list(targets)} do not match")
    ):
        mse(draws(*outputs), draws(*targets))


@pytest.mark.parametrize("outputs", [(5,), (5, 1)])
@pytest.mark.parametrize("targets", [(5,), (5, 1)])
def test_mse_of_one_output_is_right_in_both_shapes(outputs, targets):
    errors = draws(5) - draws(5, seed=1)
    value = mse(draws(5).reshape(outputs), draws(5, seed=1).reshape(targets))
    torch.testing.assert_close(value, 0.5 * errors.square().mean())


def test_mse_sums_over_all_axes_but_the_first():
    outputs, targets = draws(4, 2, 3), draws(4, 2, 3, seed=1)
    expected = 0.5 * (outputs - targets).square().sum() / 4
    torch.testing.assert_close(mse(outputs, targets), expected)
    torch.testing.assert_close(mse(outputs.flatten(1), targets.flatten(1)), expected)


@pytest.mark.parametrize("shape", [(4, 1), (4,), (4, 3, 2)])
def test_classes_need_logits(shape):
    outputs, classes = draws(*shape), torch.tensor([0, 1, 1, 0])
    with pytest.raises(ModelError, match=re.escape(f"found outputs {list(shape)} and targets [4]")):
        mse(outputs, classes)
    if len(shape) != 2:
        with pytest.raises(ModelError, match=re.escape(f"found outputs {list(shape)} and targets [4]")):
            cross_entropy(outputs, classes)


def test_cross_entropy_value_and_hessian():
    outputs, classes = draws(3, 4), torch.tensor([1, 0, 3])
    p = outputs.softmax(1)
    expected = -sum(p[i, c].log() for i, c in enumerate(classes.tolist())) / 3
    torch.testing.assert_close(cross_entropy(outputs, classes), expected)
    blocks = [(torch.diag(row) - torch.outer(row, row)) / 3 for row in p]
    torch.testing.assert_close(
        hessian_of(lambda outputs: cross_entropy(outputs, classes), outputs), torch.block_diag(*blocks)
    )


def test_cross_entropy_refuses_regression_targets():
    with pytest.raises(ModelError, match=r"needs classes .*use 'mse'"):
        cross_entropy(draws(4, 3), draws(4, 3))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shared", [True, False])
def test_vmap_over_members(name, shared):
    loss = get_loss(name)
    outputs = draws(3, 5, 4)
    classes = torch.arange(15).view(3, 5) % 4
    expected = torch.stack([loss(outputs[r], classes[0 if shared else r]) for r in range(3)])
    targets = classes[0] if shared else classes
    values = vmap(loss, in_dims=(0, None if shared else 0))(outputs, targets)
    torch.testing.assert_close(values, expected)


def test_unknown_names():
    with pytest.raises(ModelError, match=r"found 'cross_entropi'; allowed: .*did you mean 'cross_entropy'\?"):
        get_loss("cross_entropi")
    with pytest.raises(StudyError, match="module 'lossray_no_such_module' not found"):
        get_loss("lossray_no_such_module:loss")


def test_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "lossray_test_losses.py").write_text(
        "def absolute(outputs, targets):\n    return (outputs - targets).abs().mean()\n"
        "def unreduced(outputs, targets):\n    return outputs - targets\n"
        "def number(outputs, targets):\n    return 0.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lossray_test_losses", raising=False)
    outputs, targets = draws(3, 5, 2), draws(3, 5, 2, seed=1)
    values = vmap(get_loss("lossray_test_losses:absolute"))(outputs, targets)
    torch.testing.assert_close(values, (outputs - targets).abs().mean(dim=(1, 2)))
    with pytest.raises(ModelError, match=r"returns \[5, 2\] where a scalar"):
        get_loss("lossray_test_losses:unreduced")(outputs[0], targets[0])
    with pytest.raises(ModelError, match="returns float where a scalar"):
        get_loss("lossray_test_losses:number")(outputs[0], targets[0])
