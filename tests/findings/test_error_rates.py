"""Every word of every verdict, at the edge of its truth: wrong at most 6% of the time."""

from collections.abc import Iterator

import pytest
from scipy import stats

from benchmarks.error_rates.__main__ import cases
from benchmarks.error_rates.case import MOST, Case, hits

REPEATS = 150
UNLIKELY = 1e-4  # of as many wrong words if their rate were MOST


def _errors() -> Iterator[Case]:
    return (case for case in cases() if case.wrong)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(_errors()), ids=lambda case: case.label)
def test_a_word_is_rarely_wrong(case: Case) -> None:
    found = hits(case, repeats=REPEATS, seed=1)
    assert stats.binomtest(found, REPEATS, MOST, alternative="greater").pvalue > UNLIKELY, found / REPEATS


def test_the_measure_sees_a_wrong_word() -> None:
    always = Case("A", "word", "truth", "independent", 10, True, lambda rng: "word")
    assert hits(always, repeats=20) == 20
