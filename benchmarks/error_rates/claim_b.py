"""Claim B at the edges of its words: runs that share seeds, of which half say yes, or whose share is 10%."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import special

from benchmarks.error_rates.case import Case
from lossray.findings.claim_b import LOW_RANK, NullityCount, word_of_cells
from lossray.findings.verdict_a import NOT_SUPPORTED, SUPPORTED
from lossray.study.settings import ClaimsSettings

Array = NDArray[np.float64]
Yes = Callable[[np.random.Generator, int, float], Array]  # of n seeds with such a mean share, [n, RUNS]
Scatter = Callable[[np.random.Generator, int, int], Array]  # of n seeds and so many runs, mean 0, sd 1

ALPHA = ClaimsSettings().alpha
SIZES = (5, 10, 20)
RUNS = 16  # of each seed: two models, four optimizers, two learning rates
SD = 0.01  # of a run's share of large eigenvalues; as measured, 0.002 to 0.02


# ---- exactly singular, singular beyond symmetry


def correlated_yes(rng: np.random.Generator, n: int, share: float, *, icc: float) -> Array:
    """Each run says what its seed says with probability icc, otherwise something of its own."""
    seeds, own = rng.random((n, 1)) < share, rng.random((n, RUNS)) < share
    answers: Array = np.where(rng.random((n, RUNS)) < icc, seeds, own).astype(np.float64)
    return answers


def skewed_yes(rng: np.random.Generator, n: int, share: float, *, side: int) -> Array:
    """A few seeds say another thing than the others do, most of them nearly the same."""
    own = rng.beta(4.0, 0.5, size=(n, 1)) * share * 4.5 / 4.0
    answers: Array = (rng.random((n, RUNS)) < np.minimum(own, 1.0)).astype(np.float64)
    return answers if side < 0 else 1 - answers


YES: dict[str, Yes] = {
    "independent": partial(correlated_yes, icc=0.0),
    "correlated 0.3": partial(correlated_yes, icc=0.3),
    "correlated 0.6": partial(correlated_yes, icc=0.6),
    "correlated 1": partial(correlated_yes, icc=1.0),
    "skewed to the left": partial(skewed_yes, side=-1),
    "skewed to the right": partial(skewed_yes, side=1),
}


def singular(
    rng: np.random.Generator, *, yes: Yes, n: int, share: float, unknown: float = 0.0, unequal: bool = False
) -> str:
    """The word on runs of n seeds; some cannot be told, and of some seeds the first run alone is there."""
    answers = yes(rng, n, share)
    there = np.ones_like(answers)
    if unequal:
        there[rng.random(n) < 0.5, 1:] = 0.0
    told = there * (rng.random(answers.shape) >= unknown)
    return NullityCount((answers * told).sum(axis=1), (there - told).sum(axis=1), there.sum(axis=1)).verdict(
        ALPHA
    )


def _singular_cases(n: int) -> Iterator[Case]:
    claim, half = "B, singular", "half of the runs say yes"
    for null, yes in YES.items():
        for word in (SUPPORTED, NOT_SUPPORTED):
            yield Case(claim, word, half, null, n, True, partial(singular, yes=yes, n=n, share=0.5))
    for null in ("independent", "correlated 1"):
        for word in (SUPPORTED, NOT_SUPPORTED):
            own = partial(singular, yes=YES[null], n=n, share=0.5, unequal=True)
            yield Case(claim, word, f"{half}, of some seeds one run is there", null, n, True, own)
            own = partial(singular, yes=YES[null], n=n, share=0.5, unknown=0.2)
            yield Case(claim, word, f"{half}, a fifth cannot be told", null, n, True, own)
    for null in ("independent", "correlated 0.3", "correlated 1"):
        for word, share in ((SUPPORTED, 0.95), (SUPPORTED, 0.8), (NOT_SUPPORTED, 0.05), (NOT_SUPPORTED, 0.2)):
            own = partial(singular, yes=YES[null], n=n, share=share)
            yield Case(claim, word, f"{share:.0%} of the runs say yes", null, n, False, own)


# ---- effectively low rank


def correlated(rng: np.random.Generator, n: int, runs: int, *, icc: float) -> Array:
    """Normal shares, of which the runs of a seed have that correlation."""
    scatter: Array = np.sqrt(icc) * rng.normal(size=(n, 1)) + np.sqrt(1 - icc) * rng.normal(size=(n, runs))
    return scatter


def skewed(rng: np.random.Generator, n: int, runs: int, *, side: int) -> Array:
    """Shares that the seed decides, as log chi^2_1 scatters."""
    s = np.log(rng.chisquare(1, size=(n, 1))) - special.digamma(0.5) - np.log(2)
    scatter: Array = np.repeat(-side * s / np.pi * np.sqrt(2), runs, axis=1)
    return scatter


SCATTER: dict[str, Scatter] = {
    "independent": partial(correlated, icc=0.0),
    "correlated 0.3": partial(correlated, icc=0.3),
    "correlated 0.5": partial(correlated, icc=0.5),
    "correlated 1": partial(correlated, icc=1.0),
    "skewed to the left": partial(skewed, side=-1),
    "skewed to the right": partial(skewed, side=1),
}


def low_rank(
    rng: np.random.Generator, *, scatter: Scatter, n: int, runs: int, shares: tuple[float, ...]
) -> str:
    """The word on models and metrics, "cells", that have these true shares."""
    cells = [(share + SD * scatter(rng, n, runs)).mean(axis=1) for share in shares]
    return word_of_cells(cells, ALPHA)


def _low_rank_cases(n: int) -> Iterator[Case]:
    claim = "B, low rank"
    for null, scatter in SCATTER.items():
        for cells, runs in ((1, 1), (1, 28), (2, 8), (9, 8)):
            make = partial(low_rank, scatter=scatter, n=n, runs=runs)
            where = f"{cells} {'cell' if cells == 1 else 'cells'} of {runs} runs a seed"
            low = (LOW_RANK, *[LOW_RANK / 2] * (cells - 1))
            one = f"{where}, {'at 10%' if cells == 1 else 'one at 10%, the others at 5%'}"
            yield Case(claim, SUPPORTED, one, null, n, True, partial(make, shares=low))
            every = partial(make, shares=(LOW_RANK,) * cells)
            yield Case(claim, NOT_SUPPORTED, f"{where}, all at 10%", null, n, True, every)
    for null in ("independent", "correlated 0.3"):
        make = partial(low_rank, scatter=SCATTER[null], n=n, runs=8)
        low, high = (0.08,) * 9, (0.12, *[0.05] * 8)
        yield Case(
            claim, SUPPORTED, "9 cells of 8 runs a seed, all at 8%", null, n, False, partial(make, shares=low)
        )
        one = "9 cells of 8 runs a seed, one at 12%, the others at 5%"
        yield Case(claim, NOT_SUPPORTED, one, null, n, False, partial(make, shares=high))


def cases() -> Iterator[Case]:
    """Errors under every kind of scatter, powers under what was measured."""
    for n in SIZES:
        yield from _singular_cases(n)
        yield from _low_rank_cases(n)
