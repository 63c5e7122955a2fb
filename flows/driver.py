"""The ray.wait loop: streams checkpoints from training actors to analysis tasks, bounds, retries, drains.

An analysis task is the curvature of a checkpoint or, once two neighbours have theirs, their comparison.

Ray's own retries are off. A task or an actor that dies with its worker or node is submitted again from here,
so that every attempt is counted. Work is never cancelled: a cancel that races with completion can abort the
driver; an interrupted driver stops submitting, waits a little, and leaves.
"""

import heapq
import os
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from flows.capacity import Kind, Share, Shares
from flows.cluster_watch import Backlog, ClusterWatch
from flows.interrupt import Interrupt
from flows.ledger import Ledger
from flows.plan import PackPlan, Plan, described
from flows.session import is_embedded, worker_options
from tasks.commit_record import Record
from tasks.events import Event, Finished, Published, Started
from tasks.jobs import AnalysisJob, Attempt, TrainingJob
from tasks.ray_tasks import TrainingActor, analysis, warm_up

ATTEMPTS = 4  # tries at a task whose worker or node died
QUEUED = 1  # analysis tasks submitted beyond those that can run, so that no worker waits for the driver
WAIT_SECONDS = 0.25  # longest time between two looks at signals and the progress display
SPARE_SECONDS = 60.0  # for which an actor that has trained waits for an analysis
SYSTEM_FAILURES = (
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
)


class Ready(NamedTuple):
    """An analysis job in the order of the queue."""

    step: int
    arrival: int  # decides between equal steps
    job: AnalysisJob


@dataclass
class Trainer:
    """A training actor at work.

    Attributes:
        plan: of the pack that it trains.
        actor: Ray's handle.
        attempt: the try at the training.
        seen: steps whose checkpoints have arrived, over all attempts.
        fruitless: tries that were lost since the last of them.
        node: the host that it works on; None before it has left Ray's queue.
    """

    plan: PackPlan
    actor: Any
    attempt: Attempt
    seen: set[int] = field(default_factory=set)
    fruitless: int = 0
    node: str | None = None


@dataclass
class SubmittedAnalysis:
    """An analysis task that Ray has been given.

    Attributes:
        job: what it does.
        node: the host that it works on; None before it has left Ray's queue.
        record: what it has committed; None before.
        actor: the training actor in whose process it runs; None: a Ray task.
    """

    job: AnalysisJob
    node: str | None = None
    record: Record | None = None
    actor: Any = None


class Spare(NamedTuple):
    """A training actor without work; its process has imported all that an analysis needs."""

    since: float
    actor: Any


