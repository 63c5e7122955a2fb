"""How much of a pack is held in memory at once: all of it, until memory has run out."""

from dataclasses import dataclass

SHARE_HALVINGS = 5  # of the examples, once one run is left


@dataclass(frozen=True)
class Limits:
    """What is held at once. Less gives the same numbers up to rounding, and takes longer.

    Attributes:
        members: runs that are evaluated together; None: all.
        share: of the examples, and of the bytes of a graph, that are otherwise held at once.
    """

    members: int | None = None
    share: float = 1.0

    def portion(self, number: int) -> int:
        """So much of a number of examples or bytes, at least one."""
        return max(1, int(number * self.share))


WHOLE = Limits()


def halved(times: int, members: int) -> Limits:
    """What is left of ``members`` after so many halvings: first of these, then of the examples."""
    first = min(times, most_halvings(members) - SHARE_HALVINGS)
    return Limits(-(-members // 2**first) if first else None, 0.5 ** (times - first))


def most_halvings(members: int) -> int:
    """After which there is nothing more to halve."""
    return (members - 1).bit_length() + SHARE_HALVINGS
