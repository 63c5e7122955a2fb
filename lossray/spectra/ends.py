"""Which end of a spectrum: eigenvalues in the order in which they are wanted."""

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lossray.errors import StudyError
from lossray.names import unknown_name

Array = NDArray[np.float64]
End = Literal["largest", "smallest", "magnitude"]
RelativeTo = Literal["largest", "each"]  # what a tolerance is a share of: |lambda|max, or each |lambda|
RELATIVE_TO: tuple[RelativeTo, ...] = ("largest", "each")
ENDS: tuple[End, ...] = ("largest", "smallest", "magnitude")
Values = TypeVar("Values", Array, Tensor)


@dataclass(frozen=True)
class Wanted:
    """The k outermost eigenpairs of one end: algebraically largest or smallest, or largest in magnitude.

    Where `confirm` is false the pairs have to converge, but no search has to prove that nothing lies beyond.

    Attributes:
        which: the end.
        k: number of pairs.
        confirm: whether a search has to prove that nothing lies beyond; the pairs have to converge in any
            case.
    """

    which: End
    k: int
    confirm: bool = True

    def __post_init__(self) -> None:
        """Refuse less than one pair."""
        if not isinstance(self.k, int | np.integer) or self.k < 1:
            raise StudyError(f"k: found {self.k}; allowed: a whole number from 1")

    def keys(self, values: Values) -> Values:
        """What is large for the values that are wanted first."""
        if self.which == "largest":
            return values
        return -values if self.which == "smallest" else abs(values)

    def order(self, values: Array) -> NDArray[np.intp]:
        """Indices of the values, those wanted first at the front."""
        return np.argsort(-self.keys(values), kind="stable")


def allowed_residuals(
    values: Values, scale: float, *, tolerance: float, relative_to: RelativeTo = "largest"
) -> Values:
    """Largest residuals of converged pairs with these values, of an operator with |lambda|max ``scale``."""
    if relative_to == "each":
        return tolerance * abs(values)
    return tolerance * scale + 0 * values


def checked_relative_to(name: str) -> RelativeTo:
    """What a tolerance is a share of.

    Raises:
        StudyError: an unknown name.
    """
    for allowed in RELATIVE_TO:
        if allowed == name:
            return allowed
    raise StudyError(f"relative_to: {unknown_name(name, RELATIVE_TO)}")


def wanted_pairs(end: str, k: int) -> tuple[Wanted, ...]:
    """What an ``end`` asks for; "both" is k of the largest and k of the smallest.

    Raises:
        StudyError: an unknown end, or k < 1.
    """
    if end == "both":
        return Wanted("largest", k), Wanted("smallest", k)
    for name in ENDS:
        if name == end:
            return (Wanted(name, k),)
    raise StudyError(f"end: {unknown_name(end, [*ENDS, 'both'])}")
