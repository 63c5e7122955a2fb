"""Overlaps of eigenspaces: closed forms, chance, and what does not matter."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from lossray.geometry.overlaps import OverlapRow, overlap_rows, overlap_sizes
from lossray.spectra.certified_pairs import PackedEigenPairs


def _pairs(vectors: Tensor, *, residual: float = 0.0) -> PackedEigenPairs:
    """The rows [R, k, d] as eigenvectors of the values k, k - 1, ..., 1; nothing but 0 outside."""
    n, k, _ = vectors.shape
    ones = torch.ones(n, dtype=torch.float64)
    return PackedEigenPairs(
        values=torch.arange(k, 0, -1, dtype=torch.float64).repeat(n, 1),
        vectors=vectors.double().clone(),
        residuals=torch.full((n, k), residual, dtype=torch.float64),
        converged=torch.ones(n, k, dtype=torch.bool),
        confirmed=torch.ones(n, dtype=torch.bool),
        gaps=torch.ones(n, k, dtype=torch.float64),
        complement=0 * ones,
        scale=k * ones,
        matvecs=torch.zeros(n, dtype=torch.int64),
        orthogonality_loss=0 * ones,
    )


def _random(n: int, k: int, dim: int, seed: int) -> Tensor:
    """Orthonormal rows of n uniformly random subspaces, [n, k, dim]."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n, dim, k, dtype=torch.float64, generator=generator))
    return basis.mT.contiguous()


def _rows(earlier: Tensor, later: Tensor, *, n_outputs: int = 2, top: int = 3) -> dict[int, OverlapRow]:
    rows = overlap_rows(_pairs(earlier), _pairs(later), n_outputs=n_outputs, top=top)
    return {row.k: row for row in rows}


def _overlaps(earlier: Tensor, later: Tensor, **options: int) -> dict[int, float]:
    return {k: row.subspace_overlap for k, row in _rows(earlier, later, **options).items()}


def test_the_same_subspaces_overlap_wholly_and_orthogonal_ones_not_at_all() -> None:
    axes = torch.eye(12)[None]
    assert _overlaps(axes[:, :5], axes[:, :5]) == {1: 1, 2: 1, 3: 1, 4: 1, 5: 1}
    assert _overlaps(axes[:, :5], axes[:, 5:10]) == {1: 0, 2: 0, 3: 0, 4: 0, 5: 0}
    own = _random(1, 5, 40, seed=0)
    assert _overlaps(own, own) == pytest.approx(dict.fromkeys(range(1, 6), 1.0), rel=1e-14)


def test_rounding_never_leads_above_1() -> None:
    basis = _random(1, 5, 40, seed=1) * (1 + 1e-7)  # as of vectors in float32
    assert _overlaps(basis, basis) == dict.fromkeys(range(1, 6), 1.0)


@pytest.mark.parametrize("alpha", [0.0, 1e-4, 0.3, math.pi / 4, math.pi / 2])
def test_a_plane_that_turns_by_an_angle(alpha: float) -> None:
    """The first axis turns by alpha out of the plane, the second stays."""
    axes = torch.eye(9, dtype=torch.float64)
    turned = torch.stack([math.cos(alpha) * axes[0] + math.sin(alpha) * axes[4], axes[1]])
    found = _overlaps(axes[None, :2], turned[None])
    assert found[1] == pytest.approx(math.cos(alpha) ** 2, abs=1e-15)
    assert found[2] == pytest.approx((1 + math.cos(alpha) ** 2) / 2, abs=1e-15)


def test_vectors_that_change_places_keep_their_plane() -> None:
    axes = torch.eye(9)[None]
    assert _overlaps(axes[:, :2], axes[:, [1, 0]]) == {1: 0, 2: 1}


@pytest.mark.parametrize(("dim", "k"), [(30, 1), (30, 5), (200, 10)])
def test_random_subspaces_overlap_by_chance(dim: int, k: int) -> None:
    """The mean is k / d; the variance of tr(PQ) = k x overlap is 2 k^2 (d-k)^2 / (d^2 (d-1) (d+2))."""
    draws = 1000
    earlier, later = _random(draws, k, dim, seed=2), _random(draws, k, dim, seed=3)
    rows = overlap_rows(_pairs(earlier), _pairs(later), n_outputs=k, top=k)
    found = torch.tensor([row.subspace_overlap for row in rows if row.k == k], dtype=torch.float64)
    assert len(found) == draws
    deviation = math.sqrt(2 / (dim - 1) / (dim + 2)) * (dim - k) / dim
    assert abs(found.mean() - k / dim) < 4 * deviation / math.sqrt(draws)
    assert found.std() == pytest.approx(deviation, rel=0.15)
    assert {row.chance for row in rows if row.k == k} == {k / dim}


