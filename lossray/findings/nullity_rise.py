"""How the nullity rises during training, by optimizer, and how much of it is forced; the seed is the unit."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from lossray.findings.claim_rows import ClaimRow
from lossray.findings.energies import BASELINE
from lossray.findings.families import holm
from lossray.findings.means import mean_test
from lossray.findings.sign_flips import sign_flip_test
from lossray.study.settings import ClaimsSettings

CLAIM = "B/nullity"
FORCED = "is forced: dead units, weights between units that are never active together"


def rise_rows(points: pd.DataFrame, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """By model and optimizer the rise from the first checkpoint to the last, and its difference from SGD's.

    Args:
        points: counts of the Hessian at checkpoints, with a gap. Columns run_id, seed, architecture,
            optimizer, step, dim, nullity, structural_nullity.
        settings: the level.
    """
    for architecture, architecture_points in points.groupby("architecture", sort=False):
        ends = _ends(architecture_points)
        for optimizer, runs in ends.groupby("optimizer", sort=False):
            yield from _rises(f"{architecture}: {optimizer}", runs, settings)
        yield from _contrasts(str(architecture), ends, settings)


def _ends(points: pd.DataFrame) -> pd.DataFrame:
    """By run the counts at its first and last checkpoint, and their rise; runs with one alone left out."""
    ordered = points.sort_values("step", kind="stable")
    first = ordered.drop_duplicates("run_id", keep="first").set_index("run_id")
    last = ordered.drop_duplicates("run_id", keep="last").set_index("run_id")
    ends = first.join(last[["step", "nullity", "structural_nullity"]].add_suffix("_last"))
    ends = ends.assign(
        rise=ends["nullity_last"] - ends["nullity"],
        forced=ends["structural_nullity_last"] - ends["structural_nullity"],
    )
    return ends[ends["step_last"] > ends["step"]]


def _rises(subject: str, runs: pd.DataFrame, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """Of the nullity, and of the part of it that is forced where that is known."""
    by_seed = runs.groupby("seed")[["nullity", "nullity_last", "rise", "forced"]].mean()
    mean = by_seed.mean()
    text = (
        f"step {int(runs['step'].min())} to {int(runs['step_last'].max())}: {mean['nullity']:.4g} to "
        f"{mean['nullity_last']:.4g} of {runs['dim'].median():.6g}, mean over seeds"
    )
    share = f"; {mean['forced'] / mean['rise']:.0%} of the rise {FORCED}" if mean["rise"] > 0 else ""
    has_forced = bool(by_seed["forced"].notna().any())
    yield _rise_row(subject, "nullity", by_seed["rise"], text + (share if has_forced else ""), settings)
    if has_forced:
        yield _rise_row(subject, "structural_nullity", by_seed["forced"], f"the part that {FORCED}", settings)


def _rise_row(subject: str, count: str, by_seed: pd.Series, text: str, settings: ClaimsSettings) -> ClaimRow:
    values = by_seed.to_numpy(dtype=np.float64)
    test = mean_test(values, 0.0, alpha=settings.alpha / 2)
    return ClaimRow(
        claim=CLAIM,
        subject=subject,
        statistic=f"rise of {count}, first to last checkpoint",
        estimate=float(test.mean),
        low=float(test.low),
        high=float(test.high),
        p_value=float(sign_flip_test(values)),
        n=int(test.n),
        text=text,
    )


def _contrasts(architecture: str, ends: pd.DataFrame, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """Each optimizer's rise minus SGD's of the same seed."""
    rises = ends.pivot_table("rise", "optimizer", "seed", aggfunc="mean")
    others = [name for name in rises.index if name != BASELINE]
    if BASELINE not in rises.index or not others:
        return
    differences = rises.loc[others].to_numpy(dtype=np.float64) - rises.loc[BASELINE].to_numpy(
        dtype=np.float64
    )
    p_values = sign_flip_test(differences)
    adjusted = holm(p_values)
    test = mean_test(differences, 0.0, alpha=settings.alpha / 2)
    for i, name in enumerate(others):
        if not test.n[i]:
            continue
        direction = "rises more than" if test.mean[i] > 0 else "rises less than"
        verdict = (
            f"{direction} {BASELINE}'s" if adjusted[i] <= settings.alpha else "no significant difference"
        )
        yield ClaimRow(
            claim=CLAIM,
            subject=f"{architecture}: {name} - {BASELINE}",
            statistic="difference of the rise of nullity",
            estimate=float(test.mean[i]),
            low=float(test.low[i]),
            high=float(test.high[i]),
            p_value=float(p_values[i]),
            p_adjusted=float(adjusted[i]),
            n=int(test.n[i]),
            verdict=verdict,
            text=f"paired by seed; sign flips, Holm over {len(others)}",
        )
