"""The exact identities of the rescaling symmetry (theory 2.1, 2.4 to 2.7, 2.13), in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lossray.networks.layout import Layout, layout_of
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.symmetry import RescalingSymmetry, rescaling_symmetry
from lossray.training.optimizers import PackedOptimizer
from lossray.training.update_rules import optimizer_settings


class Residual(nn.Module):
    """A residual block with batch norm: one group of units for the stream, one inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 2, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(2)
        self.relu = nn.ReLU(inplace=True)
        self.output = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x = x + self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.output(self.relu(x).mean(dim=(2, 3)))


def mlp(*widths: int, bias: bool = True, name: str = "mlp") -> nn.Module:
    return build_model(model_settings({"name": name, "widths": widths, "bias": bias}), (1, 4, 4), 3)


def cnn() -> nn.Module:
    return build_model(
        model_settings({"name": "cnn", "channels": [2, 3], "kernel": 3, "widths": [4]}), (1, 4, 4), 3
    )


CASES = {
    "mlp": lambda: mlp(5, 4),
    "cnn": cnn,
    "batch norm, eval": lambda: Residual().eval(),
    "batch norm, train": Residual,
}
every_case = pytest.mark.parametrize("case", CASES)


@dataclass
class Problem:
    """A small network at a random point, as functions of theta [d]."""

    model: nn.Module
    layout: Layout
    symmetry: RescalingSymmetry
    theta: Tensor
    inputs: Tensor
    targets: Tensor

    def outputs(self, theta: Tensor) -> Tensor:
        return functional_call(self.model, self.layout.split(theta), (self.inputs,))

    def loss(self, theta: Tensor) -> Tensor:
        return cross_entropy(self.outputs(theta), self.targets)

    def gradient(self, theta: Tensor) -> Tensor:
        leaf = theta.clone().requires_grad_()
        return torch.autograd.grad(self.loss(leaf), leaf)[0]

    def hessian(self, theta: Tensor) -> Tensor:
        """By double backward: theory 2.14."""
        return torch.autograd.functional.hessian(self.loss, theta)

    def gauge(self, sigma: float = 0.7) -> Tensor:
        """D [d] of log-normal factors."""
        return self.symmetry.diagonal((sigma * normal(self.symmetry.units, seed=3)).exp())

    def powers_of_two(self) -> Tensor:
        exponents = torch.arange(self.symmetry.units) % 5 - 2
        return self.symmetry.diagonal(2.0 ** exponents.double())


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(build: Callable[[], nn.Module]) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double()
    for i, parameter in enumerate(model.parameters()):
        if parameter.ndim == 1:  # biases and affine parameters away from 0 and 1
            parameter.data += 0.3 * normal(len(parameter), seed=10 + i)
    layout = layout_of(model)
    theta = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    targets = torch.arange(20) % 3
    return Problem(
        model, layout, rescaling_symmetry(model, layout), theta, normal(20, 1, 4, 4, seed=2), targets
    )


def angle_cosine(gradient: Tensor, matrix: Tensor) -> float:
    top = torch.linalg.eigh(matrix).eigenvectors[:, -1]
    return float((gradient @ top).abs() / gradient.norm())


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(scale, 1e-3))


# ---- 2.1: generators and finite rescaling


@every_case
def test_the_gradient_and_the_hessian_along_the_generators(case):
    p = problem(CASES[case])
    gradient, hessian = p.gradient(p.theta), p.hessian(p.theta)
    kernels = p.symmetry.kernel_vectors(p.theta[None])[0]  # K_j theta
    a = p.symmetry.incoming_sums(gradient * p.theta)
    assert bool((a.abs() > 1e-5).any())
    close(kernels @ gradient, torch.zeros(len(kernels), dtype=torch.float64))
    close(p.symmetry.outgoing_sums(gradient * p.theta), a)
    close(kernels @ hessian, -p.symmetry.kernel_vectors(gradient[None])[0])
    close(torch.einsum("ui,ij,uj->u", kernels, hessian, kernels), -2 * a)


@every_case
def test_outputs_gradient_and_hessian_in_another_gauge(case):
    p = problem(CASES[case])
    gauge = p.gauge()
    assert bool((gauge != 1).any())
    close(p.outputs(gauge * p.theta), p.outputs(p.theta))
    close(p.gradient(gauge * p.theta), p.gradient(p.theta) / gauge)
    close(p.hessian(gauge * p.theta), p.hessian(p.theta) / torch.outer(gauge, gauge))


