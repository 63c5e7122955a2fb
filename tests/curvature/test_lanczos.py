"""Lanczos on prescribed spectra: every copy found, every certificate kept, members apart from one another."""

import math

import pytest
import torch
from torch import Tensor

from lossray.curvature.lanczos import _project_batched, _project_each, leading_pairs
from lossray.curvature.pairs import EigenPairs

DIM = 1000
SEEDS = range(5)


class Rotated:
    """Operators with prescribed spectra [R, d], in a basis turned by three reflections."""

    def __init__(self, spectra: Tensor, *, dtype: torch.dtype = torch.float64) -> None:
        self.spectra = spectra
        self.shape = (spectra.shape[0], spectra.shape[1])
        self.dtype = dtype
        self.device = torch.device("cpu")
        normals = torch.randn(3, self.shape[1], dtype=torch.float64, generator=_generator(7))
        self.mirrors = normals / torch.linalg.vector_norm(normals, dim=1, keepdim=True)
        self.calls = 0

    def _reflect(self, vectors: Tensor, mirrors: Tensor) -> Tensor:
        for mirror in mirrors:
            vectors = vectors - 2 * (vectors @ mirror)[..., None] * mirror
        return vectors

    def apply(self, vectors: Tensor) -> Tensor:
        self.calls += 1
        vectors = vectors.to(self.dtype).double()
        turned = self._reflect(vectors, self.mirrors)
        product = self._reflect(self.spectra * turned, self.mirrors.flip(0))
        return product.to(self.dtype).double()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _bulk(dim: int = DIM, seed: int = 1) -> Tensor:
    return torch.randn(dim, dtype=torch.float64, generator=_generator(seed))


def _spectrum(*outliers: float) -> Tensor:
    values = _bulk()
    values[: len(outliers)] = torch.tensor(outliers, dtype=torch.float64)
    return values


def _largest(spectrum: Tensor, k: int) -> Tensor:
    return spectrum.sort(dim=-1, descending=True).values[..., :k]


def _check_certificates(pairs: EigenPairs, operator: Rotated) -> None:
    """Every identity that holds for any result with all pairs found."""
    vectors = pairs.vectors
    for i in range(len(pairs)):
        rest = operator.apply(vectors[:, i]) - pairs.values[:, i, None] * vectors[:, i]
        assert torch.allclose(torch.linalg.vector_norm(rest, dim=1), pairs.residuals[:, i], atol=1e-13)
    rounding = 1e-13 * operator.spectra.abs().amax(dim=1).clamp(min=1)
    nearest = (pairs.values[:, :, None] - operator.spectra[:, None]).abs().amin(dim=2)
    assert (nearest <= pairs.residuals + rounding[:, None]).all()
    gram = vectors @ vectors.transpose(1, 2)
    assert torch.allclose(gram, torch.eye(len(pairs), dtype=torch.float64).expand_as(gram), atol=1e-12)
    assert (pairs.orthogonality_loss < 1e-12).all()
    assert (pairs.values.diff(dim=1) <= 0).all()
    assert (pairs.values <= _largest(operator.spectra, len(pairs)) + rounding[:, None]).all()


# Spectrum and number of pairs. Bulk: 1,000 standard normal values, up to about 3.
PRESCRIBED = {
    "tenfold-5": (_spectrum(*[10.0] * 10), 5),
    "tenfold-10": (_spectrum(*[10.0] * 10), 10),
    "cluster": (_spectrum(10, 9.99, 9.98), 3),
    "cluster-top": (_spectrum(10, 9.99, 9.98), 1),
    "plus-minus": (_spectrum(10, -9.9), 1),
    "minus-plus": (_spectrum(-12, 10), 2),
    "pyhessian": (_spectrum(10, 9.8, 9.5), 3),
    "ties": (_spectrum(10, 10, 8, 8, 8, 6, 6), 6),
    "far": (_spectrum(1000, 10.2, 10.1), 3),
    "bulk": (_bulk(), 5),
    "ninefold": (torch.repeat_interleave(_bulk(112).abs() ** 3, 9)[:DIM], 10),
    "negative": (-1 - _bulk().abs(), 3),
}


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-10])
@pytest.mark.parametrize("name", PRESCRIBED)
def test_prescribed_spectrum(name: str, tolerance: float) -> None:
    spectrum, k = PRESCRIBED[name]
    operator = Rotated(spectrum.expand(len(SEEDS), -1))
    pairs = leading_pairs(operator, k, seeds=SEEDS, tolerance=tolerance)
    largest = spectrum.abs().max()
    assert pairs.converged.all()
    assert pairs.confirmed.all()
    assert torch.allclose(pairs.scale, largest, rtol=0.05)
    assert (pairs.residuals <= tolerance * largest).all()
    # One to one with the exact spectrum: no copy is missing and none is invented.
    assert (pairs.values - _largest(spectrum, k)).abs().max() <= tolerance * largest
    _check_certificates(pairs, operator)