def test_over_all_axes_the_mean_is_chance_exactly() -> None:
    """A random subspace against every coordinate subspace of its size that a cyclic shift makes."""
    dim, k = 12, 5
    own = _random(1, k, dim, seed=4)
    axes = torch.eye(dim, dtype=torch.float64)
    overlaps = [_overlaps(own, axes.roll(i, 0)[None, :k])[k] for i in range(dim)]
    assert sum(overlaps) / dim == pytest.approx(k / dim, rel=1e-14)


def test_neither_signs_nor_rotations_inside_nor_the_order_of_the_two_matter() -> None:
    earlier, later = _random(3, 5, 20, seed=5), _random(3, 5, 20, seed=6)
    (rotation,) = _random(1, 5, 5, seed=7)
    signs = torch.tensor([1.0, -1, -1, 1, -1], dtype=torch.float64)[:, None]
    plain = [row.subspace_overlap for row in overlap_rows(_pairs(earlier), _pairs(later), n_outputs=9, top=3)]
    flipped = overlap_rows(_pairs(signs * earlier), _pairs(later), n_outputs=9, top=3)
    assert [row.subspace_overlap for row in flipped] == pytest.approx(plain, rel=1e-12)
    back = overlap_rows(_pairs(later), _pairs(earlier), n_outputs=9, top=3)
    assert [row.subspace_overlap for row in back] == pytest.approx(plain, rel=1e-12)
    turned = overlap_rows(_pairs(rotation @ earlier), _pairs(later), n_outputs=9, top=3)
    at_5 = [row.subspace_overlap for row in turned if row.k == 5]
    assert at_5 == pytest.approx(plain[-3:], rel=1e-12)
    at_3 = [row.subspace_overlap for row in turned if row.k == 3]
    assert at_3 != pytest.approx(plain[3:6], rel=1e-3)  # the rotation takes three of them out of their span


@pytest.mark.parametrize(
    ("n_outputs", "top", "dim", "expected"),
    [
        (10, 10, 1000, [1, 5, 9, 10, 20]),
        (3, 7, 1000, [1, 2, 3, 5, 6, 7, 10]),
        (1, 10, 1000, [1, 2, 5, 10]),
        (10, 10, 20, [1, 5, 9, 10]),
        (3, 1, 2, [1]),
        (3, 1, 1, []),
    ],
)
def test_sizes(n_outputs: int, top: int, dim: int, expected: list[int]) -> None:
    assert overlap_sizes(n_outputs, top, dim) == expected


def test_rows_end_where_the_pairs_do() -> None:
    basis = _random(2, 6, 30, seed=8)
    rows = overlap_rows(_pairs(basis), _pairs(basis[:, :5]), n_outputs=6, top=4)
    assert [(row.k, row.member) for row in rows] == [(k, r) for k in (1, 4, 5) for r in (0, 1)]
    assert {row.dim for row in rows} == {30}


@pytest.mark.parametrize("side", [0, 1])
def test_a_member_that_is_dead_on_either_side_has_no_overlap(side: int) -> None:
    spectra = [_pairs(_random(2, 3, 10, seed=9 + i)) for i in (0, 1)]
    for name in ("values", "vectors", "residuals", "complement"):
        getattr(spectra[side], name)[1] = math.nan
    for row in overlap_rows(*spectra, n_outputs=2, top=3):
        assert math.isnan(row.subspace_overlap) == (row.member == 1)
        assert row.resolved == (None if row.member == 1 else True)
        assert row.chance == row.k / 10


def test_a_pair_that_is_missing_takes_the_larger_subspaces_along() -> None:
    earlier, later = _pairs(_random(1, 3, 10, seed=11)), _pairs(_random(1, 3, 10, seed=12))
    for name in ("values", "vectors", "residuals"):
        getattr(later, name)[0, 2] = math.nan
    later.converged[0, 2] = False
    known = {
        row.k: not math.isnan(row.subspace_overlap)
        for row in overlap_rows(earlier, later, n_outputs=2, top=3)
    }
    assert known == {1: True, 2: True, 3: False}


def test_resolved_means_both() -> None:
    sharp, blurred = _pairs(_random(1, 3, 10, seed=13)), _pairs(_random(1, 3, 10, seed=14), residual=0.08)

    def resolved(earlier: PackedEigenPairs, later: PackedEigenPairs) -> list[bool | None]:
        return [row.resolved for row in overlap_rows(earlier, later, n_outputs=2, top=3)]

    assert resolved(sharp, sharp) == [True, True, True]
    assert resolved(blurred, blurred) == [
        True,
        False,
        False,
    ]  # residuals add up: 0.08, 0.11, 0.14 of a gap of 1
    assert resolved(sharp, blurred) == resolved(blurred, sharp) == [True, False, False]
    unconfirmed = dataclasses.replace(sharp, confirmed=torch.tensor([False]))
    assert resolved(unconfirmed, sharp) == [False, False, False]
