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

from flows.interrupt import Interrupt
from flows.ledger import Ledger
from flows.plan import AnalysisJob, PackPlan, Plan, described
from flows.session import Capacity, worker_options
from tasks.analyse_checkpoint import curvature, warm_up
from tasks.build_ensembles import ensemble
from tasks.compare_checkpoints import pair
from tasks.connect_runs import connectivity
from tasks.evaluate_surfaces import surfaces
from tasks.follow_runs import separations, trajectory
from tasks.jobs import (
    Attempt,
    ConnectivityJob,
    CurvatureJob,
    DegeneracyJob,
    EnsembleJob,
    PairJob,
    SeparationsJob,
    SurfaceJob,
    TrainingJob,
    TrajectoryJob,
)
from tasks.measure_degeneracy import degeneracy
from tasks.train_pack import Published, TrainingActor

ATTEMPTS = 4  # tries at a task whose worker or node died
QUEUED = 1  # analysis tasks submitted beyond those that can run, so that no worker waits for the driver
WAIT_SECONDS = 0.25  # longest time between two looks at signals and the progress display
TASKS: dict[type, Any] = {  # Ray task by job
    CurvatureJob: curvature,
    PairJob: pair,
    DegeneracyJob: degeneracy,
    TrajectoryJob: trajectory,
    SeparationsJob: separations,
    SurfaceJob: surfaces,
    ConnectivityJob: connectivity,
    EnsembleJob: ensemble,
}
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
    """

    plan: PackPlan
    actor: Any
    attempt: Attempt
    seen: set[int] = field(default_factory=set)


class Driver:
    """Runs what a plan still lacks; one object per `lossray run`.

    Args:
        plan: what the study consists of.
        ledger: what is done, counted and recorded.
        capacity: how much may run at a time.
        interrupt: asks the driver to stop.
    """

    def __init__(self, plan: Plan, ledger: Ledger, capacity: Capacity, interrupt: Interrupt) -> None:
        self.plan = plan
        self.ledger = ledger
        self.capacity = capacity
        self.interrupt = interrupt
        self.most_trainers = capacity.trainers_alone if plan.only_trains else capacity.trainers
        # An actor of a driver that was killed keeps its name for a moment: each driver has names of its own.
        self.namespace = f"{plan.namespace}-{uuid.uuid4().hex[:8]}"
        self.worker_options = worker_options([os.getcwd(), *filter(None, [plan.context.folder])])
        self.waiting = deque(pack for pack in plan.packs if not ledger.is_trained(pack))
        self.ready: list[Ready] = []  # heap of the analysis jobs that can start
        self.trainers: dict[Any, Trainer] = {}  # by generator
        self.in_flight: dict[Any, AnalysisJob] = {}  # by object reference
        self._order = count()
        self._queue(self._left_over())

    def run(self) -> bool:
        """Run until everything is done or has failed.

        Returns:
            Whether it came to the end; False after an interrupt.
        """
        self.ledger.progress.running = self._running
        try:
            warming = self._warm_up()  # held, or Ray would drop the tasks
            finished = self._loop()
            del warming
            return finished
        finally:
            self._end_trainers()  # a cluster outlives its driver, and so does a notebook's Ray

    def _loop(self) -> bool:
        while self.waiting or self.trainers or self.ready or self.in_flight:
            if self.interrupt.received:
                self._drain()
                return False
            self._submit()
            for reference in self._arrived(WAIT_SECONDS):
                self._receive(reference)
            self.ledger.tick()
        return True

    def _left_over(self) -> Iterator[AnalysisJob]:
        """Analysis that an earlier driver left undone in packs that are trained: no actor needed."""
        for pack in filter(self.ledger.is_trained, self.plan.packs):
            for step in pack.curvature_keys:
                yield from self.ledger.next_jobs(pack, step)

    def _warm_up(self) -> list[Any]:
        """Let workers import torch and read the data while the first actors start, which takes as long."""
        if not self.waiting:
            return []
        options = {**self.capacity.curvature.options(), **self.worker_options}
        task = warm_up.options(name="warm-up", **options)
        workers = max(0, self._room() - QUEUED - min(len(self.waiting), self.most_trainers))
        return [task.remote(self.plan.context) for _ in range(workers)]

    def _queue(self, jobs: Iterable[AnalysisJob]) -> None:
        """Early steps go first: every pack has rows soon, however many checkpoints others have."""
        for job in jobs:
            heapq.heappush(self.ready, Ready(job.step, next(self._order), job))

    def _room(self) -> int:
        """Analysis tasks that may be submitted: those that can run beside the actors, and a few to queue."""
        return max(1, self.capacity.curvatures - len(self.trainers)) + QUEUED

    def _submit(self) -> None:
        while self.waiting and len(self.trainers) < self.most_trainers:
            self._start_trainer(self.waiting.popleft(), Attempt(), set())
        while self.ready and len(self.in_flight) < self._room():
            job = heapq.heappop(self.ready).job
            self._start_analysis(replace(job, attempt=Attempt()))

    def _start_trainer(self, plan: PackPlan, attempt: Attempt, seen: set[int]) -> None:
        retry = f"#{attempt.number}" if attempt.number > 1 else ""
        name = f"train/{plan.pack.pack_id}{retry}"
        actor_class: Any = TrainingActor  # what ray.remote has made of it
        options = self.capacity.train.options() | self.worker_options
        actor = actor_class.options(name=name, namespace=self.namespace, **options).remote()
        self._train(actor, plan, attempt, seen)

    def _train(self, actor: Any, plan: PackPlan, attempt: Attempt, seen: set[int]) -> None:
        job: TrainingJob = self.plan.training_job(plan, attempt)
        fit = actor.fit.options(name="train", num_returns="streaming")
        self.trainers[fit.remote(job, self.capacity.train.cpus)] = Trainer(plan, actor, attempt, seen)

    def _start_analysis(self, job: AnalysisJob) -> None:
        share = self.capacity.curvature
        function: Any = TASKS[type(job)]
        task = function.options(name=job.kind, max_retries=0, **share.options(), **self.worker_options)
        self.in_flight[task.remote(job, share.cpus)] = job

    def _arrived(self, seconds: float) -> list[Any]:
        """All that is ready, after a wait for the first: a long replay keeps no finished task waiting."""
        references = [*self.trainers, *self.in_flight]
        if not references:
            return []
        ray.wait(references, num_returns=1, timeout=seconds)
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        return list(ready)

    def _receive(self, reference: Any) -> None:
        if reference in self.trainers:
            self._receive_checkpoint(reference)
        else:
            self._receive_analysis(reference)

    def _receive_checkpoint(self, stream: Any) -> None:
        trainer = self.trainers[stream]
        try:
            published: Published = ray.get(next(stream))
        except StopIteration:
            self.ledger.training_done(trainer.plan)
            if self.waiting:  # the actor goes on with another pack: a new process would import torch first
                self._train(self.trainers.pop(stream).actor, self.waiting.popleft(), Attempt(), set())
            else:
                self._end_trainer(stream)
        except RayError as error:
            self._end_trainer(stream)
            self._retry_or_fail_training(trainer, error)
        else:
            if published.step not in trainer.seen:
                trainer.seen.add(published.step)
                self.ledger.checkpoint_trained()
                self._queue(self.ledger.next_jobs(trainer.plan, published.step))

    def _receive_analysis(self, reference: Any) -> None:
        job = self.in_flight.pop(reference)
        try:
            ray.get(reference)
        except RayError as error:
            if _is_system_failure(error) and job.attempt.number < ATTEMPTS:
                self._start_analysis(replace(job, attempt=Attempt(job.attempt.number + 1)))
            else:
                self.ledger.analysis_failed(job, _reason(error), str(error))
        else:
            self._queue(self.ledger.analysis_done(job))

    def _end_trainer(self, stream: Any) -> None:
        ray.kill(self.trainers.pop(stream).actor)

    def _end_trainers(self) -> None:
        for stream in list(self.trainers):
            self._end_trainer(stream)

    def _retry_or_fail_training(self, trainer: Trainer, error: RayError) -> None:
        if _is_system_failure(error) and trainer.attempt.number < ATTEMPTS:
            self._start_trainer(trainer.plan, Attempt(trainer.attempt.number + 1), trainer.seen)
        else:
            self.ledger.training_failed(trainer.plan, trainer.attempt, _reason(error), str(error))

    def _drain(self) -> None:
        """Let analysis tasks in flight finish, for as long as the signal allows; their commits are kept.

        Training ends at once: it resumes from its newest checkpoint, and the tasks may need its CPUs.
        """
        self._end_trainers()
        deadline = time.monotonic() + self.interrupt.drain_seconds
        self.ledger.progress.state = "stopping"
        self.ledger.progress.refresh(force=True)
        while self.in_flight and (left := deadline - time.monotonic()) > 0:
            ready, _ = ray.wait(list(self.in_flight), num_returns=1, timeout=left)
            for reference in ready:
                self._receive_analysis(reference)

    def _running(self) -> list[str]:
        training = [f"train {trainer.plan.pack.pack_id}" for trainer in self.trainers.values()]
        return training + [described(job) for job in self.in_flight.values()]


def _reason(error: RayError) -> str:
    """The exception that the task raised, where one did, or what happened to its worker."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {cause}"


def _is_system_failure(error: RayError) -> bool:
    """Whether another try may succeed: the worker, node or disk failed rather than the work."""
    if isinstance(error, RayTaskError):
        return isinstance(error.cause, OSError)
    return isinstance(error, SYSTEM_FAILURES)
