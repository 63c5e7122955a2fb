"""Where each optimizer's best learning rate lies among those that were tried: inside, or at an edge."""

import json

import pandas as pd

from lossray.findings.matching import BASELINE, BEST, chosen_settings

GRID = ["architecture", "optimizer", "others"]  # settings that differ in their learning rate only


def edges(runs: pd.DataFrame) -> pd.DataFrame:
    """The best learning rate of every optimizer on every architecture, and the grid that it was chosen from.

    The best is that of `chosen_settings`. Its grid has the rates that were tried with the optimizer's other
    settings as they are; a rate at which runs diverged was tried, one at which all failed was not. The best
    is `inside` where a lower and a higher one were tried: a better one may lie beyond an edge.

    Args:
        runs: of `described_runs`.

    Returns:
        Columns architecture, optimizer, setting_id, lr, lowest, highest, tried (number of rates), inside.
    """
    tried = runs[runs["status"] != "failed"].drop_duplicates("setting_id")
    tried = tried.assign(others=tried["optimizer_settings"].map(_others))
    rates = tried.groupby(GRID)["lr"]
    grids = rates.agg(lowest="min", highest="max", tried="nunique").reset_index()
    choice = chosen_settings(runs)
    best = choice.loc[choice["rule"] == BEST, ["architecture", "optimizer", "setting_id"]]
    best_rates = best.merge(tried[["setting_id", "lr", "others"]], on="setting_id").merge(grids, on=GRID)
    best_rates["inside"] = (best_rates["lowest"] < best_rates["lr"]) & (
        best_rates["lr"] < best_rates["highest"]
    )
    columns = [*GRID[:2], "setting_id", "lr", "lowest", "highest", "tried", "inside"]
    return best_rates.sort_values(GRID[:2], kind="stable")[columns].reset_index(drop=True)


def edge_notes(runs: pd.DataFrame) -> dict[str, str]:
    """By architecture, whose best learning rate is not inside its grid, as a remark; none where all are.

    Of the optimizers that a verdict compares, where any was tried with several rates.
    """
    best_rates = edges(runs)
    judged = dict(zip(runs["optimizer"], runs["adaptive"], strict=True)) | {BASELINE: True}
    outside = best_rates[
        ~best_rates["inside"] & (best_rates["tried"] > 1) & best_rates["optimizer"].map(judged).astype(bool)
    ]
    notes = {}
    for architecture, rows in outside.groupby("architecture", sort=False):
        whose = ", ".join(_where(row) for _, row in rows.iterrows())
        notes[str(architecture)] = f"; the best learning rate is at the edge of those tried: {whose}"
    return notes


def _where(row: pd.Series) -> str:
    end = "largest" if row["lr"] == row["highest"] else "smallest"
    return f"{row['optimizer']} ({row['lr']:g}, the {end} of {row['tried']})"


def _others(text: object) -> str:
    """An optimizer's settings but for the learning rate, as one text; empty where they are not known."""
    if not isinstance(text, str):
        return ""
    return json.dumps({key: value for key, value in json.loads(text).items() if key != "lr"}, sort_keys=True)
