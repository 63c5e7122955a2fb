"""Beside the verdict of claim A: slope on dimension, attribution of the contrast."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lossray.findings.claim_rows import ClaimRow
from lossray.findings.energies import BASELINE, TOP, Cell
from lossray.findings.matching import BEST, MATCHED
from lossray.findings.means import mean_test
from lossray.findings.sign_flips import sign_flip_test
from lossray.findings.skewness import safe_mean_test
from lossray.study.settings import ClaimsSettings

Array = NDArray[np.float64]

LEAST_SIZES = 3  # for a slope
SLOPE_MARGIN = 0.1  # a slope this near to one is that one: 26% of the energy for each tenfold d


def slope_rows(runs: pd.DataFrame, rows: pd.DataFrame, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """The slope of S on ln d over models that differ in size alone: 0 is a constant angle, -1 is chance.

    Either is claimed only where the slope is shown to lie within SLOPE_MARGIN of it.

    One regression for each seed with at least three sizes; the seeds are the units. Matched loss, best
    learning rates, raw gauge, v1.
    """
    families = dict(zip(runs["architecture"], runs["family"], strict=True))
    names = dict(zip(runs["family"], runs["model"], strict=True))
    chosen = rows[
        (rows["rule"] == BEST)
        & (rows["moment"] == MATCHED)
        & (rows["gauge"] == "raw")
        & (rows["subspace"] == TOP)
        & rows["usable"]
        & rows["direction"].isin(["update", "minibatch_gradient"])
    ]
    chosen = chosen.assign(family=chosen["architecture"].map(families))
    labels = _family_labels(chosen, names)
    keys = ["family", "direction", "optimizer"]
    for (family, direction, optimizer), group in chosen.groupby(keys, sort=False):
        log_dim = np.log(group["dim"].to_numpy(dtype=np.float64))
        with_log_dim = group.assign(log_dim=log_dim)
        slopes = [
            np.polyfit(one["log_dim"], one["log_energy"], 1)[0]
            for _, one in with_log_dim.groupby("seed")
            if one["log_dim"].nunique() >= LEAST_SIZES
        ]
        if len(slopes) < 2:
            continue
        sizes = f"d = {int(group['dim'].min())} to {int(group['dim'].max())}"
        yield from _slope_tests(
            f"{labels[str(family)]}: {optimizer}, {direction}, raw", np.array(slopes), sizes, settings
        )


def _family_labels(chosen: pd.DataFrame, names: dict[str, str]) -> dict[str, str]:
    """The model's name; numbered where several families of one model were trained."""
    labels: dict[str, str] = {}
    for family in chosen["family"].unique():
        namesakes = [other for other in labels if names[other] == names[family]]
        number = f" family {len(namesakes) + 1}" if namesakes else ""
        labels[family] = f"{names[family]}{number}"
    return labels


def _slope_tests(subject: str, slopes: Array, sizes: str, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    (flat, not_flat), (chance, not_chance) = _near(slopes, 0.0), _near(slopes, -1.0)
    verdict = "not decided"
    if flat <= settings.alpha:
        verdict = "a constant angle"
    elif chance <= settings.alpha:
        verdict = "chance"
    elif max(not_flat, not_chance) <= settings.alpha:
        verdict = "neither constant nor chance"
    shown = mean_test(slopes, 0.0, alpha=settings.alpha / 2)
    for statistic, near, far in (
        ("slope of S on ln d, against 0", flat, not_flat),
        ("slope of S on ln d, against -1", chance, not_chance),
    ):
        yield ClaimRow(
            claim="A/slope",
            subject=subject,
            statistic=statistic,
            estimate=float(shown.mean),
            low=float(shown.low),
            high=float(shown.high),
            p_value=near,
            n=int(shown.n),
            verdict=verdict,
            text=f"{sizes}; 0 is a constant angle, -1 is chance, within {SLOPE_MARGIN:g} of it; p value of "
            f"lying within (two one-sided tests); of lying outside {far:.2g}",
        )


def _near(slopes: Array, target: float) -> tuple[float, float]:
    """P values of "the mean is not within SLOPE_MARGIN of the target" and, two-sided, of "it is"."""
    above_low, below_low = _one_sided(slopes, target - SLOPE_MARGIN)
    above_high, below_high = _one_sided(slopes, target + SLOPE_MARGIN)
    return max(above_low, below_high), min(1.0, 2 * min(below_low, above_high))


def _one_sided(slopes: Array, bound: float) -> tuple[float, float]:
    """P values of "the mean is not above the bound" and of "it is not below"."""
    p_less, p_greater = safe_mean_test(slopes, bound, skewed="either")
    return float(p_greater), float(p_less)


def attribution_rows(cells: Sequence[Cell], settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """The 2 x 2 of {SGD's trajectory, the method's} x {raw gradient, the method's update}, by seed.

    On SGD's trajectory the method's update is its shadow's. A column effect is the preconditioning (with the
    momentum); a row effect says that the method visits other places.
    """
    raw = {(cell.architecture, cell.direction): cell.gauges["raw"] for cell in cells if "raw" in cell.gauges}
    for (architecture, direction), shadow in raw.items():
        if not direction.startswith("shadow:"):
            continue
        method = direction.removeprefix("shadow:")
        gradient, update = raw.get((architecture, "minibatch_gradient")), raw.get((architecture, "update"))
        if gradient is None or update is None or method == BASELINE:
            continue
        by_seed = {
            "sgd_gradient": pd.Series(gradient.of(BASELINE), index=gradient.seeds),
            "sgd_update": pd.Series(shadow.of(BASELINE), index=shadow.seeds),
            "own_gradient": pd.Series(gradient.of(method), index=gradient.seeds),
            "own_update": pd.Series(update.of(method), index=update.seeds),
        }
        square = pd.DataFrame(by_seed).dropna()
        if len(square) >= 2:
            yield from _attribution_tests(f"{architecture}: {method}", square, settings)


def _attribution_tests(subject: str, square: pd.DataFrame, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    on_sgd = (square["sgd_update"] - square["sgd_gradient"]).to_numpy(dtype=np.float64)
    on_own = (square["own_update"] - square["own_gradient"]).to_numpy(dtype=np.float64)
    elsewhere = (square["own_gradient"] - square["sgd_gradient"]).to_numpy(dtype=np.float64)
    effects = {
        "column effect: update instead of gradient": (on_sgd + on_own) / 2,
        "row effect: own trajectory instead of SGD's": elsewhere + (on_own - on_sgd) / 2,
        "interaction": on_own - on_sgd,
    }
    means = ", ".join(f"{str(name).replace('_', ' ')} {value:.2f}" for name, value in square.mean().items())
    for statistic, values in effects.items():
        test = mean_test(values, 0.0, alpha=settings.alpha / 2)
        p = float(sign_flip_test(values))
        yield ClaimRow(
            claim="A/attribution",
            subject=subject,
            statistic=statistic,
            estimate=float(test.mean),
            low=float(test.low),
            high=float(test.high),
            p_value=p,
            n=len(values),
            verdict="significant" if p <= settings.alpha else "not significant",
            text=f"mean S: {means}",
        )
