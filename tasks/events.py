"""What tasks tell the driver while they work: small, and read without Ray and torch."""

from dataclasses import dataclass

from tasks.commit_record import Record


@dataclass(frozen=True)
class Started:
    """A task has left Ray's queue.

    Attributes:
        node: the host that it works on.
    """

    node: str


@dataclass(frozen=True)
class Published:
    """A checkpoint is on disk and its rows are committed.

    Attributes:
        pack_id: the pack.
        step: of the checkpoint.
        alive: members that have not diverged.
        record: of the segment that ends there; None where it was committed before.
    """

    pack_id: str
    step: int
    alive: int
    record: Record | None


@dataclass(frozen=True)
class Finished:
    """A task has come to its end.

    Attributes:
        record: what it has committed.
    """

    record: Record


Event = Started | Published | Finished
