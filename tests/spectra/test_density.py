"""PackedDensity: closed forms, exact measures, deflation, and the statistics of the estimates."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, wasserstein_distance
from torch import Tensor

from lossray.errors import ResourceError, StudyError
from lossray.spectra.analysis import packed_analysis
from lossray.spectra.density import PackedDensity, SpectralDensity, packed_density
from tests.spectra.prescribed import DIM, Rotated, bulk, generator, largest, spectrum

FEW_OUTLIERS = spectrum(60, 50, 40, 30, 20)


def _decaying(dim: int = DIM) -> Tensor:
    """Like a trained network's: ten outliers, a tail that falls like a power, a negative edge."""
    tail = torch.arange(1, dim + 1, dtype=torch.float64) ** -1.2
    tail[:10] *= torch.linspace(3, 1.5, 10, dtype=torch.float64)
    tail[-50:] = -0.01 * torch.rand(50, dtype=torch.float64, generator=generator(3))
    return tail


def _distance(density: PackedDensity, r: int, exact: Tensor) -> float:
    weights = density.weights[r].flatten().numpy()
    return float(wasserstein_distance(density.nodes[r].flatten().numpy(), exact.numpy(), weights))


@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize("exact", [FEW_OUTLIERS, _decaying(), torch.zeros(DIM), torch.full((DIM,), 2.0)])
def test_weights_sum_to_one_and_nodes_stay_inside_the_spectrum(exact: Tensor, probes: int) -> None:
    exact = exact.double()
    operator = Rotated(exact.expand(2, -1))
    density = packed_density(operator, probes=probes, steps=20, seeds=[0, 1])
    assert density.nodes.shape[:2] == (2, probes)
    assert torch.allclose(density.weights.sum(dim=2), torch.ones(2, probes, dtype=torch.float64), atol=1e-13)
    assert (density.weights >= 0).all()
    assert density.nodes.max() <= exact.max() + 1e-9
    assert density.nodes.min() >= exact.min() - 1e-9


def test_a_quadrature_of_m_nodes_is_exact_for_polynomials_of_degree_2m_minus_1() -> None:
    exact = bulk() / 3
    operator = Rotated(exact[None])
    density = packed_density(operator, probes=1, steps=5, seeds=[0])
    start = torch.randn(1, DIM, dtype=torch.float64, generator=_probe_generator())
    vector = start / start.norm()
    moment, power = [], vector
    for _ in range(10):
        moment.append(float((power * vector).sum()))
        power = operator.apply(power)
    found = [float((density.weights[0, 0] * density.nodes[0, 0] ** n).sum()) for n in range(10)]
    assert found == pytest.approx(moment, rel=1e-10, abs=1e-12)


def _probe_generator() -> torch.Generator:
    from lossray.seeds import generator as named
    from lossray.seeds import stream

    return named(stream(0, "probe", 0), "lanczos", 0)


def test_probes_are_those_of_the_member_alone() -> None:
    spectra = torch.stack([FEW_OUTLIERS, _decaying()])
    together = packed_density(Rotated(spectra), probes=3, steps=12, seeds=[5, 6])
    alone = packed_density(Rotated(spectra[1:]), probes=3, steps=12, seeds=[6])
    assert torch.allclose(together.nodes[1], alone.nodes[0], atol=1e-9)
    assert torch.allclose(together.weights[1], alone.weights[0], atol=1e-9)


def test_a_small_operator_is_diagonalised() -> None:
    exact = torch.tensor([[3.0, -1.0, 2.0, 2.0]], dtype=torch.float64)
    density = packed_density(Rotated(exact), probes=2, steps=3, seeds=[0])
    assert density.exact
    assert density.nodes[0, 0].tolist() == pytest.approx([-1, 2, 2, 3])
    assert density.weights[0, 0].tolist() == [0.25] * 4
    trace = density.estimate(lambda nodes: nodes)
    assert (float(trace.value), float(trace.stderr)) == (pytest.approx(6), 0)
    assert [float(end) for end in trace.interval()] == pytest.approx([6, 6])


