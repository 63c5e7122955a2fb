"""The driver's books: what is committed, what is counted, what failed."""

from collections.abc import Callable, Collection

from flows.plan import PackPlan, Plan
from flows.progress import Counts, Progress
from lossray.storage.store import Store
from tasks.curvature import CurvatureJob
from tasks.record import Attempt, failure
from tasks.training import failed_run_rows


class Ledger:
    """Counts and records; used by the Ray driver and by the in-process one alike.

    Args:
        plan: what the study consists of.
        store: where failures are recorded.
        committed: task keys committed before this driver started.
        guard: raises once the store has been taken over by another driver.
    """

    def __init__(
        self, plan: Plan, store: Store, committed: Collection[str], *, guard: Callable[[], None]
    ) -> None:
        self.plan = plan
        self.store = store
        self.committed = frozenset(committed)
        self.guard = guard
        self._trained = {pack.pack.pack_id for pack in plan.packs if self._was_trained(pack)}
        self.failures: list[str] = []
        self.progress = Progress(store, self._counts(), state="running")

    def tick(self) -> None:
        """Now and then: check the lease, show and publish the progress."""
        self.guard()
        self.progress.refresh()

    def is_trained(self, pack: PackPlan) -> bool:
        """Whether the pack was trained before this driver started, and leaves nothing to train again."""
        return pack.pack.pack_id in self._trained

    def unanalysed(self, pack: PackPlan) -> list[int]:
        """Steps of the pack whose curvature was not committed when this driver started."""
        return [step for step, key in pack.curvature_keys.items() if key not in self.committed]

    def training_done(self, pack: PackPlan) -> None:
        """All members of the pack are trained (or have diverged)."""
        self.progress.counts.runs_done += len(pack.pack.seeds)

    def training_failed(self, pack: PackPlan, attempt: Attempt, error: str, trace: str) -> None:
        """The pack cannot be trained: record why, and go on with the others."""
        record = failure(pack.training_key, "training", attempt, error, pack_id=pack.pack.pack_id)
        if pack.training_key not in self.committed:
            self.store.publish("runs", pack.training_key, failed_run_rows(pack.pack, self.plan.study, error))
        self._fail(record, f"training of {pack.pack.pack_id}", trace)
        self.progress.counts.runs_failed += len(pack.pack.seeds)

    def checkpoint_trained(self) -> None:
        """A checkpoint that this driver had not seen is on disk."""
        self.progress.counts.checkpoints_trained += 1
        self.progress.counts.units_done += 1

    def checkpoint_analysed(self) -> None:
        """A curvature task is committed."""
        self.progress.counts.checkpoints_analysed += 1
        self.progress.counts.units_done += 1

    def curvature_failed(self, job: CurvatureJob, error: str, trace: str) -> None:
        """A checkpoint cannot be analysed: record why, and go on with the others."""
        record = failure(job.key, "curvature", job.attempt, error, pack_id=job.pack.pack_id, step=job.step)
        self._fail(record, f"curvature of {job.pack.pack_id} at step {job.step}", trace)
        self.progress.counts.checkpoints_failed += 1

    def _was_trained(self, pack: PackPlan) -> bool:
        """A checkpoint that is still to be analysed may have been deleted: then the pack trains again."""
        paths = [self.store.checkpoint_path(pack.pack.pack_id, step) for step in self.unanalysed(pack)]
        return pack.training_key in self.committed and all(map(self.store.exists, paths))

    def _fail(self, record: dict[str, object], what: str, trace: str) -> None:
        path = self.store.log_path(f"{record['task_key']}.log")
        self.store.write_bytes(path, trace.encode())
        self.store.commit(record)
        first_line = str(record["error"]).strip().splitlines()[:1]
        self.failures.append(f"{what} failed: {''.join(first_line)} (traceback in {path})")
        self.progress.note(self.failures[-1])

    def _counts(self) -> Counts:
        """What was done before; the checkpoints of an unfinished training are counted when replayed."""
        counts = Counts()
        for pack in self.plan.packs:
            steps, analysed = len(pack.curvature_keys), len(pack.curvature_keys) - len(self.unanalysed(pack))
            trained = self.is_trained(pack)
            counts.runs += len(pack.pack.seeds)
            counts.runs_done += len(pack.pack.seeds) if trained else 0
            counts.checkpoints += steps
            counts.checkpoints_trained += steps if trained else 0
            counts.checkpoints_analysed += analysed
        counts.units = 2 * counts.checkpoints
        counts.units_done = counts.checkpoints_trained + counts.checkpoints_analysed
        return counts
