"""Expected logarithms of weighted sums of squares: closed forms, draws, and what the shortening costs."""

import math

import pytest
import torch
from scipy.special import digamma

from lossray.geometry import quadratic_forms
from lossray.geometry.quadratic_forms import QuadraticForm, form_of, stacked

EULER = 0.5772156649015329
RANKS = torch.arange(1, 3001, dtype=torch.float64)
SPECTRA = {
    "flat": torch.ones(3000, dtype=torch.float64),
    "harmonic": 1 / RANKS,
    "slow power": RANKS**-0.5,
    "fast power": RANKS**-1.5,
    "geometric": 0.97**RANKS,
    "fast geometric": 0.8**RANKS,
    "step": torch.where(RANKS < 40, 1.0, torch.where(RANKS < 400, 0.3, 0.0)),
    "inverse squares": torch.randn(3000, generator=torch.Generator().manual_seed(0)).double() ** -2,
}


def logs(*weights):
    return form_of(torch.tensor(weights, dtype=torch.float64)).expected_log().tolist()


def test_closed_forms():
    assert logs([1.0]) == pytest.approx([-EULER - math.log(2)], abs=1e-5)  # E ln chi^2_1 = -1.2704
    assert logs([1.0, 1.0]) == pytest.approx([math.log(2) - EULER], abs=1e-5)
    # Two weights: 2 ln((sqrt a + sqrt b) / 2) + ln 2 - gamma
    two = 2 * math.log((math.sqrt(7) + math.sqrt(0.2)) / 2) + math.log(2) - EULER
    assert logs([7.0, 0.2], [0.2, 7.0]) == pytest.approx([two, two], abs=1e-5)
    for n in (5, 17, 300):
        assert logs([3.0] * n) == pytest.approx([digamma(n / 2) + math.log(6)], abs=1e-5)


def test_a_form_of_equal_weights_is_one_of_many_degrees_of_freedom():
    once = QuadraticForm(torch.tensor([[2.0]]).double(), torch.tensor([[9.0]]).double())
    assert float(once.expected_log()) == pytest.approx(logs([2.0] * 9)[0], rel=1e-12)
    assert float(once.concentration) == pytest.approx(1 / 9)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_shortened_form_has_the_same_expected_logarithm(name, monkeypatch):
    weights = SPECTRA[name][None]
    short = form_of(weights)
    monkeypatch.setattr(quadratic_forms, "LEADING", 3000)
    whole = form_of(weights)
    assert short.values.shape[1] < 20 < whole.values.shape[1]
    assert float(short.expected_log()) == pytest.approx(float(whole.expected_log()), abs=1e-4)
    assert float(short.concentration) == pytest.approx(float(whole.concentration), rel=1e-9)


def test_weights_of_products_are_products_of_weights():
    first, second = SPECTRA["harmonic"][None, :70], SPECTRA["geometric"][None, :50]
    product = (first[:, :, None] * second[:, None, :]).flatten(start_dim=1)
    found = form_of(first).times(form_of(second)).expected_log()
    assert float(found) == pytest.approx(float(form_of(product).expected_log()), abs=1e-4)


def test_it_is_the_mean_of_draws():
    generator = torch.Generator().manual_seed(1)
    weights = 10.0 ** torch.linspace(0, -4, 30, dtype=torch.float64)
    draws = torch.randn(100_000, 30, dtype=torch.float64, generator=generator).square() @ weights
    error = float(draws.log().std()) / len(draws) ** 0.5
    assert abs(float(draws.log().mean()) - float(form_of(weights[None]).expected_log())) < 4 * error


@pytest.mark.parametrize("unit", [1e-200, 1e200])
def test_the_scale_of_the_weights_is_of_no_account(unit):
    weights = SPECTRA["inverse squares"][None]
    expected = float(form_of(weights).expected_log()) + math.log(unit)
    assert float(form_of(unit * weights).expected_log()) == pytest.approx(expected, rel=1e-9)


def test_without_weights_there_is_no_logarithm_and_others_are_not_touched():
    rows = torch.ones(3, 40, dtype=torch.float64)
    rows[1], rows[2, 7] = 0, torch.nan
    found = form_of(rows).expected_log()
    assert found.isnan().tolist() == [False, True, True]
    assert float(found[0]) == float(form_of(rows[:1]).expected_log())


def test_forms_below_each_other_are_as_they_are_alone():
    short, long = form_of(SPECTRA["flat"][None, :3]), form_of(SPECTRA["harmonic"][None])
    both = stacked([short, long])
    assert both.expected_log().tolist() == pytest.approx(
        [float(short.expected_log()), float(long.expected_log())], rel=1e-12
    )
    assert both.concentration.tolist() == pytest.approx([1 / 3, float(long.concentration)])