class Driver:
    """Runs what a plan still lacks; one object per `lossray run`.

    Args:
        plan: what the study consists of.
        ledger: what is done, counted and recorded.
        shares: what its tasks take of the cluster.
        interrupt: asks the driver to stop.
    """

    def __init__(self, plan: Plan, ledger: Ledger, shares: Shares, interrupt: Interrupt) -> None:
        self.plan = plan
        self.ledger = ledger
        self.shares = shares
        self.interrupt = interrupt
        patience = plan.study.resources.wait
        self.cluster = ClusterWatch(shares, patience, embedded=is_embedded(), warm=self._warm)
        # An actor of a driver that was killed keeps its name for a moment: each driver has names of its own.
        self.namespace = f"{plan.namespace}-{uuid.uuid4().hex[:8]}"
        self.worker_options = worker_options([os.getcwd(), *filter(None, [plan.context.folder])])
        self.waiting = deque(pack for pack in plan.packs if not ledger.is_trained(pack))
        self.ready: list[Ready] = []  # heap of the analysis jobs that can start
        self.trainers: dict[Any, Trainer] = {}  # by generator
        self.in_flight: dict[Any, SubmittedAnalysis] = {}  # by generator
        self.spares: list[Spare] = []
        self._order = count()
        self._queue(self._left_over())

    def run(self) -> bool:
        """Run until everything is done or has failed.

        Returns:
            Whether it came to the end; False after an interrupt.
        """
        self.ledger.progress.running = self._running
        try:
            self._warm_up()
            return self._loop()
        finally:
            self._end_actors()  # a cluster outlives its driver, and so does a notebook's Ray

    def _loop(self) -> bool:
        while self.waiting or self.trainers or self.ready or self.in_flight:
            if self.interrupt.received:
                self._drain()
                return False
            self._look()
            self._submit()
            self._end_spares()
            for stream in self._arrived(WAIT_SECONDS):
                self._receive(stream)
            self.ledger.tick()
        return True

    def _left_over(self) -> Iterator[AnalysisJob]:
        """Analysis that an earlier driver left undone in packs that are trained: no actor needed."""
        for pack in filter(self.ledger.is_trained, self.plan.packs):
            for step in pack.curvature_keys:
                yield from self.ledger.next_jobs(pack, step)

    def _warm_up(self) -> None:
        """Let workers import torch and read the data while the first actors start, which takes as long."""
        if self.waiting:
            trainers = min(len(self.waiting), self.most_trainers)
            self.cluster.warm_up(self.shares.curvature, self.cluster.capacity.curvatures(trainers))

    def _warm(self, share: Share) -> Any:
        options = share.options() | self.worker_options
        return warm_up.options(name="warm-up", **options).remote(self.plan.context)

    def _look(self) -> None:
        """Now and then: what the cluster has now, and what the study waits for."""
        if self.cluster.look(self._backlog):
            self.ledger.progress.wait_for(self.cluster.wait.text, self.cluster.wait.seconds)

    def _backlog(self) -> Backlog:
        works: list[Trainer | SubmittedAnalysis] = [*self.trainers.values(), *self.in_flight.values()]
        trains = bool(self.waiting) or any(not trainer.node for trainer in self.trainers.values())
        analyses = bool(self.ready) or any(not task.node for task in self.in_flight.values())
        kinds: list[tuple[Kind, bool]] = [("train", trains), ("curvature", analyses)]
        return Backlog(
            needed=[kind for kind, waits in kinds if waits],
            running=any(work.node for work in works),
            packs=len(self.waiting),
            trainers=len(self.trainers),
            analyses=len(self.ready),
            in_flight=len(self.in_flight),
        )

    def _queue(self, jobs: Iterable[AnalysisJob]) -> None:
        """Early steps go first: every pack has rows soon, however many checkpoints others have."""
        for job in jobs:
            heapq.heappush(self.ready, Ready(job.step, next(self._order), job))

    @property
    def most_trainers(self) -> int:
        """Training actors at a time."""
        room = self.cluster.capacity
        return room.trainers_alone if self.plan.only_trains else room.trainers

    def _room(self) -> int:
        """Analyses that may be in flight: those that can run beside the training, and a few to queue.

        None is queued where training actors analyse: one that comes free would wait beside the queue.
        """
        analysts = len(self.spares) + sum(task.actor is not None for task in self.in_flight.values())
        slots = self.cluster.capacity.curvatures(len(self.trainers) + analysts) + analysts
        return max(1, slots) + (0 if analysts else QUEUED)

    def _submit(self) -> None:
        while self.waiting and len(self.trainers) < self.most_trainers:
            self._start_trainer(Trainer(self.waiting.popleft(), None, Attempt()))
        while self.ready and (self.spares or len(self.in_flight) < self._room()):
            job = heapq.heappop(self.ready).job
            self._start_analysis(replace(job, attempt=Attempt()))

    def _start_trainer(self, trainer: Trainer) -> None:
        retry = f"#{trainer.attempt.number}" if trainer.attempt.number > 1 else ""
        name = f"train/{trainer.plan.pack.pack_id}{retry}"
        actor_class: Any = TrainingActor  # what ray.remote has made of it
        options = self.shares.train.options() | self.worker_options
        actor = actor_class.options(name=name, namespace=self.namespace, **options).remote()
        self._train(replace(trainer, actor=actor, node=None))

    def _train(self, trainer: Trainer) -> None:
        job: TrainingJob = self.plan.training_job(trainer.plan, trainer.attempt)
        fit = trainer.actor.fit.options(name="train", num_returns="streaming")
        self.trainers[fit.remote(job, self.shares.train.cpus)] = trainer

    def _start_analysis(self, job: AnalysisJob) -> None:
        share = self.shares.curvature
        actor = self.spares.pop().actor if self.spares else None
        if actor is not None:
            task = actor.analyse.options(name=job.kind, num_returns="streaming")
        else:
            options = {**share.options(), **self.worker_options}
            task = analysis.options(name=job.kind, num_returns="streaming", max_retries=0, **options)
        self.in_flight[task.remote(job, share.cpus)] = SubmittedAnalysis(job, actor=actor)

    def _arrived(self, seconds: float) -> list[Any]:
        """All that is ready, after a wait for the first: a long replay keeps no finished task waiting."""
        streams = [*self.trainers, *self.in_flight]
        if not streams:
            return []
        ray.wait(streams, num_returns=1, timeout=seconds)
        ready, _ = ray.wait(streams, num_returns=len(streams), timeout=0)
        return list(ready)

    def _receive(self, stream: Any) -> None:
        """Take the next event of a training or an analysis."""
        receive = self._receive_training if stream in self.trainers else self._receive_analysis
        try:
            event: Event | None = ray.get(next(stream))
        except StopIteration:
            receive(stream, None)
        except RayError as error:
            receive(stream, error)
        else:
            if isinstance(event, Published | Finished) and event.record is not None:
                self.ledger.task_ended(event.record)
            receive(stream, event)

    def _receive_training(self, stream: Any, event: Event | RayError | None) -> None:
        trainer = self.trainers[stream]
        match event:
            case Started():
                trainer.node = event.node
            case Published() if event.step not in trainer.seen:
                trainer.seen.add(event.step)
                trainer.fruitless = 0
                self.ledger.checkpoint_trained()
                self._queue(self.ledger.next_jobs(trainer.plan, event.step))
            case RayError():
                self._end_trainer(stream)
                self._retry_or_fail_training(trainer, event)
            case None:
                self.ledger.training_done(trainer.plan)
                self._go_on_with(self.trainers.pop(stream).actor)

    def _go_on_with(self, actor: Any) -> None:
        """What has trained a pack trains another or analyses: a new process would import torch first."""
        if self.waiting:
            self._train(Trainer(self.waiting.popleft(), actor, Attempt()))
        elif self.shares.train == self.shares.curvature:
            self.spares.append(Spare(time.monotonic(), actor))
        else:
            ray.kill(actor)

    def _receive_analysis(self, stream: Any, event: Event | RayError | None) -> None:
        task = self.in_flight[stream]
        match event:
            case Started():
                task.node = event.node
            case Finished():
                task.record = event.record
            case _:
                del self.in_flight[stream]
                self._end_analysis(task, event)

    def _end_analysis(self, task: SubmittedAnalysis, error: RayError | None) -> None:
        """A task is over; what it has committed stands, whatever became of its worker then."""
        job = task.job
        lost = error is not None and _is_system_failure(error)
        if task.actor is not None and not lost:
            self.spares.append(Spare(time.monotonic(), task.actor))
        if task.record is not None:
            self._queue(self.ledger.analysis_done(job))
        elif lost and job.attempt.number < ATTEMPTS:
            again = job.attempt.next(halved=isinstance(error, OutOfMemoryError))
            self._start_analysis(replace(job, attempt=again))
        else:
            assert error is not None  # a task ends with a record or with an error
            self.ledger.analysis_failed(job, _reason(error), str(error))

    def _end_trainer(self, stream: Any) -> None:
        ray.kill(self.trainers.pop(stream).actor)

    def _end_actors(self) -> None:
        """All but those that still analyse: these end with their handle."""
        for stream in list(self.trainers):
            self._end_trainer(stream)
        while self.spares:
            ray.kill(self.spares.pop().actor)

    def _retry_or_fail_training(self, trainer: Trainer, error: RayError) -> None:
        """Try again, unless several tries in turn have led to no further checkpoint."""
        trainer.fruitless += 1
        if _is_system_failure(error) and trainer.fruitless < ATTEMPTS:
            again = trainer.attempt.next(halved=isinstance(error, OutOfMemoryError))
            self._start_trainer(replace(trainer, attempt=again))
        else:
            self.ledger.training_failed(trainer.plan, trainer.attempt, _reason(error), str(error))

    def _end_spares(self) -> None:
        """A spare actor holds what an analysis in Ray's queue may be waiting for, or another study."""
        queued = any(not task.node and task.actor is None for task in self.in_flight.values())
        oldest = time.monotonic() - SPARE_SECONDS
        while self.spares and (queued or self.spares[0].since < oldest):
            ray.kill(self.spares.pop(0).actor)

    def _drain(self) -> None:
        """Let analysis tasks in flight finish, for as long as the signal allows; their commits are kept.

        Training ends at once: it resumes from its newest checkpoint, and the tasks may need its CPUs.
        """
        self._end_actors()
        deadline = time.monotonic() + self.interrupt.drain_seconds
        self.ledger.progress.state = "stopping"
        self.ledger.progress.refresh(force=True)
        while self.in_flight and (left := deadline - time.monotonic()) > 0:
            ready, _ = ray.wait(list(self.in_flight), num_returns=1, timeout=left)
            for stream in ready:
                self._receive(stream)

    def _running(self) -> list[str]:
        training = [
            f"train {trainer.plan.pack.pack_id}" for trainer in self.trainers.values() if trainer.node
        ]
        return training + [described(task.job) for task in self.in_flight.values() if task.node]


def _reason(error: RayError) -> str:
    """The exception that the task raised, where one did, or what happened to its worker."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {cause}"


def _is_system_failure(error: RayError) -> bool:
    """Whether another try may succeed: the worker, node or disk failed rather than the work."""
    if isinstance(error, RayTaskError):
        return isinstance(error.cause, OSError)
    return isinstance(error, SYSTEM_FAILURES)
