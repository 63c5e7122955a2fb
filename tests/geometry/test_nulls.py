"""Nulls of angles: closed forms against draws."""

import math

import pytest
import torch
from scipy.special import digamma

from lossray.geometry.nulls import IsotropicNull, LayerNull, layer_index, layer_sums
from lossray.geometry.quadratic_forms import form_of
from lossray.networks.layout import Layout

LAYOUT = Layout(
    ("a.weight", "a.bias", "b.weight"),
    (torch.Size([2, 2]), torch.Size([2]), torch.Size([3])),
    ("matrix", "other", "matrix"),
)
DIM = 9


def basis(k, generator):
    return torch.linalg.qr(torch.randn(DIM, k, dtype=torch.float64, generator=generator)).Q.T


def test_a_layer_is_the_module_that_owns_the_parameters():
    assert layer_index(LAYOUT).tolist() == [0] * 6 + [1] * 3
    values = torch.arange(9.0)[None]
    assert layer_sums(values, layer_index(LAYOUT), 2).tolist() == [[15.0, 21.0]]


@pytest.mark.parametrize("k", [1, 3])
def test_the_layer_null_is_the_mean_over_directions_with_the_same_norms(k):
    generator = torch.Generator().manual_seed(k)
    u = torch.randn(1, DIM, dtype=torch.float64, generator=generator)
    space = basis(k, generator)
    weights = space.square().sum(dim=0)[None]
    expected = float(LayerNull(LAYOUT, torch.ones(1, DIM, dtype=torch.bool)).expected(u.square(), weights))
    draws = torch.randn(200_000, DIM, dtype=torch.float64, generator=generator)
    for part in (slice(0, 6), slice(6, 9)):
        draws[:, part] *= u[0, part].norm() / draws[:, part].norm(dim=1, keepdim=True)
    energies = (draws @ space.T).square().sum(dim=1)
    error = float(energies.std() / len(draws) ** 0.5)
    assert abs(float(energies.mean()) - expected) < 4 * error


def test_dropped_coordinates_do_not_count_in_a_layer():
    kept = torch.ones(1, DIM, dtype=torch.bool)
    kept[0, :3] = False
    u, weights = torch.ones(1, DIM), torch.ones(1, DIM)
    u[0, :3], weights[0, :3] = 0, 0
    # |u_l|^2 sum v^2 / d_l: 3 * 3 / 3 and 3 * 3 / 3
    assert float(LayerNull(LAYOUT, kept).expected(u.square(), weights)) == pytest.approx(6)


def isotropic(dim, shares, sizes=(1,), scale=None):
    scale = torch.ones(1, dim, dtype=torch.float64) if scale is None else scale
    duals = torch.eye(dim, dtype=torch.float64)[None, : max(sizes)] * scale[:, None]
    found = IsotropicNull(scale, duals, sizes).expected(form_of(torch.tensor([shares])))
    return [float(found[k]) for k in sizes]


@pytest.mark.parametrize("dim", [11, 100, 5000])
def test_one_persistent_direction_has_the_law_of_beta(dim):
    expected = [digamma(k / 2) - digamma(dim / 2) for k in (1, 10)]
    assert isotropic(dim, [1.0, 0.0], (1, 10)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("dim", "steps"), [(100, 50), (100, 100), (3000, 2000)])
def test_many_independent_steps_have_chance(dim, steps):
    one, ten = isotropic(dim, [1 / steps] * steps, (1, 10))
    # As many coordinates of a random unit vector in R^d as there are steps: Beta(steps/2, (d - steps)/2).
    assert one == pytest.approx(digamma(steps / 2) - digamma(dim / 2) - math.log(steps), abs=4e-4)
    assert one == pytest.approx(-math.log(dim), abs=0.011)
    assert ten == pytest.approx(math.log(10 / dim), abs=0.002)


def test_coordinates_that_do_not_count_are_not_there():
    scale = torch.tensor([[3.0] * 50 + [0.0] * 150], dtype=torch.float64)
    expected = digamma(1 / 2) - digamma(25)
    assert isotropic(200, [1.0], scale=scale) == pytest.approx([expected], abs=1e-5)
