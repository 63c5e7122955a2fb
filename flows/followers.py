"""Jobs that wait for others: what each needs to have happened, and who can start when something has."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Event(NamedTuple):
    """A checkpoint of a pack is on disk (`trained`), or its curvature is committed (`analysed`)."""

    what: Literal["trained", "analysed"]
    pack_id: str
    step: int


@dataclass(frozen=True)
class Follower:
    """A planned job, beside the training of a pack and the curvature of its checkpoints.

    Attributes:
        kind: as in the `tasks` table: "pair", "degeneracy", ...
        pack_id: the pack that it works on.
        step: the checkpoint that it works on; the last of several.
        key: its task key.
        needs: all that must have happened before it can start.
    """

    kind: str
    pack_id: str
    step: int
    key: str
    needs: frozenset[Event]


class Waiting:
    """The followers that are still to be done, by what they wait for.

    Args:
        followers: those without a commit.
    """

    def __init__(self, followers: Iterable[Follower]) -> None:
        self.followers = tuple(followers)
        self._open = {follower.key: set(follower.needs) for follower in self.followers}
        self._by_event: dict[Event, list[Follower]] = defaultdict(list)
        for follower in self.followers:
            for event in follower.needs:
                self._by_event[event].append(follower)

    def after(self, event: Event) -> list[Follower]:
        """The followers that nothing keeps any more once ``event`` has happened; each is given once."""
        ready = []
        for follower in self._by_event.pop(event, ()):
            self._open[follower.key].discard(event)
            if not self._open[follower.key]:
                ready.append(follower)
        return ready

    def needed_steps(self, *whats: str) -> defaultdict[str, set[int]]:
        """By pack: the steps of which a follower needs the checkpoint, or what its analysis has left."""
        steps: defaultdict[str, set[int]] = defaultdict(set)
        for follower in self.followers:
            for event in follower.needs:
                if event.what in whats:
                    steps[event.pack_id].add(event.step)
        return steps
