"""Norm, curvature and cosine of directions, on operators whose answers are known."""

import math

import pytest
import torch
from torch import Tensor

from lossray.geometry.directions import (
    DirectionRow,
    Reference,
    curvature_within_layers,
    direction_rows,
    measure,
    share_rows,
    unit_vectors,
)
from lossray.geometry.finite_step import FiniteStep
from lossray.networks.layout import Layout


class Diagonal:
    """Operators diag(spectra) for R members."""

    def __init__(self, spectra: Tensor) -> None:
        self.spectra = spectra
        self.shape = (spectra.shape[0], spectra.shape[1])
        self.dtype = torch.float64
        self.device = torch.device("cpu")
        self.calls = 0

    def apply(self, vectors: Tensor) -> Tensor:
        self.calls += 1
        assert torch.isfinite(vectors).all()
        return self.spectra * vectors


def _rows(
    vectors: list[list[float]], spectra: list[list[float]], gradient: list[list[float]]
) -> list[DirectionRow]:
    operator = Diagonal(torch.tensor(spectra, dtype=torch.float64))
    measured = measure({"u": torch.tensor(vectors)}, operator)
    return direction_rows(measured, _reference(operator, torch.tensor(gradient, dtype=torch.float64)), {})


def _reference(operator: "Diagonal", gradient: Tensor) -> Reference:
    trace = operator.spectra.sum(dim=1)
    return Reference(gradient, trace, 0.1 * trace, operator.spectra.amax(dim=1))


def test_closed_form() -> None:
    first, second = _rows(
        [[3.0, 4.0, 0.0], [0.0, 0.0, -2.0]],
        [[1.0, 10.0, 5.0], [0.0, 0.0, -7.0]],
        [[1.0, 0.0, 0.0], [0.0, 0.0, 0.5]],
    )
    assert (first.member, first.direction, first.norm) == (0, "u", pytest.approx(5))
    assert first.curvature == pytest.approx((9 * 1 + 16 * 10) / 25)
    assert first.cosine_with_gradient == pytest.approx(0.6)
    assert (second.member, second.norm) == (1, pytest.approx(2))
    assert second.curvature == pytest.approx(-7)
    assert second.cosine_with_gradient == pytest.approx(-1)


def test_one_product_for_each_direction() -> None:
    operator = Diagonal(torch.ones(2, 3, dtype=torch.float64))
    vectors = torch.ones(2, 3)
    measured = measure({"a": vectors, "b": 2 * vectors}, operator)
    rows = direction_rows(measured, _reference(operator, vectors), {})
    assert operator.calls == 2
    assert [(row.direction, row.member) for row in rows] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_curvature_is_held_against_the_mean_and_the_largest() -> None:
    (row,) = _rows([[0.0, 1.0, 0.0]], [[1.0, 10.0, 4.0]], [[1.0, 0.0, 0.0]])
    assert row.relative_curvature == pytest.approx(10 / 5)
    assert row.relative_curvature_stderr == pytest.approx(0.1 * 10 / 5)
    assert row.sharpness_share == pytest.approx(1)


def test_finite_steps_are_passed_on_and_missing_ones_are_null() -> None:
    operator = Diagonal(torch.ones(1, 2, dtype=torch.float64))
    measured = measure({"a": torch.ones(1, 2), "b": torch.ones(1, 2)}, operator)
    step = FiniteStep(*(torch.tensor([value]) for value in (3.0, 0.5, 0.1)))
    a, b = direction_rows(measured, _reference(operator, torch.ones(1, 2)), {"a": step})
    assert (a.finite_step_curvature, a.finite_step_curvature_noise) == (3.0, 0.5)
    assert a.step_norm == pytest.approx(0.1)
    assert math.isnan(b.finite_step_curvature)


def test_the_layers_share_norm_and_curvature() -> None:
    layout = Layout(
        ("a.weight", "a.bias", "b.weight"),
        (torch.Size([2]), torch.Size([1]), torch.Size([1])),
        ("other",) * 3,
    )
    matrix = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = matrix + matrix.T

    class Full(Diagonal):
        def apply(self, vectors: Tensor) -> Tensor:
            return vectors @ matrix

    operator = Full(torch.ones(1, 4, dtype=torch.float64))
    u = torch.tensor([[1.0, 2.0, 2.0, 4.0]], dtype=torch.float64)
    measured = measure({"u": u}, operator)
    first, second = share_rows(measured, layout)
    assert (first.block, second.block, first.dim, second.dim) == ("a", "b", 3, 1)
    assert (first.energy_share, second.energy_share) == (pytest.approx(9 / 25), pytest.approx(16 / 25))
    (row,) = direction_rows(measured, _reference(operator, u), {})
    assert first.curvature_part + second.curvature_part == pytest.approx(row.curvature)
    assert second.curvature_part == pytest.approx(float(u[0, 3] * (matrix @ u[0])[3]) / 25)