@every_case
def test_inertia_is_invariant_while_the_largest_eigenvalue_and_the_trace_are_not(case):
    p = problem(CASES[case])
    spectra = [torch.linalg.eigvalsh(p.hessian(point)) for point in (p.theta, p.gauge() * p.theta)]
    floors = [1e-11 * float(values.abs().max()) for values in spectra]
    counts = [
        (int((values > floor).sum()), int((values < -floor).sum()))
        for values, floor in zip(spectra, floors, strict=True)
    ]
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0
    assert abs(float(spectra[1][-1] / spectra[0][-1]) - 1) > 0.05
    assert abs(float(spectra[1].sum() / spectra[0].sum()) - 1) > 0.05


@pytest.mark.parametrize("scale", [1e-2, 1e-4])
def test_dinhs_map_makes_the_largest_eigenvalue_as_large_as_one_likes(scale):
    p = problem(lambda: mlp(5))
    gauge = p.symmetry.diagonal(torch.full((5,), scale, dtype=torch.float64))
    largest = [float(torch.linalg.eigvalsh(p.hessian(point))[-1]) for point in (p.theta, gauge * p.theta)]
    bound = float(p.hessian(p.theta)[: 5 * 16].diagonal().max()) / scale**2
    assert largest[1] >= bound > 100 * largest[0]


# ---- 2.4: conservation


@every_case
def test_conservation_along_steps_of_sgd_with_coupled_decay(case):
    p = problem(CASES[case])
    lr, decay = 0.2, 0.05
    theta = p.theta[None].clone()
    optimizer = PackedOptimizer(
        optimizer_settings({"name": "sgd", "lr": lr, "weight_decay": decay}), theta, p.layout
    )
    for _ in range(5):
        before, gradient = p.symmetry.imbalance(theta), p.gradient(theta[0])[None]
        optimizer.step(gradient, lr)
        expected = (1 - lr * decay) ** 2 * before + lr**2 * p.symmetry.imbalance(gradient)
        torch.testing.assert_close(p.symmetry.imbalance(theta), expected, rtol=1e-12, atol=1e-13)
    assert bool(((p.symmetry.imbalance(theta) - p.symmetry.imbalance(p.theta[None])).abs() > 1e-4).any())


# ---- 2.5: an optimizer in another gauge


def trained(p: Problem, table: dict[str, object], start: Tensor, factor: Tensor | float = 1.0) -> Tensor:
    """theta after a few full-batch steps of an optimizer that is fed ``factor`` times the gradient."""
    settings = optimizer_settings(table)
    theta = start[None].clone()
    optimizer = PackedOptimizer(settings, theta, p.layout)
    for _ in range(6):
        optimizer.step((factor * p.gradient(theta[0]))[None], settings.lr)
    return theta[0]


SGD = [
    {"name": "sgd", "lr": 0.05},
    {"name": "momentum", "lr": 0.02},
    {"name": "nesterov", "lr": 0.02},
    {"name": "sgd", "lr": 0.05, "weight_decay": 0.1},
    {"name": "nesterov", "lr": 0.02, "weight_decay": 0.1},
]


@every_case
@pytest.mark.parametrize("table", SGD, ids=lambda table: "-".join(map(str, table.values())))
def test_sgd_in_a_gauge_is_sgd_with_a_learning_rate_for_each_parameter(case, table):
    """lr D^-2 on the gradient, decay outside D^-2; bit for bit with powers of two."""
    p = problem(CASES[case])
    gauge = p.gauge(0.3)
    close(trained(p, table, gauge * p.theta) / gauge, trained(p, table, p.theta, gauge**-2), 1e-10)
    gauge = p.powers_of_two()
    assert torch.equal(trained(p, table, gauge * p.theta) / gauge, trained(p, table, p.theta, gauge**-2))


def test_decay_inside_the_learning_rates_is_another_run():
    p = problem(CASES["mlp"])
    gauge, lr, decay = p.powers_of_two(), 0.05, 0.1
    scaled = p.theta.clone()
    for _ in range(6):
        scaled -= lr * gauge**-2 * (p.gradient(scaled) + decay * scaled)
    there = trained(p, {"name": "sgd", "lr": lr, "weight_decay": decay}, gauge * p.theta) / gauge
    assert float((there - scaled).abs().max()) > 1e-3


def test_the_per_parameter_rule_written_out():
    p = problem(CASES["cnn"])
    gauge, lr, decay, momentum = p.gauge(0.3), 0.02, 0.1, 0.9
    theta, buffer = p.theta.clone(), torch.zeros_like(p.theta)
    for _ in range(6):
        buffer = momentum * buffer + gauge**-2 * p.gradient(theta) + decay * theta
        theta = theta - lr * buffer
    table = {"name": "momentum", "lr": lr, "weight_decay": decay, "momentum": momentum}
    close(trained(p, table, gauge * p.theta) / gauge, theta, 1e-10)


