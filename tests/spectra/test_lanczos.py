"""Lanczos on prescribed spectra: every copy found, every certificate kept, members apart from one another."""

import math

import pytest
import torch
from torch import Tensor

from lossray.errors import ResourceError, StudyError
from lossray.spectra import krylov
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.spectra.eigensolver import packed_eigenpairs
from lossray.spectra.ends import Wanted, checked_relative_to, wanted_pairs
from lossray.spectra.krylov import _project_batched, _project_each
from tests.spectra.prescribed import DIM, Rotated, bulk, generator, largest, spectrum

SEEDS = range(5)


def leading_pairs(operator: Rotated, k: int, **options: object) -> PackedEigenPairs:
    (pairs,) = packed_eigenpairs(operator, [Wanted("largest", k)], **options)  # type: ignore[arg-type]
    return pairs


def _check_certificates(pairs: PackedEigenPairs, operator: Rotated) -> None:
    """Every identity that holds for any result with all pairs found."""
    vectors = pairs.vectors
    rounding = 1e-13 * operator.spectra.abs().amax(dim=1).clamp(min=1)
    for i in range(len(pairs)):
        rest = operator.apply(vectors[:, i]) - pairs.values[:, i, None] * vectors[:, i]
        difference = torch.linalg.vector_norm(rest, dim=1) - pairs.residuals[:, i]
        assert (difference.abs() <= rounding).all()
    nearest = (pairs.values[:, :, None] - operator.spectra[:, None]).abs().amin(dim=2)
    assert (nearest <= pairs.residuals + rounding[:, None]).all()
    gram = vectors @ vectors.transpose(1, 2)
    assert torch.allclose(gram, torch.eye(len(pairs), dtype=torch.float64).expand_as(gram), atol=1e-12)
    assert (pairs.orthogonality_loss < 1e-12).all()
    assert (pairs.values.diff(dim=1) <= 0).all()
    assert (pairs.values <= largest(operator.spectra, len(pairs)) + rounding[:, None]).all()


# Spectrum and number of pairs. Bulk: 1,000 standard normal values, up to about 3.
PRESCRIBED = {
    "tenfold-5": (spectrum(*[10.0] * 10), 5),
    "tenfold-10": (spectrum(*[10.0] * 10), 10),
    "cluster": (spectrum(10, 9.99, 9.98), 3),
    "cluster-top": (spectrum(10, 9.99, 9.98), 1),
    "plus-minus": (spectrum(10, -9.9), 1),
    "minus-plus": (spectrum(-12, 10), 2),
    "pyhessian": (spectrum(10, 9.8, 9.5), 3),
    "ties": (spectrum(10, 10, 8, 8, 8, 6, 6), 6),
    "far": (spectrum(1000, 10.2, 10.1), 3),
    "bulk": (bulk(), 5),
    "ninefold": (torch.repeat_interleave(bulk(112).abs() ** 3, 9)[:DIM], 10),
    "negative": (-1 - bulk().abs(), 3),
}


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-10])
@pytest.mark.parametrize("name", PRESCRIBED)
def test_prescribed_spectrum(name: str, tolerance: float) -> None:
    exact, k = PRESCRIBED[name]
    operator = Rotated(exact.expand(len(SEEDS), -1))
    pairs = leading_pairs(operator, k, seeds=SEEDS, tolerance=tolerance)
    scale = exact.abs().max()
    assert pairs.converged.all()
    assert pairs.confirmed.all()
    assert torch.allclose(pairs.scale, scale, rtol=0.05)
    assert (pairs.residuals <= tolerance * scale).all()
    # One to one with the exact spectrum: no copy is missing and none is invented.
    assert (pairs.values - largest(exact, k)).abs().max() <= tolerance * scale
    _check_certificates(pairs, operator)


@pytest.mark.parametrize("k", [5, 10])
def test_every_copy_of_a_tenfold_eigenvalue(k: int) -> None:
    operator = Rotated(spectrum(*[10.0] * 10).expand(len(SEEDS), -1))
    pairs = leading_pairs(operator, k, seeds=SEEDS, tolerance=1e-3)
    assert (pairs.values - 10).abs().max() < 1e-4
    complement = 10.0 if k == 5 else largest(bulk(), 11)[0]
    assert (pairs.complement <= complement + 1e-9).all()


