"""Claim C at the edges of its words: planted ensembles whose true mean test NLL is chosen.

The NLL of an ensemble on an example is the example's difficulty, the method's level, the run's effect on the
method and a part of that example alone, multiplied; all but the level have mean 1, so levels are true ratios.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import special

from benchmarks.error_rates.case import Case
from lossray.findings.bootstrap import example_resamples
from lossray.findings.claim_c import Judged, _judge
from lossray.findings.ensemble_scores import EnsembleCell
from lossray.findings.verdict_a import NOT_SUPPORTED, SUPPORTED
from lossray.findings.verdict_c import CONTROLS, EQUIVALENT, decide_overall
from lossray.study.settings import ClaimsSettings

Array = NDArray[np.float64]
Levels = Mapping[str, Mapping[float, float] | float]  # by method: everywhere, or by budget; 1 if not named

SETTINGS = ClaimsSettings()
METHODS = ("curve", "curve_lr_equivalent", "lr_equivalent", "rescale_curve", "rescale_retrain", "snapshot")
MARGIN = SETTINGS.margin_nll
BUDGETS = (1.0, 2.0, 3.0)
EXAMPLES = 80
RUN_SD = 0.03  # of a method's mean NLL over runs, relative
EXAMPLE_SD = 0.05  # of ln NLL of an example, given method and run
SEEDS = (5, 10, 20)


@dataclass(frozen=True)
class Null:
    """How the scores scatter."""

    name: str
    shared: float = 0.0  # share of the run effects' variance that all methods of a base run have in common
    budgets_together: bool = False  # a method's run effect is the same at every budget
    skew: int = 0  # of the variants' run effects: as log chi^2_1, with the longer tail on this side
    heavy: bool = False  # a few examples hold most of the NLL, and most of the scatter is theirs
    interaction: float = EXAMPLE_SD


NULLS = (
    Null("independent"),
    Null("correlated 0.3", shared=0.3),
    Null("correlated 1", shared=1.0),
    Null("budgets together", budgets_together=True),
    Null("skewed to the left", skew=-1),
    Null("skewed to the right", skew=1),
    Null("heavy-tailed examples", heavy=True, interaction=0.3),
)
SKEWED = tuple(null for null in NULLS if null.skew or null.name == "independent")
TOGETHER = tuple(null for null in NULLS if null.budgets_together or null.name == "independent")


class FewResamples(EnsembleCell):
    """A setting whose intervals take fewer resamples of the examples, which makes them 1% less exact."""

    @cached_property
    def resamples(self) -> dict[str, Array]:
        """As of any setting."""
        return {metric: example_resamples(scores, resamples=300) for metric, scores in self.scores.items()}


def planted(
    rng: np.random.Generator, levels: Levels, null: Null, n: int, budgets: tuple[float, ...] = BUDGETS
) -> EnsembleCell:
    """One setting of six methods."""
    ensembles = tuple((method, budget) for method in METHODS for budget in budgets)
    difficulty = rng.lognormal(-3, 1.8, EXAMPLES) if null.heavy else rng.exponential(0.2, EXAMPLES)
    of_examples = difficulty * rng.lognormal(0, 0.3, (n, EXAMPLES))
    per_example = rng.lognormal(0, null.interaction, (len(ensembles), n, EXAMPLES))
    if null.heavy:
        per_example *= rng.lognormal(0, null.interaction, (len(ensembles), 1, EXAMPLES))
    effects = _run_effects(rng, ensembles, null, n)
    level = np.array([_level(levels, method, budget) for method, budget in ensembles])
    nll = level[:, None, None] * of_examples * effects[..., None] * per_example
    runs = tuple(f"run-{i}" for i in range(n))
    return FewResamples("mlp: sgd", runs, ensembles, {"nll": nll})


def _run_effects(
    rng: np.random.Generator, ensembles: tuple[tuple[str, float], ...], null: Null, n: int
) -> Array:
    """[ensembles, n], of mean 1."""
    common = rng.normal(size=(1, n))
    effects = np.empty((len(ensembles), n))
    drawn: dict[str, Array] = {}
    for place, (method, _) in enumerate(ensembles):
        if method not in drawn or not null.budgets_together:
            skew = null.skew if method in CONTROLS else 0
            drawn[method] = _standardised(rng, skew, n)
        effects[place] = drawn[method]
    return 1 + RUN_SD * (math.sqrt(null.shared) * common + math.sqrt(1 - null.shared) * effects)


def _standardised(rng: np.random.Generator, skew: int, n: int) -> Array:
    """Of mean 0 and variance 1: normal, or with the longer tail of log chi^2_1 on the side of `skew`."""
    if not skew:
        return rng.normal(size=n)
    drawn = np.log(rng.chisquare(1, n)) - special.digamma(0.5) - math.log(2)
    return np.asarray(-skew * drawn / math.sqrt(special.polygamma(1, 0.5)), dtype=np.float64)


def _level(levels: Levels, method: str, budget: float) -> float:
    level = levels.get(method, 1.0)
    return float(level if isinstance(level, float | int) else level.get(budget, 1.0))


# ---- truths


@dataclass(frozen=True)
class Truth:
    """Levels at which a word is counted."""

    word: str
    text: str
    wrong: bool
    levels: Levels
    other: Levels  # levels of a setting in which the word is right, for the verdict over several settings


def _both(retrain: Levels) -> Levels:
    """The levels of C1 and its controls, and the same for C3 and its own."""
    names = {"rescale_retrain": "rescale_curve", "snapshot": "curve", "lr_equivalent": "curve_lr_equivalent"}
    return {**retrain, **{names[method]: level for method, level in retrain.items()}}


WON = _both({"rescale_retrain": 0.7})
FAILED = _both({"rescale_retrain": 1.3})
EDGE = 1 - MARGIN
TRUTHS = (
    Truth(SUPPORTED, "no better than learning rates", True, _both({"snapshot": 1.3}), WON),
    Truth(SUPPORTED, "no better than the schedule", True, _both({"lr_equivalent": 1.3}), WON),
    Truth(
        NOT_SUPPORTED,
        "better than both by the margin at one budget",
        True,
        {"rescale_retrain": {1.0: EDGE, 2.0: 1.3, 3.0: 1.3}, "rescale_curve": 1.3},
        FAILED,
    ),
    Truth(
        EQUIVALENT,
        "better than learning rates by the margin at one budget",
        True,
        _both({"rescale_retrain": {1.0: EDGE}, "snapshot": 0.6}),
        _both({}),
    ),
    Truth(
        EQUIVALENT,
        "worse than learning rates by the margin at one budget",
        True,
        _both({"rescale_retrain": {1.0: 1 + MARGIN}}),
        _both({}),
    ),
    Truth(SUPPORTED, "better than both by the margin", False, _both({"rescale_retrain": EDGE}), WON),
    Truth(NOT_SUPPORTED, "worse than both by 10%", False, _both({"rescale_retrain": 1.1}), FAILED),
    Truth(
        EQUIVALENT,
        "as good as learning rates, 30% better than the schedule",
        False,
        _both({"snapshot": 1.3}),
        {},
    ),
)


def cases() -> Iterator[Case]:
    """Every word at its boundaries and inside them: for one variant, one setting, and several settings."""
    for truth in TRUTHS:
        for null in NULLS if truth.wrong else TOGETHER:
            few = null.skew or null.name == "independent"
            for n in SEEDS if few else SEEDS[1:]:
                yield _case("C, variant", truth, null, n, _of_variant)
        for null in SKEWED if truth.wrong else TOGETHER:
            for n in SEEDS[1:]:
                yield _case("C, setting", truth, null, n, _of_setting)
        for n in SEEDS[1:]:
            yield _case("C, variant, one budget", truth, NULLS[0], n, _of_one_budget)
            yield _case("C, three settings", truth, NULLS[0], n, _of_settings)


Verdict = Callable[[np.random.Generator, Truth, Null, int], str]


def _case(claim: str, truth: Truth, null: Null, n: int, verdict: Verdict) -> Case:
    return Case(
        claim=claim,
        word=truth.word,
        truth=truth.text,
        null=null.name,
        n=n,
        wrong=truth.wrong,
        verdict=lambda rng: verdict(rng, truth, null, n),
    )


def _judged(cell: EnsembleCell) -> Judged:
    return _judge(cell, SETTINGS)


def _of_variant(rng: np.random.Generator, truth: Truth, null: Null, n: int) -> str:
    return _judged(planted(rng, truth.levels, null, n)).by_variant["rescale_retrain"].verdict


def _of_setting(rng: np.random.Generator, truth: Truth, null: Null, n: int) -> str:
    return _judged(planted(rng, truth.levels, null, n)).decision.verdict


def _of_settings(rng: np.random.Generator, truth: Truth, null: Null, n: int) -> str:
    """Over three settings, of which one is in question; where the word is right, all of them."""
    others = [truth.other if truth.wrong else truth.levels] * 2
    cells = [planted(rng, levels, null, n) for levels in (truth.levels, *others)]
    found = {f"setting {i}": _judged(cell).decision.verdict for i, cell in enumerate(cells)}
    return decide_overall(found, []).verdict


def _of_one_budget(rng: np.random.Generator, truth: Truth, null: Null, n: int) -> str:
    return _judged(planted(rng, truth.levels, null, n, BUDGETS[:1])).by_variant["rescale_retrain"].verdict