def test_dead_members_are_nan() -> None:
    spectra = torch.stack([FEW_OUTLIERS, FEW_OUTLIERS])
    spectra[1, 0] = math.nan
    density = packed_density(Rotated(spectra), probes=2, steps=8, seeds=[0, 1])
    assert torch.isnan(density.nodes[1]).all()
    assert torch.isnan(density.estimate(lambda nodes: nodes).value).tolist() == [False, True]


def test_a_curve_integrates_to_one_and_keeps_the_mean() -> None:
    density = packed_density(Rotated(FEW_OUTLIERS[None]), probes=4, steps=30, seeds=[0]).member(0)
    points = torch.linspace(-20, 90, 20_001, dtype=torch.float64)
    curve = density.on_grid(points, 0.5)
    mean = float((density.weights * density.nodes).sum() / 4)
    assert float(torch.trapezoid(curve, points)) == pytest.approx(1, abs=1e-9)
    assert float(torch.trapezoid(curve * points, points)) == pytest.approx(mean, abs=1e-6)


def test_a_curve_is_a_mixture_of_normal_distributions() -> None:
    density = SpectralDensity(
        torch.tensor([[1.0, 3.0]]).double(), torch.tensor([[0.25, 0.75]]).double(), False, dim=4
    )
    found = density.on_grid(torch.tensor([3.0]), 2.0)
    expected = (0.25 * math.exp(-0.5) + 0.75) / (2 * math.sqrt(2 * math.pi))
    assert float(found[0]) == pytest.approx(expected)
    with pytest.raises(StudyError, match=r"width: found 0"):
        density.on_grid(torch.zeros(1), 0)


def test_the_deflated_density_is_closer_for_fewer_products() -> None:
    exact, seeds = _decaying(), range(8)
    plain = Rotated(exact.expand(8, -1))
    density = packed_density(plain, probes=4, steps=64, seeds=seeds)
    deflated = Rotated(exact.expand(8, -1))
    analysis = packed_analysis(deflated, top=10, tolerance=1e-3, probes=4, steps=64, seeds=seeds)
    assert analysis.matvecs.max() < 0.6 * 4 * 64
    mean_plain = np.mean([_distance(density, r, exact) for r in seeds])
    assert np.mean([_distance(analysis.density, r, exact) for r in seeds]) < mean_plain


def test_the_outliers_of_an_analysis_have_weight_one_over_d() -> None:
    operator = Rotated(FEW_OUTLIERS[None])
    analysis = packed_analysis(operator, top=5, tolerance=1e-6, probes=3, steps=40, seeds=[0])
    for nodes, weights in zip(analysis.density.nodes[0], analysis.density.weights[0], strict=True):
        assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
        for outlier in largest(FEW_OUTLIERS, 5):
            assert weights[(nodes - outlier).abs() < 1e-4].tolist() == pytest.approx([1 / DIM])


EXACT_SUMS = {
    "trace": lambda x: x.sum(),
    "frobenius": lambda x: x.square().sum().sqrt(),
    "negative_mass": lambda x: (-x).clamp(min=0).sum() / x.abs().sum(),
    "participation": lambda x: x.abs().sum() ** 2 / x.square().sum(),
    "effective_dimension": lambda x: (x.clamp(min=0) / (x.clamp(min=0) + 0.01 * x.abs().max())).sum(),
}


