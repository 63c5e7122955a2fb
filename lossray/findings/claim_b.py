"""Claim B, degeneracy: exactly singular, singular beyond symmetry, effectively low rank."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lossray.findings.bounded_means import bounded_mean_interval, bounded_mean_test
from lossray.findings.claim_rows import ClaimRow
from lossray.findings.families import hommel, intersection_union, proportion_interval, seeds_needed
from lossray.findings.matching import described_runs, frame_of
from lossray.findings.means import mean_test
from lossray.findings.nullity_rise import rise_rows
from lossray.findings.skewness import safe_mean_test
from lossray.findings.verdict_a import NOT_SUPPORTED, SUPPORTED, UNDECIDED
from lossray.study.settings import ClaimsSettings

Array = NDArray[np.float64]

MOST = 0.5  # a statement on "the Hessian" must hold for more than this share of runs
LOW_RANK = 0.1  # the largest share of eigenvalues above tau |lambda|max that is called low rank
DECISIVE_TAU = 1e-2  # the finest threshold that quadratures resolve
SHOWN_TAUS = (1e-2, 1e-3)
OPERATORS = ("hessian", "adaptive")  # low rank must hold in both metrics
EXACT, BEYOND, LOW = "exactly singular", "singular beyond symmetry", "effectively low rank"
NO_SEED = -1.0  # runs without a seed may share everything: together they count as one
GIVEN_GATES = (
    ". This is given the trained gates: what is forced follows from the activation pattern at each point"
)

COLUMNS = (
    "run_id",
    "step",
    "operator",
    "point",
    "method",
    "tau",
    "at_noise_floor",
    "nullity",
    "structural_nullity",
    "quadrature_bias",
    "excess",
    "rank",
    "dim",
    "n_examples",
)


@dataclass(frozen=True)
class NullityCount:
    """Of each seed's `n` runs, those for which a statement holds, and those of which no gap lets us tell.

    Arrays [seeds]; single numbers are one seed. Runs of one seed share initialisation and data order, so that
    the seed is the unit: what is tested is the mean over seeds of the share of their runs.

    Attributes:
        yes: runs for which the statement holds.
        unknown: runs of which no gap lets us tell.
        n: runs.
    """

    yes: ArrayLike
    unknown: ArrayLike
    n: ArrayLike

    @property
    def least(self) -> Array:
        """Each seed's share of runs if the unknown ones are a no, [seeds]."""
        return _shares(self.yes, self.n)

    @property
    def most(self) -> Array:
        """The same if they are a yes."""
        return _shares(np.add(self.yes, self.unknown), self.n)

    @property
    def share(self) -> float:
        """The mean of the least shares; NaN without seeds."""
        return float(self.least.mean()) if len(self.least) else float("nan")

    def interval(self, alpha: float) -> tuple[float, float]:
        """Of the mean share, two-sided, whatever the unknown runs would turn out to be."""
        return _share_interval(self.least, alpha)[0], _share_interval(self.most, alpha)[1]

    def verdict(self, alpha: float) -> str:
        """SUPPORTED where the mean share is above MOST, NOT SUPPORTED where it is below, at alpha/2 each."""
        if bounded_mean_test(self.least, MOST)[1] <= alpha / 2:
            return SUPPORTED
        return NOT_SUPPORTED if bounded_mean_test(self.most, MOST)[0] <= alpha / 2 else UNDECIDED


def _shares(part: ArrayLike, whole: ArrayLike) -> Array:
    runs = np.atleast_1d(np.asarray(whole, dtype=np.float64))
    parts = np.broadcast_to(np.asarray(part, dtype=np.float64), runs.shape)
    return parts[runs > 0] / runs[runs > 0]


def _share_interval(shares: Array, alpha: float) -> tuple[float, float]:
    if np.isin(shares, (0.0, 1.0)).all():  # one run of each seed, or runs that agree: the same, faster
        return proportion_interval(int(shares.sum()), len(shares), alpha=alpha)
    return bounded_mean_interval(shares, alpha=alpha)