@pytest.mark.parametrize("case", ["mlp", "cnn", "batch norm, eval"])
def test_adam_in_a_gauge_takes_the_same_raw_step(case):
    """Without eps and from zero state: lr D^-1 in the original coordinates, at every step."""
    p = problem(CASES[case])
    table = {"name": "adam", "lr": 0.01, "eps": 1e-300}
    for gauge, tolerance in ((p.powers_of_two(), 1e-12), (p.gauge(0.3), 1e-7)):
        theta, probe = p.theta.clone(), p.theta[None].clone()
        optimizer = PackedOptimizer(optimizer_settings(table), probe, p.layout)
        for _ in range(6):
            probe.zero_()
            optimizer.step(p.gradient(theta)[None], 0.01)
            theta += probe[0] / gauge
        close(trained(p, table, gauge * p.theta) / gauge, theta, tolerance)


def test_eps_breaks_the_symmetry_of_adam():
    p = problem(CASES["mlp"])
    table, gauge = {"name": "adam", "lr": 0.01, "eps": 1e-2}, p.powers_of_two()
    updates = [trained(p, table, d * p.theta) - d * p.theta for d in (torch.ones_like(gauge), gauge)]
    assert float((updates[0] - updates[1]).abs().max()) > 1e-3


def test_in_a_deep_network_a_bias_scales_by_its_layer_and_weights_by_the_ratio():
    p = problem(CASES["mlp"])
    first, second = 3.0, 0.5
    alpha = torch.tensor([first] * 5 + [second] * 4, dtype=torch.float64)
    gauge = p.layout.split(p.symmetry.diagonal(alpha))
    expected = {
        "hidden1.weight": first,
        "hidden1.bias": first,
        "hidden2.weight": second / first,
        "hidden2.bias": second,
        "output.weight": 1 / second,
        "output.bias": 1.0,
    }
    for name, factor in expected.items():
        torch.testing.assert_close(gauge[name], torch.full_like(gauge[name], factor), rtol=1e-15, atol=0)


# ---- 2.6: invariant geometry and the balanced gauge


@every_case
def test_the_adaptive_geometry_is_the_same_in_every_gauge(case):
    p = problem(CASES[case])
    vectors, matrices = [], []
    for point in (p.theta, p.gauge() * p.theta):
        scale = point.abs()
        vectors.append(scale * p.gradient(point))
        matrices.append(scale[:, None] * p.hessian(point) * scale)
    close(vectors[1], vectors[0], 1e-12)
    close(torch.linalg.eigvalsh(matrices[1]), torch.linalg.eigvalsh(matrices[0]), 1e-12)
    cosines = [angle_cosine(v, m) for v, m in zip(vectors, matrices, strict=True)]
    assert cosines[1] == pytest.approx(cosines[0], abs=1e-12)


def test_the_euclidean_angle_depends_on_the_gauge():
    p = problem(CASES["mlp"])
    points = (p.theta, p.gauge() * p.theta)
    cosines = [angle_cosine(p.gradient(point), p.hessian(point)) for point in points]
    assert abs(cosines[0] - cosines[1]) > 0.05


@every_case
def test_the_balanced_gauge_is_idempotent_unique_and_of_least_norm(case):
    p = problem(CASES[case])
    factors = p.symmetry.balance_factors(p.theta[None])
    balanced = p.symmetry.diagonal(factors)[0] * p.theta
    close(p.symmetry.imbalance(balanced), torch.zeros(p.symmetry.units, dtype=torch.float64), 1e-9)
    ones = torch.ones_like(factors)
    close(p.symmetry.balance_factors(balanced[None]), ones, 1e-12)
    gauge = p.gauge()
    again = p.symmetry.diagonal(p.symmetry.balance_factors((gauge * p.theta)[None]))[0] * gauge * p.theta
    close(again, balanced, 1e-12)
    for seed in range(20):
        nearby = p.symmetry.diagonal((1e-2 * normal(p.symmetry.units, seed=seed)).exp())
        assert float((nearby * balanced).norm()) > float(balanced.norm())


def test_one_hidden_layer_is_balanced_in_closed_form():
    p = problem(lambda: mlp(6))
    squares = p.theta.square()
    ratio = p.symmetry.outgoing_sums(squares) / p.symmetry.incoming_sums(squares)
    close(p.symmetry.balance_factors(p.theta[None])[0], ratio**0.25, 1e-13)


def test_a_deep_network_is_balanced_from_a_gauge_far_away():
    p = problem(lambda: mlp(*[4] * 20))
    far = p.symmetry.diagonal((6 * normal(p.symmetry.units, seed=5)).exp()) * p.theta
    balanced = p.symmetry.diagonal(p.symmetry.balance_factors(far[None]))[0] * far
    relative = p.symmetry.imbalance(balanced) / p.symmetry.incoming_sums(balanced.square())
    assert float(relative.abs().max()) < 1e-12