@pytest.mark.parametrize("name", EXACT_SUMS)
def test_sums_over_the_spectrum(name: str) -> None:
    """Within a few standard errors, and 6 percent for what a quadrature of 64 nodes does not resolve."""
    exact, seeds = FEW_OUTLIERS, range(20)
    operator = Rotated(exact.expand(20, -1))
    analysis = packed_analysis(operator, top=5, tolerance=1e-3, probes=8, steps=64, seeds=seeds)
    estimate, truth = getattr(analysis, name), EXACT_SUMS[name](exact)
    assert estimate.dof == (39 if name in ("trace", "frobenius") else 7)
    assert ((estimate.value - truth).abs() <= 5 * estimate.stderr + 0.06 * truth.abs()).all()
    assert (estimate.value.mean() - truth).abs() <= 4 * estimate.value.std() / math.sqrt(20) + 0.06 * truth
    low, high = estimate.interval(0.999)
    assert ((low <= truth) & (truth <= high)).all()
    if name != "effective_dimension":  # in which the error of the quadrature outweighs that of the sampling
        assert 0.5 < float(estimate.stderr.mean() / estimate.value.std()) < 2


def test_trace_intervals_of_the_analysis_have_their_coverage() -> None:
    """400 fixed seeds: the 90% Student's t intervals hold the trace in about 90 of 100 cases."""
    exact, seeds, held = _decaying(400), range(400), 0
    for start in range(0, 400, 50):
        operator = Rotated(exact.expand(50, -1))
        analysis = packed_analysis(
            operator, top=3, tolerance=1e-2, probes=4, steps=16, seeds=seeds[start : start + 50]
        )
        low, high = analysis.trace.interval(0.9)
        held += int(((low <= exact.sum()) & (exact.sum() <= high)).sum())
    assert binomtest(held, 400, 0.9).pvalue > 0.001


def _two_sided(dim: int) -> Tensor:
    """Outliers, and a tail that falls towards 0 on both sides of it: below what the quadrature resolves."""
    tail = torch.logspace(-0.5, -4.5, dim, dtype=torch.float64)
    tail[1::3] *= -0.6
    tail[dim // 2 :] = 0
    tail[:8] = torch.linspace(9, 2, 8, dtype=torch.float64)
    return tail


def _powers(dim: int) -> Tensor:
    """Both signs, falling like a power."""
    values = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.9
    values[2::5] *= -1
    return values


def _half_rank(dim: int) -> Tensor:
    """Positive semidefinite, half of it 0."""
    values = torch.logspace(1, -3, dim, dtype=torch.float64)
    values[dim // 2 :] = 0
    return values


def _normal(dim: int) -> Tensor:
    return torch.randn(dim, dtype=torch.float64, generator=generator(8))


def _held(exact: Tensor, n: int, **options: int) -> dict[str, int]:
    """How many of n seeds have the truth in their 95% interval, for every sum."""
    held = dict.fromkeys(EXACT_SUMS, 0)
    for start in range(0, n, 50):
        seeds = range(start, min(n, start + 50))
        operator = Rotated(exact.expand(len(seeds), -1))
        analysis = packed_analysis(operator, tolerance=1e-3, seeds=seeds, **options)
        for name, of in EXACT_SUMS.items():
            low, high = getattr(analysis, name).interval()
            slack = 1e-12 * abs(of(exact))
            held[name] += int(((low - slack <= of(exact)) & (of(exact) <= high + slack)).sum())
    return held


def _is_covered(held: int, n: int) -> bool:
    """Not significantly below 91 of 100: with few probes Student's t is not exact for skewed samples."""
    return binomtest(held, n, 0.91, alternative="less").pvalue > 1e-3


def test_intervals_hold_what_the_quadrature_does_not_resolve() -> None:
    """Without the error of the quadrature 78 of 100 cover the effective dimension."""
    held = _held(_two_sided(400), 100, top=8, probes=4, steps=48)
    assert all(_is_covered(count, 100) for count in held.values()), held


@pytest.mark.slow
@pytest.mark.parametrize("spectrum_of", [_two_sided, _powers, _half_rank, _normal, _decaying])
@pytest.mark.parametrize(
    "options", [{"top": 10, "probes": 4, "steps": 64}, {"top": 4, "probes": 6, "steps": 24}]
)
def test_the_coverage_of_every_interval(spectrum_of, options: dict[str, int]) -> None:
    held = _held(spectrum_of(400), 200, **options)
    assert all(_is_covered(count, 200) for count in held.values()), held


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1e20, 1e300])
def test_the_sums_at_any_scale(scale: float) -> None:
    """Nothing overflows or vanishes on the way."""
    exact = _two_sided(300)
    same, scaled = (
        packed_analysis(Rotated(size * exact[None]), top=4, tolerance=1e-3, probes=4, steps=24, seeds=[0])
        for size in (1.0, scale)
    )
    for name in EXACT_SUMS:
        unit = scale if name in ("trace", "frobenius") else 1.0
        one, other = getattr(same, name), getattr(scaled, name)
        for field in ("value", "stderr", "bound"):
            found = float(getattr(other, field)) / unit
            assert found == pytest.approx(float(getattr(one, field)), rel=1e-6, abs=1e-12), (name, field)


