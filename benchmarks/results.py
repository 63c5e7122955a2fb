"""The tables of docs/results.md, from the stores of the studies `paper` and `edge-of-stability`.

``python -m benchmarks.results OUT_PAPER OUT_EDGE`` puts each in its place in the document; the text is ours.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import lossray
from benchmarks.report import fill, table
from lossray.findings.claims import TABLES_READ, claims_of
from lossray.findings.comparison import comparison_of
from lossray.findings.energies import TOP
from lossray.findings.learning_rates import edges
from lossray.findings.matching import (
    BEST,
    MATCHED,
    chosen_settings,
    moment_of,
)
from lossray.results import StudyResults
from lossray.study.settings import ClaimsSettings

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results.md"
WIDTHS = ("sgd", "momentum", "rmsprop", "adam")  # the optimizers that train every width
PLAIN = ("sgd", "momentum", "nesterov")
GAUGES = ("raw", "balanced", "adaptive", "preconditioned")
SHARES = ("explained1", "explained2", "random_walk1", "random_walk2")
NARROW = ("mlp", "cnn")  # the two that every optimizer trains
MISSING = "-"


def main(paper: str, edge: str) -> None:
    """Write all tables into the document."""
    study = lossray.open_study(paper)
    tables = {name: study.table(name) for name in TABLES_READ}
    settings = study.study.claims
    claims = claims_of(tables, settings)
    compared = comparison_of(tables, settings)
    runs, rows = compared.runs, compared.rows
    rows = rows[(rows["rule"] == BEST) & (rows["subspace"] == TOP) & rows["usable"]]
    at_end = rows[rows["moment"] == MATCHED]
    best = best_runs(runs)
    parts_of_document = {
        "verdicts": verdicts(claims),
        "rates": rates(runs),
        "levels": levels(rows, settings, "update"),
        "gradient_levels": levels(rows, settings, "minibatch_gradient"),
        "updates": gauges(at_end, "update"),
        "gradients": gauges(at_end, "minibatch_gradient"),
        "parts": parts(at_end),
        "attribution": attribution(claims),
        "dimension": widths(at_end, claims),
        "dispersion": dispersion(claims),
        "degeneracy": dense(tables["degeneracy"].merge(best, on="run_id")),
        "nullity": nullity(claims),
        "trajectories": trajectories(study.table("trajectory").merge(best, on="run_id")),
        "edge": stability(lossray.open_study(edge)),
    }
    fill(DOCUMENT, parts_of_document)


def best_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished runs at each optimizer's best learning rate, chosen as the claims choose it."""
    chosen = chosen_settings(runs)
    best = chosen.loc[chosen["rule"] == BEST, "setting_id"]
    kept = runs[runs["setting_id"].isin(best) & (runs["status"] == "finished")]
    return kept[["run_id", "architecture", "optimizer", "lr", "seed", "n_params", "train_loss"]]


def verdicts(claims: pd.DataFrame) -> str:
    """The verdicts over everything, then claim A's by architecture, which names the levels of loss."""
    chosen = claims[claims["claim"].isin(["A", "B"])]
    by_architecture = claims[(claims["claim"] == "A/levels") & ~claims["text"].str.contains("d = ")]
    rows = [
        [str(row.claim)[0], row.subject, row.verdict, row.text]
        for row in pd.concat([chosen, by_architecture]).itertuples()
    ]
    return table(("claim", "about", "verdict", "why"), [[_cell(text) for text in row] for row in rows])


def rates(runs: pd.DataFrame) -> str:
    """The best learning rate of each optimizer, and those that were tried."""
    rows = []
    for row in edges(runs).itertuples():
        tried = f"{row.tried}, {row.lowest:g} to {row.highest:g}"
        rows.append(
            [_cell(row.architecture), row.optimizer, f"{row.lr:g}", tried, "yes" if row.inside else "no"]
        )
    return table(("model", "optimizer", "best lr", "tried", "inside"), rows)


def levels(rows: pd.DataFrame, settings: ClaimsSettings, direction: str) -> str:
    """Energies in v1 at each level of loss: percent of the direction's square, and of how many runs."""
    moments = [*map(moment_of, settings.levels), MATCHED]
    own = rows[(rows["direction"] == direction) & (rows["gauge"] == "raw")]
    body = []
    for name in NARROW:
        here = own[own["architecture"].map(_is_narrow(name))]
        for optimizer in _optimizers(here):
            mine = here[here["optimizer"] == optimizer]
            cells = [_energy(mine[mine["moment"] == moment]) for moment in moments]
            body.append([name, optimizer, *cells])
    head = [f"{level:g} of the start" for level in settings.levels]
    return table(("model", "optimizer", *head, "lowest common loss"), body)


