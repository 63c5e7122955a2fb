"""Models with weight norm: the same function as torch's, and second derivatives that are right."""

import pytest
import torch
from torch import nn

import lossray
from lossray.networks.stack import build_stack
from lossray.networks.weight_norm import ElementaryWeightNorm, twice_differentiable, weight_norm


def older(layer: nn.Module, dim: int | None = 0) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer, dim=dim)


NORMS = {"parametrization": nn.utils.parametrizations.weight_norm, "hook": older}


def net(norm, *, dim: int | None = 0) -> nn.Module:
    layers = [norm(nn.Linear(3, 4), dim=dim), nn.Tanh(), norm(nn.Linear(4, 2), dim=dim)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize(("shape", "dim"), [((4, 5), 0), ((4, 5), 1), ((4, 5), -1), ((3, 2, 2, 2), 0)])
def test_it_is_torchs_function_and_its_derivatives_are_right(shape, dim):
    v = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    sizes = [shape[axis] if axis == dim else 1 for axis in range(len(shape))]
    g = torch.rand(sizes, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(weight_norm(v, g, dim), torch._weight_norm(v, g, dim))
    assert torch.autograd.gradgradcheck(lambda v, g: weight_norm(v, g, dim), (v, g))


@pytest.mark.parametrize("dim", [0, None])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_the_hessian_is_that_of_difference_quotients(norm, dim):
    model = net(norm, dim=dim)
    inputs, targets = torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 2, (20,))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hessian = lossray.Hessian(model, nn.functional.cross_entropy, (inputs, targets))
    eye = torch.eye(hessian.shape[0], dtype=torch.float64)
    matrix = hessian @ eye
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-12)

    def gradient(step):
        other = net(norm, dim=dim)
        other.load_state_dict(before)
        weights = nn.utils.parameters_to_vector(other.parameters())
        nn.utils.vector_to_parameters(weights + step, other.parameters())
        loss = nn.functional.cross_entropy(other(inputs), targets)
        return nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(other.parameters())))

    quotients = torch.stack([(gradient(1e-5 * e) - gradient(-1e-5 * e)) / 2e-5 for e in eye], dim=1)
    torch.testing.assert_close(matrix, quotients, rtol=0, atol=1e-8)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_both_executors_give_symmetric_hessians():
    stack, theta, buffers = build_stack(
        lambda: net(NORMS["parametrization"]), range(3), executor="vmap", dtype=torch.float64
    )
    inputs, targets = torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 2, (20,))
    products = []
    u, w = torch.randn(2, 3, stack.dim, dtype=torch.float64)
    for executor in ("vmap", "loop"):
        leaf = theta.clone().requires_grad_()
        own = stack.with_executor(executor)
        losses = own.losses(leaf, buffers, inputs, targets, nn.functional.cross_entropy)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
        images = [torch.autograd.grad(gradient, leaf, v, retain_graph=True)[0] for v in (u, w)]
        torch.testing.assert_close((images[0] * w).sum(dim=1), (images[1] * u).sum(dim=1))
        products.append(images[0])
    torch.testing.assert_close(products[0], products[1])


def test_models_without_it_are_evaluated_as_they_are():
    assert twice_differentiable(net(NORMS["hook"])) is ElementaryWeightNorm
    assert twice_differentiable(nn.Sequential(nn.Linear(3, 2))) is not ElementaryWeightNorm
