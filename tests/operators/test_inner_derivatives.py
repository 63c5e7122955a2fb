"""Models and losses that differentiate, recompute or save on their own have the products of plain code."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import lossray
from lossray.operators.graph_memory import _living_bytes, _saved_bytes, held_bytes
from lossray.operators.modules import ModuleObjective
from lossray.operators.products import hessian_piece

D = torch.float64


def potential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def points():
    return torch.randn(7, 2, dtype=D, generator=torch.Generator().manual_seed(1))


def nested(model, batch):
    batch = batch.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(batch).sum(), batch, create_graph=True)
    return slope


def single(model):
    return lambda point: model(point[None])[0, 0]


def one_direction(model, batch):
    ones = torch.ones(2, dtype=D)
    return vmap(lambda point: jvp(single(model), (point,), (ones,))[1])(batch)


SLOPES = {  # of u at all points, [7, 2]
    "vmap(grad)": lambda m, b: vmap(grad(single(m)))(b),
    "vmap(jacrev)": lambda m, b: vmap(jacrev(single(m)))(b),
    "vjp": lambda m, b: vjp(m, b)[1](torch.ones(len(b), 1, dtype=D))[0],
    "autograd.functional": lambda m, b: torch.autograd.functional.vjp(
        lambda x: m(x).sum(), b, create_graph=True
    )[1],
}


def products(closure, model=None):
    matrix = lossray.Hessian(model or potential(), closure=closure, data=[points()])
    vector = torch.randn(matrix.shape[0], dtype=D, generator=torch.Generator().manual_seed(2))
    return matrix @ vector


@pytest.mark.parametrize("name", SLOPES)
def test_slopes_in_a_closure(name):
    expected = products(lambda m, b: (nested(m, b).square().sum(1).mean(), 7.0))
    found = products(lambda m, b: (SLOPES[name](m, b).square().sum(1).mean(), 7.0))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_directional_derivative_and_a_laplacian_in_a_closure():
    expected = products(lambda m, b: (nested(m, b).sum(1).square().mean(), 7.0))
    found = products(lambda m, b: (one_direction(m, b).square().mean(), 7.0))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)

    def laplacian(model, batch):
        batch = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(batch).sum(), batch, create_graph=True)
        parts = [torch.autograd.grad(slope[:, i].sum(), batch, create_graph=True)[0][:, i] for i in (0, 1)]
        return (sum(parts) - model(batch)[:, 0]).square().mean(), 7.0

    def functional(model, batch):
        second = vmap(hessian(single(model)))(batch)
        return (second.diagonal(dim1=1, dim2=2).sum(1) - model(batch)[:, 0]).square().mean(), 7.0

    torch.testing.assert_close(products(functional), products(laplacian), rtol=1e-9, atol=1e-12)


class Force(nn.Module):
    """A force field: the negative slope of a potential."""

    def __init__(self, slope):
        super().__init__()
        self.potential, self.slope = potential(), slope

    def forward(self, x):
        return -self.slope(self.potential, x)


@pytest.mark.parametrize("kind", [lossray.Hessian, lossray.GaussNewton, lossray.EmpiricalFisher])
@pytest.mark.parametrize("name", ["vmap(grad)", "vjp"])
def test_slopes_in_a_model(name, kind):
    data = [(points(), points().sin()), (points()[:3], points()[:3])]
    mean = lambda outputs, targets: (outputs - targets).square().sum(1).mean()  # noqa: E731
    found, expected = (kind(Force(slope), mean, data) for slope in (SLOPES[name], nested))
    vector = torch.linspace(-1, 1, found.shape[0], dtype=D)
    torch.testing.assert_close(found @ vector, expected @ vector, rtol=1e-9, atol=1e-12)


class Wrapped(nn.Module):
    """A network whose first part is evaluated by ``call(function, x)``."""

    def __init__(self, call):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Sequential(nn.Linear(2, 6), nn.Tanh())
        self.last, self.call = nn.Linear(6, 3), call

    def forward(self, x):
        return self.last(self.call(self.first, x))


def offloaded(function, x):
    with torch.autograd.graph.save_on_cpu():
        return function(x)


@pytest.mark.parametrize(
    "call",
    [
        lambda f, x: checkpoint(f, x, use_reentrant=False),
        lambda f, x: checkpoint(f, x, use_reentrant=True),
        offloaded,
    ],
    ids=["checkpoint", "reentrant checkpoint", "save_on_cpu"],
)
def test_parts_that_recompute_or_save_on_their_own(call):
    data = (points().float(), torch.arange(7) % 3)
    matrices = [
        lossray.Hessian(Wrapped(how), nn.functional.cross_entropy, data, dtype=D)
        for how in (call, lambda f, x: f(x))
    ]
    vector = torch.ones(matrices[0].shape[0], dtype=D)
    found, expected = (matrix @ vector for matrix in matrices)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_what_cannot_be_measured_by_hooks_is_measured_by_what_lives():
    """Both count the same graph; the second also what is kept without being saved, such as the gradient."""
    x = torch.randn(400, 2)
    objective = ModuleObjective(Wrapped(lambda f, x: f(x)), nn.functional.mse_loss, (x, torch.randn(400, 3)))
    (batch,) = objective.batches()
    build = partial(hessian_piece, objective, batch)
    saved = _saved_bytes(build)
    assert held_bytes(build) == saved
    assert 0.6 * saved < _living_bytes(build) < 1.5 * saved


@pytest.mark.parametrize("kind", [lossray.Hessian, lossray.GaussNewton])
def test_sparse_embeddings_have_the_curvature_of_dense_ones(kind):
    words, targets = (
        torch.randint(0, 9, (20, 4), generator=torch.Generator().manual_seed(0)),
        torch.arange(20) % 3,
    )
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 3, sparse=sparse), nn.Flatten(), nn.Linear(12, 3))
        matrix = kind(model, nn.functional.cross_entropy, (words, targets), dtype=D)
        found.append(matrix @ torch.linspace(-1, 1, matrix.shape[0], dtype=D))
        assert matrix.derivative_error < 1e-6
        assert model[0].sparse == sparse
    assert torch.equal(*found)


@pytest.mark.slow
def test_compiled_parts_have_the_curvature_of_what_they_were_made_from():
    """As where torch's compiler has been loaded: what it compiles runs as it was written."""
    import torch._dynamo

    data = (points().float(), torch.arange(7) % 3)
    model = Wrapped(lambda f, x: f(x))
    matrices = [lossray.Hessian(model, nn.functional.cross_entropy, data)]
    model.first = torch.compile(model.first)
    matrices.append(lossray.Hessian(model, nn.functional.cross_entropy, data))
    vector = torch.ones(matrices[0].shape[0])
    compiled = torch._dynamo.utils.counters["frames"]["total"]
    assert torch.equal(matrices[0] @ vector, matrices[1] @ vector)
    assert torch._dynamo.utils.counters["frames"]["total"] == compiled
    assert matrices[1].derivative_error < 1e-6
