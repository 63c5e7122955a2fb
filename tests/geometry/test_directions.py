"""Norm, curvature and cosine of directions, on operators whose answers are known."""

import math

import pytest
import torch
from torch import Tensor

from lossray.geometry.directions import DirectionRow, direction_rows, unit_vectors


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
    return direction_rows({"u": torch.tensor(vectors)}, operator, torch.tensor(gradient, dtype=torch.float64))


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
    rows = direction_rows({"a": vectors, "b": 2 * vectors}, operator, vectors)
    assert operator.calls == 2
    assert [(row.direction, row.member) for row in rows] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


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
