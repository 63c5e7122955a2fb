"""The driver's books: what is committed, what is counted, what failed."""

from collections.abc import Callable, Iterator, Mapping

from flows.followers import Event, Follower, Waiting
from flows.metrics import StudyMetrics
from flows.plan import PackPlan, Plan, described
from flows.progress import Counts, Progress
from lossray.errors import StoreError
from lossray.measures.run_rows import failed_run_rows
from lossray.storage.store import Store
from tasks.commit_record import Record, failure
from tasks.jobs import AnalysisJob, Attempt, CurvatureJob, PairJob


class Ledger:
    """Counts and records; used by the Ray driver and by the in-process one alike.

    Args:
        plan: what the study consists of.
        store: where failures are recorded.
        committed: status by task key of what was committed before this driver started.
        guard: raises once the store has been taken over by another driver.
        metrics: what Prometheus is told; None without Ray.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        committed: Mapping[str, str],
        *,
        guard: Callable[[], None],
        metrics: StudyMetrics | None = None,
    ) -> None:
        self.plan = plan
        self.store = store
        self.committed = committed
        self.guard = guard
        self.metrics = metrics
        self._packs = {pack.pack.pack_id: pack for pack in plan.packs}
        self._waiting = Waiting(follower for follower in self._followers() if follower.key not in committed)
        self._needed = self._waiting.needed_steps("trained", "analysed")  # by pack: checkpoints
        self._compared = self._waiting.needed_steps("analysed")  # by pack: eigenvectors
        self._unanalysed = {name: self._without_analysis(pack) for name, pack in self._packs.items()}
        self._trained = {name for name, pack in self._packs.items() if self._was_trained(pack)}
        self.failures: list[str] = []
        self.untrained: set[str] = set()  # ids of packs whose training has failed
        state = "tuning" if plan.only_trains else "running"
        listener = None if metrics is None else metrics.progressed
        self.progress = Progress(store, self._counts(), state=state, listener=listener)

    def tick(self) -> None:
        """Now and then: check the lease, show and publish the progress."""
        self.guard()
        self.progress.refresh()

    def task_ended(self, record: Record) -> None:
        """A task has committed this, or has failed for good."""
        if self.metrics is not None:
            self.metrics.task_ended(record)

    def is_trained(self, pack: PackPlan) -> bool:
        """Whether the pack was trained before this driver started, and leaves nothing to train again."""
        return pack.pack.pack_id in self._trained

    def unanalysed(self, pack: PackPlan) -> list[int]:
        """Steps of the pack whose curvature this driver is to compute."""
        return self._unanalysed[pack.pack.pack_id]

    def next_jobs(self, pack: PackPlan, step: int) -> list[AnalysisJob]:
        """What can start once the checkpoint at a step is on disk; asked once for each.

        That is its analysis, unless an earlier driver has done it, and the jobs that have waited for it.
        """
        name = pack.pack.pack_id
        jobs = self._after(Event("trained", name, step))
        if step in self.unanalysed(pack):
            return [self.plan.curvature_job(pack, step), *jobs]
        return [*jobs, *self._after(Event("analysed", name, step))]

    def training_done(self, pack: PackPlan) -> None:
        """All members of the pack are trained (or have diverged)."""
        self.progress.counts.runs_done += len(pack.pack.seeds)
        self.progress.counts.runs_diverged += self._diverged(pack)

    def training_failed(self, pack: PackPlan, attempt: Attempt, error: str, trace: str) -> None:
        """The pack cannot be trained: record why, and go on with the others."""
        record = failure(pack.training_key, "training", attempt, error, pack_id=pack.pack.pack_id)
        if pack.training_key not in self.committed:
            self.store.publish("runs", pack.training_key, failed_run_rows(pack.pack, self.plan.study, error))
        self._fail(record, f"training of {pack.pack.pack_id}", trace)
        self.progress.counts.runs_failed += len(pack.pack.seeds)
        self.untrained.add(pack.pack.pack_id)

    def checkpoint_trained(self) -> None:
        """A checkpoint that this driver had not seen is on disk."""
        self.progress.counts.checkpoints_trained += 1
        self.progress.counts.units_done += 1

    def analysis_done(self, job: AnalysisJob) -> list[AnalysisJob]:
        """A job is committed; returns those that can start now."""
        counts = self.progress.counts
        counts.units_done += 1
        if isinstance(job, CurvatureJob):
            counts.checkpoints_analysed += 1
            return self._after(Event("analysed", job.pack.pack_id, job.step))
        if isinstance(job, PairJob):
            counts.pairs_done += 1
        else:
            counts.further_done += 1
        return []

    def analysis_failed(self, job: AnalysisJob, error: str, trace: str) -> None:
        """A checkpoint cannot be analysed, or another job not done: record why, and go on with the others."""
        record = failure(job.key, job.kind, job.attempt, error, pack_id=job.pack.pack_id, step=job.step)
        self._fail(record, described(job), trace)
        counts = self.progress.counts
        if isinstance(job, CurvatureJob):
            counts.checkpoints_failed += 1
        elif isinstance(job, PairJob):
            counts.pairs_failed += 1
        else:
            counts.further_failed += 1

    def _followers(self) -> Iterator[Follower]:
        for pack in self.plan.packs:
            yield from pack.followers

    def _after(self, event: Event) -> list[AnalysisJob]:
        """The jobs that have waited for this event, and for nothing else any more."""
        ready = self._waiting.after(event)
        return [self.plan.job_of(self._packs[follower.pack_id], follower) for follower in ready]

    def _without_analysis(self, pack: PackPlan) -> list[int]:
        """Steps whose curvature is not committed, or is to be computed again for its eigenvectors."""
        again = self._without_vectors(pack) if self.plan.study.curvature.vectors else ()
        return [
            step for step, key in pack.curvature_keys.items() if key not in self.committed or step in again
        ]

    def _without_vectors(self, pack: PackPlan) -> list[int]:
        """Analysed steps whose eigenvectors are still needed, and have been deleted."""
        return [
            step
            for step in self._compared[pack.pack.pack_id]
            if pack.curvature_keys[step] in self.committed
            and not self.store.exists(self.store.vectors_path(pack.pack.pack_id, step))
        ]

    def _was_trained(self, pack: PackPlan) -> bool:
        """A checkpoint, or a record, that is still needed may have been deleted: then the pack trains again.

        Checkpoints on disk are read, not trained: a record that is missing costs no step.
        """
        needed = {*self.unanalysed(pack), *self._needed[pack.pack.pack_id]}
        paths = [self.store.checkpoint_path(pack.pack.pack_id, step) for step in sorted(needed)]
        recorded = self.committed.keys() >= {pack.training_key, *pack.checkpoint_keys.values()}
        return recorded and all(map(self.store.exists, paths))

    def _diverged(self, pack: PackPlan) -> int:
        """How many runs of a trained pack have diverged."""
        if self.committed.get(pack.training_key) == "done":
            return 0
        try:
            runs = self.store.read_table(self.store.part_path("runs", pack.training_key), "runs")
        except StoreError:  # gathering says so
            return 0
        statuses: list[str] = runs["status"].to_pylist()
        return statuses.count("diverged")

    def _fail(self, record: Record, what: str, trace: str) -> None:
        path = self.store.log_path(f"{record['task_key']}.log")
        self.store.write_bytes(path, trace.encode())
        self.task_ended(self.store.commit(record))
        first_line = str(record["error"]).strip().splitlines()[:1]
        self.failures.append(f"{what} failed: {''.join(first_line)} (traceback in {path})")
        self.progress.note(self.failures[-1])

    def _counts(self) -> Counts:
        """What was done before; the checkpoints of an unfinished training are counted when replayed."""
        counts = Counts()
        for pack in self.plan.packs:
            steps, to_analyse = len(pack.checkpoint_keys), len(pack.curvature_keys)
            trained = self.is_trained(pack)
            counts.runs += len(pack.pack.seeds)
            counts.runs_done += len(pack.pack.seeds) if trained else 0
            counts.runs_diverged += self._diverged(pack) if trained else 0
            counts.checkpoints += steps
            counts.checkpoints_trained += steps if trained else 0
            counts.to_analyse += to_analyse
            counts.checkpoints_analysed += to_analyse - len(self.unanalysed(pack))
        undone = {follower.key for follower in self._waiting.followers}
        for follower in self._followers():
            if follower.kind == "pair":
                counts.pairs += 1
                counts.pairs_done += follower.key not in undone
            else:
                counts.further += 1
                counts.further_done += follower.key not in undone
        counts.units = counts.checkpoints + counts.to_analyse + counts.pairs + counts.further
        done = counts.checkpoints_trained + counts.checkpoints_analysed
        counts.units_done = done + counts.pairs_done + counts.further_done
        return counts
