"""Beside claim A: the words for a slope of S on ln d, and on dispersion, at the edges of their truth."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import special

from benchmarks.error_rates.case import Case
from lossray.findings.claim_a_extras import SLOPE_MARGIN, _slope_tests
from lossray.findings.dispersion import FACTOR, Spreads, log_spreads, word_of
from lossray.findings.verdict_a import NOT_SUPPORTED, SUPPORTED
from lossray.study.settings import ClaimsSettings

Array = NDArray[np.float64]
Noise = Callable[..., Array]  # of a generator and a shape whose second axis a seed's runs share; mean 0, sd 1

SETTINGS = ClaimsSettings()
SIZES = (5, 10, 20)
LOG_DIM = np.log([310, 610, 2410, 9610, 31210])
METHODS = 9
CHECKPOINTS = 12


def normal(rng: np.random.Generator, shape: tuple[int, ...], *, shared: float) -> Array:
    """The runs of a seed, along the first axis, have this correlation."""
    together, own = rng.normal(size=(1, *shape[1:])), rng.normal(size=shape)
    noise: Array = np.sqrt(shared) * together + np.sqrt(1 - shared) * own
    return noise


def skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """As log chi^2_1, the S of a single direction."""
    s: Array = np.log(rng.chisquare(1, size=shape)) - special.digamma(0.5) - np.log(2)
    return s * np.sqrt(2) / np.pi


NULLS: dict[str, Noise] = {
    "independent": partial(normal, shared=0.0),
    "correlated 0.3": partial(normal, shared=0.3),
    "correlated 1": partial(normal, shared=1.0),
    "skewed": skewed,
}


# ---- slope


def slope(rng: np.random.Generator, *, noise: Noise, n: int, truth: float, sd: float) -> str:
    """The word on the regressions of n seeds, of S at five sizes with that scatter."""
    s = truth * LOG_DIM[:, None] + sd * noise(rng, (len(LOG_DIM), n))
    apart = LOG_DIM - LOG_DIM.mean()
    row = next(_slope_tests("mlp", apart @ s / (apart @ apart), "d = 310 to 31210", SETTINGS))
    return str(row.verdict)


def _slope_cases(n: int) -> Iterator[Case]:
    constant, chance, neither = "a constant angle", "chance", "neither constant nor chance"
    edge = SLOPE_MARGIN
    for null, noise in NULLS.items():
        for word, truths in (
            (constant, (-edge, edge)),
            (chance, (-1 - edge, -1 + edge)),
            (neither, (-1 - edge, -1 + edge, -edge, edge)),
        ):
            for truth in truths:
                own = partial(slope, noise=noise, n=n, truth=truth, sd=0.5)
                yield Case("A, slope", word, f"slope {truth:g}", null, n, True, own)
    for word, truth in ((constant, 0.0), (chance, -1.0), (neither, -0.3), (neither, 0.3)):
        for sd in (0.2, 0.5):
            own = partial(slope, noise=NULLS["independent"], n=n, truth=truth, sd=sd)
            yield Case(
                "A, slope", word, f"slope {truth:g}, S scatters by {sd:g}", "independent", n, False, own
            )


# ---- dispersion


def dispersion(
    rng: np.random.Generator,
    *,
    noise: Noise,
    n: int,
    ratios: tuple[float, ...],
    checkpoints: int = CHECKPOINTS,
    architectures: int = 1,
    restless: float = 0.0,
) -> str:
    """The word where the methods' S scatter by these multiples of SGD's; seeds may differ in how much."""
    judged = []
    scale = np.array([*ratios, 1.0])[:, None, None]
    for _ in range(architectures):
        seeds = np.exp(restless * rng.normal(size=(1, n, 1)))
        s = scale * seeds * noise(rng, (len(ratios) + 1, n, checkpoints))
        differences = log_spreads(s[:-1], s[-1])
        trained = np.full(len(ratios), n)
        judged.append(Spreads("mlp", ("method",) * len(ratios), trained, differences, differences))
    return word_of(judged, SETTINGS.alpha)


def _dispersion_cases(n: int) -> Iterator[Case]:
    edge = 1 / FACTOR
    one, every = (edge, *[0.4] * (METHODS - 1)), (edge,) * METHODS
    claim, all_at = "A, dispersion", "every method's spread 1/1.25 of SGD's"
    for null, noise in NULLS.items():
        make = partial(dispersion, noise=noise, n=n)
        truth = "one method's spread 1/1.25 of SGD's, the others' 0.4"
        yield Case(claim, SUPPORTED, truth, null, n, True, partial(make, ratios=one))
        yield Case(claim, NOT_SUPPORTED, all_at, null, n, True, partial(make, ratios=every))
        five = partial(make, ratios=every, architectures=5)
        yield Case(claim, NOT_SUPPORTED, f"5 architectures: {all_at}", null, n, True, five)
        few = partial(make, ratios=every, checkpoints=3, restless=1.0)
        yield Case(claim, NOT_SUPPORTED, f"3 checkpoints, seeds of all kinds: {all_at}", null, n, True, few)
    for null in ("independent", "correlated 0.3"):
        make = partial(dispersion, noise=NULLS[null], n=n)
        half = partial(make, ratios=(0.5,) * METHODS)
        yield Case(claim, SUPPORTED, "every method's spread half of SGD's", null, n, False, half)
        like = partial(make, ratios=(1.2, *[0.5] * (METHODS - 1)))
        yield Case(claim, NOT_SUPPORTED, "one method's spread 1.2 times SGD's", null, n, False, like)


def cases() -> Iterator[Case]:
    """Errors under every kind of scatter, powers under what was measured."""
    for n in (3, *SIZES):
        yield from _slope_cases(n)
    for n in SIZES:
        yield from _dispersion_cases(n)
