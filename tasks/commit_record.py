"""The commit record of a task: its row of the `tasks` table."""

import resource
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from lossray.operators.product_count import PRODUCTS
from lossray.packages import running
from lossray.storage.store import Store
from lossray.study import versions_of
from tasks.jobs import AnalysisJob, Attempt

Record = dict[str, Any]  # a row of the table `tasks`

TRAINS = ("checkpoint", "training")  # kinds that take no products; without Ray others run meanwhile


@dataclass
class Stopwatch:
    """Times one piece of work; `restart` begins the next.

    Attributes:
        attempt: at the task.
        device: where it works: "cpu", or the kind of GPU.
        started: when the piece of work began, in seconds since the epoch.
        queued: seconds between the submission and the start.
        products_before: curvature products of this process when the piece of work began.
    """

    attempt: Attempt
    device: str
    started: float = field(default_factory=time.time)
    queued: float = field(init=False)
    products_before: int = field(init=False)

    def __post_init__(self) -> None:
        """The first piece of work may have waited for a worker."""
        self.queued = max(0.0, self.started - self.attempt.submitted)
        self.products_before = PRODUCTS.total
        if self.device not in ("", "cpu"):
            forget_peak()

    def restart(self) -> None:
        """Begin timing the next piece of work, which waits for nothing."""
        self.started, self.queued = time.time(), 0.0

    def record(
        self,
        key: str,
        kind: str,
        *,
        pack_id: str | None = None,
        step: int | None = None,
        reduced: str | None = None,
    ) -> Record:
        """The row to commit now, with status `done`."""
        finished = time.time()
        return {
            "task_key": key,
            "kind": kind,
            "pack_id": pack_id,
            "step": step,
            "status": "done",
            "attempts": self.attempt.number,
            "wall_seconds": finished - self.started,
            "queue_seconds": self.queued,
            "started": datetime.fromtimestamp(self.started, UTC),
            "finished": datetime.fromtimestamp(finished, UTC),
            "node": socket.gethostname(),
            "device": self.device,
            "peak_bytes": peak_bytes(),
            "products": None if kind in TRAINS else PRODUCTS.total - self.products_before,
            "reduced": reduced,
            "error": None,
            "versions": versions_text(versions_of(kind)),
            **{f"{package}_version": version for package, version in running().items()},
        }

    def commit(self, store: Store, job: AnalysisJob, *, reduced: str | None = None) -> Record:
        """Commit what a job has published, and return its record."""
        record = self.record(job.key, job.kind, pack_id=job.pack.pack_id, step=job.step, reduced=reduced)
        return store.commit(record)


def versions_text(versions: Mapping[str, int]) -> str:
    """Versions as the `tasks` table has them: "training 1, table runs 1"."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def versions_in(text: str) -> dict[str, int]:
    """Inverse of `versions_text`."""
    return {name: int(version) for name, _, version in (entry.rpartition(" ") for entry in text.split(", "))}


def failure(
    key: str, kind: str, attempt: Attempt, error: str, *, pack_id: str | None = None, step: int | None = None
) -> Record:
    """The row of a task that failed for good; it is not a commit, so a later run tries again."""
    watch = Stopwatch(attempt, device="")
    return {
        **watch.record(key, kind, pack_id=pack_id, step=step),
        "status": "failed",
        "error": error,
        "device": None,
        "products": None,
    }


def forget_peak() -> None:
    """Begin `peak_bytes` of the GPU anew: a worker may have done other tasks before."""
    import torch  # here: as below

    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Most memory that this task has held on the GPU; where it used none, its process in main memory."""
    import torch  # here: `lossray status` reads records, and needs none

    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
