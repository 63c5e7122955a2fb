"""What a study waits for when the cluster has no node, or no room, for its tasks."""

from collections.abc import Collection
from dataclasses import dataclass

from flows.capacity import Capacity, Kind, unmet
from lossray.errors import StudyError

BUSY_SECONDS = 20.0  # after which tasks that have not started wait for others to end: a worker starts in less


@dataclass
class ResourceWait:
    """Looks at what has not started, and says what it waits for.

    Attributes:
        patience: seconds for which no node of the cluster may have what is needed, while nothing runs.
        text: what is waited for now; empty while the study works.
        seconds: for which it has waited so far, and nothing ran.
    """

    patience: float
    text: str = ""
    seconds: float = 0.0
    _state: str = "running"  # or "missing": no node has what is needed; or "queued": one has it
    _since: float = 0.0  # when that began, on the caller's clock
    _before: float = 0.0  # `seconds` then

    def look(
        self, now: float, room: Capacity, needed: Collection[Kind], *, running: bool, embedded: bool
    ) -> None:
        """Look once.

        Args:
            now: on a monotonic clock, in seconds.
            room: what the cluster holds.
            needed: kinds of which a task is to start, or has been given to Ray and has not started.
            running: whether any task of this study has started.
            embedded: whether the cluster is this study's alone.

        Raises:
            StudyError: for longer than the patience nothing ran, and no node had what is needed.
        """
        missing = [kind for kind in needed if not room.fits(kind)]
        at_work = running or not needed
        self._enter("running" if at_work else "missing" if len(missing) == len(needed) else "queued", now)
        idle = now - self._since
        if self._state == "running":
            self.text = _waiting(missing, room)
            return
        if self._state == "missing":
            if idle >= self.patience:
                waited = f"none with that came in {self.patience:g} s (resources.wait)"
                raise StudyError(f"{unmet(missing[0], room)}; {waited}; the same command resumes")
            self.text = _waiting(missing, room)
        else:
            busy = not embedded and idle >= BUSY_SECONDS
            self.text = _waiting(needed, room, ", which others use") if busy else ""
        self.seconds = self._before + (idle if self.text else 0.0)

    def _enter(self, state: str, now: float) -> None:
        if state != self._state:
            self._state, self._since, self._before = state, now, self.seconds


def _waiting(kinds: Collection[Kind], room: Capacity, remark: str = "") -> str:
    """For a reader: "waiting for 1 CPU (the cluster has 0 CPUs and 0 GPUs)"; empty where nothing is."""
    if not kinds:
        return ""
    asked = " and ".join(dict.fromkeys(str(room.shares.of(kind)) for kind in kinds))
    return f"waiting for {asked} (the cluster has {room}{remark})"