def gauges(at_end: pd.DataFrame, direction: str) -> str:
    """Geometric means at the lowest common loss, in percent of the direction's square; and over the nulls."""
    own = at_end[at_end["direction"] == direction]
    body = []
    for name in NARROW:
        here = own[own["architecture"].map(_is_narrow(name))]
        for optimizer in _optimizers(here):
            mine = here[here["optimizer"] == optimizer]
            by_gauge = {gauge: mine[mine["gauge"] == gauge] for gauge in GAUGES}
            shares = [_percent(by_gauge[gauge]["log_energy"]) for gauge in GAUGES]
            raw, adaptive = by_gauge["raw"], by_gauge["adaptive"]
            over = [raw["over_chance"], raw["over_sign_flips"], adaptive["over_chance"]]
            body.append([name, optimizer, *shares, *(_ratio(values) for values in over)])
    nulls = ("raw: times random", "raw: times random signs", "adaptive: times random")
    return table(("model", "optimizer", *GAUGES, *nulls), body)


def parts(at_end: pd.DataFrame) -> str:
    """Gradient, momentum, P^-1 g, update, and the first two in the optimizer's metric; percent, mlp."""
    mlp = at_end[at_end["architecture"].map(_is_narrow("mlp"))]
    columns = {
        "g": ("minibatch_gradient", "raw"),
        "m": ("momentum", "raw"),
        "P^-1 g": ("preconditioned_gradient", "raw"),
        "update": ("update", "raw"),
        "P^-1/2 g": ("minibatch_gradient", "preconditioned"),
        "P^-1/2 m": ("momentum", "preconditioned"),
    }
    rows = []
    for optimizer in _optimizers(mlp):
        group = mlp[mlp["optimizer"] == optimizer]
        cells = [
            _percent(group[(group["direction"] == name) & (group["gauge"] == gauge)]["log_energy"])
            for name, gauge in columns.values()
        ]
        rows.append([optimizer, *cells])
    return table(("optimizer", *columns), rows)


def widths(at_end: pd.DataFrame, claims: pd.DataFrame) -> str:
    """The update's energy by dimension at the lowest common loss, and the slopes."""
    own = at_end[(at_end["direction"] == "update") & (at_end["gauge"] == "raw")]
    relu = own["architecture"].str.startswith("mlp") & ~own["architecture"].str.contains("tanh")
    own = own[relu & own["optimizer"].isin(WIDTHS)]
    rows = []
    for dim, group in own.groupby("n_params"):
        cells = [_energy(group[group["optimizer"] == name]) for name in WIDTHS]
        rows.append([f"{dim:,.0f}", *cells, f"{100 / dim:.2g}"])
    slopes = claims[claims["claim"] == "A/slope"]
    text = [
        [row.subject, row.statistic, _interval(row), row.verdict or ""]
        for row in slopes.itertuples()
        if "update" in str(row.subject)
    ]
    first = table(("d", *WIDTHS, "chance"), rows)
    return f"{first}\n\n{table(('about', 'statistic', 'estimate', 'verdict'), text)}"


def dispersion(claims: pd.DataFrame) -> str:
    """The spread of S along training beside SGD's."""
    own = claims[(claims["claim"] == "A/dispersion") & claims["estimate"].notna()]
    rows = []
    for row in own.itertuples():
        word = MISSING if pd.isna(row.verdict) else row.verdict
        rows.append([_cell(row.subject), row.statistic, _interval(row), f"{row.n}", word])
    return table(("about", "statistic", "estimate", "n", "verdict"), rows)


def attribution(claims: pd.DataFrame) -> str:
    """Column, row and interaction effects of the 2 x 2 with Adam's shadow on SGD's trajectory."""
    rows = [
        [row.subject, row.statistic, _interval(row), row.verdict]
        for row in claims[claims["claim"] == "A/attribution"].itertuples()
    ]
    return table(("about", "effect on S", "estimate", "verdict"), rows)


