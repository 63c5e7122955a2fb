"""Which runs and checkpoints are compared: architectures, learning-rate rules, levels of training loss."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lossray.storage.schema import INTEGER, NUMBER
from lossray.storage.tables import schema_of

NOT_OF_THE_MODEL = ("name", "optimizers")  # the second says who trains it
SIZES = ("widths", "channels", "width", "dim")  # settings that make a model larger, nothing else
BEST, SMALLEST, LARGEST = "best lr", "smallest lr", "largest lr"
MATCHED, LAST = "matched loss", "last checkpoint"
MOST_MISMATCH = 1.5  # factor between a checkpoint's training loss and the one it is compared at
BASELINE = "sgd"  # whom every method is compared with

RUN_COLUMNS = (
    "run_id",
    "setting_id",
    "model",
    "activation",
    "model_settings",
    "optimizer",
    "optimizer_settings",
    "lr",
    "adaptive",
    "seed",
    "n_params",
    "loss",
    "status",
    "train_loss",
    "validation_loss",
)


def frame_of(tables: Mapping[str, pd.DataFrame], name: str, columns: tuple[str, ...]) -> pd.DataFrame:
    """The named columns of a table, numbers as float64, the others as objects.

    Columns or tables that are not there are empty: null, or without rows.
    """
    frame = tables.get(name, pd.DataFrame()).reindex(columns=list(columns))
    numeric = {
        column.name: pd.to_numeric(frame[column.name]).astype("float64")
        for column in schema_of(name).columns
        if column.name in columns and column.type in (NUMBER, INTEGER)
    }
    return frame.astype("object").assign(**numeric)


def described_runs(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The `runs` table and two columns: `architecture`, a label, and `family`, the same but for size."""
    runs = frame_of(tables, "runs", RUN_COLUMNS)
    texts = {text: _settings(text) for text in runs["model_settings"].dropna().unique()}
    settings = [
        {"name": name} | texts.get(text, {})
        for name, text in zip(runs["model"], runs["model_settings"], strict=True)
    ]
    distinct = list(
        {json.dumps(model_settings, sort_keys=True): model_settings for model_settings in settings}.values()
    )
    runs["architecture"] = [_label(model_settings, distinct) for model_settings in settings]
    runs["family"] = [
        json.dumps(_without_size(model_settings), sort_keys=True) for model_settings in settings
    ]
    runs["adaptive"] = (runs["adaptive"] == True).astype(bool)  # noqa: E712 - null is not adaptive
    return runs


def _settings(text: str) -> dict[str, Any]:
    plain = json.loads(text)
    return {key: value for key, value in plain.items() if key not in NOT_OF_THE_MODEL}


