"""What claim A compares: the chosen runs at each level of loss, and S of each of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from lossray.findings.energies import ALIGNMENT_COLUMNS, observations
from lossray.findings.matching import (
    BEST,
    chosen_settings,
    described_runs,
    frame_of,
    lost_runs,
    matched_points,
)
from lossray.study.settings import ClaimsSettings


@dataclass(frozen=True)
class Comparison:
    """Runs, the checkpoints at which they are compared, and their rows of `alignment` there.

    Attributes:
        runs: of `described_runs`.
        alignment: the table, all of it.
        points: of `matched_points`.
        lost: of `lost_runs`.
        rows: of `observations`.
    """

    runs: pd.DataFrame
    alignment: pd.DataFrame
    points: pd.DataFrame
    lost: pd.DataFrame
    rows: pd.DataFrame


def comparison_of(tables: Mapping[str, pd.DataFrame], settings: ClaimsSettings) -> Comparison:
    """Of the tables `runs`, `checkpoints` and `alignment`, at the levels of loss of the settings."""
    runs = described_runs(tables)
    alignment = frame_of(tables, "alignment", ALIGNMENT_COLUMNS)
    checkpoints = frame_of(tables, "checkpoints", ("run_id", "step", "train_loss"))
    start = checkpoints[checkpoints["step"] == 0]
    later = checkpoints[checkpoints["step"] > 0].merge(_moving(alignment), on=["run_id", "step"])
    choice = chosen_settings(runs)
    considered = pd.concat([start, later], ignore_index=True)
    points = matched_points(runs, considered, _analysed(choice, runs, alignment), levels=settings.levels)
    return Comparison(runs, alignment, points, lost_runs(runs, choice), observations(points, alignment))


def _analysed(choice: pd.DataFrame, runs: pd.DataFrame, alignment: pd.DataFrame) -> pd.DataFrame:
    """The choice without rules by which hardly anything was analysed: in tuning only the best rates are."""
    setting_ids = runs.loc[runs["run_id"].isin(alignment["run_id"]), "setting_id"]
    rows = choice["setting_id"].isin(setting_ids)
    whole = rows.groupby([choice["architecture"], choice["rule"]]).transform("all")
    return choice[whole | (choice["rule"] == BEST)]


def _moving(alignment: pd.DataFrame) -> pd.DataFrame:
    """Run and step of the windows in which the parameters move: not so where a schedule has ended at zero."""
    keys = ["run_id", "step"]
    raw = alignment[(alignment["direction"] == "update") & (alignment["gauge"] == "raw")]
    still = raw.loc[raw["log_energy"].isna(), keys].drop_duplicates()
    windows = pd.concat([alignment[keys].drop_duplicates(), still])
    return windows.drop_duplicates(keep=False)
