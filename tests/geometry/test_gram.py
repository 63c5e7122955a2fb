"""How far a window's steps persist: the sketch against all coordinates, and what it does to the null."""

import math

import pytest
import torch

from lossray.geometry.gram import WIDTH, GramSketch, gram_shares
from lossray.geometry.quadratic_forms import form_of

LARGE = 5 * WIDTH + 123


def windows(beta, dim, generator, n=3, steps=20):
    """[n, steps, dim] of directions whose energy lies in few coordinates, in one run of them."""
    scale = torch.randn(dim, dtype=torch.float64, generator=generator).abs() ** 3
    scale[dim // 3 :] = 0
    found = [torch.randn(n, dim, dtype=torch.float64, generator=generator) * scale]
    for _ in range(steps - 1):
        new = torch.randn(n, dim, dtype=torch.float64, generator=generator) * scale
        found.append(beta * found[-1] + math.sqrt(1 - beta**2) * new)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("dim", [1, 7, WIDTH])
def test_inner_products_of_small_vectors_are_exact(dim):
    vectors = windows(0.5, dim, torch.Generator().manual_seed(dim), steps=3)
    image = GramSketch(dim)(vectors)
    assert image.shape == vectors.shape
    assert torch.allclose(image @ image.mT, vectors @ vectors.mT, rtol=1e-12)


def test_a_sketch_is_linear_and_always_the_same():
    vectors = windows(0.5, LARGE, torch.Generator().manual_seed(0), n=1, steps=2)
    image = GramSketch(LARGE)(vectors)
    assert torch.equal(image, GramSketch(LARGE)(vectors))
    assert torch.equal(image[:, 1], GramSketch(LARGE)(vectors[:, 1]))
    total = GramSketch(LARGE)(vectors.sum(dim=1))
    assert torch.allclose(image.sum(dim=1), total, rtol=1e-9, atol=1e-9 * float(total.abs().max()))


def test_inner_products_of_large_vectors_are_right_in_the_mean():
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(2, 150, LARGE, dtype=torch.float64, generator=generator).unbind()
    sketch = GramSketch(LARGE)
    errors = ((sketch(u) * sketch(v)).sum(dim=1) - (u * v).sum(dim=1)) / (u.norm(dim=1) * v.norm(dim=1))
    deviation = math.sqrt(1 / WIDTH)  # of independent u and v; sqrt(2 / WIDTH) for u = v
    assert abs(float(errors.mean())) < 4 * deviation / 150**0.5
    assert float(errors.std()) == pytest.approx(deviation, rel=0.25)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.99, 1.0])
def test_the_null_hardly_moves_by_the_sketch(beta):
    vectors = windows(beta, LARGE, torch.Generator().manual_seed(2))
    exact, found = gram_shares(vectors), gram_shares(GramSketch(LARGE)(vectors))
    moved = form_of(found).expected_log() - form_of(exact).expected_log()
    assert float(moved.abs().max()) < 0.01


def test_shares_are_of_each_window_alone():
    vectors = windows(0.5, 30, torch.Generator().manual_seed(3), n=4, steps=6)
    sound = gram_shares(vectors)
    vectors[1], vectors[2, 3] = 0, torch.nan
    shares = gram_shares(vectors)
    assert shares.isnan().all(dim=1).tolist() == [False, True, True, False]
    assert torch.equal(shares[[0, 3]], sound[[0, 3]])
    assert torch.allclose(shares[[0, 3]].sum(dim=1), torch.ones(2, dtype=torch.float64))
    one = gram_shares(torch.ones(1, 5, 9, dtype=torch.float64))
    assert one[0].tolist() == pytest.approx([0, 0, 0, 0, 1], abs=1e-12)
