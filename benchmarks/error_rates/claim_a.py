"""Claim A on planted energies: nine methods, SGD, four gauges; what is planted is S, the rest is lossray."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import special

from benchmarks.error_rates.case import Case
from lossray.findings.energies import BASELINE, TOP, Cell, GaugeEnergies
from lossray.findings.evidence_a import evidence_of
from lossray.findings.verdict_a import (
    DIMENSION_ARTEFACT,
    METRIC_ARTEFACT,
    NOT_SUPPORTED,
    RANDOM_SIGNS,
    SUPPORTED,
    across_moments,
    decide_together,
    overall,
)
from lossray.study.settings import ClaimsSettings

Array = NDArray[np.float64]
Noise = Callable[[np.random.Generator, int, int], Array]  # of m optimizers and n seeds, mean 0

SETTINGS = ClaimsSettings()
MARGIN = SETTINGS.margin_energy
METHODS = tuple(f"method{i}" for i in range(9))
GAUGES = ("raw", "balanced", "adaptive", "preconditioned")
DIM = 2410
CHANCE = 1 / DIM
SD = 0.5  # of S over seeds, as measured: 0.2 to 0.7
SIZES = (5, 10, 20)


def normal(rng: np.random.Generator, m: int, n: int, *, shared: float) -> Array:
    """Normal S; the runs of a seed have this correlation."""
    own = rng.normal(size=(m, n))
    together: Array = SD * (math.sqrt(shared) * rng.normal(size=(1, n)) + math.sqrt(1 - shared) * own)
    return together


def skewed(rng: np.random.Generator, m: int, n: int) -> Array:
    """S of a single direction, log chi^2_1: standard deviation 2.2, skewness -1.5."""
    s: Array = np.log(rng.chisquare(1, size=(m, n))) - special.digamma(0.5) - math.log(2)
    return s


NULLS: dict[str, Noise] = {
    "independent": partial(normal, shared=0.0),
    "correlated 0.3": partial(normal, shared=0.3),
    "correlated 1": partial(normal, shared=1.0),
    "skewed": skewed,
}


def planted_cell(
    rng: np.random.Generator,
    noise: Noise,
    n: int,
    levels: Mapping[str, tuple[float, Array]],
    *,
    flips: float = 1.0,
    common: float = 1.0,
    lost_sign: int = 0,
) -> Cell:
    """S around the planted levels.

    Args:
        rng: of the noise.
        noise: of one gauge.
        n: seeds.
        levels: exp(mean S) of SGD and of each method, by gauge.
        common: part of the noise's variance that the gauges share.
        flips: exp(S) over the sign-flip null, but for one method.
        lost_sign: 1 where that method is a factor 3 above its own null, 0 where it is as the others.
    """
    optimizers = (BASELINE, *METHODS)
    first = noise(rng, len(optimizers), n)
    gauges = {}
    for name, (sgd, methods) in levels.items():
        mixed = first
        if name != "raw" and common < 1:
            own = noise(rng, len(optimizers), n)
            mixed = math.sqrt(common) * first + math.sqrt(1 - common) * own
        s = np.log(np.array([sgd, *np.broadcast_to(methods, len(METHODS))]))[:, None] + mixed
        over = mixed + math.log(flips)
        over[-1] += lost_sign * math.log(3)
        gauges[name] = GaugeEnergies(
            name, TOP, optimizers, tuple(range(n)), s, s - math.log(CHANCE), over, DIM, 0
        )
    return Cell("mlp", "best lr", "matched loss", "update", METHODS, DIM, gauges)


def in_all(
    sgd: float, methods: float | list[float], **others: tuple[float, float]
) -> dict[str, tuple[float, Array]]:
    """The same levels in every gauge but those named."""
    return {
        name: (own[0], np.asarray(own[1], dtype=np.float64))
        for name in GAUGES
        for own in [others.get(name, (sgd, methods))]
    }


def _one(level: float, rest: float) -> list[float]:
    return [level, *[rest] * (len(METHODS) - 1)]


def verdict(
    rng: np.random.Generator,
    *,
    make: Callable[[np.random.Generator], Cell],
    architectures: int = 1,
    moments: int = 1,
) -> str:
    """The overall verdict over so many architectures, at so many levels of loss each, all drawn anew."""
    cells = [make(rng) for _ in range(architectures * moments)]
    evidence = [evidence_of(cell, "relu", SETTINGS) for cell in cells]
    decisions = decide_together(evidence, alpha=SETTINGS.alpha)
    words = {}
    for i in range(architectures):
        own = decisions[i * moments : (i + 1) * moments]
        words[str(i)] = across_moments({str(j): decision for j, decision in enumerate(own)}).verdict
    return overall(words)


M = MARGIN
TRUE = in_all(0.1, M / 10)
OTHERS_AT = {name: (2 * M, M) for name in GAUGES[1:]}
# word, truth, levels and further arguments of `planted_cell`
ERRORS = (
    (
        SUPPORTED,
        "one method at the margin, the others a tenth of it, SGD ten times",
        in_all(0.1, _one(M, M / 10)),
        {},
    ),
    (SUPPORTED, "SGD at the margin, the methods a tenth of it", in_all(M, M / 10), {}),
    (
        SUPPORTED,
        "one method a factor 2 below SGD, around the margin",
        in_all(M * 2**0.5, _one(M / 2**0.5, M / 20)),
        {},
    ),
    (
        SUPPORTED,
        "one method at the margin in the balanced gauge",
        in_all(0.1, M / 10) | {"balanced": (0.1, np.array(_one(M, M / 10)))},
        {},
    ),
    (NOT_SUPPORTED, "every method at the margin, SGD ten times", in_all(0.1, M), {}),
    (NOT_SUPPORTED, "every method at the margin, SGD twice", in_all(2 * M, M), {}),
    (NOT_SUPPORTED, "SGD at the margin, every method half of it", in_all(M, M / 2), {}),
    (NOT_SUPPORTED, "all at three times chance", in_all(3 * CHANCE, 3 * CHANCE), {}),
    (
        METRIC_ARTEFACT,
        "true; in the other gauges every method at the margin, SGD twice",
        in_all(0.1, M / 10, **OTHERS_AT),
        {},
    ),
    (
        METRIC_ARTEFACT,
        "true; in the other gauges all far below the margin, SGD half of the methods",
        in_all(0.1, M / 10, **dict.fromkeys(GAUGES[1:], (M / 40, M / 20))),
        {},
    ),
    (
        DIMENSION_ARTEFACT,
        "one method at three times chance, all others at chance",
        in_all(CHANCE, _one(3 * CHANCE, CHANCE)),
        {},
    ),
    (
        DIMENSION_ARTEFACT,
        "one method at a third of chance, all others at chance",
        in_all(CHANCE, _one(CHANCE / 3, CHANCE)),
        {},
    ),
    (RANDOM_SIGNS, "true; one method at three times its random signs", TRUE, {"lost_sign": 1}),
)
TOGETHER = (  # architectures, levels of loss
    (NOT_SUPPORTED, "every method at the margin, SGD ten times", in_all(0.1, M), 5, 1),
    (NOT_SUPPORTED, "every method at the margin, SGD ten times", in_all(0.1, M), 1, 5),
    (NOT_SUPPORTED, "SGD at the margin, every method half of it", in_all(M, M / 2), 5, 1),
    (
        METRIC_ARTEFACT,
        "true; in the other gauges every method at the margin",
        in_all(0.1, M / 10, **OTHERS_AT),
        5,
        1,
    ),
)
POWERS = (
    (SUPPORTED, "SGD 7.8%, methods 0.2%", in_all(0.078, 0.002), {}),
    (SUPPORTED, "SGD 7.8%, methods 0.5%", in_all(0.078, 0.005), {}),
    (NOT_SUPPORTED, "SGD 7.8%, methods 2.5%", in_all(0.078, 0.025), {}),
    (NOT_SUPPORTED, "true, but for one method at 5%", in_all(0.1, _one(0.05, M / 10)), {}),
    (NOT_SUPPORTED, "all at half of the margin (12 times chance)", in_all(M / 2, M / 2), {}),
    (
        METRIC_ARTEFACT,
        "true; 5% in the preconditioned gauge",
        in_all(0.078, 0.002, preconditioned=(0.05, 0.05)),
        {},
    ),
    (DIMENSION_ARTEFACT, "all at chance", in_all(CHANCE, CHANCE), {}),
    (RANDOM_SIGNS, "true; all as their random signs", TRUE, {}),
)


def cases() -> Iterator[Case]:
    """Errors under every kind of scatter, powers under what was measured."""
    for n in SIZES:
        for null, noise in NULLS.items():
            for word, truth, levels, further in ERRORS:
                # Sign nulls are far away where they are not the point.
                flips = 1.0 if word == RANDOM_SIGNS else 30.0
                make = partial(
                    planted_cell, noise=noise, n=n, levels=levels, flips=flips, common=0.5, **further
                )
                yield Case("A", word, truth, null, n, True, partial(verdict, make=make))
            for word, truth, levels, architectures, moments in TOGETHER:
                make = partial(planted_cell, noise=noise, n=n, levels=levels, flips=30.0, common=0.5)
                many = f"{architectures} architectures" if architectures > 1 else f"{moments} levels of loss"
                own = partial(verdict, make=make, architectures=architectures, moments=moments)
                yield Case("A", word, f"{many}: {truth}", null, n, True, own)
        for null in ("independent", "correlated 0.3"):
            for word, truth, levels, further in POWERS:
                flips = 1.0 if word == RANDOM_SIGNS else 30.0
                make = partial(planted_cell, noise=NULLS[null], n=n, levels=levels, flips=flips, **further)
                yield Case("A", word, truth, null, n, False, partial(verdict, make=make))