def _without_size(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model but for its sizes; of lists of sizes their length, the depth, stays."""
    depths = {key: len(settings[key]) for key in SIZES if isinstance(settings.get(key), list)}
    return {key: value for key, value in settings.items() if key not in SIZES} | depths


def _label(settings: Mapping[str, Any], distinct: list[dict[str, Any]]) -> str:
    """The model's name, and those of its settings in which models of that name differ."""
    namesakes = [other for other in distinct if other["name"] == settings["name"]]
    varying = [key for key in settings if any(other.get(key) != settings[key] for other in namesakes)]
    return " ".join([str(settings["name"]), *(f"{key}={_short(settings[key])}" for key in varying)])


def _short(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def chosen_settings(runs: pd.DataFrame) -> pd.DataFrame:
    """For each learning-rate rule one setting of each optimizer.

    "best lr" has the lowest median final validation loss (training loss where there is none), diverged runs
    counting as infinite. The other rules are there where an optimizer has several learning rates. Columns
    architecture, rule, optimizer, setting_id.
    """
    finished = runs["status"] == "finished"
    score = runs["validation_loss"].fillna(runs["train_loss"])
    scored = runs.assign(score=score.where(finished & np.isfinite(score), np.inf), finished=finished)
    keys = ["architecture", "optimizer", "setting_id"]
    settings = scored.groupby(keys, as_index=False).agg(
        lr=("lr", "first"), score=("score", "median"), finished=("finished", "any")
    )
    settings = settings[settings["finished"]]
    several = (
        settings.groupby("architecture")["lr"].count()
        > settings.groupby("architecture")["optimizer"].nunique()
    )
    with_grid = settings[settings["architecture"].map(several).astype(bool)]
    parts = []
    for rule, candidates, order, ascending in (
        (BEST, settings, ["score", "lr"], [True, True]),
        (SMALLEST, with_grid, ["lr", "score"], [True, True]),
        (LARGEST, with_grid, ["lr", "score"], [False, True]),
    ):
        first = candidates.sort_values(order, ascending=ascending).drop_duplicates(keys[:2])
        parts.append(first[keys].assign(rule=rule))
    return pd.concat(parts, ignore_index=True)


def matched_points(
    runs: pd.DataFrame,
    checkpoints: pd.DataFrame,
    choice: pd.DataFrame,
    *,
    levels: Sequence[float] = (),
) -> pd.DataFrame:
    """The checkpoints of each chosen run at which optimizers are compared.

    At each level, a share of the loss at the start, the run's checkpoint after step 0 whose training loss is
    nearest in the logarithm; "matched loss" is the lowest loss that every judged optimizer comes down to (the
    largest over optimizers of the median over runs of the lowest loss). A run without a checkpoint within a
    factor MOST_MISMATCH of the loss is not compared there. "last checkpoint" takes any loss.

    Args:
        runs: of `described_runs`.
        checkpoints: columns run_id, step, train_loss: those that may be chosen; step 0 gives the start.
        choice: of `chosen_settings`.
        levels: shares of the loss at the start.

    Returns:
        Columns architecture, rule, optimizer, adaptive, seed, n_params, run_id, moment, step, train_loss,
        reference, mismatch (|ln train_loss/reference|, null at the last checkpoint).
    """
    kept = runs[(runs["status"] == "finished") & runs["seed"].notna()]
    columns = ["run_id", "setting_id", "architecture", "optimizer", "adaptive", "seed", "n_params"]
    rows = kept[columns].merge(choice, on=["architecture", "optimizer", "setting_id"])
    rows = rows.drop(columns="setting_id").merge(checkpoints[["run_id", "step", "train_loss"]], on="run_id")
    rows = rows[(rows["train_loss"] > 0) & np.isfinite(rows["train_loss"])]
    references = _references(rows, levels)
    rows = rows[rows["step"] > 0]
    one = ["architecture", "rule", "run_id"]
    last = rows.sort_values("step", kind="stable").drop_duplicates(one, keep="last").assign(moment=LAST)
    matched = rows.merge(references, on=["architecture", "rule"])
    matched["mismatch"] = np.abs(np.log(matched["train_loss"] / matched["reference"]))
    matched = matched[matched["mismatch"] <= np.log(MOST_MISMATCH)]
    nearest = matched.sort_values(["mismatch", "step"], kind="stable").drop_duplicates([*one, "moment"])
    points: pd.DataFrame = pd.concat([nearest, last], ignore_index=True)
    return points


def _references(rows: pd.DataFrame, levels: Sequence[float]) -> pd.DataFrame:
    """The losses at which runs are compared, by architecture and rule: of the judged optimizers, if any.

    Args:
        rows: checkpoints of the chosen runs.
        levels: shares of the loss at the start.

    Returns:
        Columns architecture, rule, moment, reference.
    """
    cell = ["architecture", "rule"]
    judged = rows["adaptive"].astype(bool) | (rows["optimizer"] == BASELINE)
    rows = rows[judged | ~judged.groupby([rows[name] for name in cell]).transform("any")]
    later = rows[rows["step"] > 0]
    lowest = later.groupby([*cell, "optimizer", "run_id"])["train_loss"].min()
    reached = lowest.groupby([*cell, "optimizer"]).median()
    parts = [reached.groupby(cell).max().rename("reference").reset_index().assign(moment=MATCHED)]
    start = rows[rows["step"] == 0].groupby(cell)["train_loss"].median().rename("reference").reset_index()
    parts += [start.assign(reference=level * start["reference"], moment=moment_of(level)) for level in levels]
    return pd.concat(parts, ignore_index=True)


def moment_of(level: float) -> str:
    """The moment at which the training loss is this share of the loss at the start."""
    return f"{MATCHED} {level:g} of the start"


def lost_runs(runs: pd.DataFrame, choice: pd.DataFrame) -> pd.DataFrame:
    """How many runs of each optimizer's chosen setting diverged or failed, of how many.

    Of an optimizer that finished no run at all, those of the setting with most runs.

    Returns:
        Columns architecture, rule, optimizer, adaptive, lost, total.
    """
    keys = ["architecture", "optimizer"]
    grouped = runs.assign(lost=runs["status"] != "finished").groupby([*keys, "setting_id"], as_index=False)
    counts = grouped.agg(adaptive=("adaptive", "any"), lost=("lost", "sum"), total=("lost", "size"))
    chosen = counts.merge(choice, on=[*keys, "setting_id"])
    # An optimizer without any finished run has no chosen setting.
    finished = (counts["total"] - counts["lost"]).groupby([counts[key] for key in keys]).transform("sum")
    gone = counts[finished == 0]
    gone = gone.sort_values("total", ascending=False, kind="stable").drop_duplicates(keys)
    rules = choice[["architecture", "rule"]].drop_duplicates()
    lost: pd.DataFrame = pd.concat([chosen, gone.merge(rules, on="architecture")], ignore_index=True)
    return lost.drop(columns="setting_id")
