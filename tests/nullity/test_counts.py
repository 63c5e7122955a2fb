"""Counts of small eigenvalues: exact ranks, noise floors, gaps, and what a quadrature makes of it."""

import math

import pytest
import torch
from torch import nn

import lossray
from lossray.errors import ModelError, ResourceError, StudyError
from lossray.networks.losses import cross_entropy, mse
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.stack import build_stack
from lossray.nullity.counts import (
    GRID,
    MatrixOperator,
    counts_of,
    dense_matrices,
    gram_counts,
    quadrature_counts,
    skew_norm,
    spectrum_of,
)
from lossray.operators.objectives import PackedObjective
from lossray.operators.packed import PackedGaussNewton

# ---- the rank of deep linear networks (Singh et al., arXiv 2106.16225; theory 2.8)


def linear_network(d, widths, k, n, loss, r=None, *, fitted=False, seed=0):
    """A network at random parameters, and its data with inputs of rank r."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    if r is not None:
        x = x[:, :r] @ torch.randn(r, d, dtype=torch.float64, generator=generator) / r**0.5
    torch.manual_seed(seed)
    model = build_model(model_settings({"name": "linear", "widths": widths}), (d,), k).double()
    if loss is cross_entropy:
        return model, (x, torch.randint(0, k, (n,), generator=generator))
    y = model(x).detach() if fitted else torch.randn(n, k, dtype=torch.float64, generator=generator)
    return model, (x, y)


def predicted(d, widths, k, loss, r):
    """2 q M - L q^2 + q (r + k) with L matrices, and the rank of the outer part, q (r + k - q)."""
    r, k = (d if r is None else r), k - (loss is cross_entropy)
    q = min([r, k, *widths])
    return 2 * q * sum(widths) - (len(widths) + 1) * q * q + q * (r + k), q * (r + k - q)


LINEAR = [
    (6, [4], 3, 40, None),
    (6, [2], 3, 40, None),  # a bottleneck
    (9, [5], 4, 60, 3),  # inputs of low rank
    (6, [4, 5], 3, 60, None),
    (7, [2, 6], 4, 60, None),
    (8, [3, 4], 5, 60, 5),
    (6, [4, 3, 5], 3, 60, None),
    (6, [5, 2, 4], 4, 60, 4),
]


@pytest.mark.parametrize("loss", [mse, cross_entropy])
@pytest.mark.parametrize(("d", "widths", "k", "n", "r"), LINEAR)
def test_the_rank_of_a_linear_network_is_that_of_the_formula(d, widths, k, n, r, loss):
    model, data = linear_network(d, widths, k, n, loss, r)
    found = lossray.degeneracy(lossray.Hessian(model, loss, data))
    rank, _ = predicted(d, widths, k, loss, r)
    assert found.rank == min(rank, found.dim)
    assert found.gap > 1e3
    assert (found.structural_nullity, found.excess) == (found.dim - found.rank, 0)


@pytest.mark.parametrize(("d", "widths", "k", "n", "r"), LINEAR)
def test_without_a_residual_the_outer_rank_is_left(d, widths, k, n, r):
    model, data = linear_network(d, widths, k, n, mse, r, fitted=True)
    _, outer = predicted(d, widths, k, mse, r)
    found = lossray.degeneracy(lossray.Hessian(model, mse, data))
    assert found.rank == outer
    assert found.excess >= 0  # beyond what is forced at generic parameters
    gauss_newton = lossray.degeneracy(lossray.GaussNewton(model, mse, data))
    assert gauss_newton.rank == outer
    assert gauss_newton.structural_nullity is None


def test_softmax_regression_at_zero_has_a_known_spectrum():
    """Theory 2.9: eig(X'X/N) / C, each C - 1 times, and d zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 4, (50,), generator=generator)
    model = nn.Linear(6, 4, bias=False).double()
    nn.init.zeros_(model.weight)
    found = lossray.degeneracy(lossray.Hessian(model, cross_entropy, (x, y)))
    expected = torch.linalg.eigvalsh(x.T @ x / 50) / 4
    expected = torch.cat([torch.zeros(6), expected.repeat_interleave(3)]).double()
    torch.testing.assert_close(found.eigenvalues, expected, rtol=1e-10, atol=1e-14)
    assert (found.nullity, found.rank, found.excess) == (6, 18, 0)


# ---- the noise floor, gaps and ranks


def symmetric(values, seed=0, noise=0.0):
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    matrix = basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T
    return (matrix + matrix.T) / 2 + noise * torch.randn(
        n, n, dtype=torch.float64, generator=generator
    ), basis


def test_thresholds_count_and_the_last_is_the_noise_floor():
    values = [0.0, 0.0, 1e-9, -1e-6, 1e-3, -0.5, 1.0]
    matrix, _ = symmetric(values)
    spectrum = spectrum_of(matrix, torch.float64)
    counts = counts_of(spectrum)
    by_tau = {round(math.log10(c.tau)): c for c in counts if not c.at_noise_floor}
    assert [by_tau[-p].nullity for p in (1, 2, 4, 7, 10)] == [5, 5, 4, 3, 2]
    assert all(count.tau in GRID for count in counts[:-1])
    assert counts[-1].at_noise_floor
    assert (counts[-1].nullity, counts[-1].rank) == (2, 5)
    assert counts[-1].gap > 1e5
    assert by_tau[-4].gap == pytest.approx(1e3, rel=1e-3)
    assert by_tau[-7].rank is None  # above it 1e-6, below it 1e-9: a thousand, give or take rounding
    assert [c.threshold for c in counts] == sorted((c.threshold for c in counts), reverse=True)


@pytest.mark.parametrize("turn", range(6))
@pytest.mark.parametrize("smaller", [1e-6, 1e-8, 1e-9, 1e-10])
def test_a_gap_of_exactly_a_thousand_supports_no_rank_on_any_machine(smaller, turn):
    """Each basis rounds the two values in its own way, as processors do."""
    for ratio, rank in ((1e3, None), (1.1e3, 3)):
        matrix, _ = symmetric([0.0, smaller, ratio * smaller, -0.3, 1.0], seed=turn)
        counts = counts_of(spectrum_of(matrix, torch.float64))
        assert {c.rank for c in counts if c.nullity == 2} == {rank}


@pytest.mark.parametrize("turn", range(6))
def test_eigenvalues_that_equal_a_threshold_count_below_it_on_any_machine(turn):
    matrix, _ = symmetric([0.0, 1e-4, -1e-2, 0.1, 1.0], seed=turn)
    counts = counts_of(spectrum_of(matrix, torch.float64))
    assert [count.nullity for count in counts[:5]] == [4, 3, 2, 2, 1]


def test_what_lies_below_the_noise_floor_supports_no_rank_by_its_luck():
    """6e-14 of |lambda|max is far above rounding that came out at 1e-17, and not far above 2e-16."""
    for null in (1e-17, 1e-16, 0.0):
        matrix = torch.diag(torch.tensor([null, 6e-14, 0.5, 1.0], dtype=torch.float64))
        assert counts_of(spectrum_of(matrix, torch.float64))[-1].rank is None


@pytest.mark.parametrize("size", [1e-2, 1.0, 30.0])
def test_a_noise_floor_of_the_size_of_the_spectrum_gives_no_rank(size):
    """A vector that is taken for null and is not."""
    matrix, basis = symmetric([0.0, 1e-3, size / 10, 0.7 * size, 1.0])
    wrong = counts_of(spectrum_of(matrix, torch.float64, null_vectors=basis[:, 3:4].T))
    assert all(count.rank is None for count in wrong)
    right = counts_of(spectrum_of(matrix, torch.float64, null_vectors=basis[:, :1].T))
    assert right[-1].rank == 4


def test_no_gap_no_rank():
    matrix, _ = symmetric([10.0**-k for k in range(16)])
    counts = counts_of(spectrum_of(matrix, torch.float64))
    assert all(count.rank is None for count in counts)
    assert all(count.gap == pytest.approx(10, rel=0.1) for count in counts[:-2])


def test_products_in_float32_count_coarsely_and_never_give_a_rank():
    matrix, _ = symmetric([0.0, 0.0, 0.5, 1.0])
    counts = counts_of(spectrum_of(matrix.float().double(), torch.float32))
    assert min(count.tau for count in counts) >= 1e-6
    assert all(count.rank is None for count in counts)
    model = nn.Linear(4, 3)
    data = (torch.randn(20, 4), torch.randint(0, 3, (20,)))
    found = lossray.degeneracy(lossray.Hessian(model, cross_entropy, data))
    assert found.rank is None
    assert lossray.degeneracy(lossray.Hessian(model, cross_entropy, data, dtype=torch.float64)).rank == 10


def test_the_noise_floor_is_ten_times_the_largest_observed_error():
    matrix, basis = symmetric([0.0, 0.2, 1.0, 2.0], noise=1e-9)
    skew = float(torch.linalg.matrix_norm(matrix - matrix.T, ord=2))
    assert skew_norm(matrix) == pytest.approx(skew, rel=1e-3)
    assert spectrum_of(matrix, torch.float64).noise_floor == pytest.approx(10 * skew, rel=1e-3)
    sound, basis = symmetric([0.0, 0.2, 1.0, 2.0])
    assert spectrum_of(sound, torch.float64).noise_floor == pytest.approx(20 * 2.2e-16, rel=0.01)
    shifted = sound + 1e-7 * torch.outer(basis[:, 0], basis[:, 0])
    known = spectrum_of(shifted, torch.float64, null_vectors=3 * basis[:, :1].T)
    assert known.noise_floor == pytest.approx(1e-6, rel=1e-3)  # what should be null is 1e-7
    assert counts_of(known)[-1].nullity == 1


def test_small_eigenvalues_of_a_saturated_softmax_are_not_swallowed():
    """As the softmax saturates H shrinks, but its smallest eigenvalues stay above the floor."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, dtype=torch.float64, generator=generator)
    model = nn.Linear(4, 3, bias=False).double()
    labels = model(x).argmax(dim=1)
    with torch.no_grad():
        model.weight *= 60
    found = lossray.degeneracy(lossray.Hessian(model, cross_entropy, (x, labels)))
    assert float(found.eigenvalues.abs().max()) < 0.1  # 0.3 at random labels
    assert (found.nullity, found.rank) == (4, 8)


def test_a_zero_matrix_is_all_null_and_a_matrix_that_is_not_finite_has_no_spectrum():
    (count,) = counts_of(spectrum_of(torch.zeros(3, 3, dtype=torch.float64), torch.float64))
    assert (count.nullity, count.rank, count.at_noise_floor) == (3, 0, True)
    assert spectrum_of(torch.full((2, 2), torch.nan, dtype=torch.float64), torch.float64) is None
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = torch.inf
    with pytest.raises(ModelError, match="not finite"):
        lossray.degeneracy(lossray.Hessian(model, mse, (torch.ones(3, 2), torch.ones(3, 2))))


def test_a_floor_of_ones_own_and_operators_of_other_kinds():
    model, data = linear_network(6, [4], 3, 40, mse)
    hessian = lossray.Hessian(model, mse, data)
    assert lossray.degeneracy(hessian, floor=1).excess == lossray.degeneracy(hessian).nullity - 1
    scaled = lossray.Scaled(hessian, 1 + torch.rand(36, dtype=torch.float64))
    found = lossray.degeneracy(scaled)
    assert found.rank == 33  # inertia does not change
    assert found.structural_nullity is None
    closure = lossray.Hessian(model, closure=lambda m, b: (mse(m(b[0]), b[1]), 1.0), data=[data])
    assert lossray.degeneracy(closure).rank == 33
    with pytest.raises(StudyError, match="found Linear"):
        lossray.degeneracy(nn.Linear(2, 2))
    for floor in (-1, 37, 1.5, True, "one"):
        with pytest.raises(StudyError, match=r"floor: found .*; allowed: .* an integer from 0 to 36"):
            lossray.degeneracy(hessian, floor=floor)


class Keyword(nn.Linear):
    """Takes its inputs by name."""

    def forward(self, *, x):
        return super().forward(x)


def test_inputs_by_name_have_no_known_floor():
    model, x = Keyword(3, 2).double(), torch.randn(9, 3, dtype=torch.float64)
    found = lossray.degeneracy(lossray.Hessian(model, mse, ({"x": x}, torch.zeros(9, 2).double())))
    assert (found.rank, found.structural_nullity) == (8, None)


def test_what_does_not_fit_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr("lossray.memory.available_bytes", lambda device: 10_000)
    model, data = linear_network(6, [4], 3, 40, mse)
    with pytest.raises(ResourceError, match="dense_up_to"):
        lossray.degeneracy(lossray.Hessian(model, mse, data))


# ---- packs: Gauss-Newton from its Gram matrix, and quadrature


def stack_objective(loss, widths=(5,), n=9, members=2):
    settings = model_settings({"name": "mlp", "widths": list(widths)})
    stack, theta, buffers = build_stack(
        lambda: build_model(settings, (4,), 3), range(members), executor="vmap", dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (n,), generator=generator)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    return PackedObjective(stack, theta, buffers, loss, batches, dtype=torch.float64)


@pytest.mark.parametrize("loss", [cross_entropy, mse])
def test_the_gram_matrix_gives_the_eigenvalues_of_the_gauss_newton_matrix(loss):
    objective = stack_objective(loss)
    matrices = dense_matrices(PackedGaussNewton(objective))
    for matrix, counts in zip(matrices, gram_counts(objective), strict=True):
        exact = counts_of(spectrum_of(matrix, torch.float64))
        found, expected = counts[-1], exact[-1]
        assert found.rank == expected.rank
        # N (C - 1) under cross entropy, N C under mse, where the network does not limit it further.
        assert found.rank <= 9 * (2 if loss is cross_entropy else 3)
        assert found.threshold / found.tau == pytest.approx(expected.threshold / expected.tau, rel=1e-9)
        for tau in (1e-1, 1e-2, 1e-4):
            pair = [next(c.nullity for c in own if c.tau == tau) for own in (counts, exact)]
            assert pair[0] == pair[1]


def test_a_large_network_with_few_examples_is_bounded_by_them():
    for loss, rank in ((cross_entropy, 5 * 2), (mse, 5 * 3)):
        for counts in gram_counts(stack_objective(loss, widths=(30, 20), n=5)):
            assert counts[-1].rank == rank
            assert counts[-1].nullity == counts[-1].rank_at_least * 0 + (30 * 5 + 20 * 31 + 3 * 21) - rank


def prescribed(d=400, members=2):
    """A bulk near zero, with a few large eigenvalues."""
    values = [1e-5 * (i % 7) for i in range(d - 12)] + [0.05 * i for i in range(1, 13)]
    return torch.stack([symmetric(values, seed=seed)[0] for seed in range(members)]), values


def test_quadrature_counts_come_with_an_error_that_covers_the_truth():
    matrices, values = prescribed()
    found = quadrature_counts(MatrixOperator(matrices), probes=4, steps=32, seeds=[0, 1])
    scale = max(values)
    for counts in found:
        assert [count.tau for count in counts] == [1e-1, 1e-2]
        for count in counts:
            truth = sum(abs(value) <= count.tau * scale for value in values)
            assert abs(count.nullity - truth) <= 5 * count.stderr + 1e-6 * len(values)
            assert count.rank_at_least <= len(values) - truth  # interlacing
            assert count.rank_at_least >= len(values) - truth - 2
            assert count.rank is None


@pytest.mark.parametrize("turn", range(4))
def test_a_quadrature_counts_what_equals_a_threshold_below_it(turn):
    matrices = symmetric([1e-2, -1e-2, 0.1, 0.1, 0.5, 1.0], seed=turn)[0][None]
    (counts,) = quadrature_counts(MatrixOperator(matrices), probes=1, steps=8, seeds=[0])
    assert [(count.nullity, count.rank_at_least) for count in counts] == [(4, 2), (2, 4)]


def test_quadrature_of_a_dead_member_is_empty_and_a_known_scale_is_used():
    matrices, _ = prescribed()
    alive = torch.tensor([False, True])
    first, second = quadrature_counts(
        MatrixOperator(matrices), probes=2, steps=16, seeds=[0, 1], scales=[10.0, 10.0], alive=alive
    )
    assert first == []
    assert [count.threshold for count in second] == [1.0, 0.1]


def test_matrix_operators_multiply():
    matrices, _ = prescribed(d=8 + 12)
    operator = MatrixOperator(matrices)
    block = torch.randn(2, 3, 20, dtype=torch.float64)
    torch.testing.assert_close(operator.apply(block), torch.einsum("rij,rbj->rbi", matrices, block))
    torch.testing.assert_close(operator.apply(block[:, 0]), operator.apply(block)[:, 0])
