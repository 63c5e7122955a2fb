"""Derivatives that are not those of the model are refused; those that are never, whatever the kinks."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossray
from lossray.errors import ModelError
from lossray.networks.stack import stack_models
from lossray.operators.objectives import PackedObjective
from lossray.operators.packed import PackedFisher, PackedGaussNewton, PackedHessian

X = torch.randn(90, 5, generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(90) % 4
REFUSED = "what autograd gives for its derivatives differs from a finite difference"


class Kept(torch.autograd.Function):
    """The square, whose backward keeps the input as a number: right once, not twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.detach()
        return x * x

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return 2 * ctx.kept * slopes[0]


class Saved(torch.autograd.Function):
    """The same with what autograd saves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * slopes[0]


class Net(nn.Module):
    """Two layers around an activation."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)))


class FromAList(Net):
    """The weights of the second layer are read past it."""

    def __init__(self) -> None:
        super().__init__(torch.tanh)
        self.weights = [self.second.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.first(x)), self.weights[0], self.second.bias)


class ByName(FromAList):
    """They are read by a function that refers to the module, which is right."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = []
        self.read = lambda: self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.first(x)), self.read(), self.second.bias)


class FromOutside(ByName):
    """They are read by a function that refers to them."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.second.weight
        self.read = lambda: weight


class Detached(Net):
    """A scale that moves with the weights, unseen by autograd."""

    def __init__(self) -> None:
        super().__init__(torch.tanh)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.first.weight.detach().norm()


def _spectral() -> nn.Module:
    model = Net(torch.tanh)
    nn.utils.parametrizations.spectral_norm(model.first)
    return model


