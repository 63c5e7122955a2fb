"""Angles to eigenspaces: closed forms, the null of random directions, and when a subspace is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import kstest
from torch import Tensor

from lossray.geometry.gauges import Gauge
from lossray.geometry.nulls import null_p_values
from lossray.geometry.settings import AnglesSettings
from lossray.geometry.subspace_angles import AngleRow, angle_rows
from lossray.geometry.subspaces import subspaces
from lossray.networks.layout import Layout
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.spectra.eigensolver import packed_eigenpairs
from lossray.spectra.ends import Wanted


def _pairs(
    n_members: int = 1, *, k: int = 5, dim: int = 8, tilt: float = 0.0, basis: Tensor | None = None
) -> PackedEigenPairs:
    """Values dim, dim - 1, ... at the first unit vectors or the rows of ``basis``; residuals ``tilt``."""
    vectors = torch.eye(dim, dtype=torch.float64)[:k] if basis is None else basis
    values = torch.arange(dim, dim - k, -1, dtype=torch.float64).expand(n_members, k)
    ones = torch.ones(n_members, dtype=torch.float64)
    return PackedEigenPairs(
        values=values.clone(),
        vectors=vectors.expand(n_members, k, dim).clone(),
        residuals=torch.full((n_members, k), tilt, dtype=torch.float64),
        converged=torch.ones(n_members, k, dtype=torch.bool),
        confirmed=torch.ones(n_members, dtype=torch.bool),
        gaps=torch.ones(n_members, k, dtype=torch.float64),
        complement=(dim - k) * ones,
        scale=dim * ones,
        matvecs=torch.zeros(n_members, dtype=torch.int64),
        orthogonality_loss=0 * ones,
    )


def _layout(dim: int) -> Layout:
    """One layer."""
    return Layout(("w",), (torch.Size([dim]),), ("other",))


def _rows(vectors: Tensor, *, n_outputs: int = 3, k: int = 5) -> dict[str, AngleRow]:
    pairs, dim = _pairs(k=k, dim=vectors.shape[1]), vectors.shape[1]
    rows = angle_rows({"u": vectors}, pairs, n_outputs=n_outputs, layout=_layout(dim))
    return {row.subspace: row for row in rows}


def test_closed_forms() -> None:
    rows = _rows(torch.tensor([[-3.0, 0, 0, 0, 0, 4.0, 0, 0]]))
    assert list(rows) == ["v1", "top2", "top3", "top5"]  # there are five pairs
    for name, k in (("v1", 1), ("top2", 2), ("top5", 5)):
        row = rows[name]
        assert row.cosine == pytest.approx(0.6, rel=1e-14)
        assert row.energy == pytest.approx(0.36, rel=1e-14)
        assert row.angle_degrees == pytest.approx(math.degrees(math.acos(0.6)), rel=1e-14)
        assert row.null_ratio == pytest.approx(0.36 * 8 / k)
        assert (row.k, row.dim, row.gauge, row.resolved) == (k, 8, "raw", True)
        assert row.null_p + row.null_p_lower == pytest.approx(1)
    # The angle to a subspace takes in all of its part of the direction.
    both = _rows(torch.tensor([[1.0, 1.0, 0, 0, 0, 0, 0, 0]]))
    assert both["v1"].angle_degrees == pytest.approx(45)
    assert both["top2"].angle_degrees == 0
    assert both["top2"].null_p == 0


def test_opposite_directions_have_the_same_angle() -> None:
    u = torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert _rows(u) == _rows(-u)


@pytest.mark.parametrize("small", [1e-3, 1e-8, 1e-12, 1e-100])
def test_accurate_near_0_and_90_degrees(small: float) -> None:
    """An arc cosine would lose everything below 1e-6 degrees."""
    near_0 = _rows(torch.tensor([[1.0, 0, 0, 0, 0, small, 0, 0]], dtype=torch.float64))["v1"]
    assert near_0.angle_degrees == pytest.approx(math.degrees(math.atan(small)), rel=1e-12)
    near_90 = _rows(torch.tensor([[small, 0, 0, 0, 0, 1.0, 0, 0]], dtype=torch.float64))["v1"]
    assert near_90.cosine == pytest.approx(math.sin(math.atan(small)), rel=1e-12)
    assert 90 - near_90.angle_degrees == pytest.approx(math.degrees(small), rel=1e-6, abs=1e-13)


def test_null_probabilities_in_closed_form() -> None:
    """d = 4, k = 2: Beta(1, 1) is uniform. d = 3, k = 1: P(B >= x) = 1 - sqrt(x)."""
    chi2 = np.array([0.0, 1e-30, 0.1, 0.5, 0.9, 1.0])
    upper, lower = null_p_values(chi2, 1 - chi2, 2, 4)
    assert upper == pytest.approx(1 - chi2, rel=1e-12)
    assert lower == pytest.approx(chi2, rel=1e-12)
    upper, lower = null_p_values(chi2, 1 - chi2, 1, 3)
    assert upper == pytest.approx(1 - np.sqrt(chi2), rel=1e-12)
    assert lower == pytest.approx(np.sqrt(chi2), rel=1e-12)
    upper, _ = null_p_values(np.array([1.0]), np.array([1e-20]), 2, 4)
    assert upper == pytest.approx(1e-20, abs=0)  # 1 - chi2 would be 0


@pytest.mark.parametrize(("dim", "k"), [(50, 1), (50, 5), (2000, 3)])
def test_random_directions_follow_the_null(dim: int, k: int) -> None:
    """null_p is uniform, and the mean energy k / d (theory 2.11)."""
    draws = 2000
    generator = torch.Generator().manual_seed(dim + k)
    vectors = torch.randn(draws, dim, dtype=torch.float64, generator=generator)
    basis, _ = torch.linalg.qr(torch.randn(dim, k, dtype=torch.float64, generator=generator))
    pairs = _pairs(draws, k=k, dim=dim, basis=basis.T)
    rows = [row for row in angle_rows({"u": vectors}, pairs, n_outputs=k, layout=_layout(dim)) if row.k == k]
    assert len(rows) == draws
    assert kstest([row.null_p for row in rows], "uniform").pvalue > 0.01
    energies = torch.tensor([row.energy for row in rows], dtype=torch.float64)
    spread = math.sqrt(2 * (k / dim) * (1 - k / dim) / (dim + 2))  # standard deviation of the Beta
    assert abs(energies.mean() - k / dim) < 4 * spread / math.sqrt(draws)
    ratios = torch.tensor([row.null_ratio for row in rows])
    assert ratios.mean() == pytest.approx(1, abs=4 * spread * dim / k / math.sqrt(draws))


@pytest.mark.parametrize(
    ("n_outputs", "dim", "expected"),
    [
        (10, 100, {"v1": 1, "top5": 5, "top9": 9, "top10": 10, "top20": 20}),
        (5, 100, {"v1": 1, "top4": 4, "top5": 5, "top10": 10}),
        (6, 100, {"v1": 1, "top5": 5, "top6": 6, "top12": 12}),
        (2, 100, {"v1": 1, "top2": 2, "top4": 4, "top5": 5}),
        (1, 100, {"v1": 1, "top2": 2, "top5": 5}),
        (10, 10, {"v1": 1, "top5": 5, "top9": 9}),
        (10, 2, {"v1": 1}),
        (10, 1, {}),
    ],
)
def test_subspaces(n_outputs: int, dim: int, expected: dict[str, int]) -> None:
    assert subspaces(n_outputs, dim) == expected


def test_subspaces_beyond_the_pairs_are_left_out() -> None:
    assert list(_rows(torch.ones(1, 8), n_outputs=7)) == ["v1", "top5"]


def test_a_zero_direction_has_no_angle() -> None:
    row = _rows(torch.zeros(1, 8))["v1"]
    numbers = (row.cosine, row.angle_degrees, row.energy, row.null_ratio, row.null_p, row.null_p_lower)
    assert all(math.isnan(number) for number in numbers)
    assert (row.k, row.dim, row.resolved) == (1, 8, True)


def test_a_dead_member_is_nan() -> None:
    pairs = _pairs(2)
    for name in ("values", "vectors", "residuals"):
        getattr(pairs, name)[1] = math.nan
    alive, dead = (
        row
        for row in angle_rows({"u": torch.ones(2, 8)}, pairs, n_outputs=1, layout=_layout(8))
        if row.k == 1
    )
    assert alive.energy == pytest.approx(1 / 8)
    assert (dead.member, dead.resolved) == (1, None)
    assert math.isnan(dead.energy)
    assert math.isnan(dead.null_p)


def test_resolved_depends_on_residual_gap_and_flags() -> None:
    def resolved(pairs: PackedEigenPairs) -> dict[str, bool | None]:
        rows = angle_rows({"u": torch.ones(1, 8)}, pairs, n_outputs=3, layout=_layout(8))
        return {row.subspace: row.resolved for row in rows}

    everything = {"v1": True, "top2": True, "top3": True, "top5": True}
    assert resolved(_pairs(tilt=0.04)) == everything  # five residuals of 0.04: 0.089 of the gap of 1
    assert resolved(_pairs(tilt=0.06)) == everything | {"top3": False, "top5": False}
    assert not any(resolved(_pairs(tilt=0.2)).values())
    tie = _pairs(tilt=1e-6)
    tie.values[0, 0] = tie.values[0, 1] + 1e-7  # v1 is any mixture of the two; the pair is known
    assert resolved(tie) == everything | {"v1": False}
    unconverged = _pairs()
    unconverged.converged[0, 2] = False
    assert resolved(unconverged) == everything | {"top3": False, "top5": False}
    unconfirmed = _pairs()
    unconfirmed.confirmed[0] = False
    assert not any(resolved(unconfirmed).values())


def test_from_a_solve() -> None:
    """The gradient of a quadratic at v1 + v2 lies in the plane of the two."""

    class Quadratic:
        shape = (1, 40)
        dtype = torch.float64
        device = torch.device("cpu")
        spectrum = torch.linspace(4, 0.1, 40, dtype=torch.float64)

        def apply(self, vectors: Tensor) -> Tensor:
            return self.spectrum * vectors

    operator = Quadratic()
    (pairs,) = packed_eigenpairs(operator, [Wanted("largest", 5)], seeds=[0], tolerance=1e-10)
    point = torch.zeros(1, 40, dtype=torch.float64)
    point[0, :2] = 1
    found = angle_rows({"g": operator.apply(point)}, pairs, n_outputs=2, layout=_layout(40))
    rows = {row.subspace: row for row in found}
    first, second = operator.spectrum[:2]
    assert rows["v1"].energy == pytest.approx((first**2 / (first**2 + second**2)).item())
    assert rows["top2"].angle_degrees < 1e-6
    assert all(row.resolved for row in rows.values())


def test_the_smallest_eigenvector_is_a_subspace_of_its_own() -> None:
    smallest = _pairs(k=1)
    smallest.values[0, 0], smallest.complement[0] = -3.0, -1.0
    smallest.vectors[0, 0] = torch.eye(8, dtype=torch.float64)[7]
    smallest.confirmed[0] = False  # nothing searches below it
    directions = {"u": torch.tensor([[0.0, 0, 0, 0, 0, 0, 3.0, 4.0]])}
    rows = angle_rows(directions, _pairs(), n_outputs=3, layout=_layout(8), smallest=smallest)
    row = next(row for row in rows if row.subspace == "vmin")
    assert row.energy == pytest.approx(0.64)
    assert (row.k, row.resolved) == (1, True)
    smallest.residuals[0, 0] = 0.3
    rows = angle_rows(directions, _pairs(), n_outputs=3, layout=_layout(8), smallest=smallest)
    assert next(row for row in rows if row.subspace == "vmin").resolved is False


def test_the_sign_flip_null_is_the_mean_over_all_signs() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=generator))
    u = torch.randn(8, dtype=torch.float64, generator=generator)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 8).double()
    pairs = _pairs(basis=basis.T[:5])
    rows = angle_rows({"u": u[None]}, pairs, n_outputs=3, layout=_layout(8))
    for row in rows:
        energies = (signs * u @ basis[:, : row.k]).square().sum(dim=1) / u.square().sum()
        assert row.sign_flip_null == pytest.approx(float(energies.mean()), rel=1e-12)
        assert row.layer_null == pytest.approx(row.k / 8)  # one layer: the mean over all directions


def test_dropped_coordinates_leave_the_dimension() -> None:
    scale = torch.ones(1, 8, dtype=torch.float64)
    scale[0, 5:] = 0
    gauge = Gauge("adaptive", scale)
    directions = gauge.transform({"u": torch.ones(1, 8)})
    rows = angle_rows(directions, _pairs(k=4), n_outputs=3, layout=_layout(8), gauge=gauge)
    row = rows[0]
    assert (row.gauge, row.dim, row.dropped, row.subspace) == ("adaptive", 5, 3, "v1")
    assert row.energy == pytest.approx(1 / 5)
    assert row.null_ratio == pytest.approx(1)
    assert row.layer_null == pytest.approx(1 / 5)


def test_settings_defaults_are_those_of_the_design() -> None:
    assert AnglesSettings().plain() == {
        "directions": ["gradient", "minibatch_gradient", "update", "momentum", "displacement"],
        "gauges": ["raw", "balanced", "adaptive", "preconditioned"],
        "shadow": [],
        "window": 50,
        "subspaces": "all",
        "layers": False,
    }
    assert AnglesSettings.model_validate({"shadow": ["adam"], "window": 0}).shadow == ("adam",)


@pytest.mark.parametrize(
    "table",
    [
        {"directions": ["gradients"]},
        {"directions": ["update", "update"]},
        {"directions": "gradient"},
        {"gauges": ["balance"]},
        {"gauges": []},
        {"shadow": ["adamm"]},
        {"shadow": ["adam", "adam"]},
        {"shadow": [1]},
        {"window": -1},
        {"window": 2.0},
        {"windows": 5},
    ],
)
def test_settings_refuse(table: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AnglesSettings.model_validate(table)


def test_the_smallest_eigenvalue_of_a_dropped_coordinate_is_no_subspace_that_is_known() -> None:
    """S H S with H positive: its smallest eigenvalue is the zero of the coordinate that S drops."""
    scale = torch.ones(1, 8, dtype=torch.float64)
    scale[0, 7] = 0
    smallest = _pairs(k=1, dim=8, basis=torch.eye(8, dtype=torch.float64)[7:])
    smallest = replace(smallest, values=torch.zeros(1, 1, dtype=torch.float64))

    def vmin(gauge: Gauge) -> AngleRow:
        rows = angle_rows(
            {"update": torch.ones(1, 8)},
            _pairs(),
            n_outputs=3,
            layout=_layout(8),
            gauge=gauge,
            smallest=smallest,
        )
        return next(row for row in rows if row.subspace == "vmin")

    assert vmin(Gauge("raw", torch.ones_like(scale))).resolved is True
    assert vmin(Gauge("adaptive", scale)).resolved is False
