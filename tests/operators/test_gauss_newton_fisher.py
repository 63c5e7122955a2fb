"""Gauss-Newton and Fisher of a stack against dense float64 matrices from Jacobians and closed forms."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lossray.errors import ModelError
from lossray.networks.losses import get_loss
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.stack import Stack, build_stack
from lossray.operators.objectives import PackedObjective
from lossray.operators.packed import PackedFisher, PackedGaussNewton, PackedHessian

CLASSES = 3
MODELS = {
    "linear": ({"name": "linear", "widths": [3]}, (1, 3, 3)),
    "mlp-layer": ({"name": "mlp", "widths": [4], "activation": "tanh", "norm": "layer"}, (1, 3, 3)),
    "cnn": ({"name": "cnn", "channels": [2], "widths": [4], "kernel": 3, "activation": "gelu"}, (1, 4, 4)),
    "resnet-group": ({"name": "resnet", "depth": 8, "width": 1, "norm": "group"}, (1, 4, 4)),
    "resnet-batch": ({"name": "resnet", "depth": 8, "width": 1, "norm": "batch"}, (1, 4, 4)),
    "vit": ({"name": "vit", "dim": 4, "depth": 1, "heads": 2, "patch": 2}, (1, 4, 4)),
}
Case = tuple[Stack, Tensor, dict[str, Tensor], list[tuple[Tensor, Tensor]]]


def _case(name: str, *, executor: str = "loop", classes: int = CLASSES) -> Case:
    table, shape = MODELS[name]
    stack, theta, buffers = build_stack(
        lambda: build_model(model_settings(table), shape, classes),
        [0, 1],
        executor=executor,
        dtype=torch.float64,
    )
    generator = torch.Generator().manual_seed(5)
    batches = [
        (
            torch.randn(size, *shape, dtype=torch.float64, generator=generator),
            torch.randint(0, classes, (size,), generator=generator),
        )
        for size in (5, 2)
    ]
    return stack, theta, buffers, batches


def _jacobian(case: Case, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [N, C], their Jacobian [N, C, d] row by row, and the targets [N], for member r."""
    stack, theta, buffers, batches = case
    inputs, targets = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    point = theta[r].clone().requires_grad_()
    state = {**stack.layout.split(point), **{name: tensor[r].clone() for name, tensor in buffers.items()}}
    outputs = functional_call(stack.template.eval(), state, (inputs,))
    rows = [
        torch.autograd.grad(value, point, retain_graph=True, materialize_grads=True)[0]
        for value in outputs.flatten()
    ]
    return outputs.detach(), torch.stack(rows).view(*outputs.shape, -1), targets


def _dense_gauss_newton(case: Case, loss: str, r: int) -> Tensor:
    outputs, jacobian, _ = _jacobian(case, r)
    total = torch.zeros(jacobian.shape[-1], jacobian.shape[-1], dtype=torch.float64)
    for output, rows in zip(outputs, jacobian, strict=True):
        p = torch.softmax(output, dim=0)
        curvature = (
            torch.diag(p) - torch.outer(p, p) if loss == "cross_entropy" else torch.eye(len(p)).double()
        )
        total += rows.T @ curvature @ rows
    return total / len(outputs)


def _dense_fisher(case: Case, loss: str, r: int) -> Tensor:
    outputs, jacobian, targets = _jacobian(case, r)
    truth = nn.functional.one_hot(targets, outputs.shape[1])
    slopes = (torch.softmax(outputs, dim=1) if loss == "cross_entropy" else outputs) - truth
    gradients = torch.einsum("nc,ncd->nd", slopes, jacobian)
    return gradients.T @ gradients / len(outputs)


def _objective(
    case: Case, loss: str = "cross_entropy", dtype: torch.dtype = torch.float64
) -> PackedObjective:
    stack, theta, buffers, batches = case
    return PackedObjective(stack, theta, buffers, get_loss(loss), batches, dtype=dtype)


