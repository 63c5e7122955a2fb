"""The table of claims as a text for the command line; reading it loads no statistics."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

CLAIMS_VERSION = 3  # goes up when the same tables come to mean other claims
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


def claims_text(frame: "pd.DataFrame") -> str:
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