def claim_b_rows(tables: Mapping[str, pd.DataFrame], settings: ClaimsSettings) -> list[ClaimRow]:
    """The rows of the three statements of claim B, the verdicts first."""
    runs = described_runs(tables)
    runs = runs.assign(seed=runs["seed"].fillna(NO_SEED))
    kept = runs.loc[runs["status"] == "finished", ["run_id", "architecture", "optimizer", "seed", "loss"]]
    degeneracy = frame_of(tables, "degeneracy", COLUMNS).merge(kept, on="run_id")
    degeneracy = degeneracy[np.isfinite(degeneracy["nullity"])]
    floor = degeneracy[
        (degeneracy["at_noise_floor"] == True)  # noqa: E712 - null is false
        & (degeneracy["operator"] == "hessian")
        & (degeneracy["method"] == "dense")
    ]
    floor = floor.assign(gap=floor["rank"].notna())
    coarse = degeneracy[degeneracy["method"] != "dense"]
    return [
        *_singular_rows(EXACT, floor, "nullity", settings, _aside(floor, coarse, runs)),
        *_singular_rows(BEYOND, floor, "excess", settings, _aside(floor, coarse, runs)),
        *_low_rank_rows(degeneracy, runs, settings),
        *rise_rows(floor[(floor["point"] == "checkpoint") & floor["gap"]], settings),
    ]


def _aside(floor: pd.DataFrame, coarse: pd.DataFrame, runs: pd.DataFrame) -> str:
    """What the dense Hessians are of, and which models and runs have none."""
    if not (floor["step"] > 0).any():
        return _why_none(coarse)
    sizes = sorted({int(size) for size in floor["n_examples"].dropna()})
    examples = f"{' or '.join(map(str, sizes))} examples of the analysis set" if sizes else "analysis set"
    return f"; the Hessian is that of the {examples}{_left_out(floor, runs, 'dense spectrum')}"


def _left_out(counted: pd.DataFrame, runs: pd.DataFrame, what: str) -> str:
    """Architectures without rows, and runs that did not finish.

    Rates that were only tried, in tuning, are not analysed, and their runs are not lost.
    """
    without = sorted(set(runs["architecture"]) - set(counted["architecture"]))
    gone = runs["status"] != "finished"
    analysed = runs["setting_id"].isin(runs.loc[runs["run_id"].isin(counted["run_id"]), "setting_id"])
    hopeless = gone.groupby([runs["architecture"], runs["optimizer"]]).transform("all")
    lost = int((gone & (analysed | hopeless)).sum())
    none = f"; no {what} of {', '.join(without)}" if without else ""
    return none + (f"; {lost} diverged or failed runs are left out" if lost else "")


def _why_none(coarse: pd.DataFrame) -> str:
    """What would give one: the section, or a limit above d."""
    if coarse.empty:
        return " ([degeneracy] of the study switches them on)"
    sizes = sorted({int(dim) for dim in coarse["dim"].dropna()})
    return f": d = {', '.join(map(str, sizes))} is above degeneracy.dense_up_to"


# ---- singular, and beyond symmetry


def _singular_rows(
    statement: str, floor: pd.DataFrame, column: str, settings: ClaimsSettings, aside: str
) -> Iterator[ClaimRow]:
    """The verdict over runs after step 0, then first and last checkpoints by model and optimizer."""
    # Where nothing is null no gap is needed; a positive count without a gap may be rounding.
    decided = floor[column].notna() & (floor["gap"] | (floor[column] <= 0))
    marked = floor.assign(yes=decided & (floor[column] > 0), unknown=~decided)
    checkpoints = marked[marked["point"] == "checkpoint"]
    trained = checkpoints[checkpoints["step"] > 0]
    yield _singular_verdict(statement, trained, column, settings, aside)
    for model, points in marked[marked["point"] == "polished"].groupby("architecture", sort=False):
        yield _share_row(f"B/{statement}", f"{model}: polished to a critical point", points, column, settings)
    if len(trained):
        yield ClaimRow(
            claim=f"B/{statement}",
            subject="all checkpoints after step 0",
            statistic=f"share of points with {column} > 0",
            estimate=float(trained["yes"].mean()),
            n=int(trained["seed"].nunique()),
            text=f"{int(trained['yes'].sum())} of {len(trained)} points, "
            f"{int(trained['unknown'].sum())} without a gap",
        )
    for (architecture, optimizer), group in checkpoints.groupby(["architecture", "optimizer"], sort=False):
        ordered = group.sort_values("step", kind="stable")
        for moment, chosen in (
            ("first", ordered.drop_duplicates("run_id", keep="first")),
            ("last", ordered.drop_duplicates("run_id", keep="last")),
        ):
            subject = f"{architecture}: {optimizer}, {moment} checkpoint"
            yield _share_row(f"B/{statement}", subject, chosen, column, settings)


def _runs_of(rows: pd.DataFrame) -> pd.DataFrame:
    """By run: yes where all of its rows are, unknown where some are and none is a no."""
    marked = rows.assign(no=~rows["yes"] & ~rows["unknown"])
    runs = marked.groupby("run_id").agg(seed=("seed", "first"), yes=("yes", "all"), no=("no", "any"))
    return runs.assign(unknown=~runs["yes"] & ~runs["no"])


