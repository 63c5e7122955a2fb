"""Beside the verdict of claim A: dispersion, slope on dimension, attribution of the contrast."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lossray.findings.claim_rows import ClaimRow
from lossray.findings.energies import BASELINE, TOP, Cell
from lossray.findings.families import holm
from lossray.findings.matching import BEST, MATCHED
from lossray.findings.means import mean_test, two_sided
from lossray.findings.sign_flips import sign_flip_test
from lossray.study.settings import ClaimsSettings

Array = NDArray[np.float64]

LEAST_CHECKPOINTS = 3  # for the spread of a run's S
LEAST_SIZES = 3  # for a slope


def dispersion_rows(
    points: pd.DataFrame, alignment: pd.DataFrame, settings: ClaimsSettings
) -> Iterator[ClaimRow]:
    """Ln SD of a run's S over its checkpoints, against SGD's of the same seed: "SGD follows no such rule".

    Of the update, raw, v1, at the best learning rates.
    """
    chosen = points[(points["rule"] == BEST) & (points["moment"] == MATCHED)].drop(columns="step")
    own = alignment[
        (alignment["direction"] == "update")
        & (alignment["gauge"] == "raw")
        & (alignment["subspace"] == TOP)
        & (alignment["resolved"] == True)  # noqa: E712 - null is not resolved
        & (alignment["step"] > 0)
    ]
    rows = own.merge(chosen, on="run_id")
    spread = rows.groupby(["architecture", "optimizer", "seed"])["log_energy"].agg(["std", "count"])
    spread = spread[(spread["count"] >= LEAST_CHECKPOINTS) & (spread["std"] > 0)]
    spread = spread.assign(log_sd=np.log(spread["std"].to_numpy(dtype=np.float64))).reset_index()
    for architecture, group in spread.groupby("architecture", sort=False):
        wide = group.pivot_table("log_sd", "optimizer", "seed", aggfunc="first")
        others = [name for name in wide.index if name in set(chosen["optimizer"][chosen["adaptive"]])]
        if BASELINE not in wide.index or not others:
            continue
        differences = wide.loc[others].to_numpy(float) - wide.loc[BASELINE].to_numpy(float)
        p_values = sign_flip_test(differences)
        adjusted = holm(p_values)
        test = mean_test(differences, 0.0, alpha=settings.alpha / 2)
        for i, name in enumerate(others):
            if not test.n[i]:
                continue
            significant = adjusted[i] <= settings.alpha
            verdict = "more regular than sgd" if test.mean[i] < 0 else "less regular than sgd"
            yield ClaimRow(
                claim="A/dispersion",
                subject=f"{architecture}: {name} - {BASELINE}, update, raw",
                statistic="difference of ln SD of S over checkpoints",
                estimate=float(test.mean[i]),
                low=float(test.low[i]),
                high=float(test.high[i]),
                p_value=float(p_values[i]),
                p_adjusted=float(adjusted[i]),
                n=int(test.n[i]),
                verdict=verdict if significant else "no significant difference",
                text=f"the spread of S along training is {math.exp(float(test.mean[i])):.2g} times that of "
                f"{BASELINE}; sign flips, Holm over {len(others)}",
            )


def slope_rows(runs: pd.DataFrame, rows: pd.DataFrame, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """The slope of S on ln d over models that differ in size alone: 0 is a constant angle, -1 is chance.

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
        own = group.assign(log_dim=log_dim)
        slopes = [
            np.polyfit(one["log_dim"], one["log_energy"], 1)[0]
            for _, one in own.groupby("seed")
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
        namesakes = [own for own in labels if names[own] == names[family]]
        number = f" family {len(namesakes) + 1}" if namesakes else ""
        labels[family] = f"{names[family]}{number}"
    return labels


def _slope_tests(subject: str, slopes: Array, sizes: str, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    alpha = settings.alpha
    flat = mean_test(slopes, 0.0, alpha=alpha / 2)
    chance = mean_test(slopes, -1.0, alpha=alpha / 2)
    p_flat, p_chance = float(two_sided(flat)), float(two_sided(chance))
    verdict = {
        (True, True): "neither constant nor chance",
        (False, True): "a constant angle",
        (True, False): "chance",
        (False, False): "not decided",
    }[p_flat <= alpha, p_chance <= alpha]
    for statistic, p in (
        ("slope of S on ln d, against 0", p_flat),
        ("slope of S on ln d, against -1", p_chance),
    ):
        yield ClaimRow(
            claim="A/slope",
            subject=subject,
            statistic=statistic,
            estimate=float(flat.mean),
            low=float(flat.low),
            high=float(flat.high),
            p_value=p,
            n=int(flat.n),
            verdict=verdict,
            text=f"{sizes}; 0 is a constant angle, -1 is chance",
        )


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