def test_dead_units_keep_their_gauge_and_dead_members_spoil_no_other():
    p = problem(CASES["mlp"])
    silent = p.theta.clone()
    silent[p.symmetry.incoming == 2] = 0
    silent[p.symmetry.outgoing == 7] = 0
    theta = torch.stack([p.theta, torch.full_like(p.theta, torch.nan), silent])
    factors = p.symmetry.balance_factors(theta)
    assert torch.equal(factors[0], p.symmetry.balance_factors(p.theta[None])[0])
    assert bool(factors[1].isnan().all())
    assert factors[2][[2, 7]].tolist() == [1.0, 1.0]
    balanced = p.symmetry.diagonal(factors[2]) * silent
    alive = torch.ones(9, dtype=torch.bool)
    alive[[2, 7]] = False
    close(p.symmetry.imbalance(balanced)[alive], torch.zeros(7, dtype=torch.float64), 1e-9)


# ---- 2.7: paths between gauges


def test_the_straight_path_scales_the_outputs_and_the_geometric_path_keeps_them():
    p = problem(lambda: mlp(6))
    alpha = 3.0
    gauge = p.symmetry.diagonal(torch.full((6,), alpha, dtype=torch.float64))
    bias = p.layout.split(p.theta)["output.bias"]
    start = p.outputs(p.theta)
    for t in (0.1, 0.5, 0.8):
        factor = 1 + t * (1 - t) * (alpha + 1 / alpha - 2)
        straight = p.outputs((1 - t) * p.theta + t * gauge * p.theta)
        close(straight - bias, factor * (start - bias), 1e-13)
        close(p.outputs(gauge**t * p.theta), start, 1e-13)


# ---- 2.13: homogeneity


def convolutions_without_biases() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3, 4, bias=False),
        nn.ReLU(),
        nn.Linear(4, 3, bias=False),
    )


@pytest.mark.parametrize("build", [lambda: mlp(5, 4, bias=False), convolutions_without_biases])
def test_without_biases_outputs_are_homogeneous_of_the_depth(build):
    p = problem(build)
    depth = 3

    def output(theta: Tensor) -> Tensor:
        return (p.outputs(theta) * normal(20, 3, seed=6)).sum()  # a sum of outputs is one output

    leaf = p.theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(output(leaf), leaf)
    close(p.theta @ gradient, depth * output(p.theta))
    hessian = torch.autograd.functional.hessian(output, p.theta)
    close(hessian @ p.theta, (depth - 1) * gradient)


def test_the_scalar_product_network_at_its_minimum():
    """1/2 (u v - y)^2: eigenvalues 0 and u^2 + v^2 at u v = y; the null vector is K theta."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    layout = layout_of(model)
    theta = torch.tensor([0.7, -1.9], dtype=torch.float64)

    def loss(point: Tensor) -> Tensor:
        output = functional_call(model, layout.split(point), (torch.ones(1, 1, dtype=torch.float64),))
        return (output - theta.prod()).square().sum() / 2

    hessian = torch.autograd.functional.hessian(loss, theta)
    expected = torch.tensor([0.0, 0.7**2 + 1.9**2], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.eigvalsh(hessian), expected, rtol=1e-14, atol=1e-14)
    kernel = rescaling_symmetry(model, layout).kernel_vectors(theta[None])[0, 0]
    assert kernel.tolist() == [0.7, 1.9]
    assert float((hessian @ kernel).abs().max()) < 1e-14


# ---- numbering


def test_coordinates_of_units_and_a_few_kernel_vectors_at_a_time():
    p = problem(CASES["cnn"])
    symmetry = p.symmetry
    assert symmetry.groups == {"conv1": slice(0, 2), "conv2": slice(2, 5), "hidden1": slice(5, 9)}
    conv2 = slice(20, 20 + 3 * 2 * 9)  # after conv1, 2 x (9 + 1)
    owners = symmetry.incoming[conv2].view(3, 2, 9), symmetry.outgoing[conv2].view(3, 2, 9)
    assert torch.equal(owners[0], torch.tensor([2, 3, 4])[:, None, None].expand(3, 2, 9))
    assert torch.equal(owners[1], torch.tensor([0, 1])[None, :, None].expand(3, 2, 9))
    whole = symmetry.kernel_vectors(p.theta[None])
    parts = [symmetry.kernel_vectors(p.theta[None], slice(i, i + 4)) for i in (0, 4, 8)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_summands_share_their_units():
    symmetry = problem(CASES["batch norm, eval"]).symmetry
    assert symmetry.groups == {"norm": slice(0, 2), "norm1": slice(2, 5)}