def _count(runs: pd.DataFrame) -> NullityCount:
    seed, _ = pd.factorize(runs["seed"])
    yes, unknown = (np.bincount(seed, weights=runs[name].to_numpy(dtype=bool)) for name in ("yes", "unknown"))
    return NullityCount(yes, unknown, np.bincount(seed))


def _singular_verdict(
    statement: str, trained: pd.DataFrame, column: str, settings: ClaimsSettings, aside: str
) -> ClaimRow:
    if trained.empty:
        text = f"no dense spectrum after step 0{aside}"
        return ClaimRow("B", statement, "verdict", n=0, verdict=UNDECIDED, text=text)
    runs = _runs_of(trained)
    count = _count(runs)
    low, high = count.interval(settings.alpha)
    seeds, least = len(count.least), seeds_needed(1, settings.alpha)
    few = f" (at least {least} are needed)" if seeds < least else ""
    text = (
        f"{runs['yes'].sum()} of {len(runs)} runs have {column} > 0 with a gap at the noise floor at every "
        f"checkpoint after step 0 ({runs['unknown'].sum()} cannot be told), a share of {count.share:.4g} in "
        f"the mean over {seeds} seeds{few}; median {column} {_medians(trained, column)}{aside}"
    )
    return ClaimRow(
        claim="B",
        subject=statement,
        statistic="verdict",
        estimate=count.share,
        low=low,
        high=high,
        n=seeds,
        verdict=count.verdict(settings.alpha),
        text=text + (_forced(trained) if statement == EXACT else GIVEN_GATES),
    )


def _medians(rows: pd.DataFrame, column: str) -> str:
    """Within each network: they say nothing across sizes."""
    return ", ".join(
        f"{group[column].median():.4g} of {group['dim'].median():.6g} in {architecture}"
        for architecture, group in rows.groupby("architecture", sort=False)
    )


def _forced(trained: pd.DataFrame) -> str:
    """Under cross entropy a null space says nothing (docs/science.md, "Degeneracy")."""
    share = (trained["loss"] == "cross_entropy").mean()
    if share == 0:
        return ""
    where = "" if share == 1 else f" (the loss of {share:.0%} of these points)"
    return f". This is forced under cross entropy{where}: softmax does not see a shift of all outputs"


def _share_row(
    claim: str, subject: str, rows: pd.DataFrame, column: str, settings: ClaimsSettings
) -> ClaimRow:
    """Of one model."""
    runs = _runs_of(rows)
    count = _count(runs)
    low, high = count.interval(settings.alpha)
    steps = sorted({int(step) for step in rows["step"]})
    return ClaimRow(
        claim=claim,
        subject=subject,
        statistic=f"share of runs with {column} > 0",
        estimate=count.share,
        low=low,
        high=high,
        n=len(count.least),
        text=f"{runs['yes'].sum()} of {len(runs)} runs, {runs['unknown'].sum()} without a gap; "
        f"median {column} {rows[column].median():.4g}; step {', '.join(map(str, steps))}",
    )


# ---- low rank


def _low_rank_rows(
    degeneracy: pd.DataFrame, runs: pd.DataFrame, settings: ClaimsSettings
) -> Iterator[ClaimRow]:
    """The share of eigenvalues above tau |lambda|max at the last checkpoint: verdict, then by model."""
    counts = degeneracy[
        (degeneracy["point"] == "checkpoint")
        & degeneracy["operator"].isin(OPERATORS)
        & degeneracy["method"].isin(["dense", "quadrature"])
        & (degeneracy["step"] > 0)
        & (degeneracy["dim"] > 0)
    ]
    counts = counts.assign(
        share=1 - counts["nullity"] / counts["dim"], bias=counts["quadrature_bias"] / counts["dim"]
    )
    # Of each run the last checkpoint, and all eigenvalues ("dense" sorts first) rather than a quadrature.
    counts = counts.sort_values(["step", "method"], ascending=[False, True], kind="stable")
    parts = []
    for tau in SHOWN_TAUS:
        at_tau = counts[np.isclose(counts["tau"], tau, rtol=1e-6, atol=0.0)]
        parts.append(at_tau.assign(level=tau).drop_duplicates(["run_id", "operator"]))
    shares = pd.concat(parts, ignore_index=True)
    cells = ["architecture", "operator"]
    yield _low_rank_verdict(shares, runs, settings)
    for tau in SHOWN_TAUS:
        at_tau = shares[shares["level"] == tau]
        for labels, group in at_tau.groupby(cells, sort=False):
            yield _low_rank_row(": ".join(map(str, labels)), tau, group, settings)
        for labels, group in at_tau[at_tau["bias"].notna()].groupby(cells, sort=False):
            yield _bias_row(f"{': '.join(map(str, labels))}, quadrature", tau, group, settings)


