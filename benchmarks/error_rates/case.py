"""One planted truth, and how often a verdict falls on it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MOST = 0.06  # a wrong word at most that often


@dataclass(frozen=True)
class Case:
    """A word of a verdict, and a truth at which it is counted.

    Where `wrong`, the truth is the word's own boundary, at which it should not be given: its rate is an error
    rate. Otherwise the word is right, and its rate is a power.
    """

    claim: str  # such as "A" or "B, low rank"
    word: str
    truth: str  # in words
    null: str  # how the runs scatter: "independent", "correlated 0.3", "correlated 1", "skewed", ...
    n: int  # seeds
    wrong: bool
    verdict: Callable[[np.random.Generator], str]  # of one simulated study

    @property
    def label(self) -> str:
        """All but the verdict, in one line."""
        return f"{self.claim}: {self.word}: {self.truth}: {self.null}: n={self.n}"


def hits(case: Case, *, repeats: int, seed: int = 0) -> int:
    """In how many of so many simulated studies the word is given."""
    rng = np.random.default_rng(seed)
    return sum(case.verdict(rng) == case.word for _ in range(repeats))