def test_a_single_run_would_miss_the_copies() -> None:
    """The reason for the confirmation: stopped before it, the solve says that it is not confirmed."""
    operator = Rotated(spectrum(*[10.0] * 10)[None])
    pairs = leading_pairs(operator, 3, seeds=[0], tolerance=1e-3, max_matvecs=30)
    assert not pairs.confirmed.any()


def test_thick_restarts_keep_the_basis_bounded() -> None:
    exact = torch.arange(DIM, dtype=torch.float64)  # dense at the top: many steps
    operator = Rotated(exact[None])
    pairs = leading_pairs(operator, 3, seeds=[0], tolerance=1e-8, basis=12, max_matvecs=20_000)
    assert pairs.matvecs[0] > 10 * 12  # so the basis was compressed many times
    assert torch.allclose(pairs.values[0], largest(exact, 3), rtol=1e-12)
    assert torch.allclose(pairs.gaps[0], torch.ones(3, dtype=torch.float64), rtol=1e-6)
    _check_certificates(pairs, operator)


def test_gaps_and_complement() -> None:
    operator = Rotated(spectrum(20, 10, 9)[None])
    pairs = leading_pairs(operator, 2, seeds=[0], tolerance=1e-8)
    assert torch.allclose(pairs.gaps[0], torch.tensor([10.0, 1.0], dtype=torch.float64), atol=1e-6)
    assert pairs.complement[0].item() == pytest.approx(9.0, abs=1e-6)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_tiny_operators_are_solved_exactly(dim: int, k: int) -> None:
    operator = Rotated(torch.tensor([[3.0, -4.0, 3.0, 0.0, 1e-9]], dtype=torch.float64)[:, :dim])
    pairs = leading_pairs(operator, k, seeds=[0])
    exact = largest(operator.spectra, k)
    assert pairs.values.shape == (1, min(k, dim))
    assert torch.allclose(pairs.values, exact, atol=1e-13)
    assert pairs.converged.all()
    assert pairs.confirmed.all()
    if k >= dim:
        assert pairs.complement[0] == -math.inf
    _check_certificates(pairs, operator)


def test_one_dimension_has_no_gap() -> None:
    pairs = leading_pairs(Rotated(torch.full((1, 1), 2.0, dtype=torch.float64)), 1, seeds=[0])
    assert pairs.gaps[0, 0] == math.inf


@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
def test_multiples_of_the_identity(value: float) -> None:
    operator = Rotated(torch.full((2, DIM), value, dtype=torch.float64))
    pairs = leading_pairs(operator, 4, seeds=[0, 1])
    assert torch.allclose(pairs.values, torch.full((2, 4), value, dtype=torch.float64), atol=1e-12)
    assert pairs.converged.all()
    assert pairs.confirmed.all()
    assert pairs.gaps.abs().max() < 1e-12
    _check_certificates(pairs, operator)


@pytest.mark.parametrize("scale", [1e-163, 1e-30, 1e150])
def test_the_scale_does_not_matter(scale: float) -> None:
    """Squares of the smallest vanish in float64, squares of the largest overflow."""
    exact = spectrum(10, 9, 9, 8)
    operator = Rotated(scale * exact[None])
    pairs = leading_pairs(operator, 3, seeds=[0], tolerance=1e-8)
    torch.testing.assert_close(pairs.values / scale, largest(exact, 3)[None], rtol=1e-8, atol=0)
    assert bool(pairs.converged.all())
    assert bool((pairs.residuals > 0).all())


def test_low_rank() -> None:
    exact = torch.zeros(DIM, dtype=torch.float64)
    exact[:3] = torch.tensor([5.0, 2.0, -3.0])
    pairs = leading_pairs(Rotated(exact[None]), 5, seeds=[0], tolerance=1e-9)
    assert torch.allclose(pairs.values, largest(exact, 5)[None], atol=1e-8)
    assert pairs.confirmed.all()


def test_members_differ_and_one_is_dead() -> None:
    spectra = torch.stack([spectrum(10, 9, 8), spectrum(*[math.nan] * DIM), spectrum(30, 30, 2)])
    operator = Rotated(spectra)
    alive = torch.tensor([True, False, True])
    pairs = leading_pairs(operator, 3, seeds=[0, 1, 2], tolerance=1e-8, alive=alive)
    exact = largest(spectra[[0, 2]], 3)
    assert torch.allclose(pairs.values[[0, 2]], exact, atol=1e-6)
    assert pairs.converged[[0, 2]].all()
    assert pairs.confirmed.tolist() == [True, False, True]
    assert pairs.matvecs[1] == 0
    assert not pairs.converged[1].any()
    for name in ("values", "vectors", "residuals", "gaps", "complement", "scale", "orthogonality_loss"):
        assert torch.isnan(getattr(pairs, name)[1]).all(), name


