"""The tables of docs/results.md, from the stores of the studies `paper` and `edge-of-stability`.

``python -m benchmarks.results OUT_PAPER OUT_EDGE`` puts each in its place in the document; the text is ours.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import lossray
from benchmarks.report import fill, table
from lossray.findings.claims import TABLES_READ, claims_of
from lossray.findings.matching import BEST, chosen_settings, described_runs
from lossray.results import StudyResults

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results.md"
WIDTHS = ("sgd", "momentum", "rmsprop", "adam")  # the optimizers that train every width
PLAIN = ("sgd", "momentum", "nesterov")
GAUGES = ("raw", "balanced", "adaptive", "preconditioned")
SHARES = ("explained1", "explained2", "random_walk1", "random_walk2")


def main(paper: str, edge: str) -> None:
    """Write all tables into the document."""
    study = lossray.open_study(paper)
    tables = {name: study.table(name) for name in TABLES_READ}
    claims = claims_of(tables, study.study.claims)
    runs = best_runs(tables)
    alignment = tables["alignment"].merge(runs, on="run_id")
    parts_of_document = {
        "verdicts": verdicts(claims),
        "updates": energies(alignment, "update"),
        "gradients": energies(alignment, "minibatch_gradient"),
        "parts": parts(alignment),
        "attribution": attribution(claims),
        "dimension": widths(alignment, claims),
        "degeneracy": dense(tables["degeneracy"].merge(runs, on="run_id")),
        "trajectories": trajectories(study.table("trajectory").merge(runs, on="run_id")),
        "edge": stability(lossray.open_study(edge)),
    }
    fill(DOCUMENT, parts_of_document)


def best_runs(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The finished runs at each optimizer's better learning rate, chosen as the claims choose it."""
    runs = described_runs(tables)
    chosen = chosen_settings(runs)
    best = chosen.loc[chosen["rule"] == BEST, "setting_id"]
    kept = runs[runs["setting_id"].isin(best) & (runs["status"] == "finished")]
    return kept[["run_id", "architecture", "optimizer", "lr", "seed", "n_params", "train_loss"]]


def verdicts(claims: pd.DataFrame) -> str:
    """The statements, and claim A by architecture at the better learning rate, at both moments."""
    rows = []
    for row in claims.itertuples():
        if row.claim == "B":
            rows.append(["B", row.subject, row.verdict, row.text])
        elif row.claim == "A/verdict" and ", best lr, " in str(row.subject) and "d = " not in str(row.text):
            rows.append(["A", str(row.subject).replace(", best lr", ""), row.verdict, row.text])
    return table(("claim", "about", "verdict", "why"), [[_cell(text) for text in row] for row in rows])


def energies(alignment: pd.DataFrame, direction: str) -> str:
    """Geometric means at the last checkpoint, in percent of the direction's square."""
    last = alignment[alignment["step"] == alignment["step"].max()]
    own = last[(last["direction"] == direction) & (last["subspace"] == "v1")]
    rows = []
    for (architecture, optimizer), group in own.groupby(["architecture", "optimizer"], sort=False):
        if architecture not in ("cnn", "mlp widths=32 activation=relu"):
            continue
        raw = group[group["gauge"] == "raw"]
        gauges = [_percent(group[group["gauge"] == gauge]["log_energy"]) for gauge in GAUGES]
        flips = np.exp((raw["log_energy"] - np.log(raw["sign_flip_null"])).mean())
        loss = raw["train_loss"].median()
        ratio = np.exp(raw["log_energy"].mean()) * raw["dim"].median()
        who = [architecture.split()[0], optimizer, f"{raw['lr'].iloc[0]:g}", f"{loss:.2g}"]
        rows.append([*who, *gauges, f"{ratio:.0f}", f"{flips:.1f}"])
    head = ("model", "optimizer", "lr", "loss", *GAUGES, "times chance", "times sign flips")
    return table(head, sorted(rows, key=lambda row: (row[0], row[1] not in PLAIN, row[1])))


def parts(alignment: pd.DataFrame) -> str:
    """Gradient, momentum, P^-1 g, update, and the first two in the optimizer's metric; percent, mlp."""
    last = alignment[(alignment["step"] == alignment["step"].max()) & (alignment["subspace"] == "v1")]
    mlp = last[last["architecture"] == "mlp widths=32 activation=relu"]
    columns = {
        "g": ("minibatch_gradient", "raw"),
        "m": ("momentum", "raw"),
        "P^-1 g": ("preconditioned_gradient", "raw"),
        "update": ("update", "raw"),
        "P^-1/2 g": ("minibatch_gradient", "preconditioned"),
        "P^-1/2 m": ("momentum", "preconditioned"),
    }
    rows = []
    for optimizer, group in mlp.groupby("optimizer"):
        cells = [
            _percent(group[(group["direction"] == name) & (group["gauge"] == gauge)]["log_energy"])
            for name, gauge in columns.values()
        ]
        rows.append([optimizer, *cells])
    return table(("optimizer", *columns), sorted(rows, key=lambda row: (row[0] not in PLAIN, row[0])))


def widths(alignment: pd.DataFrame, claims: pd.DataFrame) -> str:
    """The update's energy by dimension, and the slopes."""
    last = alignment[(alignment["step"] == alignment["step"].max()) & (alignment["subspace"] == "v1")]
    own = last[(last["direction"] == "update") & (last["gauge"] == "raw")]
    own = own[own["architecture"].str.contains("activation=relu") & own["optimizer"].isin(WIDTHS)]
    rows = []
    for dim, group in own.groupby("n_params"):
        cells = [_percent(group[group["optimizer"] == name]["log_energy"]) for name in WIDTHS]
        rows.append([f"{dim:,.0f}", *cells, f"{100 / dim:.2g}"])
    slopes = claims[claims["claim"] == "A/slope"]
    text = [
        [row.subject, row.statistic, _interval(row), row.verdict or ""]
        for row in slopes.itertuples()
        if "update" in str(row.subject)
    ]
    first = table(("d", *WIDTHS, "chance"), rows)
    return f"{first}\n\n{table(('about', 'statistic', 'estimate', 'verdict'), text)}"


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


def trajectories(trajectory: pd.DataFrame) -> str:
    """Shares of the variance on the first two axes beside a random walk's."""
    last = trajectory[trajectory["step"] == trajectory["step"].max()]
    rows = []
    for (architecture, optimizer), group in last.groupby(["architecture", "optimizer"]):
        if optimizer in WIDTHS and architecture in ("cnn", "mlp widths=32 activation=relu"):
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
