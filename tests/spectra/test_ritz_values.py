"""Largest Ritz values against the eigenvalues of matrices."""

import pytest
import torch

from lossray.spectra.ritz_values import largest_ritz_values


class Matrices:
    """R symmetric matrices as a packed operator that counts its products."""

    def __init__(self, matrices):
        self.matrices = matrices
        self.products = 0

    def apply(self, vectors):
        self.products += 1
        return torch.einsum("rij,rj->ri", self.matrices, vectors)


def symmetric(members, size, seed):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(members, size, size, generator=generator, dtype=torch.float64)
    return draws + draws.transpose(1, 2), torch.randn(members, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_as_many_steps_as_the_size_give_the_largest_eigenvalue(seed):
    matrices, start = symmetric(3, 7, seed)
    operator = Matrices(matrices)
    torch.testing.assert_close(
        largest_ritz_values(operator, start, 7), torch.linalg.eigvalsh(matrices)[:, -1]
    )
    assert operator.products == 7


def test_fewer_steps_give_growing_lower_bounds():
    matrices, start = symmetric(2, 40, 0)
    exact = torch.linalg.eigvalsh(matrices)[:, -1]
    bounds = torch.stack([largest_ritz_values(Matrices(matrices), start, steps) for steps in range(1, 12)])
    assert (bounds.diff(dim=0) > 0).all()
    assert (bounds < exact).all()
    rayleigh = torch.einsum("ri,rij,rj->r", start, matrices, start) / start.square().sum(dim=1)
    torch.testing.assert_close(bounds[0], rayleigh)


def test_an_invariant_start_ends_at_its_own_largest_eigenvalue():
    matrices = torch.diag(torch.tensor([5.0, 2.0, 1.0, 0.0], dtype=torch.float64))[None]
    start = torch.tensor([[0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    assert float(largest_ritz_values(Matrices(matrices), start, 2)) == pytest.approx(2)


def test_a_dead_member_is_nan_and_the_others_are_as_alone():
    matrices, start = symmetric(2, 9, 1)
    alone = largest_ritz_values(Matrices(matrices[1:]), start[1:], 4)
    matrices[0] = torch.nan
    both = largest_ritz_values(Matrices(matrices), start, 4)
    assert both[0].isnan()
    torch.testing.assert_close(both[1:], alone)