def test_a_member_that_turns_out_not_to_be_finite_is_given_up() -> None:
    spectra = torch.stack([spectrum(10), spectrum(*[math.inf] * 2)])
    pairs = leading_pairs(Rotated(spectra), 2, seeds=[0, 1])
    assert pairs.values[0, 0].item() == pytest.approx(10, abs=1e-2)
    assert torch.isnan(pairs.values[1]).all()
    assert pairs.confirmed.tolist() == [True, False]


def test_all_members_dead() -> None:
    operator = Rotated(bulk().expand(2, -1))
    pairs = leading_pairs(operator, 3, seeds=[0, 1], alive=torch.zeros(2, dtype=torch.bool))
    assert torch.isnan(pairs.values).all()
    assert operator.calls == 0


def test_a_member_depends_on_its_seed_and_not_on_its_pack() -> None:
    spectra = torch.stack([spectrum(10, 9.9), spectrum(*[7.0] * 4), bulk()])
    together = leading_pairs(Rotated(spectra), 4, seeds=[3, 4, 5], tolerance=1e-5)
    for r, seed in enumerate([3, 4, 5]):
        alone = leading_pairs(Rotated(spectra[r : r + 1]), 4, seeds=[seed], tolerance=1e-5)
        assert torch.allclose(alone.values[0], together.values[r], atol=1e-11)
    other = leading_pairs(Rotated(spectra), 4, seeds=[3, 9, 5], tolerance=1e-5)
    assert torch.equal(other.vectors[0], together.vectors[0])
    assert not torch.equal(other.vectors[1], together.vectors[1])