@pytest.mark.parametrize("k", [5, 10])
def test_every_copy_of_a_tenfold_eigenvalue(k: int) -> None:
    operator = Rotated(_spectrum(*[10.0] * 10).expand(len(SEEDS), -1))
    pairs = leading_pairs(operator, k, seeds=SEEDS, tolerance=1e-3)
    assert (pairs.values - 10).abs().max() < 1e-4
    complement = 10.0 if k == 5 else _largest(_bulk(), 11)[0]
    assert (pairs.complement <= complement + 1e-9).all()


def test_a_single_run_would_miss_the_copies() -> None:
    """The reason for the confirmation: stopped before it, the solve says that it is not confirmed."""
    operator = Rotated(_spectrum(*[10.0] * 10)[None])
    pairs = leading_pairs(operator, 3, seeds=[0], tolerance=1e-3, max_matvecs=30)
    assert not pairs.confirmed.any()


def test_thick_restarts_keep_the_basis_bounded() -> None:
    spectrum = torch.arange(DIM, dtype=torch.float64)  # dense at the top: many steps
    operator = Rotated(spectrum[None])
    pairs = leading_pairs(operator, 3, seeds=[0], tolerance=1e-8, basis=12, max_matvecs=20_000)
    assert pairs.matvecs[0] > 10 * 12  # so the basis was compressed many times
    assert torch.allclose(pairs.values[0], _largest(spectrum, 3), rtol=1e-12)
    assert torch.allclose(pairs.gaps[0], torch.ones(3, dtype=torch.float64), rtol=1e-6)
    _check_certificates(pairs, operator)


def test_gaps_and_complement() -> None:
    operator = Rotated(_spectrum(20, 10, 9)[None])
    pairs = leading_pairs(operator, 2, seeds=[0], tolerance=1e-8)
    assert torch.allclose(pairs.gaps[0], torch.tensor([10.0, 1.0], dtype=torch.float64), atol=1e-6)
    assert pairs.complement[0].item() == pytest.approx(9.0, abs=1e-6)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_tiny_operators_are_solved_exactly(dim: int, k: int) -> None:
    operator = Rotated(torch.tensor([[3.0, -4.0, 3.0, 0.0, 1e-9]], dtype=torch.float64)[:, :dim])
    pairs = leading_pairs(operator, k, seeds=[0])
    exact = _largest(operator.spectra, k)
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
    spectrum = _spectrum(10, 9, 9, 8)
    operator = Rotated(scale * spectrum[None])
    pairs = leading_pairs(operator, 3, seeds=[0], tolerance=1e-8)
    torch.testing.assert_close(pairs.values / scale, _largest(spectrum, 3)[None], rtol=1e-8, atol=0)
    assert bool(pairs.converged.all())
    assert bool((pairs.residuals > 0).all())


def test_low_rank() -> None:
    spectrum = torch.zeros(DIM, dtype=torch.float64)
    spectrum[:3] = torch.tensor([5.0, 2.0, -3.0])
    pairs = leading_pairs(Rotated(spectrum[None]), 5, seeds=[0], tolerance=1e-9)
    assert torch.allclose(pairs.values, _largest(spectrum, 5)[None], atol=1e-8)
    assert pairs.confirmed.all()


def test_members_differ_and_one_is_dead() -> None:
    spectra = torch.stack([_spectrum(10, 9, 8), _spectrum(*[math.nan] * DIM), _spectrum(30, 30, 2)])
    operator = Rotated(spectra)
    alive = torch.tensor([True, False, True])
    pairs = leading_pairs(operator, 3, seeds=[0, 1, 2], tolerance=1e-8, alive=alive)
    exact = _largest(spectra[[0, 2]], 3)
    assert torch.allclose(pairs.values[[0, 2]], exact, atol=1e-6)
    assert pairs.converged[[0, 2]].all()
    assert pairs.confirmed.tolist() == [True, False, True]
    assert pairs.matvecs[1] == 0
    assert not pairs.converged[1].any()
    for name in ("values", "vectors", "residuals", "gaps", "complement", "scale", "orthogonality_loss"):
        assert torch.isnan(getattr(pairs, name)[1]).all(), name


def test_a_member_that_turns_out_not_to_be_finite_is_given_up() -> None:
    spectra = torch.stack([_spectrum(10), _spectrum(*[math.inf] * 2)])
    pairs = leading_pairs(Rotated(spectra), 2, seeds=[0, 1])
    assert pairs.values[0, 0].item() == pytest.approx(10, abs=1e-2)
    assert torch.isnan(pairs.values[1]).all()
    assert pairs.confirmed.tolist() == [True, False]


