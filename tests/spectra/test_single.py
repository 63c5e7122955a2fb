"""`lossray.eigenpairs`, `spectral_density`, `trace` and `analyse` on a model of the user's."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossray
from lossray.errors import StudyError


def _setting(width: int = 24) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=draws, dtype=torch.float64))
    inputs = torch.randn(50, 6, generator=draws, dtype=torch.float64)
    return model, (inputs, torch.arange(50) % 3)


def _dense(model: nn.Module, data: tuple[Tensor, Tensor], loss: Any = F.cross_entropy) -> Tensor:
    """By double backward, [d, d]."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(model(data[0]), data[1]), parameters, create_graph=True)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    rows = [
        torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True) for entry in flat
    ]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


@pytest.fixture(scope="module")
def case() -> tuple[lossray.Hessian, Tensor, Tensor]:
    """A Hessian of size 243 with its dense matrix and eigenvalues, descending."""
    model, data = _setting()
    dense = _dense(model, data)
    return lossray.Hessian(model, F.cross_entropy, data), dense, torch.linalg.eigvalsh(dense).flip(0)


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("end", ["largest", "smallest", "magnitude", "both"])
def test_pairs_of_every_end(case, end: str, block: int) -> None:
    matrix, dense, exact = case
    pairs = lossray.eigenpairs(matrix, k=4, end=end, tol=1e-8, seed=3, block=block)
    by_size = exact[exact.abs().argsort(descending=True)]
    expected = {
        "largest": exact[:4],
        "smallest": exact.flip(0)[:4],
        "magnitude": by_size[:4],
        "both": torch.cat([exact[:4], exact.flip(0)[:4]]),
    }[end]
    assert torch.allclose(pairs.values, expected, atol=1e-9)
    assert pairs.vectors.shape == (243, len(expected))
    images = dense @ pairs.vectors - pairs.vectors * pairs.values
    assert torch.allclose(images.norm(dim=0), pairs.residuals, atol=1e-12)
    assert pairs.converged.all()
    assert pairs.confirmed
    assert pairs.orthogonality_loss < 1e-12
    assert 0 < pairs.matvecs < 600
    assert len(pairs) == len(expected)


def test_products_are_counted(case) -> None:
    matrix, _, _ = case
    before = matrix.matvecs
    pairs = lossray.eigenpairs(matrix, k=3)
    assert matrix.matvecs - before == pairs.matvecs
    before = matrix.matvecs
    report = lossray.analyse(matrix, top=3)
    assert matrix.matvecs - before == report.matvecs


def test_a_warm_start_finds_the_same(case) -> None:
    matrix, _, exact = case
    cold = lossray.eigenpairs(matrix, k=3, tol=1e-6)
    warm = lossray.eigenpairs(matrix, k=3, tol=1e-6, start=cold.vectors)
    assert torch.allclose(warm.values, exact[:3], atol=1e-6)
    assert warm.confirmed


def test_the_report_of_one_pass(case) -> None:
    matrix, _, exact = case
    report = lossray.analyse(matrix, top=5, probes=4, steps=64, seed=1, tol=1e-6)
    assert torch.allclose(report.pairs.values, exact[:5], atol=1e-6)
    assert float(report.smallest.values[0]) == pytest.approx(float(exact[-1]), abs=1e-6)
    low, high = report.trace.interval(0.9999)
    assert low <= float(exact.sum()) <= high
    assert abs(report.frobenius.value - float(exact.norm())) < 6 * report.frobenius.stderr
    assert torch.allclose(report.density.weights.sum(dim=1), torch.ones(4, dtype=torch.float64))
    assert report.loss == matrix.loss
    assert torch.equal(report.gradient, matrix.gradient)
    assert report.gradient_norm == pytest.approx(float(matrix.gradient.norm()))
    assert report.product_error < 1e-12  # the products are float64 themselves


