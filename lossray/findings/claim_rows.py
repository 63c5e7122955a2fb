"""One row of the table of claims."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClaimRow:
    """The columns of `lossray.storage.claims_tables.CLAIMS`; NaN and None stand for null."""

    claim: str
    subject: str
    statistic: str
    estimate: float = np.nan
    low: float = np.nan
    high: float = np.nan
    p_value: float = np.nan
    p_adjusted: float = np.nan
    n: int | None = None
    verdict: str | None = None
    text: str | None = None
