"""One row of the table of claims."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClaimRow:
    """The columns of `lossray.storage.claims_tables.CLAIMS`; NaN and None stand for null.

    Attributes:
        claim: which, and which part of it: "A", "A/contrast", ...
        subject: what the row is about, in words.
        statistic: what is estimated, or "verdict".
        estimate: of the statistic.
        low: lower end of its interval, or a one-sided bound.
        high: upper end, likewise.
        p_value: of what the text says.
        p_adjusted: the same, adjusted over the family that the text names.
        n: number of units: seeds, pairs of runs, base runs.
        verdict: in words.
        text: why, or how it was computed.
    """

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
