"""lossray.Hessian and its kin on modules of the user's: dense references, closed forms, curvlinops, data."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import lossray
from lossray.networks.losses import cross_entropy, mse
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.operators.matrices import CurvatureMatrix

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries that curvlinops loads
    import curvlinops

KINDS = [lossray.Hessian, lossray.GaussNewton, lossray.EmpiricalFisher]
TABLES: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear", "widths": [3]},
    "mlp": {"name": "mlp", "widths": [6, 4], "activation": "tanh"},
    "cnn": {"name": "cnn", "channels": [2], "widths": [4], "kernel": 3, "activation": "gelu"},
    "resnet-none": {"name": "resnet", "depth": 8, "width": 1, "norm": "none"},
    "resnet-batch": {"name": "resnet", "depth": 8, "width": 1, "norm": "batch"},
    "vit": {"name": "vit", "dim": 4, "depth": 1, "heads": 2, "patch": 2},
}
Batch = tuple[Tensor, Tensor]


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return make().double()


def _model(name: str) -> nn.Module:
    return _seeded(lambda: build_model(model_settings(TABLES[name]), (1, 4, 4), 3))


def _data(*sizes: int, shape: tuple[int, ...] = (1, 4, 4), classes: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(n, *shape, dtype=torch.float64, generator=generator),
            torch.randint(0, classes, (n,), generator=generator),
        )
        for n in sizes
    ]


def _joined(batches: list[Batch]) -> Batch:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def _plain_products(model: nn.Module, loss: Callable[[nn.Module], Tensor], probes: Tensor) -> Tensor:
    """Hessian of ``loss(model)`` times ``probes`` [d, k], through the model's own parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(loss(model), parameters, create_graph=True, materialize_grads=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    columns = [
        torch.autograd.grad(flat, parameters, probe, retain_graph=True, materialize_grads=True)
        for probe in probes.unbind(1)
    ]
    return torch.stack([torch.cat([g.reshape(-1) for g in column]) for column in columns], dim=1)


