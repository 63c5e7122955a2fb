"""The trace: exact cases, unbiasedness, intervals with the coverage that they claim."""

import math

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from lossray.errors import StudyError
from lossray.spectra.estimates import jackknife
from lossray.spectra.trace import packed_trace
from tests.spectra.prescribed import DIM, Rotated, bulk, generator, spectrum


def _decaying(dim: int) -> Tensor:
    return torch.arange(1, dim + 1, dtype=torch.float64) ** -1.5


SPECTRA = {
    "normal": bulk(300),
    "outliers": torch.cat([torch.tensor([50.0, 40.0, 30.0]).double(), bulk(297)]),
    "decaying": _decaying(300),
    "one-sided": bulk(300).abs(),
}


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("name", SPECTRA)
def test_coverage_is_nominal(name: str, level: float) -> None:
    """400 fixed seeds; Student's t with the estimator's degrees of freedom."""
    exact, held = SPECTRA[name], 0
    for start in range(0, 400, 100):
        seeds = range(start, start + 100)
        estimate = packed_trace(Rotated(exact.expand(100, -1)), matvecs=24, seeds=seeds)
        assert estimate.dof == 11
        low, high = estimate.interval(level)
        held += int(((low <= exact.sum()) & (exact.sum() <= high)).sum())
    assert binomtest(held, 400, level).pvalue > 0.001


def test_the_mean_over_seeds_is_the_trace() -> None:
    exact = SPECTRA["decaying"]
    estimate = packed_trace(Rotated(exact.expand(200, -1)), matvecs=12, seeds=range(200))
    deviation = (estimate.value.mean() - exact.sum()) / (estimate.value.std() / math.sqrt(200))
    assert abs(float(deviation)) < 4


def test_deflation_beats_hutchinson() -> None:
    """Its error for the same number of products is a third, where the spectrum decays."""
    exact = _decaying(DIM)
    estimate = packed_trace(Rotated(exact.expand(50, -1)), matvecs=40, seeds=range(50))
    error = (estimate.value - exact.sum()).square().mean().sqrt()
    hutchinson = math.sqrt(2 * float(exact.square().sum()) / 40)
    assert float(error) < hutchinson / 3


def test_multiples_of_the_identity_have_no_error() -> None:
    estimate = packed_trace(Rotated(torch.full((1, DIM), 2.5).double()), matvecs=10, seeds=[0])
    assert float(estimate.value) == pytest.approx(2.5 * DIM)
    assert float(estimate.stderr) < 1e-9


def test_low_rank_is_exact_once_the_basis_holds_it() -> None:
    exact = torch.zeros(DIM, dtype=torch.float64)
    exact[:4] = torch.tensor([5.0, -2.0, 1.0, 0.5])
    estimate = packed_trace(Rotated(exact[None]), matvecs=20, seeds=[0])
    assert float(estimate.value) == pytest.approx(4.5, abs=1e-9)


def test_few_parameters_are_exact() -> None:
    estimate = packed_trace(Rotated(bulk(7)[None]), matvecs=20, seeds=[0])
    assert float(estimate.value) == pytest.approx(float(bulk(7).sum()), abs=1e-12)
    assert float(estimate.stderr) == 0


def test_products_are_counted_and_dead_members_are_nan() -> None:
    spectra = torch.stack([spectrum(10), spectrum(math.nan)])
    operator = Rotated(spectra)
    estimate = packed_trace(operator, matvecs=20, seeds=[0, 1], alive=torch.tensor([True, False]))
    assert operator.matvecs == 20
    assert torch.isnan(estimate.value).tolist() == [False, True]


def test_too_few_products() -> None:
    with pytest.raises(StudyError, match=r"matvecs: found 3; allowed: a whole number from 4"):
        packed_trace(Rotated(bulk()[None]), matvecs=3, seeds=[0])


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    samples = torch.randn(3, 9, 1, dtype=torch.float64, generator=generator(0))
    estimate = jackknife(samples)
    assert torch.allclose(estimate.value, samples[..., 0].mean(dim=1))
    assert torch.allclose(estimate.stderr, samples[..., 0].std(dim=1) / 3)
    assert estimate.dof == 8


def test_the_jackknife_of_a_ratio_is_the_delta_methods() -> None:
    samples = 10 + 0.1 * torch.randn(1, 400, 2, dtype=torch.float64, generator=generator(0))
    estimate = jackknife(samples, lambda means: means[..., 0] / means[..., 1])
    ratio = samples[..., 0].mean() / samples[..., 1].mean()
    rest = samples[0, :, 0] - ratio * samples[0, :, 1]
    delta = rest.std() / math.sqrt(400) / samples[..., 1].mean()
    assert float(estimate.stderr) == pytest.approx(float(delta), rel=1e-2)