def test_all_members_dead() -> None:
    operator = Rotated(_bulk().expand(2, -1))
    pairs = leading_pairs(operator, 3, seeds=[0, 1], alive=torch.zeros(2, dtype=torch.bool))
    assert torch.isnan(pairs.values).all()
    assert operator.calls == 0


def test_a_member_depends_on_its_seed_and_not_on_its_pack() -> None:
    spectra = torch.stack([_spectrum(10, 9.9), _spectrum(*[7.0] * 4), _bulk()])
    together = leading_pairs(Rotated(spectra), 4, seeds=[3, 4, 5], tolerance=1e-5)
    for r, seed in enumerate([3, 4, 5]):
        alone = leading_pairs(Rotated(spectra[r : r + 1]), 4, seeds=[seed], tolerance=1e-5)
        assert torch.allclose(alone.values[0], together.values[r], atol=1e-11)
    other = leading_pairs(Rotated(spectra), 4, seeds=[3, 9, 5], tolerance=1e-5)
    assert torch.equal(other.vectors[0], together.vectors[0])
    assert not torch.equal(other.vectors[1], together.vectors[1])


def test_a_solve_repeats_bit_for_bit_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = (leading_pairs(Rotated(_spectrum(5, 4)[None]), 2, seeds=[0]) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(torch.get_rng_state(), before)


def test_signs_are_fixed() -> None:
    """Two start vectors give the same vectors, not their opposites; the largest component is positive."""
    pairs = leading_pairs(Rotated(_spectrum(30, 20, 10).expand(4, -1)), 3, seeds=range(4), tolerance=1e-9)
    assert torch.allclose(pairs.vectors, pairs.vectors[:1].expand_as(pairs.vectors), atol=1e-6)
    largest = pairs.vectors.abs().argmax(dim=2, keepdim=True)
    assert (pairs.vectors.gather(2, largest) > 0).all()


@pytest.mark.parametrize("cap", [1, 5, 12])
def test_unconverged_pairs_are_flagged(cap: int) -> None:
    operator = Rotated(_bulk()[None])
    pairs = leading_pairs(operator, 4, seeds=[0], tolerance=1e-10, max_matvecs=cap)
    assert not pairs.converged.any()
    assert not pairs.confirmed.any()
    found = min(4, cap)
    assert pairs.matvecs[0] == cap + found
    assert torch.isfinite(pairs.values[0, :found]).all()
    assert torch.isnan(pairs.values[0, found:]).all()
    # What is there is certified all the same: its residual says how bad it is.
    nearest = (pairs.values[0, :found, None] - _bulk()).abs().amin(dim=1)
    assert (nearest <= pairs.residuals[0, :found]).all()
    assert (pairs.residuals[0, :found] > 1e-10 * pairs.scale[0]).all()


def test_residuals_certify_the_operator_of_float32_products() -> None:
    spectrum = _spectrum(10, 9, 8)
    operator = Rotated(spectrum[None], dtype=torch.float32)
    reachable = leading_pairs(operator, 3, seeds=[0], tolerance=1e-4)
    assert reachable.converged.all()
    assert (reachable.values - _largest(spectrum, 3)).abs().max() < 1e-5
    assert reachable.orthogonality_loss.max() < 1e-12  # the recurrence itself is float64
    below_rounding = leading_pairs(operator, 3, seeds=[0], tolerance=1e-9)
    assert not below_rounding.converged.any()


def test_the_batched_projection_of_accelerators_is_that_of_cpus() -> None:
    generator = _generator(3)
    vectors = torch.randn(4, 9, 30, dtype=torch.float64, generator=generator)
    vectors = torch.linalg.qr(vectors.transpose(1, 2)).Q.transpose(1, 2)
    products = torch.randn(4, 30, dtype=torch.float64, generator=generator)
    spans = [(2, 7), (4, 4), (4, 5), (1, 9)]
    one_by_one, batched = products.clone(), products.clone()
    expected = _project_each(vectors, one_by_one, spans)
    found = _project_batched(vectors, batched, spans)
    assert torch.allclose(one_by_one, batched, atol=1e-14)
    assert [len(overlap) for overlap in found] == [5, 0, 1, 8]
    assert all(a == pytest.approx(b, abs=1e-14) for a, b in zip(expected, found, strict=True))
    assert (vectors[0, 2:7] @ batched[0]).abs().max() < 1e-14
    assert torch.equal(batched[1], products[1])


@pytest.mark.parametrize(
    "arguments",
    [{"k": 0}, {"tolerance": 0.0}, {"tolerance": 1.0}, {"basis": 5}, {"max_matvecs": 0}, {"seeds": [0, 1]}],
)
def test_impossible_arguments(arguments: dict[str, object]) -> None:
    usual: dict[str, object] = {"k": 4, "seeds": [0]}
    with pytest.raises(ValueError, match="found"):
        leading_pairs(Rotated(_bulk()[None]), **(usual | arguments))  # type: ignore[arg-type]
