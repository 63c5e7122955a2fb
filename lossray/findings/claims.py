"""The table of claims, from a study's other tables."""

from collections.abc import Mapping
from dataclasses import asdict

import pandas as pd

from lossray.findings.claim_a import claim_a_rows
from lossray.findings.claim_b import claim_b_rows
from lossray.findings.claim_c import claim_c_rows
from lossray.findings.claims_text import HEADLINES
from lossray.storage.claims_tables import CLAIMS
from lossray.study.settings import ClaimsSettings

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
