"""Does SGD's S scatter more along training than every adaptive method's: "SGD follows no such rule"?

The rule that is claimed is one angle, all along. So the verdict rests on the standard deviation of a run's S
over its checkpoints, a trend included: an angle that opens or closes is not the same. Beside it, for display,
stands how far a run departs from the course that the other seeds of its method take, whatever its form: a
course that all seeds take is a rule as well, if another one. (A straight line in ln(step) would not do as the
trend: where S falls, rises and falls again in every seed, what it leaves over is the bend.)
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from lossray.findings.claim_rows import ClaimRow
from lossray.findings.energies import BASELINE, TOP
from lossray.findings.families import hommel
from lossray.findings.matching import BEST, LAST
from lossray.findings.means import mean_test
from lossray.findings.verdict_a import NOT_SUPPORTED, SUPPORTED, UNDECIDED
from lossray.study.settings import ClaimsSettings

Array = NDArray[np.float64]

FACTOR = 1.25  # SGD's spread must exceed a method's by more, to be "less regular"
MEASURE = f"SD of S over checkpoints as a multiple of {BASELINE}'s, more regular if below {1 / FACTOR:g}"
LEAST_CHECKPOINTS = 3  # at which both runs of a pair have S
ROUNDING = 1e-12  # relative: a smaller spread of S is none, and has no logarithm
POWER = 0.8
MOST_SEEDS = 1000  # no plan goes beyond


@dataclass(frozen=True)
class Spreads:
    """Of one architecture: ln SD of S minus SGD's of the same seed, over the checkpoints of both; [m, n].

    NaN where a run is missing, or has too few checkpoints with a resolved v1.

    Attributes:
        architecture: its label.
        methods: the m adaptive methods.
        trained: seeds of each method, [m] int64, diverged ones included.
        about_mean: with the SD about the run's own mean, [m, n].
        about_course: with the SD about the course of the other seeds, [m, n].
    """

    architecture: str
    methods: tuple[str, ...]
    trained: NDArray[np.int64]
    about_mean: Array
    about_course: Array

    @property
    def pairs(self) -> NDArray[np.int64]:
        """Seeds of each method that can be compared, [m]."""
        counts: NDArray[np.int64] = np.isfinite(self.about_mean).sum(axis=-1)
        return counts

    @property
    def mostly_lost(self) -> NDArray[np.bool_]:
        """Methods that have lost more than half of their seeds: what is left may be a selection."""
        lost: NDArray[np.bool_] = 2 * self.pairs < self.trained
        return lost

    def tests(self) -> tuple[Array, Array]:
        """P values [m] of "not below SGD's by more than FACTOR" and of "below it by more".

        Student's: however S scatters, the difference of the logarithms of two SDs is nearly symmetric.
        """
        test = mean_test(self.about_mean, -math.log(FACTOR), alpha=0.05)  # of its bounds, which are not used
        lost = self.mostly_lost
        return np.where(lost, 1.0, test.p_less), np.where(lost, 1.0, test.p_greater)


def dispersion_rows(
    runs: pd.DataFrame, points: pd.DataFrame, alignment: pd.DataFrame, settings: ClaimsSettings
) -> Iterator[ClaimRow]:
    """The verdict over all architectures, then those of each, then the methods'.

    Of the update, raw, v1, at the best learning rates and all checkpoints after step 0.

    Args:
        runs: of `matching.described_runs`.
        points: of `matching.matched_points`, for the runs with the best learning rate.
        alignment: the table.
        settings: the level.
    """
    chosen = points[(points["rule"] == BEST) & (points["moment"] == LAST)].drop(columns="step")
    resolved_rows = alignment[
        (alignment["direction"] == "update")
        & (alignment["gauge"] == "raw")
        & (alignment["subspace"] == TOP)
        & (alignment["resolved"] == True)  # noqa: E712 - null is not resolved
        & (alignment["step"] > 0)
        & np.isfinite(alignment["log_energy"])
    ]
    energies = resolved_rows.merge(chosen[["run_id", "architecture", "optimizer", "seed"]], on="run_id")
    judged, left_out = [], {}
    for architecture in dict.fromkeys(runs["architecture"]):
        trained = runs[runs["architecture"] == architecture]
        there = energies[energies["architecture"] == architecture]
        reason = _why_not(trained, there)
        if reason is None:
            judged.append(_spreads(str(architecture), trained, there))
        else:
            left_out[str(architecture)] = reason
    yield _overall_row(judged, left_out, settings)
    for spreads in judged:
        yield _architecture_row(spreads, settings)
    for spreads in judged:
        yield from _method_rows(spreads, settings)


# ---- the spreads


def _why_not(trained: pd.DataFrame, energies: pd.DataFrame) -> str | None:
    """Why an architecture cannot be judged; None if it can."""
    if not trained["adaptive"].any():
        return "no adaptive method"
    if BASELINE not in set(energies["optimizer"]):
        return f"no resolved S of {BASELINE}"
    if energies.groupby("run_id").size().max() < LEAST_CHECKPOINTS:
        return f"fewer than {LEAST_CHECKPOINTS} checkpoints after step 0"
    return None


def _spreads(architecture: str, trained: pd.DataFrame, energies: pd.DataFrame) -> Spreads:
    counts = trained[trained["adaptive"]].groupby("optimizer")["seed"].nunique().astype("int64")
    methods = tuple(map(str, counts.index))
    seeds, steps = (sorted(energies[name].unique()) for name in ("seed", "step"))
    wide = energies.pivot_table("log_energy", ["optimizer", "seed"], "step", aggfunc="first")
    every = pd.MultiIndex.from_product([(*methods, BASELINE), seeds])
    s = wide.reindex(index=every, columns=steps).to_numpy(dtype=np.float64)
    log_energies = s.reshape(len(methods) + 1, len(seeds), len(steps))
    apart = _from_the_course(log_energies)
    return Spreads(
        architecture,
        methods,
        np.asarray(counts, dtype=np.int64),
        log_spreads(log_energies[:-1], log_energies[-1]),
        log_spreads(apart[:-1], apart[-1]),
    )


def _from_the_course(energies: Array) -> Array:
    """S minus the mean S of the other seeds at the same checkpoint, [optimizers, seeds, checkpoints]."""
    there = np.isfinite(energies)
    total = np.where(there, energies, 0.0).sum(axis=1, keepdims=True)
    others = there.sum(axis=1, keepdims=True) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        apart: Array = energies - (total - energies) / others
    return apart


def log_spreads(energies: Array, baseline: Array) -> Array:
    """Ln of the SD over checkpoints minus that of the baseline over the same ones, [..., seeds].

    NaN where fewer than LEAST_CHECKPOINTS are common, or S does not scatter.

    Args:
        energies: S, [..., seeds, checkpoints]; NaN where it is not known.
        baseline: of SGD, [seeds, checkpoints].
    """
    both = np.isfinite(energies) & np.isfinite(baseline)
    enough = both.sum(axis=-1) >= LEAST_CHECKPOINTS
    variance, baseline_variance = (
        _mean_square(np.broadcast_to(s, both.shape), both) for s in (energies, baseline)
    )
    difference: Array = 0.5 * (np.log(variance) - np.log(baseline_variance))
    return np.where(enough, difference, np.nan)


def _mean_square(s: Array, both: NDArray[np.bool_]) -> Array:
    """About the mean of the entries that count; NaN where these are equal but for rounding."""
    n = np.maximum(both.sum(axis=-1, keepdims=True), 1)
    mean = np.where(both, s, 0.0).sum(axis=-1, keepdims=True) / n
    square = np.where(both, np.square(s - mean), 0.0).sum(axis=-1) / n[..., 0]
    size = np.where(both, np.abs(s), 0.0).max(axis=-1)
    return np.where(square > np.square(ROUNDING * size), square, np.nan)


# ---- verdicts


def _overall_row(judged: Sequence[Spreads], left_out: dict[str, str], settings: ClaimsSettings) -> ClaimRow:
    texts = [
        f"{spreads.architecture}: by itself {word_of([spreads], settings.alpha)} "
        f"({_multiples(spreads)}{_lost(spreads)})"
        for spreads in judged
    ]
    texts += [f"{name}: not judged ({reason})" for name, reason in left_out.items()]
    return ClaimRow(
        claim="A",
        subject="dispersion",
        statistic="verdict",
        n=len(judged),
        verdict=word_of(judged, settings.alpha),
        text=f"{MEASURE}: {'; '.join(texts) or 'there are no runs'}",
    )


def word_of(judged: Sequence[Spreads], alpha: float) -> str:
    """SUPPORTED if every method of every architecture is more regular, NOT SUPPORTED if some is not.

    The first is an intersection-union test; the second adjusts p values over methods and architectures.
    """
    if not judged:
        return UNDECIDED
    p_less, p_greater = (
        np.concatenate(p) for p in zip(*(spreads.tests() for spreads in judged), strict=True)
    )
    if p_less.max() <= alpha:
        return SUPPORTED
    return NOT_SUPPORTED if hommel(p_greater).min() <= alpha else UNDECIDED


def _architecture_row(spreads: Spreads, settings: ClaimsSettings) -> ClaimRow:
    verdict = word_of([spreads], settings.alpha)
    needed = f"; {_seeds_needed(spreads, settings.alpha)}" if verdict == UNDECIDED else ""
    return ClaimRow(
        claim="A/dispersion",
        subject=spreads.architecture,
        statistic="verdict",
        n=int(spreads.pairs.min()),
        verdict=verdict,
        text=f"{MEASURE}: {_multiples(spreads)}{_lost(spreads)}{needed}",
    )


def _multiples(spreads: Spreads) -> str:
    """Geometric means over seeds."""
    means = [
        differences[np.isfinite(differences)].mean() if np.isfinite(differences).any() else np.nan
        for differences in spreads.about_mean
    ]
    return ", ".join(
        f"{name} {math.exp(mean):.2g}"
        for name, mean in zip(spreads.methods, means, strict=True)
        if np.isfinite(mean)
    )


def _lost(spreads: Spreads) -> str:
    """Methods that have lost runs, or their S, and how many; most of them: then nothing is decided."""
    named = [
        f"{name} {trained - pairs} of {trained}{' (too many)' if most else ''}"
        for name, trained, pairs, most in zip(
            spreads.methods, spreads.trained, spreads.pairs, spreads.mostly_lost, strict=True
        )
        if pairs < trained
    ]
    return f"; seeds lost: {', '.join(named)}" if named else ""


def _seeds_needed(spreads: Spreads, alpha: float) -> str:
    """With which the claim would probably be settled, one way or the other, if the estimates are right."""
    distance = mean_test(spreads.about_mean, 0.0, alpha=alpha).mean + math.log(FACTOR)
    every = [
        _enough(differences, -gap, alpha)
        for differences, gap in zip(spreads.about_mean, distance, strict=True)
    ]
    level = alpha / len(spreads.methods)
    some = [
        _enough(differences, gap, level)
        for differences, gap in zip(spreads.about_mean, distance, strict=True)
    ]
    seeds = max(min(max(every), min(some)), float(spreads.pairs.max() + 1))
    if not math.isfinite(seeds):
        return f"more than {MOST_SEEDS} seeds, or other runs, would be needed"
    return f"about {seeds:.0f} seeds would decide it with probability {POWER:.0%} if the estimates are right"


def _enough(differences: Array, distance: float, alpha: float) -> float:
    """Seeds with which a one-sided t test finds such a distance with POWER; infinite if none would."""
    finite = differences[np.isfinite(differences)]
    if len(finite) < 2 or distance <= 0:
        return math.inf
    seeds = np.arange(2, MOST_SEEDS + 1)
    reach = (stats.t.ppf(1 - alpha, seeds - 1) + stats.norm.ppf(POWER)) * finite.std(ddof=1) / np.sqrt(seeds)
    enough = seeds[reach < distance]
    return float(enough[0]) if len(enough) else math.inf


# ---- the methods


def _method_rows(spreads: Spreads, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """Each method against SGD: over checkpoints, with its word, and about the course of the other seeds."""
    p_less, p_greater = spreads.tests()
    refuted = hommel(p_greater)
    for i, name in enumerate(spreads.methods):
        if not spreads.pairs[i]:
            continue
        subject = f"{spreads.architecture}: {name} - {BASELINE}, update, raw"
        word = f"not more regular than {BASELINE}" if refuted[i] <= settings.alpha else "not decided"
        yield replace(
            _difference_row(subject, "over checkpoints", spreads.about_mean[i], settings),
            p_value=float(p_less[i]),
            verdict=f"more regular than {BASELINE}" if p_less[i] <= settings.alpha else word,
            text=f"p value of being below {BASELINE}'s by more than a factor {FACTOR:g}; of not being so, "
            f"adjusted over {len(refuted)} methods: {refuted[i]:.2g}",
        )
        yield _difference_row(
            subject, "about the course of the other seeds", spreads.about_course[i], settings
        )


def _difference_row(subject: str, where: str, differences: Array, settings: ClaimsSettings) -> ClaimRow:
    test = mean_test(differences, 0.0, alpha=settings.alpha / 2)
    return ClaimRow(
        claim="A/dispersion",
        subject=subject,
        statistic=f"difference of ln SD of S {where}",
        estimate=float(test.mean),
        low=float(test.low),
        high=float(test.high),
        n=int(test.n),
        text="for display: what is left where a course that all seeds take counts as a rule",
    )
