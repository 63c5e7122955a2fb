"""Critical points that are reached, and those that are not."""

import torch

import lossray
from lossray.networks.losses import cross_entropy, mse
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.stack import build_stack
from lossray.networks.symmetry import rescaling_symmetry
from lossray.nullity.polish import polish
from lossray.operators.objectives import PackedObjective, mean_losses
from lossray.operators.packed import PackedHessian


def objective(table, loss, n=12, members=2, classes=2):
    settings = model_settings(table)
    stack, theta, buffers = build_stack(
        lambda: build_model(settings, (3,), classes), range(members), executor="vmap", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator)
    y = torch.randint(0, classes, (n,), generator=generator)
    return PackedObjective(stack, theta, buffers, loss, [(x, y)]), (x.double(), y)


def test_least_squares_is_solved():
    own, (x, y) = objective({"name": "linear", "widths": [], "bias": True}, mse)
    found = polish(own)
    design = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    targets = torch.nn.functional.one_hot(y, 2).double()
    solution = torch.linalg.lstsq(design, targets).solution  # [4, 2]
    expected = torch.cat([solution[:3].T.flatten(), solution[3]])
    torch.testing.assert_close(found, expected.expand(2, -1), rtol=1e-6, atol=1e-7)


def test_the_scale_of_the_loss_decides_nothing():
    plain, _ = objective({"name": "mlp", "widths": [2], "activation": "tanh"}, mse, n=40)
    found = polish(plain)
    for scale in (1e-9, 1e9):
        scaled, _ = objective(
            {"name": "mlp", "widths": [2], "activation": "tanh"}, lambda o, t, s=scale: s * mse(o, t), n=40
        )
        torch.testing.assert_close(polish(scaled)[:1], found[:1], rtol=1e-5, atol=1e-6)


def test_near_a_teacher_the_symmetry_adds_null_directions_at_the_critical_point():
    """Theory 2.1: H K_j theta = -K_j g, so that K_j theta is null there, one for each relu unit."""
    table = {"name": "mlp", "widths": [3]}
    own, (x, _) = objective(table, mse, n=60)
    teacher = own.theta.detach().double()
    model = build_model(model_settings(table), (3,), 2).double()
    for r, weights in enumerate(teacher):
        torch.nn.utils.vector_to_parameters(weights, model.parameters())
        data = (x, model(x).detach())
        generator = torch.Generator().manual_seed(r)
        start = weights + 1e-3 * torch.randn(len(weights), dtype=torch.float64, generator=generator)
        student = PackedObjective(own.stack, start[None], {}, mse, [data], dtype=torch.float64)
        (theta,) = polish(student)
        assert torch.isfinite(theta).all()
        torch.nn.utils.vector_to_parameters(theta, model.parameters())
        hessian = lossray.Hessian(model, mse, data)
        assert float(hessian.gradient.norm()) < 1e-8
        symmetry = rescaling_symmetry(model, hessian.packed.layout)
        (vectors,) = symmetry.kernel_vectors(theta[None])
        assert float((hessian @ vectors.T).norm()) < 1e-6
        # A gradient of 1e-8 leaves these eigenvalues at its size: far above the noise floor, far below
        # the others.
        sizes = lossray.degeneracy(hessian).eigenvalues.abs()
        assert int((sizes < 1e-8).sum()) == 3
        assert float(sizes.sort().values[3]) > 1e-4


def test_a_smooth_network_gets_to_a_critical_point_and_does_not_climb():
    own, _ = objective({"name": "mlp", "widths": [2], "activation": "tanh"}, mse, n=40)
    found, before = polish(own), mean_losses(own, own.theta.detach())
    assert torch.isfinite(found[0]).all()
    there = PackedHessian(own.to(torch.float64).member(0).moved(found[:1]))
    assert float(there.gradient.norm()) < 1e-8
    assert float(there.losses[0]) < float(before[0])


def test_a_softmax_that_separates_its_data_has_no_critical_point():
    own, _ = objective({"name": "mlp", "widths": [8]}, cross_entropy, n=5)
    assert polish(own).isnan().all()


def test_a_dead_member_goes_nowhere_and_spoils_nobody():
    own, _ = objective({"name": "linear", "widths": [], "bias": True}, mse)
    theta = own.theta.detach().clone()
    theta[0, 0] = torch.nan
    found = polish(own.moved(theta))
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1], polish(own)[1])
