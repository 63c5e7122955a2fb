"""What the cluster has while a study runs: looked at again and again, waited for, and asked for more."""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import ray

from flows.capacity import Capacity, Kind, Share, Shares, capacity
from flows.resource_wait import ResourceWait

LOOK_SECONDS = 1.0  # between two looks at the cluster
ASK_SECONDS = 10.0  # between two requests for more of it
MOST_ASK_SECONDS = 300.0  # likewise, where it does not grow


@dataclass(frozen=True)
class Backlog:
    """What a study has to do at one moment.

    Attributes:
        needed: kinds of which a task is to start, or has been given to Ray and has not started.
        running: whether any task has started.
        packs: that wait for a training actor.
        trainers: training actors.
        analyses: that can start and have not been given to Ray.
        in_flight: analyses that have.
    """

    needed: Collection[Kind]
    running: bool
    packs: int
    trainers: int
    analyses: int
    in_flight: int


class ClusterWatch:
    """Keeps a driver's idea of the cluster up to date.

    Args:
        shares: what the study's tasks take.
        patience: seconds to wait for a node that has what is needed.
        embedded: whether the cluster is this study's alone, and does not grow.
        warm: starts a task that takes a share and only makes a worker ready.
    """

    def __init__(
        self, shares: Shares, patience: float, *, embedded: bool, warm: Callable[[Share], Any]
    ) -> None:
        self.shares = shares
        self.embedded = embedded
        self.capacity: Capacity = capacity(shares)
        self.wait = ResourceWait(patience)
        self._warm = warm
        self._warming: list[Any] = []  # held, or Ray would drop the tasks
        self._looked = self._asked = -math.inf
        self._pause, self._nodes_before = ASK_SECONDS, 0

    def warm_up(self, share: Share, workers: int) -> None:
        """Make so many workers ready."""
        self._warming += [self._warm(share) for _ in range(workers)]

    def look(self, backlog: Callable[[], Backlog]) -> bool:
        """Look at the cluster, unless it has just been looked at.

        Returns:
            Whether it has looked.

        Raises:
            StudyError: nothing runs, and no node that could has come for too long.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return False
        self._looked = now
        self.capacity = capacity(self.shares)
        work = backlog()
        self.wait.look(now, self.capacity, work.needed, running=work.running, embedded=self.embedded)
        if not self.embedded and now - self._asked >= self._pause:
            self._asked = now
            self._ask_for_more(work)
        return True

    def _ask_for_more(self, work: Backlog) -> None:
        """Tell an autoscaler how much more the study could use: as much again as it has, while that waits.

        Only tasks that wait make a cluster grow, and the study's own wait in its driver. So warm-ups ask in
        their stead: they end with the driver, while a request to the autoscaler would outlive it. Each that
        has been answered by the nodes that there were doubles the pause before the next.
        """
        if self._warming:
            _, self._warming = ray.wait(self._warming, num_returns=len(self._warming), timeout=0)
        if not self._warming:
            nodes = len(self.capacity.nodes)
            in_vain = nodes == self._nodes_before
            self._pause = min(2 * self._pause, MOST_ASK_SECONDS) if in_vain else ASK_SECONDS
            self._nodes_before = nodes
            self.warm_up(self.shares.train, min(work.packs, max(1, work.trainers)))
            self.warm_up(self.shares.curvature, min(work.analyses, max(1, work.in_flight)))
