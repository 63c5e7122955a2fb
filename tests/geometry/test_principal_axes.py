"""Principal axes against numpy's SVD, a random walk's shares against theory and simulation, distances."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lossray.geometry.principal_axes import (
    AXES,
    TrajectoryPoint,
    gram_of,
    principal_axes,
    random_walk_shares,
    separation,
    trajectory_points,
)
from lossray.training.settings import TrainingSettings, checkpoint_steps


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _walk(n_points: int, n_members: int, dim: int, seed: int = 0) -> list[Tensor]:
    """T points [R, d] of random walks."""
    return list(_drawn(n_points, n_members, dim, seed=seed).cumsum(0))


def _points(steps: list[int], walk: list[Tensor], alive: Tensor | None = None) -> list[TrajectoryPoint]:
    everywhere = torch.ones(walk[0].shape[0], len(walk), dtype=torch.bool)
    return trajectory_points(steps, gram_of(walk), everywhere if alive is None else alive)


def _gram(rows: Tensor) -> np.ndarray:
    return (rows @ rows.T).numpy()


# ---- principal axes


@pytest.mark.parametrize("n_points", [4, 9, 40])
def test_the_axes_are_those_of_the_svd_of_the_centred_points(n_points: int) -> None:
    walk = _walk(n_points, 3, 60)
    steps = list(range(n_points))
    found = _points(steps, walk)
    assert [(point.member, point.step) for point in found] == [(r, t) for r in range(3) for t in steps]
    for r in range(3):
        rows = torch.stack([point[r] for point in walk]).numpy()
        left, sizes, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
        shares = sizes**2 / (sizes**2).sum()
        own = [point for point in found if point.member == r]
        coordinates = np.array([point.coordinates for point in own])
        np.testing.assert_allclose(np.abs(coordinates), np.abs(left * sizes)[:, :AXES], atol=1e-11)
        for point in own:
            np.testing.assert_allclose(point.explained, shares[:AXES], rtol=1e-12)


def test_the_weights_make_orthonormal_axes_on_which_the_coordinates_are_projections() -> None:
    rows = _drawn(6, 30).cumsum(0)
    axes = principal_axes(_gram(rows))
    centred = (rows - rows.mean(dim=0)).numpy()
    vectors = axes.weights.T @ centred
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(AXES), atol=1e-12)
    np.testing.assert_allclose(centred @ vectors.T, axes.coordinates, atol=1e-12)


def test_coordinates_know_nothing_of_where_and_how_the_space_lies() -> None:
    rows = _drawn(7, 20).cumsum(0)
    turn, _ = torch.linalg.qr(_drawn(20, 20, seed=1))
    expected = principal_axes(_gram(rows)).coordinates
    for other in (-rows, rows @ turn, rows + 5 * _drawn(20, seed=2)):
        np.testing.assert_allclose(principal_axes(_gram(other)).coordinates, expected, atol=1e-11)


def test_a_run_starts_on_the_left() -> None:
    for seed in range(20):
        found = _points([0, 1, 2, 3, 4], _walk(5, 1, 9, seed))
        assert all(coordinate < 0 for coordinate in found[0].coordinates)
    # The first checkpoint lies at zero of both axes: the second decides.
    cross = torch.tensor([[0.0, 0, 1], [3, 0, 1], [-3, 0, 1], [0, 2, 1], [0, -2, 1]], dtype=torch.float64)
    expected = [[0, 0], [-3, 0], [3, 0], [0, -2], [0, 2]]
    np.testing.assert_allclose(principal_axes(_gram(cross)).coordinates[:, :2], expected, atol=1e-12)


def test_a_straight_line_has_one_axis_and_a_point_has_none() -> None:
    line = [torch.tensor([[1.0, 2.0, 2.0]]) * t for t in (0.0, 1.0, 4.0)]
    for point, place in zip(_points([0, 1, 4], line), (-5.0, -2.0, 7.0), strict=True):
        assert point.coordinates[0] == pytest.approx(place)
        assert point.explained[0] == pytest.approx(1)
        assert np.isnan([*point.coordinates[1:], *point.explained[1:]]).all()
    for still in ([torch.ones(1, 3)] * 4, [torch.ones(1, 3)]):
        for point in _points(list(range(len(still))), still):
            assert np.isnan([*point.coordinates, *point.explained]).all()


def test_small_moves_far_from_the_origin_keep_their_digits() -> None:
    moves = _drawn(6, 1, 40).cumsum(0) * 1e-6
    far = 1e6 * _drawn(1, 40, seed=1)
    walk = [far + move for move in moves]
    rows = torch.stack([(point - walk[0])[0] for point in walk]).numpy()
    sizes = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
    axes = principal_axes(gram_of(walk)[0].numpy())
    np.testing.assert_allclose(axes.explained, (sizes**2 / (sizes**2).sum())[:AXES], rtol=1e-10)


def test_points_in_float32_are_multiplied_in_float64() -> None:
    walk = [point.float() for point in _walk(5, 2, 1000)]
    exact = gram_of([point.double() for point in walk])
    assert torch.equal(gram_of(walk), exact)


# ---- members that have diverged


def test_a_diverged_member_has_axes_of_its_living_checkpoints_and_changes_no_other() -> None:
    steps = [0, 10, 20, 40, 80, 160]
    walk = _walk(6, 3, 25)
    alive = torch.ones(3, 6, dtype=torch.bool)
    alive[1, 4:] = False
    broken = [point.clone() for point in walk]
    broken[4][1], broken[5][1] = 1e300, float("nan")
    sound, found = _points(steps, walk), _points(steps, broken, alive)
    until = _points(steps[:4], [point[1:2] for point in walk[:4]])
    for old, new in zip(sound, found, strict=True):
        if new.member != 1:
            assert new == old
        elif new.step >= 80:
            assert np.isnan([*new.coordinates, *new.explained, *new.random_walk]).all()
        else:
            own = until[steps.index(new.step)]
            numbers = [*new.coordinates, *new.explained, *new.random_walk]
            expected = [*own.coordinates, *own.explained, *own.random_walk]
            np.testing.assert_allclose(numbers, expected, rtol=1e-12, atol=1e-12)


def test_a_member_that_never_lived_has_no_numbers() -> None:
    for point in _points([0, 1, 2], _walk(3, 1, 4), torch.zeros(1, 3, dtype=torch.bool)):
        assert np.isnan([*point.coordinates, *point.explained, *point.random_walk]).all()


# ---- the null


def test_a_random_walk_with_uniform_checkpoints() -> None:
    """Theory 2.12: component k explains 6 / (pi k)^2, in the limit of many checkpoints."""
    shares = random_walk_shares(range(0, 4000, 10))
    np.testing.assert_allclose(shares, [0.608, 0.152, 0.068], atol=5e-4)
    np.testing.assert_allclose(shares, 6 / (np.pi * np.arange(1, 4)) ** 2, rtol=1e-4)


def test_a_random_walk_with_twelve_log_spaced_checkpoints() -> None:
    """Theory 2.12; the default checkpoints hold step 0 as well."""
    spaced = np.geomspace(1, 1000, 12).round().astype(int).tolist()
    np.testing.assert_allclose(random_walk_shares(spaced), [0.685, 0.163, 0.074], atol=5e-4)
    steps = checkpoint_steps(TrainingSettings())
    assert (len(steps), steps[0], steps[-1]) == (12, 0, 1000)
    np.testing.assert_allclose(random_walk_shares(steps), [0.694, 0.164, 0.073], atol=5e-4)


def test_the_null_knows_only_the_ratios_of_the_times_since_the_first() -> None:
    shares = random_walk_shares([0, 1, 3, 9, 20])
    np.testing.assert_allclose(random_walk_shares([50, 57, 71, 113, 190]), shares, rtol=1e-10)
    assert np.isnan(random_walk_shares([0, 10, 20])[2])
    assert random_walk_shares([0, 10]).tolist()[0] == pytest.approx(1)
    assert np.isnan(random_walk_shares([7])).all()


@pytest.mark.parametrize("steps", [[0, 10, 20, 30, 40, 50], [0, 1, 3, 10, 30, 100]])
def test_simulated_walks_in_high_dimension_explain_what_the_null_says(steps: list[int]) -> None:
    gaps = torch.tensor(steps, dtype=torch.float64).diff(prepend=torch.zeros(1, dtype=torch.float64))
    walk = list((_drawn(6, 4, 20_000) * gaps.sqrt()[:, None, None]).cumsum(0))
    for point in _points(steps, walk):
        np.testing.assert_allclose(point.explained, point.random_walk, rtol=0.05)
        np.testing.assert_allclose(point.random_walk, random_walk_shares(steps), rtol=1e-12)


# ---- two runs


def test_distances_and_cosines_in_closed_form() -> None:
    a_first, b_first = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    a, b = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 1.0, 4.0])
    found = separation(a, b, a_first, b_first)
    assert found.distance == pytest.approx(math.sqrt(4 + 1 + 16))
    assert found.cosine == pytest.approx(5 / math.sqrt(5 * 26))
    assert found.displacement_cosine == 0
    assert separation(b, a, b_first, a_first) == found
    along = separation(a_first + 2 * a, b_first + 3 * a, a_first, b_first)
    assert along.displacement_cosine == pytest.approx(1, rel=1e-7)
    assert separation(a, a, a_first, a_first).cosine == pytest.approx(1, abs=1e-15)


def test_at_the_first_checkpoint_nothing_has_moved() -> None:
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    found = separation(a, b, a, b)
    assert (found.distance, found.cosine) == (5, 0)
    assert math.isnan(found.displacement_cosine)


def test_a_run_that_has_diverged_is_no_distance_from_another() -> None:
    a = torch.tensor([3.0, 1.0])
    found = separation(a, a.new_full((2,), float("nan")), a, a)
    assert np.isnan([found.distance, found.cosine, found.displacement_cosine]).all()