def test_a_float32_report_says_how_far_its_products_are_from_float64() -> None:
    model, data = _setting()
    exact = torch.linalg.eigvalsh(_dense(model, data)).flip(0)
    single = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3))
    single.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    matrix = lossray.Hessian(single, F.cross_entropy, (data[0].float(), data[1]))
    report = lossray.analyse(matrix, top=3, tol=1e-5)
    assert 0 < report.product_error < 1e-5 * report.pairs.scale
    assert torch.allclose(report.pairs.values, exact[:3], atol=1e-4 * float(exact[0]))


def test_density_and_trace(case) -> None:
    matrix, _, exact = case
    density = lossray.spectral_density(matrix, probes=3, steps=20, seed=0)
    assert density.nodes.shape == density.weights.shape == (3, 20)
    assert not density.exact
    everything = lossray.spectral_density(matrix, probes=4, steps=64)
    assert everything.exact
    assert torch.allclose(everything.nodes[0], exact.flip(0), atol=1e-10)
    estimate = lossray.trace(matrix, matvecs=60, seed=0)
    assert estimate.dof == 29
    low, high = estimate.interval(0.9999)
    assert low <= float(exact.sum()) <= high


def test_a_block_and_a_scaled_operator(case) -> None:
    matrix, dense, _ = case
    block = lossray.Restricted(matrix, ["0.*"])
    exact = torch.linalg.eigvalsh(dense[:168, :168]).flip(0)
    assert torch.allclose(lossray.eigenpairs(block, 3, tol=1e-8).values, exact[:3], atol=1e-9)
    scale = torch.linspace(0.5, 2, 243, dtype=torch.float64)
    scaled = lossray.Preconditioned(matrix, scale)
    root = scale.rsqrt()
    exact = torch.linalg.eigvalsh(root[:, None] * dense * root).flip(0)
    assert torch.allclose(lossray.eigenpairs(scaled, 3, tol=1e-8).values, exact[:3], atol=1e-9)


def test_a_number_of_pairs_from_numpy(case) -> None:
    assert len(lossray.eigenpairs(case[0], k=np.int64(3))) == 3


def test_more_pairs_than_there_are(case) -> None:
    model, data = _setting(1)
    small = lossray.Hessian(model, F.cross_entropy, data)
    pairs = lossray.eigenpairs(small, k=50)
    assert torch.allclose(pairs.values, torch.linalg.eigvalsh(_dense(model, data)).flip(0), atol=1e-10)
    assert pairs.complement == -math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"end": "larges"}, r"end: found 'larges'; .* did you mean 'largest'\?"),
        ({"k": 0}, r"k: found 0; allowed: a whole number from 1"),
        ({"k": 1.5}, r"k: found 1.5; allowed: a whole number from 1"),
        ({"tol": 2.0}, r"found 2.0; allowed: between 0 and 1"),
        ({"block": 0}, r"block: found 0"),
        ({"start": torch.zeros(3, 1)}, r"start: found shape \[3, 1\]; allowed: columns \[243, n\]"),
        ({"start": torch.full((243, 1), math.nan)}, r"start: found entries that are not finite"),
    ],
)
def test_impossible_arguments(case, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        lossray.eigenpairs(case[0], **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("top", [0, 2.0, True])
def test_the_number_of_pairs_is_named_as_it_is_given(top: object) -> None:
    with pytest.raises(StudyError, match=f"top: found {top}; allowed"):
        lossray.analyse(None, top=top)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lossray.Scaled, lossray.Preconditioned, lossray.Restricted])
def test_what_is_no_matrix_is_not_transformed(make: Callable[..., object]) -> None:
    with pytest.raises(StudyError, match=r"operator: found int; allowed: lossray.Hessian"):
        make(3, torch.ones(2))