def test_a_solve_repeats_bit_for_bit_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = (leading_pairs(Rotated(spectrum(5, 4)[None]), 2, seeds=[0]) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(torch.get_rng_state(), before)


def test_signs_are_fixed() -> None:
    """Two start vectors give the same vectors, not their opposites; the largest component is positive."""
    pairs = leading_pairs(Rotated(spectrum(30, 20, 10).expand(4, -1)), 3, seeds=range(4), tolerance=1e-9)
    assert torch.allclose(pairs.vectors, pairs.vectors[:1].expand_as(pairs.vectors), atol=1e-6)
    positions = pairs.vectors.abs().argmax(dim=2, keepdim=True)
    assert (pairs.vectors.gather(2, positions) > 0).all()


@pytest.mark.parametrize("cap", [1, 5, 12])
def test_unconverged_pairs_are_flagged(cap: int) -> None:
    operator = Rotated(bulk()[None])
    pairs = leading_pairs(operator, 4, seeds=[0], tolerance=1e-10, max_matvecs=cap)
    assert not pairs.converged.any()
    assert not pairs.confirmed.any()
    found = min(4, cap)
    assert pairs.matvecs[0] == cap + found
    assert torch.isfinite(pairs.values[0, :found]).all()
    assert torch.isnan(pairs.values[0, found:]).all()
    # What is there is certified all the same: its residual says how bad it is.
    nearest = (pairs.values[0, :found, None] - bulk()).abs().amin(dim=1)
    assert (nearest <= pairs.residuals[0, :found]).all()
    assert (pairs.residuals[0, :found] > 1e-10 * pairs.scale[0]).all()


@pytest.mark.parametrize("outlier", [3e2, -4e3, 2e6])
def test_a_tolerance_relative_to_each_value_sees_beside_an_outlier(outlier: float) -> None:
    """By default a value is known to a share of the outlier, which `relative_errors` shows."""
    exact = bulk().abs() / 4
    exact[:6] = torch.tensor([outlier, 1.9, 1.7, 1.5, 1.4, 1.3])
    operator = Rotated(exact[None])
    (pairs,) = packed_eigenpairs(operator, [Wanted("magnitude", 6)], seeds=[0], relative_to="each")
    assert pairs.converged.all()
    assert bool(pairs.confirmed[0])
    assert torch.allclose(pairs.values[0], exact[:6], rtol=1e-3)
    assert (pairs.residuals[0] <= 1e-3 * pairs.values[0].abs()).all()
    (coarse,) = packed_eigenpairs(operator, [Wanted("magnitude", 6)], seeds=[0])
    found = coarse.member(0)
    errors = (found.values - exact[:6]).abs() / found.values.abs()
    assert found.converged.all()
    if outlier == 2e6:  # 1e-3 of it is more than all the others
        assert errors.max() > 1e-2
        assert found.relative_errors[errors.argmax()] > 1e-2


def test_what_is_below_rounding_does_not_converge_relative_to_itself() -> None:
    """And costs no more products than it takes to see that."""
    exact = torch.zeros(DIM, dtype=torch.float64)
    exact[:4] = torch.tensor([7.0, 4, 2, 0.5])
    operator = Rotated(exact[None])
    (pairs,) = packed_eigenpairs(operator, [Wanted("largest", 7)], seeds=[0], relative_to="each")
    assert pairs.converged[0].tolist() == [True] * 4 + [False] * 3
    assert operator.matvecs < 100
    with pytest.raises(
        StudyError, match="relative_to: found 'eech'; allowed: largest, each; did you mean 'each'"
    ):
        checked_relative_to("eech")


def test_residuals_certify_the_operator_of_float32_products() -> None:
    exact = spectrum(10, 9, 8)
    operator = Rotated(exact[None], dtype=torch.float32)
    reachable = leading_pairs(operator, 3, seeds=[0], tolerance=1e-4)
    assert reachable.converged.all()
    assert (reachable.values - largest(exact, 3)).abs().max() < 1e-5
    assert reachable.orthogonality_loss.max() < 1e-12  # the recurrence itself is float64
    below_rounding = leading_pairs(operator, 3, seeds=[0], tolerance=1e-9)
    assert not below_rounding.converged.any()


@pytest.mark.parametrize("block", [2, 3, 5])
@pytest.mark.parametrize("name", PRESCRIBED)
def test_blocks_find_the_same(name: str, block: int) -> None:
    exact, k = PRESCRIBED[name]
    operator = Rotated(exact.expand(2, -1))
    pairs = leading_pairs(operator, k, seeds=[0, 1], tolerance=1e-7, block=block)
    assert pairs.converged.all()
    assert pairs.confirmed.all()
    assert (pairs.values - largest(exact, k)).abs().max() <= 1e-7 * exact.abs().max()
    _check_certificates(pairs, operator)


def test_a_block_of_ten_finds_a_tenfold_eigenvalue_in_its_first_run() -> None:
    operator = Rotated(spectrum(*[10.0] * 10)[None])
    pairs = leading_pairs(operator, 10, seeds=[0], tolerance=1e-6, block=10, max_matvecs=80)
    assert torch.allclose(pairs.values, torch.full((1, 10), 10.0, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("end", ["largest", "smallest", "magnitude", "both"])
@pytest.mark.parametrize("name", PRESCRIBED)
def test_every_end(name: str, end: str) -> None:
    exact, k = PRESCRIBED[name]
    wanted = wanted_pairs(end, k)
    found = packed_eigenpairs(Rotated(exact.expand(2, -1)), wanted, seeds=[0, 1], tolerance=1e-4)
    assert len(found) == len(wanted)
    for pairs, one in zip(found, wanted, strict=True):
        order = one.keys(exact).argsort(descending=True)
        assert pairs.converged.all()
        assert pairs.confirmed.all()
        # By magnitude a pair of opposite values ties: their sizes are compared, then the values themselves.
        expected = exact[order]
        sizes = one.keys(pairs.values) - one.keys(expected[:k])
        assert sizes.abs().max() <= 1e-4 * exact.abs().max()
        nearest = (pairs.values[..., None] - exact).abs().amin(dim=2)
        assert (nearest <= pairs.residuals + 1e-12 * exact.abs().max()).all()
        assert (one.keys(pairs.values).diff(dim=1) <= 1e-12).all()
        beyond = one.keys(pairs.complement) - one.keys(expected[k])
        assert (beyond <= 1e-4 * exact.abs().max()).all()
        assert (pairs.gaps <= (pairs.values - pairs.complement[:, None]).abs() + 1e-12).all()


def test_opposite_values_keep_their_signs() -> None:
    """Power iteration mixes (10, -9.9); the largest in magnitude of (-12, 10) is negative."""
    (top,) = packed_eigenpairs(Rotated(spectrum(10, -9.9)[None]), wanted_pairs("largest", 1), seeds=[0])
    assert top.values[0, 0].item() == pytest.approx(10, abs=1e-2)
    (big,) = packed_eigenpairs(Rotated(spectrum(-12, 10)[None]), wanted_pairs("magnitude", 2), seeds=[0])
    assert big.values[0].tolist() == pytest.approx([-12, 10], abs=1e-2)


def test_a_warm_start_takes_fewer_products_and_finds_what_the_guesses_lack() -> None:
    exact = spectrum(*[10.0 + 0.3 * i for i in range(10)])
    operator = Rotated(exact[None])
    cold = leading_pairs(operator, 10, seeds=[0], tolerance=1e-6)
    noise = 1e-3 * torch.randn(1, 10, DIM, dtype=torch.float64, generator=generator(4)) / math.sqrt(DIM)
    warm = leading_pairs(operator, 10, seeds=[0], tolerance=1e-3, guesses=cold.vectors + noise)
    assert torch.allclose(warm.values, cold.values, atol=1e-4)
    assert warm.confirmed.all()
    assert warm.matvecs < leading_pairs(operator, 10, seeds=[0], tolerance=1e-3).matvecs
    # Guesses from the wrong end of the spectrum: the random vector beside them finds the rest.
    misled = leading_pairs(operator, 3, seeds=[0], tolerance=1e-6, guesses=cold.vectors[:, 5:8])
    assert torch.allclose(misled.values, cold.values[:, :3], atol=1e-5)
    # Guesses that are all alike, or exact, are no trouble.
    same = leading_pairs(
        operator, 3, seeds=[0], tolerance=1e-6, guesses=cold.vectors[:, :1].expand(-1, 3, -1)
    )
    assert torch.allclose(same.values, cold.values[:, :3], atol=1e-5)
    assert same.orthogonality_loss.max() < 1e-12


def test_a_basis_that_does_not_fit_is_refused_before_it_is_made() -> None:
    class Huge:
        shape = (4, 10**12)
        dtype = torch.float32
        device = torch.device("cpu")

        def apply(self, vectors: Tensor) -> Tensor:
            raise AssertionError("no product is formed")

    with pytest.raises(
        ResourceError, match="a basis of 85 vectors of 1,000,000,000,000 for each of 4 members"
    ):
        leading_pairs(Huge(), 10, seeds=range(4))  # type: ignore[arg-type]


def test_one_pass_is_enough_where_nothing_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second pass is made only where the norm test asks for it; orthogonality does not suffer."""
    passes = []

    def counted(vectors: Tensor, block: Tensor, running: list[int], empty: list[int]) -> object:
        passes.append(vectors.shape[1])
        return _project_each(vectors, block, running, empty)

    monkeypatch.setattr(krylov, "_project_each", counted)
    operator = Rotated(spectrum(10, 9, 8)[None])
    pairs = leading_pairs(operator, 3, seeds=[0], tolerance=1e-6)
    # One pass over the last two vectors and one over all of them, for each product but the certificates'.
    assert len(passes) < 2.3 * operator.calls
    assert pairs.orthogonality_loss.max() < 1e-13


@pytest.mark.parametrize("block", [1, 3])
def test_the_batched_projection_of_accelerators_is_that_of_cpus(block: int) -> None:
    draws = generator(3)
    vectors = torch.randn(4, 9, 30, dtype=torch.float64, generator=draws)
    vectors = torch.linalg.qr(vectors.transpose(1, 2)).Q.transpose(1, 2)
    empty, running = [2, 4, 0, 8], [0, 1, 3]
    for row, n in zip(vectors, empty, strict=True):
        row[:n] = 0
    products = torch.randn(4, block, 30, dtype=torch.float64, generator=draws)
    one_by_one, batched = products.clone(), products.clone()
    expected = _project_each(vectors, one_by_one, running, empty)
    found = _project_batched(vectors, batched, running)
    assert torch.allclose(one_by_one, batched, atol=1e-14)
    assert found == pytest.approx(expected, abs=1e-14)
    assert (vectors[0] @ batched[0].T).abs().max() < 1e-14
    assert torch.equal(batched[2], products[2])
    assert not found[2].any()


@pytest.mark.parametrize(
    "arguments",
    [
        {"k": 0},
        {"tolerance": 0.0},
        {"tolerance": 1.0},
        {"basis": 5},
        {"max_matvecs": 0},
        {"block": 0},
        {"seeds": [0, 1]},
    ],
)
def test_impossible_arguments(arguments: dict[str, object]) -> None:
    usual: dict[str, object] = {"k": 4, "seeds": [0]}
    with pytest.raises(StudyError, match="found"):
        leading_pairs(Rotated(bulk()[None]), **(usual | arguments))  # type: ignore[arg-type]