WRONG = {
    "a backward that keeps its input": (lambda: Net(Kept.apply), False),
    "weights in a list": (FromAList, False),
    "weights in a function": (FromOutside, False),
    "a detached scale": (Detached, False),
    "spectral norm in train mode": (_spectral, True),
}
RIGHT = {
    "a backward that saves its input": (lambda: Net(Saved.apply), False),
    "weights read by a function": (ByName, False),
    "spectral norm in eval mode": (_spectral, False),
    "relu": (lambda: Net(torch.relu), True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_second_derivatives_are_refused(name: str, dtype: torch.dtype) -> None:
    make, train = WRONG[name]
    model = make().to(dtype)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    matrix = lossray.Hessian(model, F.cross_entropy, (X.to(dtype), LABELS), train=train, dtype=dtype)
    for ask in (lambda: matrix @ torch.ones(matrix.shape[0]), lambda: lossray.trace(matrix)):
        with pytest.raises(ModelError, match=REFUSED):
            ask()
    after = model.state_dict()
    assert all(torch.equal(state[key], after[key]) and state[key].dtype == after[key].dtype for key in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RIGHT)
def test_right_ones_are_stated(name: str, dtype: torch.dtype) -> None:
    make, train = RIGHT[name]
    matrix = lossray.Hessian(
        make().to(dtype), F.cross_entropy, (X.to(dtype), LABELS), train=train, dtype=dtype
    )
    error = matrix.derivative_error
    assert error < 1e-6
    pairs = lossray.eigenpairs(matrix, k=2)
    report = lossray.analyse(lossray.Restricted(matrix, ["first.*"]), top=2)
    assert pairs.derivative_error == report.derivative_error == report.pairs.derivative_error == error


@pytest.mark.parametrize("kind", [lossray.GaussNewton, lossray.EmpiricalFisher])
def test_first_derivatives_of_outputs_are_compared_for_gauss_newton_and_fisher(kind: Any) -> None:
    """These take no second derivative of the model, so that a backward that keeps its input is right."""
    assert kind(Net(Kept.apply), F.cross_entropy, (X, LABELS)).derivative_error < 1e-6
    with pytest.raises(ModelError, match=REFUSED):
        _ = kind(FromAList(), F.cross_entropy, (X, LABELS)).derivative_error


def test_the_slope_of_the_loss_is_compared() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return Kept.apply(outputs).sum(dim=1).mean()

    assert lossray.EmpiricalFisher(Net(torch.tanh), loss, (X, LABELS)).derivative_error < 1e-6
    with pytest.raises(ModelError, match=REFUSED):
        _ = lossray.GaussNewton(Net(torch.tanh), loss, (X, LABELS)).derivative_error


def test_closures() -> None:
    def closure(model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
        return F.cross_entropy(model(batch), LABELS[: len(batch)]), len(batch)

    assert lossray.Hessian(Net(torch.tanh), closure=closure, data=[X, X[:7]]).derivative_error < 1e-6
    with pytest.raises(ModelError, match=REFUSED):
        _ = lossray.Hessian(Net(Kept.apply), closure=closure, data=[X, X[:7]]).derivative_error


@pytest.mark.parametrize("executor", ["loop", "vmap"])
def test_each_member_of_a_pack_has_its_number(executor: str) -> None:
    def operator(models: list[nn.Module]) -> PackedHessian:
        stack, theta, buffers = stack_models(models, executor=executor, dtype=torch.float32)
        theta[1] = float("inf")
        return PackedHessian(PackedObjective(stack, theta, buffers, F.cross_entropy, [(X, LABELS)]))

    errors = operator([Net(torch.tanh) for _ in range(3)]).derivative_error
    assert errors.isnan().tolist() == [False, True, False]
    assert float(errors[[0, 2]].max()) < 1e-6
    with pytest.raises(ModelError, match=REFUSED):
        operator([FromAList() for _ in range(3)]).apply(torch.ones(3, 64))


class Two(Net):
    """The same network with its inputs in two parts."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return super().forward(torch.cat([left, right], dim=1))


@pytest.mark.parametrize("inputs", [(X[:, :2], X[:, 2:]), {"right": X[:, 2:], "left": X[:, :2]}])
@pytest.mark.parametrize("kind", [PackedHessian, PackedGaussNewton, PackedFisher])
def test_members_of_a_pack_may_take_several_inputs(kind: Any, inputs: Any) -> None:
    stack, theta, buffers = stack_models(
        [Two(torch.tanh) for _ in range(2)], executor="loop", dtype=torch.float32
    )
    objective = PackedObjective(stack, theta, buffers, F.cross_entropy, [(inputs, LABELS)])
    assert float(kind(objective).derivative_error.max()) < 1e-6  # NaN would be no number


@pytest.mark.parametrize("executor", ["loop", "vmap"])
@pytest.mark.parametrize("frozen", ["first", "second"])
def test_members_of_a_pack_may_have_frozen_parameters(frozen: str, executor: str) -> None:
    models = [Net(torch.tanh) for _ in range(2)]
    for model in models:
        model.get_submodule(frozen).requires_grad_(False)
    stack, theta, buffers = stack_models(models, executor=executor, dtype=torch.float32)
    objective = PackedObjective(stack, theta, buffers, F.cross_entropy, [(X, LABELS)])
    assert float(PackedHessian(objective).derivative_error.max()) < 1e-6


@pytest.mark.parametrize("kind", [lossray.Hessian, lossray.GaussNewton, lossray.EmpiricalFisher])
def test_graphs_that_the_user_has_kept_stay_whole(kind: Any) -> None:
    model = Net(torch.tanh)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(X), LABELS), parameters, create_graph=True)
    before = torch.autograd.grad(gradients, parameters, gradients, retain_graph=True)
    assert kind(model, F.cross_entropy, (X, LABELS)).derivative_error < 1e-6
    after = torch.autograd.grad(gradients, parameters, gradients)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize("make", [FromAList, FromOutside, lambda: Net(Kept.apply)])
def test_wrong_derivatives_are_refused_beside_a_kept_graph(make: Any) -> None:
    model = make()
    kept = F.cross_entropy(model(X), LABELS)
    with pytest.raises(ModelError, match=REFUSED):
        _ = lossray.Hessian(model, F.cross_entropy, (X, LABELS)).derivative_error
    kept.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_kink_at_the_point_is_no_mistake() -> None:
    model = Net(torch.relu)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    matrix = lossray.Hessian(model, F.cross_entropy, (X, LABELS))
    assert math.isnan(matrix.derivative_error)
    assert lossray.eigenpairs(matrix, k=1).values[0] > 0


def test_models_that_pin_float32_are_not_refused_for_their_rounding() -> None:
    class Pinned(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).float().to(x.dtype)

    matrix = lossray.Hessian(Pinned(torch.tanh), F.cross_entropy, (X, LABELS))
    assert math.isnan(matrix.derivative_error) or matrix.derivative_error < 1e-3
    assert lossray.eigenpairs(matrix, k=1).values[0] > 0


def test_no_curvature_at_all_is_no_mistake() -> None:
    linear: Callable[[Tensor, Tensor], Tensor] = lambda o, t: o.mean() * 3  # noqa: E731
    matrix = lossray.Hessian(nn.Linear(5, 4), linear, (X, LABELS))
    assert matrix.derivative_error < 1e-4
    assert lossray.trace(matrix).value == 0


def _relu(width: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(5, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def _pooled(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Flatten(),
        nn.Linear(2 * channels, 4),
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [lambda: _relu(8, 2), lambda: _relu(300, 3), lambda: _pooled(40)])
def test_networks_with_kinks_are_never_refused(make: Callable[[], nn.Module], seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
    for dtype in (torch.float32, torch.float64):
        matrix = lossray.Hessian(model.to(dtype), F.cross_entropy, (X.to(dtype), LABELS))
        assert matrix.derivative_error < 1e-6


def test_steps_over_a_kink_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first step far too long for these kinks the next ones are sound."""
    attempts = ((80, 1e-2), (4, 1e-7), (2, 1e-8))
    monkeypatch.setattr("lossray.operators.derivative_check.ATTEMPTS", attempts)
    assert lossray.Hessian(_relu(200, 3), F.cross_entropy, (X, LABELS)).derivative_error < 1e-5


@pytest.mark.parametrize("factor", [1e6, 1e11])
@pytest.mark.parametrize("activation", [torch.relu, Kept.apply])
def test_tensors_of_very_different_sizes(activation: Callable[[Tensor], Tensor], factor: float) -> None:
    """One layer divided and the next multiplied: the same function under ReLU, and as right or wrong."""
    model = Net(activation)
    with torch.no_grad():
        model.first.weight /= factor
        model.first.bias.zero_()
        model.second.weight *= factor if activation is torch.relu else factor**2
    matrix = lossray.Hessian(model, F.cross_entropy, (X, LABELS))
    if activation is torch.relu:
        assert matrix.derivative_error < 1e-6
    else:
        with pytest.raises(ModelError, match=REFUSED):
            _ = matrix.derivative_error


@pytest.mark.parametrize("kind", [lossray.GaussNewton, lossray.EmpiricalFisher])
def test_outputs_of_very_different_sizes(kind: Any) -> None:
    units = torch.tensor([1e10, 1.0, 1e-7, 1.0])

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(torch.sin(3 * outputs / units.to(outputs)), targets)

    model = Net(torch.tanh)
    with torch.no_grad():
        model.second.weight *= units[:, None]
        model.second.bias *= units
    assert kind(model, loss, (X, LABELS)).derivative_error < 1e-6


def test_models_that_take_batches_of_one_size_are_compared_on_the_whole_batch() -> None:
    class OfOneSize(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(90, 5))

    assert lossray.Hessian(OfOneSize(torch.tanh), F.cross_entropy, (X, LABELS)).derivative_error < 1e-6
    with pytest.raises(ModelError, match=REFUSED):
        _ = lossray.Hessian(OfOneSize(Kept.apply), F.cross_entropy, (X, LABELS)).derivative_error


@pytest.mark.parametrize("scale", [8.0, 14.0, 18.0, 25.0, 40.0])
def test_a_saturated_softmax_is_no_mistake(scale: float) -> None:
    """Its gradient is the difference of numbers near 1, so that a small step shows their rounding."""
    outputs = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        outputs.weight.copy_(scale * torch.eye(4, dtype=torch.float64))
    inputs = torch.eye(4, dtype=torch.float64).repeat(3, 1) + 0.1 * X[:12, :4].double()
    hessian = lossray.Hessian(outputs, F.cross_entropy, (inputs, LABELS[:12]))
    error = hessian.derivative_error
    assert math.isnan(error) or error < 1e-4
