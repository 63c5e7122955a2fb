"""Train one pack: stream a checkpoint as soon as it is published.

A segment is the training between two checkpoints. Its parts are published and committed together with the
checkpoint at its end, so that a killed actor loses at most the segment it was in: run again, the body replays
the checkpoints on disk in order (rows that were not committed come from the checkpoint file) and trains on
from the newest. Only those of this very training are taken: each carries its training's key.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lossray.errors import StoreError
from lossray.limits import Limits
from lossray.measures.cells import Row
from lossray.measures.halving import Halving, release_memory
from lossray.measures.pack_point import stack_of
from lossray.measures.recorded_run import evaluated
from lossray.measures.run_rows import checkpoint_rows, run_rows, training_rows
from lossray.packages import running
from lossray.storage import checkpoints
from lossray.storage.checkpoints import Checkpoint, read_checkpoint
from lossray.storage.store import Store
from lossray.training.loop import train
from lossray.training.settings import checkpoint_steps
from tasks.commit_record import Stopwatch
from tasks.devices import device_name, local_device
from tasks.events import Finished, Published
from tasks.jobs import TrainingJob
from tasks.planned_data import dataset_of, dataset_on


def train_pack(job: TrainingJob, device: torch.device | None = None) -> Iterator[Published | Finished]:
    """Replay what is on disk, train the rest, and commit the runs.

    Args:
        job: what to train.
        device: where; None takes this machine's GPU if it has one.

    Yields:
        One event for each checkpoint, in order of the steps; at the end the record of the whole.
    """
    device = device or local_device()
    store = Store(job.context.out)
    whole = Stopwatch(job.attempt, device_name(device))
    # A loop holds one run at a time anyway.
    size = len(job.pack.seeds) if job.pack.executor == "vmap" else 1
    halving = Halving(size, job.attempt.halvings)
    segments = _Segments(job, store, Stopwatch(job.attempt, device_name(device)), halving)
    checkpoint_stream = _recorded(job, segments, device) if job.pack.recorded else _trained(segments, device)
    for checkpoint in checkpoint_stream:
        yield segments.commit(checkpoint)
        segments.watch.restart()  # after the yield: without Ray the analysis runs meanwhile
    store.publish("runs", job.key, segments.run_rows(whole.device))
    record = whole.record(job.key, "training", pack_id=job.pack.pack_id, reduced=halving.reduced)
    record["status"] = "done" if segments.all_alive else "diverged"
    yield Finished(store.commit(record))


def _trained(segments: "_Segments", device: torch.device) -> Iterator[Checkpoint]:
    """All checkpoints of a pack, on the CPU: those on disk, the others as they are trained and written.

    Where memory runs out, training goes on from the newest with less of the pack in memory at once.
    """
    store, job, halving = segments.store, segments.job, segments.halving
    newest: Checkpoint | None = None
    for newest in _replay(store, job, segments.committed):
        yield newest
    while True:
        try:
            trained = _train_on(job, newest, device, halving.limits)
            for newest in _written(store, job, trained):
                yield newest
        except Exception as error:
            halving.halve(error)
        else:
            return
        release_memory()


def _written(store: Store, job: TrainingJob, trained: Iterator[Checkpoint]) -> Iterator[Checkpoint]:
    """Each checkpoint as a replay would read it, once it is on disk."""
    for checkpoint in trained:
        path = store.checkpoint_path(job.pack.pack_id, checkpoint.step)
        data = checkpoints.dumps(replace(checkpoint, training_key=job.key, versions=running()))
        store.write_bytes(path, data)
        yield checkpoints.loads(data, name=path)


def _recorded(job: TrainingJob, segments: "_Segments", device: torch.device) -> Iterator[Checkpoint]:
    """All checkpoints of a recorded run; the last one is evaluated for the `runs` row in any case."""
    keys = job.checkpoint_keys
    unknown = {step for step, key in keys.items() if key not in segments.committed or step == max(keys)}
    checkpoints_and_doubts = (
        (read_checkpoint(segments.store, job.pack.pack_id, step), step in unknown) for step in sorted(keys)
    )
    dataset = dataset_on(job.context, device)
    return evaluated(job.context.study, job.pack, dataset, checkpoints_and_doubts)


def _replay(store: Store, job: TrainingJob, committed: Collection[str]) -> Iterator[Checkpoint]:
    """The checkpoints on disk, in order, up to the first that is missing, damaged or of another training."""
    for step in checkpoint_steps(job.context.study.training):
        try:
            checkpoint = read_checkpoint(store, job.pack.pack_id, step)
        except StoreError:
            return  # trained again from the one before
        if not _is_of(job, checkpoint, committed):
            return
        yield checkpoint


def _is_of(job: TrainingJob, checkpoint: Checkpoint, committed: Collection[str]) -> bool:
    """Whether a file was written by this training.

    Files from before they carried a key are trusted where their rows are committed under the planned one.
    """
    if checkpoint.training_key is None:
        return job.checkpoint_keys[checkpoint.step] in committed
    return checkpoint.training_key == job.key


def _train_on(
    job: TrainingJob, newest: Checkpoint | None, device: torch.device, limits: Limits
) -> Iterator[Checkpoint]:
    """The checkpoints after the newest."""
    settings = job.context.study.training
    if newest is not None and newest.step == checkpoint_steps(settings)[-1]:
        return
    dtype = getattr(torch, settings.dtype)
    dataset = dataset_of(job.context)
    assert job.pack.optimizer is not None  # only a recorded run's may be unknown
    stack, theta, buffers = stack_of(job.pack, dataset, dtype=dtype, device=device)
    yield from train(
        stack.limited(limits),
        theta,
        buffers,
        job.pack.optimizer,
        settings,
        dataset,
        pack_id=job.pack.pack_id,
        seeds=job.pack.seeds,
        resume=newest,
        shadow=job.context.study.angles.shadow,
    )


class _Segments:
    """Commits the segments of one pack in order, and keeps what the `runs` rows need of them."""

    def __init__(self, job: TrainingJob, store: Store, watch: Stopwatch, halving: Halving) -> None:
        self.job = job
        self.store = store
        self.watch = watch
        self.halving = halving
        self.committed = store.committed_keys()
        self.initial: Mapping[str, Tensor] = {}  # parameters at step 0, [R, *shape]
        self.last: Checkpoint | None = None
        self.seconds = 0.0

    @property
    def all_alive(self) -> bool:
        """Whether no member has diverged so far."""
        return self.last is None or bool(self.last.alive.all())

    def commit(self, checkpoint: Checkpoint) -> Published:
        """Publish and commit the rows of the segment that ends at ``checkpoint``, unless they are."""
        job, key = self.job, self.job.checkpoint_keys[checkpoint.step]
        self.initial = self.initial or checkpoint.parameters
        record = None
        if key not in self.committed:
            path = self.store.checkpoint_path(job.pack.pack_id, checkpoint.step)
            self.store.publish("training", key, training_rows(job.pack, checkpoint))
            self.store.publish("checkpoints", key, checkpoint_rows(job.pack, checkpoint, self.initial, path))
            record = self.watch.record(
                key,
                "checkpoint",
                pack_id=job.pack.pack_id,
                step=checkpoint.step,
                reduced=self.halving.reduced,
            )
            record = self.store.commit(record)
        self.last = checkpoint
        self.seconds += checkpoint.seconds
        return Published(job.pack.pack_id, checkpoint.step, int(checkpoint.alive.sum()), record)

    def run_rows(self, device: str) -> list[Row]:
        """Rows of `runs`, once the last segment is committed."""
        assert self.last is not None  # step 0 always has a checkpoint, and a recorded run has one
        context = self.job.context
        return run_rows(
            context.study,
            self.job.pack,
            self.last,
            data_key=context.data_key,
            seconds=self.seconds,
            device=device,
        )