@pytest.mark.parametrize("dim", [5, 300])
def test_the_sums_of_an_operator_that_is_zero_are_zero(dim: int) -> None:
    """A dead member stays without any, and its neighbour keeps its own."""
    spectra = torch.stack([torch.zeros(dim).double(), _normal(dim), _normal(dim)])
    operator = Rotated(spectra)
    alive = torch.tensor([True, False, True])
    analysis = packed_analysis(
        operator, top=3, tolerance=1e-3, probes=4, steps=16, seeds=[0, 1, 2], alive=alive
    )
    for name in EXACT_SUMS:
        estimate = getattr(analysis, name)
        assert (float(estimate.value[0]), float(estimate.stderr[0]), float(estimate.bound[0])) == (0, 0, 0)
        assert math.isnan(float(estimate.value[1]))
        assert float(estimate.value[2]) != 0
    assert analysis.pairs.converged[0].all()


def test_the_other_rules_have_the_moments_of_the_gauss_rule() -> None:
    exact = _two_sided(300)
    operator = Rotated(exact[None])
    analysis = packed_analysis(operator, top=4, tolerance=1e-8, probes=3, steps=16, seeds=[0])
    density, blocks = analysis.density, 4
    at_zero = density.others[0]
    assert float(at_zero.nodes.abs().min()) < 1e-12
    for degree in range(2 * blocks - 1):
        expected = density.sums(lambda nodes, n=degree: nodes**n)
        for other in density.others:
            assert torch.allclose(other.sums(lambda nodes, n=degree: nodes**n), expected, rtol=1e-6)
    # For |lambda| the rule with a node at 0 is the lowest.
    least = at_zero.sums(torch.abs)
    assert all((least <= other.sums(torch.abs) * (1 + 1e-9)).all() for other in (density, *density.others))


def test_one_probe_has_no_standard_error() -> None:
    operator = Rotated(FEW_OUTLIERS[None])
    analysis = packed_analysis(operator, top=5, tolerance=1e-3, probes=1, steps=16, seeds=[0])
    assert math.isnan(float(analysis.participation.stderr))
    assert math.isfinite(float(analysis.participation.value))
    assert analysis.participation.dof == 0
    assert analysis.frobenius.dof == 16  # it takes the probes of the trace
    assert analysis.trace.dof == 16  # the trace has probes of its own


@pytest.mark.parametrize("arguments", [{"probes": 0}, {"steps": 0}])
def test_impossible_numbers(arguments: dict[str, int]) -> None:
    with pytest.raises(StudyError, match=r"found 0; allowed: a whole number from 1"):
        packed_density(Rotated(bulk()[None]), **({"probes": 2, "steps": 4} | arguments), seeds=[0])


def test_bases_that_do_not_fit_are_refused() -> None:
    class Huge:
        shape = (1, 10**12)
        dtype = torch.float32
        device = torch.device("cpu")

        def apply(self, vectors: Tensor) -> Tensor:
            raise AssertionError("no product is formed")

    with pytest.raises(ResourceError, match="fewer"):
        packed_density(Huge(), probes=4, steps=64, seeds=[0])