def _probe(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", MODELS)
def test_equal_the_dense_matrices(name: str, loss: str) -> None:
    case = _case(name)
    references = {PackedGaussNewton: _dense_gauss_newton, PackedFisher: _dense_fisher}
    for kind, reference in references.items():
        dense = reference(case, loss, 1)
        for executor in ("loop", "vmap"):
            for mode in ("retained", "recompute"):
                objective = _objective((case[0].with_executor(executor), *case[1:]), loss)
                operator = kind(objective, mode=mode)
                probe = _probe(operator.shape)
                error = operator.apply(probe)[1] - dense @ probe[1]
                assert torch.linalg.vector_norm(error) <= 1e-12 * torch.linalg.vector_norm(dense @ probe[1])


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("kind", [PackedGaussNewton, PackedFisher])
def test_losses_and_gradients_are_those_of_the_hessian(kind: type, loss: str) -> None:
    case = _case("mlp-layer")
    operator, hessian = kind(_objective(case, loss)), PackedHessian(_objective(case, loss))
    assert torch.allclose(operator.losses, hessian.losses, rtol=1e-13)
    assert torch.allclose(operator.gradient, hessian.gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_of_a_linear_model_gauss_newton_is_the_hessian(classes: int, loss: str) -> None:
    """Whatever the number of outputs: a mean over examples has no factor C."""
    generator = torch.Generator().manual_seed(2)
    batch = (
        torch.randn(9, 4, dtype=torch.float64, generator=generator),
        torch.randint(0, classes, (9,), generator=generator),
    )
    stack, theta, buffers = build_stack(
        lambda: nn.Linear(4, classes), [0, 1], executor="loop", dtype=torch.float64
    )
    case: Case = (stack, theta, buffers, [batch])
    hessian, newton = PackedHessian(_objective(case, loss)), PackedGaussNewton(_objective(case, loss))
    probe = _probe(hessian.shape)
    assert torch.allclose(hessian.apply(probe), newton.apply(probe), rtol=1e-12, atol=1e-14)
    fisher = PackedFisher(_objective(case, loss)).apply(probe)[0]
    expected = _dense_fisher(case, loss, 0) @ probe[0]
    assert torch.allclose(fisher, expected, rtol=1e-12, atol=1e-14)


def test_gauss_newton_takes_losses_that_are_not_convex() -> None:
    """d2 loss / d outputs2 is indefinite for sin: the second derivative is taken, not its absolute value."""
    case = _case("linear")
    stack, theta, buffers, batches = case
    loss = lambda outputs, targets: torch.sin(outputs * (1 + targets[:, None])).sum(dim=1).mean()  # noqa: E731
    outputs, jacobian, targets = _jacobian(case, 0)
    factors = 1 + targets[:, None]
    second = -torch.sin(outputs * factors) * factors**2
    dense = torch.einsum("ncd,nc,nce->de", jacobian, second, jacobian) / len(outputs)
    assert torch.linalg.eigvalsh(dense)[0] < 0
    operator = PackedGaussNewton(PackedObjective(stack, theta, buffers, loss, batches, dtype=torch.float64))
    probe = _probe(operator.shape)
    assert torch.allclose(operator.apply(probe)[0], dense @ probe[0], rtol=1e-11, atol=1e-14)


def test_a_loss_linear_in_the_outputs_has_no_gauss_newton_matrix() -> None:
    stack, theta, buffers, batches = _case("mlp-layer")
    loss = lambda outputs, targets: (outputs[:, 0] * targets).mean()  # noqa: E731
    operator = PackedGaussNewton(PackedObjective(stack, theta, buffers, loss, batches, dtype=torch.float64))
    assert operator.gradient.abs().max() > 0
    assert torch.equal(operator.apply(theta), torch.zeros_like(theta))


def test_the_fisher_of_a_loss_that_branches_on_values() -> None:
    """vmap cannot take it: the examples' losses are then computed one after the other."""
    case = _case("linear")
    stack, theta, buffers, batches = case

    def branching(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.sum() > 1e9:
            return outputs.sum()
        return get_loss("cross_entropy")(outputs, targets)

    operator = PackedFisher(PackedObjective(stack, theta, buffers, branching, batches, dtype=torch.float64))
    probe = _probe(operator.shape)
    expected = _dense_fisher(case, "cross_entropy", 0) @ probe[0]
    assert torch.allclose(operator.apply(probe)[0], expected, rtol=1e-11, atol=1e-14)


def test_the_fisher_of_a_sum_is_refused() -> None:
    stack, theta, buffers, batches = _case("linear")
    total = lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, reduction="sum")  # noqa: E731
    objective = PackedObjective(stack, theta, buffers, total, batches, dtype=torch.float64)
    with pytest.raises(ModelError, match="is no mean over examples"):
        PackedFisher(objective)


@pytest.mark.parametrize("kind", [PackedHessian, PackedGaussNewton, PackedFisher])
def test_a_block_is_its_vectors_and_members_do_not_mix(kind: type) -> None:
    case = _case("cnn")
    stack, theta, buffers, batches = case
    for mode in ("retained", "recompute"):
        operator = kind(_objective(case), mode=mode)
        block = torch.randn(2, 3, operator.shape[1], dtype=torch.float64)
        products = operator.apply(block)
        for i in range(3):
            assert torch.equal(products[:, i], operator.apply(block[:, i]))
        assert operator.matvecs == 6
        for r in range(2):
            own = {name: tensor[r : r + 1] for name, tensor in buffers.items()}
            alone = kind(_objective((stack, theta[r : r + 1], own, batches)), mode=mode)
            assert torch.allclose(alone.apply(block[r : r + 1]), products[r : r + 1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", [PackedGaussNewton, PackedFisher])
def test_a_dead_member_is_nan_and_alone_in_it(kind: type) -> None:
    case = _case("mlp-layer")
    stack, theta, buffers, batches = case
    spoiled = theta.clone()
    spoiled[0, 3] = math.inf
    healthy, operator = kind(_objective(case)), kind(_objective((stack, spoiled, buffers, batches)))
    probe = _probe(operator.shape)
    products = operator.apply(probe)
    assert torch.equal(products[1], healthy.apply(probe)[1])
    for rows in (products, operator.gradient, operator.losses, operator.product_error(probe)):
        assert torch.isnan(rows[0]).all()
        assert torch.isfinite(rows[1]).all()


@pytest.mark.parametrize("kind", [PackedHessian, PackedGaussNewton, PackedFisher])
def test_the_product_error_is_that_of_the_dtype(kind: type) -> None:
    """In float32 it is the distance to float64 products of the same point and data; in float64 nothing."""
    case = _case("cnn")
    double = kind(_objective(case))
    single = kind(_objective(case, dtype=torch.float32))
    probe = _probe(double.shape)
    expected = torch.linalg.vector_norm(single.apply(probe) - double.apply(probe), dim=1)
    products, found = single.matvecs, single.product_error(probe)
    assert torch.allclose(found, expected, rtol=1e-6)
    assert (found > 0).all()
    assert (found < 1e-4 * torch.linalg.vector_norm(double.apply(probe), dim=1)).all()
    assert single.matvecs == products
    assert (double.product_error(probe) < 1e-14 * torch.linalg.vector_norm(probe, dim=1)).all()