def _seed_means(rows: pd.DataFrame, column: str) -> Array:
    """Runs of one seed are not independent: their mean, [seeds]."""
    return rows.groupby("seed")[column].mean().to_numpy(dtype=np.float64)


def _low_rank_verdict(shares: pd.DataFrame, runs: pd.DataFrame, settings: ClaimsSettings) -> ClaimRow:
    """Low rank in both metrics for every model: SUPPORTED; not so in one of them: NOT SUPPORTED."""
    decisive = shares[shares["level"] == DECISIVE_TAU]
    cells = {
        (str(architecture), str(operator)): _seed_means(group, "share")
        for (architecture, operator), group in decisive.groupby(["architecture", "operator"], sort=False)
    }
    models = dict.fromkeys(architecture for architecture, _ in cells)
    lacking = [name for name in OPERATORS if any((model, name) not in cells for model in models)]
    verdict = word_of_cells(list(cells.values()), settings.alpha)
    if verdict == SUPPORTED and lacking:
        verdict = UNDECIDED
    means = {cell: float(values.mean()) for cell, values in cells.items()}
    statements = "; ".join(f"{', '.join(cell)}: {mean:.2%}" for cell, mean in means.items())
    missing = f"; no counts of the operator {', '.join(lacking)} of every model" if lacking else ""
    n = int(decisive["seed"].nunique())
    few = "; at least two seeds are needed" if n < 2 else ""
    text = (
        f"share of eigenvalues above {DECISIVE_TAU:g} |lambda|max, low below {LOW_RANK:.0%}, mean over {n} "
        f"seeds: {statements or 'none counted'}{missing}{few}{_left_out(decisive, runs, 'counts')}"
    )
    largest = max(means.values(), default=float("nan"))
    return ClaimRow("B", LOW, "verdict", estimate=largest, n=n, verdict=verdict, text=text)


def word_of_cells(cells: Sequence[Array], alpha: float) -> str:
    """The verdict on low rank, from the mean share of each seed's runs, [seeds] of every model and metric."""
    tests = [safe_mean_test(values, LOW_RANK, skewed="either") for values in cells]
    if not tests:
        return UNDECIDED
    p_less, p_greater = np.array(tests, dtype=np.float64).T
    return _low_rank_word(p_less, p_greater, alpha)


def _low_rank_word(p_less: ArrayLike, p_greater: ArrayLike, alpha: float) -> str:
    """Of one cell, or of all, [cells]: SUPPORTED if every one is below, NOT SUPPORTED if some one is above.

    The first is an intersection-union test and needs no adjustment; in the second the p values are adjusted.
    """
    if intersection_union(np.atleast_1d(p_less)) <= alpha:
        return SUPPORTED
    return NOT_SUPPORTED if hommel(np.atleast_1d(p_greater)).min() <= alpha else UNDECIDED


def _low_rank_row(subject: str, tau: float, group: pd.DataFrame, settings: ClaimsSettings) -> ClaimRow:
    values = _seed_means(group, "share")
    shown = mean_test(values, LOW_RANK, alpha=settings.alpha)
    p_less, p_greater = (float(p) for p in safe_mean_test(values, LOW_RANK, skewed="either"))
    methods = ", ".join(sorted(set(group["method"])))
    return ClaimRow(
        claim=f"B/{LOW}",
        subject=subject,
        statistic=f"share of |lambda| > {tau:g} |lambda|max",
        estimate=float(shown.mean),
        low=float(shown.low),
        high=float(shown.high),
        p_value=p_less,
        n=len(values),
        verdict=_low_rank_word(p_less, p_greater, settings.alpha),
        text=f"last checkpoint, {methods}; d = {int(group['dim'].median())}; mean over seeds of {len(group)} "
        f"runs; p value of being below {LOW_RANK:g}, skewed shares too; low and high are one-sided bounds",
    )


def _bias_row(subject: str, tau: float, group: pd.DataFrame, settings: ClaimsSettings) -> ClaimRow:
    test = mean_test(_seed_means(group, "bias"), 0.0, alpha=settings.alpha / 2)
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