def dense(degeneracy: pd.DataFrame) -> str:
    """Nullity, what is forced, and the excess, at the noise floor; medians over runs."""
    exact = degeneracy[(degeneracy["method"] == "dense") & degeneracy["at_noise_floor"]]
    rows = []
    for key, group in exact.groupby(["architecture", "n_params", "step", "operator"]):
        gap = group["rank"].notna().mean()
        who = [key[0], f"{key[1]:,.0f}", str(key[2]), key[3], str(len(group))]
        middle = [_median(group[name]) for name in ("nullity", "structural_nullity", "excess")]
        beyond = f"{int((group['excess'] > 0).sum())}" if group["excess"].notna().any() else "-"
        rows.append([*who, *middle, f"{100 * gap:.0f} %", beyond])
    head = (
        "model",
        "d",
        "step",
        "operator",
        "runs",
        "nullity",
        "forced",
        "excess",
        "with a gap",
        "excess > 0",
    )
    return table(head, rows)


def nullity(claims: pd.DataFrame) -> str:
    """How the nullity rises during training, what of it is forced, and against SGD."""
    rows = [
        [_cell(row.subject), row.statistic, _interval(row), f"{row.n}", _cell(row.text)]
        for row in claims[claims["claim"] == "B/nullity"].itertuples()
    ]
    return table(("about", "statistic", "estimate", "seeds", ""), rows)


def trajectories(trajectory: pd.DataFrame) -> str:
    """Shares of the variance on the first two axes beside a random walk's."""
    last = trajectory[trajectory["step"] == trajectory["step"].max()]
    rows = []
    for (architecture, optimizer), group in last.groupby(["architecture", "optimizer"]):
        if optimizer in WIDTHS and any(_is_narrow(name)(architecture) for name in NARROW):
            shares = [f"{100 * group[name].mean():.1f}" for name in SHARES]
            rows.append([architecture.split()[0], optimizer, *shares])
    return table(("model", "optimizer", "axis 1", "axis 2", "walk 1", "walk 2"), rows)


def stability(study: StudyResults) -> str:
    """Medians over the second half of training."""
    runs = study.table("runs")[["run_id", "optimizer", "lr", "seed", "train_loss"]]
    sharpness = study.table("sharpness").drop(columns="lr").merge(runs, on="run_id")
    late = sharpness[sharpness["step"] >= sharpness["step"].max() / 2]
    rows = []
    for (optimizer, lr), group in late.groupby(["optimizer", "lr"]):
        medians = group.groupby("seed")["preconditioned_lr"].median()
        raw = group.groupby("seed")["lambda_max_lr"].median()
        rows.append(
            [optimizer, f"{lr:g}", f"{group['threshold'].iloc[0]:.3g}", _spread(medians), _spread(raw)]
        )
    return table(("optimizer", "lr", "threshold", "preconditioned sharpness x lr", "lambda_max x lr"), rows)


def _is_narrow(name: str) -> Callable[[object], bool]:
    """Whether a label is that of the small network of this name, whatever stood beside it in the study."""
    wanted = {"mlp": "mlp widths=32", "cnn": "cnn"}[name]
    return lambda label: str(label).removesuffix(" activation=relu") == wanted


def _optimizers(rows: pd.DataFrame) -> list[str]:
    """SGD and its like first, then the adaptive ones, then the others."""
    adaptive = dict(zip(rows["optimizer"], rows["adaptive"], strict=True))
    return sorted(adaptive, key=lambda name: (name not in PLAIN, not adaptive[name], name))


def _energy(rows: pd.DataFrame) -> str:
    """The geometric mean of exp(S) in percent, and over how many runs."""
    n = int(rows["log_energy"].notna().sum())
    return f"{_percent(rows['log_energy'])} ({n})" if n else MISSING


def _ratio(logarithms: pd.Series) -> str:
    known = logarithms.dropna()
    return f"{np.exp(known.mean()):.3g}" if len(known) else MISSING


def _cell(text: object) -> str:
    return str(text).replace("|", r"\|")


def _percent(values: Iterable[float]) -> str:
    known = pd.Series(list(values)).dropna()
    return f"{100 * np.exp(known.mean()):.2g}" if len(known) else "-"


def _median(values: pd.Series) -> str:
    known = values.dropna()
    return f"{known.median():g}" if len(known) else "-"


def _spread(values: Sequence[float] | pd.Series) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def _interval(row: object) -> str:
    estimate, low, high = (getattr(row, name) for name in ("estimate", "low", "high"))
    return f"{estimate:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main(*sys.argv[1:])
