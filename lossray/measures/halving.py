"""Out of memory: a task goes on with half of its pack at a time, then with a quarter, down to one run.

After that it takes fewer examples at a time. Keys and packs stay what they are, and so do the numbers, up to
rounding: no member depends on those that are computed together with it.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from lossray.errors import ResourceError
from lossray.limits import WHOLE, Limits, halved, most_halvings
from lossray.measures.cells import Row
from lossray.memory import is_out_of_memory
from lossray.study import Pack

Result = TypeVar("Result")


@dataclass(frozen=True)
class Part:
    """Some of what a task works on, which it holds in memory at once.

    Attributes:
        members: indices of the runs (or pairs of them).
        limits: how much of these is evaluated at once.
    """

    members: range
    limits: Limits

    def of(self, pack: Pack) -> Pack:
        """The pack with these runs alone."""
        return replace(pack, seeds=tuple(pack.seeds[r] for r in self.members))


def whole(pack: Pack) -> Part:
    """All runs of a pack."""
    return Part(range(len(pack.seeds)), WHOLE)


@dataclass
class Halving:
    """How much a task holds at once; less each time that memory has run out.

    Attributes:
        size: runs (or pairs of them) that it works on.
        times: halvings so far, those of earlier attempts included.
        noun: what it works on.
    """

    size: int
    times: int
    noun: str = "runs"

    @property
    def limits(self) -> Limits:
        """What is held at once now."""
        return halved(self.times, self.size)

    @property
    def held(self) -> str:
        """What is held at once; nothing where it is everything."""
        limits = self.limits
        runs = f"{limits.members} of {self.size} {self.noun}" if limits.members else ""
        examples = f"1/{round(1 / limits.share)} of the examples" if limits.share < 1 else ""
        held = " and ".join(filter(None, (runs, examples)))
        return held and f"{held} at a time"

    @property
    def reduced(self) -> str | None:
        """The same for the table `tasks`."""
        return f"{self.held} after running out of memory" if self.held else None

    def halve(self, error: Exception) -> None:
        """Hold half as much from now on.

        Raises:
            ResourceError: nothing is left to halve.
            Exception: ``error`` itself, where it is no lack of memory.
        """
        if not (isinstance(error, ResourceError) or is_out_of_memory(error)):
            raise error
        if self.times >= most_halvings(self.size):
            if isinstance(error, ResourceError):
                raise error
            first_line = str(error).strip().partition("\n")[0].removesuffix(".")
            raise ResourceError(
                f"out of memory with {self.held}: {first_line}; give the task a GPU of its own "
                "(gpus = 1 in [resources]) or one with more memory, or take a smaller training.batch_size"
            ) from error
        self.times += 1

    def run(self, work: Callable[[Limits], Result]) -> Result:
        """The result of ``work``, tried with less in memory until it comes through."""
        while True:
            try:
                return work(self.limits)
            except Exception as error:
                self.halve(error)
            release_memory()  # outside, where no traceback holds the frames of the failed try

    def by_parts(self, work: Callable[[Part], Result]) -> list[Result]:
        """The results of ``work`` on all parts: one part, until memory has run out."""
        return self.run(lambda limits: [work(part) for part in self._parts(limits)])

    def _parts(self, limits: Limits) -> Iterator[Part]:
        size = limits.members or self.size
        for start in range(0, self.size, size):
            yield Part(range(start, min(start + size, self.size)), replace(limits, members=None))


def rows_of_all(parts: Iterable[Mapping[str, list[Row]]]) -> dict[str, list[Row]]:
    """The rows of all parts by table."""
    rows: dict[str, list[Row]] = {}
    for part in parts:
        for table, entries in part.items():
            rows.setdefault(table, []).extend(entries)
    return rows


def release_memory() -> None:
    """Give back what a failed try has held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