def _dense(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """The Hessian of ``loss(model)``."""
    dim = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return _plain_products(model, loss, torch.eye(dim, dtype=torch.float64))


def _matrix(matrix: CurvatureMatrix) -> Tensor:
    return matrix @ torch.eye(matrix.shape[0], dtype=torch.float64)


def _same(found: Tensor, expected: Tensor, relative: float) -> bool:
    return bool(torch.linalg.matrix_norm(found - expected) <= relative * torch.linalg.matrix_norm(expected))


@pytest.mark.parametrize("loss", [cross_entropy, mse])
@pytest.mark.parametrize("name", TABLES)
def test_products_are_those_of_plain_double_backward(name: str, loss: Any) -> None:
    model, batches = _model(name), _data(5, 2)
    inputs, targets = _joined(batches)
    exact = lossray.Hessian(model, loss, batches)
    assert exact.dtype == torch.float64
    probes = torch.randn(exact.shape[0], 3, dtype=torch.float64)
    expected = _plain_products(model.eval(), lambda own: loss(own(inputs), targets), probes)
    assert _same(exact @ probes, expected, 1e-12)
    single = lossray.Hessian(model, loss, batches, dtype=torch.float32, mode="recompute")
    assert single.dtype == torch.float32
    assert _same(single @ probes, expected, 1e-4)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=["ce", "mse"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet-none", "resnet-batch"])
def test_agree_with_curvlinops(name: str, loss: nn.Module) -> None:
    """Where curvlinops is right: neither LayerNorm nor batch norm in train mode (theory 2.14)."""
    peers = [curvlinops.HessianLinearOperator, curvlinops.GGNLinearOperator, curvlinops.EFLinearOperator]
    model, batches = _model(name).eval(), _data(5, 2)
    if isinstance(loss, nn.MSELoss):
        batches = [(x, torch.nn.functional.one_hot(y, 3).double()) for x, y in batches]
    for kind, peer in zip(KINDS, peers, strict=True):
        theirs = peer(model, loss, list(model.parameters()), batches)
        ours = kind(model, loss, batches)
        probe = torch.randn(ours.shape[0], dtype=torch.float64)
        # Theirs is that of a likelihood of 3 outputs; ours has the gradients of the loss itself (their mean).
        likelihood = 3 if kind is lossray.EmpiricalFisher and isinstance(loss, nn.MSELoss) else 1
        assert torch.allclose(likelihood * (ours @ probe), theirs @ probe, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_pass_the_data_gives_the_same(kind: Any) -> None:
    model, batches = _model("mlp"), _data(5, 2)
    inputs, targets = _joined(batches)
    reference = _matrix(kind(model, cross_entropy, (inputs, targets)))
    forms: dict[str, Any] = {
        "uneven list": batches,
        "uneven tuple in a list": [*_data(5, 2)],
        "list as a batch": [inputs, targets],
        "loader": DataLoader(TensorDataset(inputs, targets), batch_size=3),
        "arrays": (inputs.numpy(), targets.numpy()),
        "equal weights": (inputs, targets, torch.full((7,), 0.3)),
        "an empty batch": [*batches, (inputs[:0], targets[:0])],
    }
    for form, data in forms.items():
        for mode in ("retained", "recompute"):
            assert _same(_matrix(kind(model, cross_entropy, data, mode=mode)), reference, 1e-12), form


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_examples(kind: Any) -> None:
    """Weight 2 counts like two copies, weight 0 like none."""
    model = _model("cnn")
    ((inputs, targets),) = _data(6)
    weights = torch.tensor([2.0, 1.0, 0.0, 1.0, 0.0, 3.0])
    index = torch.tensor([0, 0, 1, 3, 5, 5, 5])
    weighted = kind(
        model, cross_entropy, [(inputs[:2], targets[:2], weights[:2]), (inputs[2:], targets[2:], weights[2:])]
    )
    copied = kind(model, cross_entropy, (inputs[index], targets[index]))
    assert weighted.loss == pytest.approx(copied.loss, rel=1e-12)
    assert torch.allclose(weighted.gradient, copied.gradient, rtol=1e-10, atol=1e-13)
    assert _same(_matrix(weighted), _matrix(copied), 1e-12)


def test_a_closure_is_weighted_by_what_it_says() -> None:
    model, batches = _model("mlp"), _data(5, 2)
    inputs, targets = _joined(batches)
    calls: list[int] = []

    def closure(own: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
        calls.append(len(batch["x"]))
        penalty = sum(p.square().sum() for p in own.parameters())
        return cross_entropy(own(batch["x"]), batch["y"]) + 0.1 * penalty, len(batch["x"])

    dicts = [{"x": x, "y": y} for x, y in batches]
    dense = _dense(model, lambda own: closure(own, {"x": inputs, "y": targets})[0])
    for data in (dicts, {"x": inputs, "y": targets}):
        for mode in ("retained", "recompute"):
            hessian = lossray.Hessian(model, closure=closure, data=data, mode=mode)
            assert _same(_matrix(hessian), dense, 1e-12)
    assert {5, 2, 7} <= set(calls)


class _Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, *, a: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(self.first(a)) * self.second(b)


def test_dict_inputs_become_keywords() -> None:
    model = _seeded(_Keywords)
    a, b, y = torch.randn(6, 4).double(), torch.randn(6, 2).double(), torch.arange(6) % 3
    dense = _dense(model, lambda own: cross_entropy(own(a=a, b=b), y))
    data = [({"a": a[:4], "b": b[:4]}, y[:4]), ({"a": a[4:], "b": b[4:]}, y[4:])]
    assert _same(_matrix(lossray.Hessian(model, cross_entropy, data)), dense, 1e-12)


class _Tied(nn.Module):
    """One matrix used twice, one frozen layer, one layer that is never used, one scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        self.outer = nn.Linear(4, 4, bias=False)
        self.outer.weight = self.inner.weight
        self.frozen = nn.Linear(4, 3).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.shift += 1  # a buffer that is written in place
        hidden = self.outer(torch.tanh(self.inner(x)))
        return self.frozen(self.scale * hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_tied_frozen_and_unused_parameters(kind: Any) -> None:
    model = _seeded(_Tied)
    data = _data(6, shape=(4,))
    matrix = kind(model, cross_entropy, data)
    assert matrix.parameter_names == ("scale", "inner.weight", "unused.weight", "unused.bias")
    found = _matrix(matrix)
    assert found[-6:].abs().max() == 0
    assert found[:, -6:].abs().max() == 0
    assert (model.shift == 1).all()
    if kind is lossray.Hessian:
        assert _same(found, _dense(model, lambda own: cross_entropy(own(data[0][0]), data[0][1])), 1e-12)


def test_batch_norm_in_train_mode_uses_the_statistics_of_the_batch() -> None:
    model = _seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))
    ((inputs, targets),) = _data(8, shape=(4,))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hessian = lossray.Hessian(model.eval(), cross_entropy, (inputs, targets), train=True)
    newton = lossray.GaussNewton(model, cross_entropy, (inputs, targets), train=True)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found = _matrix(hessian)
    assert _same(found, _dense(model.train(), lambda own: cross_entropy(own(inputs), targets)), 1e-11)
    assert torch.linalg.eigvalsh(_matrix(newton))[0] > -1e-12
    assert not _same(found, _matrix(lossray.Hessian(model, cross_entropy, (inputs, targets))), 1e-2)


def test_softmax_regression_at_zero() -> None:
    """Theory 2.9: eig(X'X/N)/C, each C - 1 times, and d zeros; Gauss-Newton is the same matrix."""
    features, classes = 5, 4
    ((inputs, targets),) = _data(30, shape=(features,), classes=classes)
    model = nn.Linear(features, classes, bias=False).double()
    nn.init.zeros_(model.weight)
    covariance = torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs))
    expected = torch.cat([torch.zeros(features), covariance.repeat_interleave(classes - 1) / classes])
    for kind in (lossray.Hessian, lossray.GaussNewton):
        spectrum = torch.linalg.eigvalsh(_matrix(kind(model, cross_entropy, (inputs, targets))))
        assert torch.allclose(spectrum, expected, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_shift_is_null_for_all_three(kind: Any) -> None:
    """Theory 2.2: equal shifts of all output biases."""
    matrix = kind(_model("mlp"), cross_entropy, _data(9))
    shift = torch.zeros(matrix.shape[0], dtype=torch.float64)
    shift[-3:] = 1
    assert (matrix @ shift).abs().max() < 1e-15
    assert abs(float(matrix.gradient @ shift)) < 1e-15


@pytest.mark.parametrize("kind", KINDS)
def test_symmetric_and_additive_over_batches(kind: Any) -> None:
    model, batches = _model("vit"), _data(5, 3)
    matrix = kind(model, cross_entropy, batches)
    a, b = torch.randn(2, matrix.shape[0], dtype=torch.float64)
    assert float(a @ (matrix @ b)) == pytest.approx(float(b @ (matrix @ a)), rel=1e-11)
    parts = [kind(model, cross_entropy, batch) for batch in batches]
    expected = sum(n / 8 * (part @ a) for n, part in zip((5, 3), parts, strict=True))
    assert torch.allclose(matrix @ a, expected, rtol=1e-11, atol=1e-14)


def test_the_product_is_the_derivative_of_gradients() -> None:
    """Central differences at two steps: their error is of fourth order, far below the tolerance."""
    model, data = _model("vit"), _data(6)
    hessian = lossray.Hessian(model, cross_entropy, data)
    probe = torch.nn.functional.normalize(torch.randn(hessian.shape[0], dtype=torch.float64), dim=0)
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()

    def gradient(step: float) -> Tensor:
        nn.utils.vector_to_parameters(theta + step * probe, model.parameters())
        return lossray.Hessian(model, cross_entropy, data).gradient

    near, far = ((gradient(h) - gradient(-h)) / (2 * h) for h in (5e-4, 1e-3))
    product = hessian @ probe
    assert (product - (4 * near - far) / 3).norm() < 1e-9 * product.norm()


def test_losses_of_any_reduction() -> None:
    """A mean over examples is what counts; a sum over one batch is what it says."""
    model = _model("mlp")
    ((inputs, targets),) = _data(6)
    onehot = nn.functional.one_hot(targets, 3).double()
    mean = lossray.Hessian(model, mse, (inputs, targets))
    torch_mean = lossray.Hessian(model, nn.MSELoss(), (inputs, onehot))  # over examples and outputs
    assert _same(2 / 3 * _matrix(mean), _matrix(torch_mean), 1e-12)
    total = lossray.Hessian(model, nn.CrossEntropyLoss(reduction="sum"), (inputs, targets))
    assert _same(_matrix(total), 6 * _matrix(lossray.Hessian(model, cross_entropy, (inputs, targets))), 1e-12)


def test_vectors_and_what_comes_back() -> None:
    hessian = lossray.Hessian(_model("mlp"), cross_entropy, _data(5, 2))
    d = hessian.shape[0]
    dense = _matrix(hessian)
    block = torch.randn(d, 3, dtype=torch.float64)
    assert hessian.matvecs == d
    assert torch.allclose(hessian @ block, dense @ block, rtol=1e-11, atol=1e-14)
    assert torch.equal(block.T @ hessian, (hessian @ block).T)
    assert torch.equal(block[:, 0] @ hessian, hessian @ block[:, 0])
    array = block.numpy()
    assert isinstance(hessian @ array, np.ndarray)
    assert np.array_equal(array.T @ hessian, (hessian @ array).T)
    assert np.array_equal(array[:, 0] @ hessian, hessian @ array[:, 0])
    for dtype in (torch.float32, torch.float64):
        assert (hessian @ block.to(dtype)).dtype == dtype
        assert (hessian @ block.to(dtype).numpy()).dtype == block.to(dtype).numpy().dtype
    assert (hessian @ block[:, :0]).shape == (d, 0)
    assert hessian.matvecs == d + 3 + 3 + 3 + 1 + 1 + 3 + 3 + 3 + 1 + 1 + 2 * 3 * 2
    assert "Hessian" in repr(hessian)


def test_as_a_scipy_operator() -> None:
    hessian = lossray.Hessian(_model("mlp"), cross_entropy, _data(5, 2))
    operator = hessian.to_scipy()
    values = scipy.sparse.linalg.eigsh(
        operator, k=3, which="LA", return_eigenvectors=False, v0=np.ones(hessian.shape[0])
    )
    exact = torch.linalg.eigvalsh(_matrix(hessian))[-3:]
    assert np.allclose(values, exact.numpy(), rtol=1e-10)
    assert operator.dtype == np.float64
    assert np.allclose(operator.rmatvec(np.ones(hessian.shape[0])), hessian @ np.ones(hessian.shape[0]))


def test_transformed() -> None:
    hessian = lossray.Hessian(_model("mlp"), cross_entropy, _data(5, 2))
    d, dense = hessian.shape[0], _matrix(hessian)
    scale = torch.rand(d, dtype=torch.float64) + 0.1
    scaled, preconditioned = lossray.Scaled(hessian, scale.numpy()), lossray.Preconditioned(hessian, scale)
    block = lossray.Restricted(hessian, ["output.*"])
    assert _same(_matrix(scaled), scale[:, None] * dense * scale, 1e-12)
    assert _same(_matrix(preconditioned), dense / (scale[:, None] * scale).sqrt(), 1e-12)
    assert _same(_matrix(block), dense[-15:, -15:], 1e-12)
    assert block.parameter_names == ("output.weight", "output.bias")
    assert block.loss == hessian.loss
    assert block.matvecs == hessian.matvecs
    assert torch.equal(block.gradient, hessian.gradient[-15:])


def test_half_precision_is_analysed_in_float32() -> None:
    model = _model("mlp").half()
    ((inputs, targets),) = _data(6)
    hessian = lossray.Hessian(model, cross_entropy, (inputs.half(), targets))
    assert hessian.dtype == torch.float32
    reference = lossray.Hessian(model, cross_entropy, (inputs.half(), targets), dtype=torch.float64)
    assert _same(_matrix(hessian), _matrix(reference), 1e-4)
    assert next(model.parameters()).dtype == torch.float16


def test_products_do_not_depend_on_the_surroundings() -> None:
    """Under no_grad, inference-like and autocast contexts the products are the same."""
    model, data = _model("cnn").float(), [(x.float(), y) for x, y in _data(6)]
    reference = _matrix(lossray.Hessian(model, cross_entropy, data))
    with torch.no_grad(), torch.autocast("cpu"):
        for mode in ("retained", "recompute"):
            assert torch.equal(_matrix(lossray.Hessian(model, cross_entropy, data, mode=mode)), reference)


def test_functional_weights_are_those_at_construction() -> None:
    model, data = _model("mlp"), _data(6)
    hessian = lossray.Hessian(model, cross_entropy, data, mode="recompute")
    probe = torch.randn(hessian.shape[0], dtype=torch.float64)
    before = hessian @ probe
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(hessian @ probe, before)
    value = functional_call(model, {}, (data[0][0],))
    assert float(value.detach().abs().max()) == 0
