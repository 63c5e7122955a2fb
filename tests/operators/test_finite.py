"""A number that is not finite is refused by batch and example, wherever it stands in the data."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossray
from lossray.errors import DataError, ModelError


def _net(activation: nn.Module | None = None) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 6), activation or nn.Tanh(), nn.Linear(6, 2))


def _data(n: int = 160) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 2


def _broken(value: float, row: int) -> tuple[Tensor, Tensor]:
    inputs, targets = _data()
    inputs[row, 1] = value
    return inputs, targets


ASKING: dict[str, Callable[[nn.Module, Any], object]] = {
    "eigenpairs": lambda model, data: lossray.eigenpairs(lossray.Hessian(model, F.cross_entropy, data), k=1),
    "trace": lambda model, data: lossray.trace(lossray.GaussNewton(model, F.cross_entropy, data)),
    "fisher": lambda model, data: lossray.EmpiricalFisher(model, F.cross_entropy, data),
    "structural_floor": lambda model, data: lossray.structural_floor(model, data, F.cross_entropy),
    "align": lambda model, data: lossray.align(model, _net(), data, kind="permutation"),
    "connect": lambda model, data: lossray.connect(model, _net(), F.cross_entropy, data, "line"),
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("ask", ASKING)
def test_inputs_are_refused_everywhere(ask: str, value: float) -> None:
    whole = _broken(value, 131)
    with pytest.raises(DataError, match=f"batch 0 of the data: found {value} in the inputs of example 131"):
        ASKING[ask](_net(), whole)
    parts = [_data(40), (whole[0][90:], whole[1][90:])]
    with pytest.raises(DataError, match=f"batch 1 of the data: found {value} in the inputs of example 41"):
        ASKING[ask](_net(), parts)


def test_also_inputs_that_a_finite_loss_hides() -> None:
    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, 0.1 * torch.ones_like(x))

    with pytest.raises(DataError, match="example 70"):
        lossray.Hessian(nn.Sequential(Positive(), _net()), F.cross_entropy, _broken(math.nan, 70))


def test_a_mask_to_be_added_may_be_infinite() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward((x + mask).softmax(dim=1))

    inputs, targets = _data()
    mask = torch.zeros(160, 3).index_fill(1, torch.tensor(2), -math.inf)
    matrix = lossray.Hessian(Masked(3, 2), F.cross_entropy, ({"x": inputs, "mask": mask}, targets))
    assert lossray.eigenpairs(matrix, k=1).values.isfinite()


@pytest.mark.parametrize("kind", [lossray.Hessian, lossray.GaussNewton, lossray.EmpiricalFisher])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_targets_are_refused_by_their_loss(kind: Any, value: float) -> None:
    inputs, _ = _data()
    targets = torch.zeros(160, 2)
    targets[149, 0] = value
    for data, place in (
        ((inputs, targets), "example 149 in batch 0"),
        ([(inputs[:9], targets[:9]), (inputs[9:], targets[9:])], "example 140 in batch 1"),
    ):
        with pytest.raises(DataError, match=f"{place} of the data: the loss is (nan|inf)"):
            kind(_net(), F.mse_loss, data)
    with pytest.raises(DataError, match="example 149 in batch 0 of the data: the loss"):
        lossray.connect(_net(), _net(), F.mse_loss, (inputs, targets), "line")


def test_closures_name_the_batch() -> None:
    def closure(model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
        return model(batch).square().mean(), len(batch)

    with pytest.raises(DataError, match=r"^batch 2 of the data: the loss is nan"):
        lossray.Hessian(_net(), closure=closure, data=[*_data()[0].split(60)[:2], _broken(math.nan, 3)[0]])


def test_a_gradient_that_is_not_finite() -> None:
    inputs, targets = _data()
    inputs[93] = 0

    class Length(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.vector_norm(super().forward(x), dim=1, keepdim=True).square().sqrt()

    with pytest.raises(ModelError, match=r"example 93 in batch 0 .* its gradient is not, as that of a root"):
        lossray.Hessian(Length(3, 2, bias=False), F.mse_loss, (inputs, targets[:, None].float()))


def test_second_derivatives_that_are_not_finite() -> None:
    """The power 1.5 has a slope at 0 and no second derivative."""
    model = nn.Linear(3, 1, bias=False)
    inputs = _data()[0].abs()
    inputs[120] = 0
    with torch.no_grad():
        model.weight.fill_(1.0)
    power: Callable[[Tensor, Tensor], Tensor] = lambda o, t: o.pow(1.5).mean()  # noqa: E731
    matrix = lossray.Hessian(model, power, (inputs, torch.zeros(160, 1)))
    with pytest.raises(ModelError, match="the second derivatives are not"):
        lossray.eigenpairs(matrix, k=1)


def test_a_batch_that_begins_with_ignored_targets() -> None:
    inputs, targets = _data()
    targets[:100] = -100
    found = lossray.Hessian(_net(), F.cross_entropy, (inputs, targets))
    assert found.loss == pytest.approx(float(F.cross_entropy(_net()(inputs), targets).detach()), rel=1e-6)
