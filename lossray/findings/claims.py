"""The table of claims, from a study's other tables; and its text for the command line."""

from collections.abc import Mapping
from dataclasses import asdict

import pandas as pd

from lossray.findings.claim_a import claim_a_rows
from lossray.findings.claim_b import claim_b_rows
from lossray.findings.claim_c import claim_c_rows
from lossray.storage.claims_tables import CLAIMS
from lossray.study.settings import ClaimsSettings

CLAIMS_VERSION = 3  # goes up when the same tables come to mean other claims
TABLES_READ = (
    "runs",
    "checkpoints",
    "alignment",
    "degeneracy",
    "predictions",
    "ensembles",
    "members",
    "rescalings",
)
HEADLINES = {"A": "A. Perpendicularity", "B": "B. Degeneracy", "C": "C. Ensembles from scale invariance"}
WORDS = {
    ("A", "update"): "the updates of adaptive methods are almost perpendicular to v1, SGD's are not",
    ("A", "minibatch_gradient"): "the same of their minibatch gradients",
    ("A", "dispersion"): "SGD's angle follows no such rule: it is less regular than every adaptive method's",
    (
        "C",
        "overall",
    ): "at equal budget, rescaling makes a better ensemble than no rescaling and than learning rates",
}


def claims_of(tables: Mapping[str, pd.DataFrame], settings: ClaimsSettings) -> pd.DataFrame:
    """The `claims` table: the statistics and verdicts of claims A, B and C (docs/science.md, "Claims").

    Args:
        tables: TABLES_READ by name, as `open_study(...).table` gives them. What is empty or not there is
            missing data, which a verdict names.
        settings: margins and level.

    Returns:
        The columns of CLAIMS, the verdicts first; keys are unique.

    Raises:
        DataError: the ensembles of one setting are scored on different test splits.
    """
    rows = [
        *claim_a_rows(tables, settings),
        *claim_b_rows(tables, settings),
        *claim_c_rows(tables, settings),
    ]
    columns = [column.name for column in CLAIMS.columns]
    frame = pd.DataFrame([asdict(row) for row in rows], columns=columns)
    numbers = ["estimate", "low", "high", "p_value", "p_adjusted"]
    frame[numbers] = frame[numbers].astype("float64")
    frame["n"] = frame["n"].astype("Int64")
    return frame.sort_values("claim", kind="stable", key=_headlines_first).reset_index(drop=True)


def _headlines_first(claims: pd.Series) -> pd.Series:
    return claims.map(lambda name: (name not in HEADLINES, name[0]))


def claims_text(frame: pd.DataFrame) -> str:
    """What `lossray claims` prints: the verdicts and why, then those by model.

    Args:
        frame: of `claims_of`, or the table read back.
    """
    lines: list[str] = []
    for claim, title in HEADLINES.items():
        lines.append(title)
        for row in frame[(frame["claim"] == claim)].itertuples():
            words = WORDS.get((claim, str(row.subject)), str(row.subject))
            lines += [f"  {row.verdict}: {words}", f"    {row.text}"]
        details = frame[frame["claim"] == f"{claim}/levels"]
        lines += [f"  - {row.subject}: {row.verdict}: {row.text}" for row in details.itertuples()]
        lines.append("")
    lines.append("The numbers behind them: the table `claims` (lossray tables OUT claims).")
    return "\n".join(lines)
