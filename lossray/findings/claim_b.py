"""Claim B, degeneracy: exactly singular, singular beyond symmetry, effectively low rank (SCIENCE 5B)."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lossray.findings.claim_rows import ClaimRow
from lossray.findings.families import proportion_interval
from lossray.findings.matching import described_runs, frame_of
from lossray.findings.means import mean_test
from lossray.findings.verdict_a import NOT_SUPPORTED, SUPPORTED, UNDECIDED
from lossray.study.settings import ClaimsSettings

MOST = 0.5  # a statement on "the Hessian" must hold for more than this share of runs
LOW_RANK = 0.1  # the largest share of eigenvalues above tau |lambda|max that is called low rank
DECISIVE_TAU = 1e-2  # the finest threshold that quadratures resolve
SHOWN_TAUS = (1e-2, 1e-3)
EXACT, BEYOND, LOW = "exactly singular", "singular beyond symmetry", "effectively low rank"

COLUMNS = (
    "run_id",
    "step",
    "operator",
    "point",
    "method",
    "tau",
    "at_noise_floor",
    "nullity",
    "quadrature_bias",
    "excess",
    "rank",
    "dim",
)


@dataclass(frozen=True)
class Count:
    """Of `n` runs, those for which a statement holds, and those for which no gap lets us tell."""

    yes: int
    unknown: int
    n: int

    def interval(self, alpha: float) -> tuple[float, float]:
        """Exact binomial interval of the share, whatever the unknown runs would turn out to be."""
        low, _ = proportion_interval(self.yes, self.n, alpha=alpha)
        _, high = proportion_interval(self.yes + self.unknown, self.n, alpha=alpha)
        return low, high

    def verdict(self, alpha: float) -> str:
        """SUPPORTED where the share is above MOST, NOT SUPPORTED where it is below."""
        low, high = self.interval(alpha)
        if low > MOST:
            return SUPPORTED
        return NOT_SUPPORTED if high < MOST else UNDECIDED


def claim_b_rows(tables: Mapping[str, pd.DataFrame], settings: ClaimsSettings) -> list[ClaimRow]:
    """The rows of the three statements of claim B, the verdicts first."""
    runs = described_runs(tables)
    finished = runs.loc[runs["status"] == "finished", ["run_id", "architecture", "optimizer", "loss"]]
    degeneracy = frame_of(tables, "degeneracy", COLUMNS).merge(finished, on="run_id")
    degeneracy = degeneracy[np.isfinite(degeneracy["nullity"])]
    floor = degeneracy[
        (degeneracy["at_noise_floor"] == True)  # noqa: E712 - null is false
        & (degeneracy["operator"] == "hessian")
        & (degeneracy["method"] == "dense")
    ]
    floor = floor.assign(gap=floor["rank"].notna())
    coarse = degeneracy[degeneracy["method"] != "dense"]
    return [
        *_singular_rows(EXACT, floor, "nullity", settings, coarse),
        *_singular_rows(BEYOND, floor, "excess", settings, coarse),
        *_low_rank_rows(degeneracy, settings),
    ]


# ---- singular, and beyond symmetry


def _singular_rows(
    statement: str, floor: pd.DataFrame, column: str, settings: ClaimsSettings, coarse: pd.DataFrame
) -> Iterator[ClaimRow]:
    """The verdict over runs after step 0, then first and last checkpoints by model and optimizer."""
    # Where nothing is null no gap is needed; a positive count without a gap may be rounding.
    known = floor[column].notna() & (floor["gap"] | (floor[column] <= 0))
    marked = floor.assign(yes=known & (floor[column] > 0), unknown=~known)
    checkpoints = marked[marked["point"] == "checkpoint"]
    trained = checkpoints[checkpoints["step"] > 0]
    yield _singular_verdict(statement, trained, column, settings, coarse)
    polished = marked[marked["point"] == "polished"]
    if len(polished):
        yield _share_row(f"B/{statement}", "polished to a critical point", polished, column, settings)
    if len(trained):
        yield ClaimRow(
            claim=f"B/{statement}",
            subject="all checkpoints after step 0",
            statistic=f"share of points with {column} > 0",
            estimate=float(trained["yes"].mean()),
            n=int(trained["run_id"].nunique()),
            text=f"{int(trained['yes'].sum())} of {len(trained)} points, "
            f"{int(trained['unknown'].sum())} without a gap",
        )
    for (architecture, optimizer), own in checkpoints.groupby(["architecture", "optimizer"], sort=False):
        ordered = own.sort_values("step", kind="stable")
        for moment, chosen in (
            ("first", ordered.drop_duplicates("run_id", keep="first")),
            ("last", ordered.drop_duplicates("run_id", keep="last")),
        ):
            subject = f"{architecture}: {optimizer}, {moment} checkpoint"
            yield _share_row(f"B/{statement}", subject, chosen, column, settings)


def _count(rows: pd.DataFrame) -> Count:
    """By run: yes where all of its rows are, unknown where some are and none is a no."""
    by_run = rows.groupby("run_id").agg(yes=("yes", "all"), no=("no", "any"))
    return Count(
        yes=int(by_run["yes"].sum()),
        unknown=int((~by_run["yes"] & ~by_run["no"]).sum()),
        n=len(by_run),
    )


def _with_no(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(no=~rows["yes"] & ~rows["unknown"])


def _singular_verdict(
    statement: str, trained: pd.DataFrame, column: str, settings: ClaimsSettings, coarse: pd.DataFrame
) -> ClaimRow:
    count = _count(_with_no(trained))
    if count.n == 0:
        text = "no dense spectrum after step 0" + _why_none(coarse)
        return ClaimRow("B", statement, "verdict", n=0, verdict=UNDECIDED, text=text)
    low, high = count.interval(settings.alpha)
    values = trained[column].dropna()
    text = (
        f"{count.yes} of {count.n} runs have {column} > 0 with a gap at the noise floor at every checkpoint "
        f"after step 0 ({count.unknown} cannot be told); median {column} {values.median():.4g} of "
        f"{trained['dim'].median():.6g} eigenvalues"
    )
    return ClaimRow(
        claim="B",
        subject=statement,
        statistic="verdict",
        estimate=count.yes / count.n,
        low=low,
        high=high,
        n=count.n,
        verdict=count.verdict(settings.alpha),
        text=text + (_forced(trained) if statement == EXACT else ""),
    )


def _why_none(coarse: pd.DataFrame) -> str:
    """What would give one: the section, or a limit above d."""
    if coarse.empty:
        return " ([degeneracy] of the study switches them on)"
    sizes = sorted({int(dim) for dim in coarse["dim"].dropna()})
    return f": d = {', '.join(map(str, sizes))} is above degeneracy.dense_up_to"


def _forced(trained: pd.DataFrame) -> str:
    """Under cross entropy a null space says nothing (SCIENCE 2.2)."""
    share = (trained["loss"] == "cross_entropy").mean()
    if share == 0:
        return ""
    where = "" if share == 1 else f" (the loss of {share:.0%} of these points)"
    return f". This is forced under cross entropy{where}: softmax does not see a shift of all outputs"


def _share_row(
    claim: str, subject: str, rows: pd.DataFrame, column: str, settings: ClaimsSettings
) -> ClaimRow:
    count = _count(_with_no(rows))
    low, high = count.interval(settings.alpha)
    steps = sorted({int(step) for step in rows["step"]})
    return ClaimRow(
        claim=claim,
        subject=subject,
        statistic=f"share of runs with {column} > 0",
        estimate=count.yes / count.n,
        low=low,
        high=high,
        n=count.n,
        text=f"{count.yes} of {count.n} runs, {count.unknown} without a gap; median {column} "
        f"{rows[column].median():.4g}; step {', '.join(map(str, steps))}",
    )


# ---- low rank


def _low_rank_rows(degeneracy: pd.DataFrame, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """The share of eigenvalues above tau |lambda|max at the last checkpoint: verdict, then by model."""
    own = degeneracy[
        (degeneracy["point"] == "checkpoint")
        & degeneracy["operator"].isin(["hessian", "adaptive"])
        & degeneracy["method"].isin(["dense", "quadrature"])
        & (degeneracy["step"] > 0)
        & (degeneracy["dim"] > 0)
    ]
    own = own.assign(share=1 - own["nullity"] / own["dim"])
    # Of each run the last checkpoint, and all eigenvalues ("dense" sorts first) rather than a quadrature.
    own = own.sort_values(["step", "method"], ascending=[False, True], kind="stable")
    parts = []
    for tau in SHOWN_TAUS:
        at_tau = own[np.isclose(own["tau"], tau, rtol=1e-6, atol=0.0)]
        parts.append(at_tau.assign(level=tau).drop_duplicates(["run_id", "operator"]))
    shares = pd.concat(parts, ignore_index=True)
    yield _low_rank_verdict(shares, settings)
    for tau in SHOWN_TAUS:
        at_tau = shares[shares["level"] == tau]
        for labels, group in at_tau.groupby(["architecture", "operator"], sort=False):
            yield _low_rank_row(": ".join(map(str, labels)), tau, group, settings)
        for operator, group in at_tau.groupby("operator", sort=False):
            bias = (group["quadrature_bias"] / group["dim"]).dropna()
            if len(bias):
                yield _bias_row(f"quadrature: {operator}", tau, bias, settings)


def _low_rank_verdict(shares: pd.DataFrame, settings: ClaimsSettings) -> ClaimRow:
    """Low rank in both metrics for every model: SUPPORTED; not so in one of them: NOT SUPPORTED."""
    decisive = shares[shares["level"] == DECISIVE_TAU]
    statements, verdicts = [], []
    for (architecture, operator), group in decisive.groupby(["architecture", "operator"], sort=False):
        test = mean_test(group["share"].to_numpy(dtype=np.float64), LOW_RANK, alpha=settings.alpha)
        verdicts.append(_low_rank_word(float(test.p_less), float(test.p_greater), settings.alpha))
        statements.append(f"{architecture}, {operator}: {float(test.mean):.2%}")
    lacking = [name for name in ("hessian", "adaptive") if name not in set(decisive["operator"])]
    if NOT_SUPPORTED in verdicts:
        verdict = NOT_SUPPORTED
    else:
        verdict = SUPPORTED if set(verdicts) == {SUPPORTED} and not lacking else UNDECIDED
    missing = f"; no counts of the operator {', '.join(lacking)}" if lacking else ""
    n = int(decisive["run_id"].nunique())
    few = "; at least two runs are needed" if n < 2 else ""
    text = (
        f"share of eigenvalues above {DECISIVE_TAU:g} |lambda|max, low below {LOW_RANK:.0%}: "
        f"{'; '.join(statements) or 'none counted'}{missing}{few}"
    )
    overall = float(decisive["share"].mean()) if n else math.nan
    return ClaimRow("B", LOW, "verdict", estimate=overall, n=n, verdict=verdict, text=text)


def _low_rank_word(p_less: float, p_greater: float, alpha: float) -> str:
    if p_less <= alpha:
        return SUPPORTED
    return NOT_SUPPORTED if p_greater <= alpha else UNDECIDED


def _low_rank_row(subject: str, tau: float, group: pd.DataFrame, settings: ClaimsSettings) -> ClaimRow:
    test = mean_test(group["share"].to_numpy(dtype=np.float64), LOW_RANK, alpha=settings.alpha)
    methods = ", ".join(sorted(set(group["method"])))
    return ClaimRow(
        claim=f"B/{LOW}",
        subject=subject,
        statistic=f"share of |lambda| > {tau:g} |lambda|max",
        estimate=float(test.mean),
        low=float(test.low),
        high=float(test.high),
        p_value=float(test.p_less),
        n=int(test.n),
        verdict=_low_rank_word(float(test.p_less), float(test.p_greater), settings.alpha),
        text=f"last checkpoint, {methods}; d = {int(group['dim'].median())}; p value of being below "
        f"{LOW_RANK:g}; low and high are one-sided bounds",
    )


def _bias_row(subject: str, tau: float, bias: pd.Series, settings: ClaimsSettings) -> ClaimRow:
    test = mean_test(bias.to_numpy(dtype=np.float64), 0.0, alpha=settings.alpha / 2)
    return ClaimRow(
        claim=f"B/{LOW}",
        subject=subject,
        statistic=f"bias of the share below {tau:g} |lambda|max",
        estimate=float(test.mean),
        low=float(test.low),
        high=float(test.high),
        n=int(test.n),
        text="what the quadrature counts more than the full spectrum, as a share of all eigenvalues",
    )