class Coupled(Diagonal):
    """Operators of R members as dense symmetric matrices [R, d, d]."""

    def __init__(self, matrices: Tensor) -> None:
        super().__init__(matrices.diagonal(dim1=1, dim2=2))
        self.matrices = matrices

    def apply(self, vectors: Tensor) -> Tensor:
        self.calls += vectors.shape[1] if vectors.ndim == 3 else 1
        block = vectors if vectors.ndim == 3 else vectors[:, None]
        return (block @ self.matrices).view(vectors.shape)


LAYERS = Layout(
    ("a.weight", "a.bias", "b.weight", "c.weight"),
    tuple(torch.Size([size]) for size in (2, 1, 3, 1)),
    ("other",) * 4,
)


def _coupled() -> tuple[Coupled, Tensor]:
    """Two members' operators on LAYERS, and a direction of each."""
    draws = torch.Generator().manual_seed(0)
    matrices = torch.randn(2, 7, 7, dtype=torch.float64, generator=draws)
    return Coupled(matrices + matrices.mT), torch.randn(2, 7, dtype=torch.float64, generator=draws)


def test_curvature_within_and_across_layers_is_that_of_the_blocks() -> None:
    operator, u = _coupled()
    measured = measure({"u": u}, operator)
    operator.calls = 0
    within = curvature_within_layers(measured, operator, LAYERS)
    assert operator.calls == 3  # one for each layer
    rows = share_rows(measured, LAYERS, within)
    ends = {"a": slice(0, 3), "b": slice(3, 6), "c": slice(6, 7)}
    for row in rows:
        own, matrix, part = u[row.member], operator.matrices[row.member], ends[row.block]
        block = own[part] @ matrix[part, part] @ own[part] / (own @ own)
        whole = own[part] @ matrix[part] @ own / (own @ own)
        assert row.curvature_within == pytest.approx(float(block), rel=1e-12)
        assert row.curvature_across == pytest.approx(float(whole - block), rel=1e-12)
        assert row.curvature_within + row.curvature_across == pytest.approx(row.curvature_part, rel=1e-12)
    for r in range(2):
        total = sum(row.curvature_within + row.curvature_across for row in rows if row.member == r)
        assert total == pytest.approx(float(u[r] @ operator.matrices[r] @ u[r] / (u[r] @ u[r])), rel=1e-12)


def test_uncoupled_layers_have_nothing_across() -> None:
    operator, u = _coupled()
    block = torch.block_diag(*(torch.ones(n, n) for n in (3, 3, 1)))
    operator.matrices = operator.matrices * block
    measured = measure({"u": u}, operator)
    rows = share_rows(measured, LAYERS, curvature_within_layers(measured, operator, LAYERS))
    assert all(row.curvature_across == pytest.approx(0, abs=1e-14) for row in rows)
    assert all(row.curvature_within == pytest.approx(row.curvature_part) for row in rows)


def test_without_it_and_of_a_zero_direction_it_is_null() -> None:
    operator, u = _coupled()
    measured = measure({"u": u, "zero": 0 * u}, operator)
    assert all(math.isnan(row.curvature_within) for row in share_rows(measured, LAYERS))
    rows = share_rows(measured, LAYERS, curvature_within_layers(measured, operator, LAYERS))
    nulls = {(row.direction, math.isnan(row.curvature_within)) for row in rows}
    assert nulls == {("u", False), ("zero", True)}


def test_a_zero_direction_has_a_norm_and_nothing_else() -> None:
    row, _ = _rows([[0.0, 0.0], [1.0, 0.0]], [[1.0, 2.0]] * 2, [[1.0, 0.0]] * 2)
    assert row.norm == 0
    assert math.isnan(row.curvature)
    assert math.isnan(row.cosine_with_gradient)


def test_a_dead_member_is_nan_and_spoils_nobody() -> None:
    dead, other = _rows(
        [[math.nan, 1.0], [1.0, 1.0]], [[math.nan] * 2, [1.0, 3.0]], [[math.nan] * 2, [1.0, 0.0]]
    )
    assert all(math.isnan(value) for value in (dead.norm, dead.curvature, dead.cosine_with_gradient))
    assert other.curvature == pytest.approx(2)


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1.0, 1e30, 1e200])
def test_lengths_neither_overflow_nor_vanish(size: float) -> None:
    units, norms = unit_vectors(torch.tensor([[3.0, 4.0]], dtype=torch.float64) * size)
    assert torch.allclose(units, torch.tensor([[0.6, 0.8]], dtype=torch.float64))
    assert norms.item() == pytest.approx(5 * size)


def test_infinite_vectors_have_no_direction() -> None:
    units, _ = unit_vectors(torch.tensor([[math.inf, 1.0]]))
    assert torch.isnan(units).any()