def test_anything_else_than_an_operator_is_refused() -> None:
    with pytest.raises(StudyError, match=r"operator: found Tensor; allowed: lossray.Hessian"):
        lossray.analyse(torch.eye(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [64, 128, 256])
@pytest.mark.parametrize("hidden", [8, 10, 12, 16, 20])
def test_sizes_around_the_one_from_which_a_basis_fits(hidden: int, steps: int) -> None:
    """d = 97 to 241: small enough to be filled by a wide basis, or diagonalised."""
    draws = torch.Generator().manual_seed(2)
    model = nn.Sequential(nn.Linear(10, hidden), nn.Tanh(), nn.Linear(hidden, 1)).double()
    inputs = torch.randn(60, 10, generator=draws, dtype=torch.float64)
    targets = torch.randn(60, 1, generator=draws, dtype=torch.float64)
    exact = torch.linalg.eigvalsh(_dense(model, (inputs, targets), F.mse_loss)).flip(0)
    report = lossray.analyse(lossray.Hessian(model, F.mse_loss, (inputs, targets)), tol=1e-6, steps=steps)
    size = float(exact.abs().max())
    assert report.pairs.converged.all()
    assert torch.allclose(report.pairs.values, exact[:10], atol=2e-6 * size)
    assert float(report.smallest.values[0]) == pytest.approx(float(exact[-1]), abs=2e-6 * size)
    assert max(report.pairs.orthogonality_loss, report.smallest.orthogonality_loss) < 1e-11
    assert abs(report.frobenius.value - float(exact.norm())) <= 6 * report.frobenius.stderr + 1e-9 * size


def test_a_network_without_curvature_has_sums_of_zero() -> None:
    """L1 loss of a linear layer, and dead units: H is exactly 0, as is the block of a dead layer."""
    inputs = torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    linear = nn.Linear(30, 9).double()
    zero = lossray.analyse(lossray.Hessian(linear, F.l1_loss, (inputs, torch.zeros(40, 9).double())))
    dead = nn.Sequential(nn.Linear(30, 9), nn.ReLU(), nn.Linear(9, 2)).double()
    with torch.no_grad():
        dead[0].bias.fill_(-1e3)
    hessian = lossray.Hessian(dead, F.mse_loss, (inputs, torch.ones(40, 2).double()))
    block = lossray.analyse(lossray.Restricted(hessian, ["0.*"]))
    for report in (zero, block):
        for name in ("trace", "frobenius", "negative_mass", "participation", "effective_dimension"):
            estimate = getattr(report, name)
            assert (estimate.value, estimate.stderr, estimate.bound) == (0, 0, 0), name
        assert report.pairs.values.abs().max() == 0
        assert report.pairs.converged.all()


class _Softmax32(nn.Module):
    """As language models have it: the softmax in float32 whatever the dtype of the rest."""

    def __init__(self, pinned: bool) -> None:
        super().__init__()
        self.pinned = pinned
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        return self.last((hidden.float() if self.pinned else hidden).softmax(dim=-1).to(inputs.dtype))


@pytest.mark.parametrize(("pinned", "least", "most"), [(True, 1e-10, 1e-5), (False, 0, 1e-14)])
def test_the_product_error_shows_a_lower_precision_inside(pinned: bool, least: float, most: float) -> None:
    torch.manual_seed(4)
    model = _Softmax32(pinned).double()
    inputs = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrix = lossray.Hessian(model, F.cross_entropy, (inputs, torch.arange(30) % 3), dtype=torch.float64)
    for operator in (matrix, lossray.Scaled(matrix, torch.linspace(0.5, 2, matrix.shape[0]).double())):
        report = lossray.analyse(operator, top=2)
        assert least * report.pairs.scale <= report.product_error <= most * report.pairs.scale


def test_a_model_that_pins_its_dtype_has_no_product_error() -> None:
    class Pinned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs.float())

    inputs = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    matrix = lossray.Hessian(Pinned(), F.cross_entropy, (inputs, torch.arange(20) % 3))
    report = lossray.analyse(matrix, top=2)
    assert math.isnan(report.product_error)
    assert report.pairs.converged.all()
    scaled = lossray.analyse(lossray.Scaled(matrix, torch.ones(15)), top=2)
    assert math.isnan(scaled.product_error)
