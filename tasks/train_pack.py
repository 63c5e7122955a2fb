"""Train one pack: stream a checkpoint as soon as it is published.

A segment is the training between two checkpoints. Its parts are published and committed together with the
checkpoint at its end, so that a killed actor loses at most the segment it was in: run again, the body replays
the checkpoints on disk in order (rows that were not committed come from the checkpoint file) and trains on
from the newest. Only those of this very training are taken: each carries its training's key.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from torch import Tensor

from lossray.errors import StoreError
from lossray.packages import running
from lossray.storage import checkpoints
from lossray.storage.checkpoints import Checkpoint, read_checkpoint
from lossray.storage.store import Store
from lossray.study import Pack, Study
from lossray.training.loop import checkpoint_steps, train
from lossray.training.optimizers import OPTIMIZERS
from lossray.training.schedules import ScheduleSettings
from tasks.commit_record import Attempt, Stopwatch
from tasks.context import (
    Context,
    dataset_of,
    device_name,
    local_device,
    prepare_worker,
    stack_of,
)
from tasks.recorded_run import recorded_checkpoints

Row = dict[str, Any]


@dataclass(frozen=True)
class TrainingJob:
    """Train one pack from its newest checkpoint to the last step."""

    context: Context
    pack: Pack
    key: str  # task key of the whole training
    checkpoint_keys: Mapping[int, str]  # step -> task key of the segment that ends there
    attempt: Attempt


@dataclass(frozen=True)
class Published:
    """A checkpoint is on disk and its rows are committed."""

    pack_id: str
    step: int
    alive: int  # members that have not diverged


def train_pack(job: TrainingJob, device: torch.device | None = None) -> Iterator[Published]:
    """Replay what is on disk, train the rest, and commit the runs.

    Args:
        job: what to train.
        device: where; None takes this machine's GPU if it has one.

    Yields:
        One event for each checkpoint, in order of the steps.
    """
    device = device or local_device()
    store = Store(job.context.out)
    whole = Stopwatch(job.attempt, device_name(device))
    segments = _Segments(job, store, Stopwatch(job.attempt, device_name(device)))
    if job.pack.recorded:
        found = _recorded(job, segments, device)
    else:
        found = _trained(store, job, segments.committed, device)
    for checkpoint in found:
        yield segments.commit(checkpoint)
        segments.watch.restart()  # after the yield: without Ray the analysis runs meanwhile
    store.publish("runs", job.key, _run_rows(segments, whole.device))
    record = whole.record(job.key, "training", pack_id=job.pack.pack_id)
    store.commit(record | {"status": "done" if segments.all_alive else "diverged"})


@ray.remote(num_cpus=1, max_restarts=0)
class TrainingActor:
    """One pack's training; the driver starts a new actor where one dies."""

    def fit(self, job: TrainingJob, cpus: float) -> Iterator[Published]:
        """Stream the events of `train_pack` (a Ray generator)."""
        yield from train_pack(job, prepare_worker(cpus))


def _trained(
    store: Store, job: TrainingJob, committed: Collection[str], device: torch.device
) -> Iterator[Checkpoint]:
    """All checkpoints of a pack, on the CPU: those on disk, the others as they are trained and written."""
    newest: Checkpoint | None = None
    for newest in _replay(store, job, committed):
        yield newest
    for checkpoint in _train_on(job, newest, device):
        path = store.checkpoint_path(job.pack.pack_id, checkpoint.step)
        data = checkpoints.dumps(replace(checkpoint, training_key=job.key, versions=running()))
        store.write_bytes(path, data)
        yield checkpoints.loads(data, name=path)  # as a replay would read it


def _recorded(job: TrainingJob, segments: "_Segments", device: torch.device) -> Iterator[Checkpoint]:
    """All checkpoints of a recorded run; the last one is evaluated for the `runs` row in any case."""
    keys = job.checkpoint_keys
    unknown = {step for step, key in keys.items() if key not in segments.committed or step == max(keys)}
    return recorded_checkpoints(job.context, job.pack, sorted(keys), unknown, device)


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


def _train_on(job: TrainingJob, newest: Checkpoint | None, device: torch.device) -> Iterator[Checkpoint]:
    settings = job.context.study.training
    if newest is not None and newest.step == checkpoint_steps(settings)[-1]:
        return
    dtype = getattr(torch, settings.dtype)
    dataset = dataset_of(job.context, dtype)
    assert job.pack.optimizer is not None  # only a recorded run's may be unknown
    stack, theta, buffers = stack_of(job.pack, dataset, dtype=dtype, device=device)
    yield from train(
        stack,
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

    def __init__(self, job: TrainingJob, store: Store, watch: Stopwatch) -> None:
        self.job = job
        self.store = store
        self.watch = watch
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
        if key not in self.committed:
            path = self.store.checkpoint_path(job.pack.pack_id, checkpoint.step)
            self.store.publish("training", key, _training_rows(job, checkpoint))
            self.store.publish("checkpoints", key, _checkpoint_rows(job, checkpoint, self.initial, path))
            self.store.commit(
                self.watch.record(key, "checkpoint", pack_id=job.pack.pack_id, step=checkpoint.step)
            )
        self.last = checkpoint
        self.seconds += checkpoint.seconds
        return Published(job.pack.pack_id, checkpoint.step, int(checkpoint.alive.sum()))


def _training_rows(job: TrainingJob, checkpoint: Checkpoint) -> list[Row]:
    """Rows of the `training` table from one segment's log."""
    log = {name: column.numpy() for name, column in checkpoint.log.items()}
    shared = ("step", "lr", "examples_seen")
    return [
        {
            "run_id": run_id,
            **{name: _value(log[name][i] if name in shared else log[name][i, r]) for name in log},
        }
        for r, run_id in enumerate(job.pack.run_ids)
        for i in range(len(log["step"]))
    ]


def _checkpoint_rows(
    job: TrainingJob, checkpoint: Checkpoint, initial: Mapping[str, Tensor], path: str
) -> list[Row]:
    norms, distances = _norms(checkpoint.parameters), _norms(checkpoint.parameters, initial)
    rows = []
    for r, run_id in enumerate(job.pack.run_ids):
        alive = bool(checkpoint.alive[r])
        row = {
            "run_id": run_id,
            "step": checkpoint.step,
            "pack_id": job.pack.pack_id,
            "member": r,
            "path": path,
            "alive": alive,
            "parameter_norm": norms[r] if alive else None,
            "distance_from_init": distances[r] if alive else None,
        }
        rows.append(row | {name: _value(values[r]) for name, values in checkpoint.evaluation.items()})
    return rows


def _norms(parameters: Mapping[str, Tensor], origin: Mapping[str, Tensor] | None = None) -> list[float]:
    """Euclidean norm of every member's parameters, or their distance from ``origin``, in float64."""
    squares = sum(
        (tensor.double() - (origin[name].double() if origin else 0)).flatten(1).square().sum(1)
        for name, tensor in parameters.items()
    )
    return [float(square) ** 0.5 for square in torch.as_tensor(squares)]


def _run_rows(segments: _Segments, device: str) -> list[Row]:
    pack, last = segments.job.pack, segments.last
    assert last is not None  # step 0 always has a checkpoint, and a recorded run has one
    shared: Row = {
        "n_params": sum(tensor[0].numel() for tensor in last.parameters.values()),
        "data_fingerprint": segments.job.context.data_key,
        "wall_seconds": segments.seconds,
        "device": device,
    }
    if pack.recorded is not None:  # how it was trained is not known, but for the number format
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in last.parameters.values()}
        shared |= {"wall_seconds": None, "device": None, "dtype": ", ".join(sorted(dtypes))}
    rows = []
    for r, row in enumerate(_described(pack, segments.job.context.study)):
        diverged_at = None if last.alive[r] else int(last.diverged_at[r])
        outcome: Row = {"status": "finished", "steps_done": last.step}
        if diverged_at is not None:
            causes = "parameters" if pack.recorded else "loss, gradient or parameters"
            also = "" if pack.recorded else ", or loss too high,"
            reason = f"{causes} not finite{also} at step {diverged_at}"
            outcome = {
                "status": "diverged",
                "steps_done": diverged_at,
                "diverged_at": diverged_at,
                "reason": reason,
            }
        measures = {name: _value(values[r]) for name, values in last.evaluation.items()}
        rows.append(row | shared | outcome | measures)
    return rows


def failed_run_rows(pack: Pack, study: Study, reason: str) -> list[Row]:
    """The `runs` rows of a pack whose training failed."""
    return [row | {"status": "failed", "reason": reason} for row in _described(pack, study)]


def _described(pack: Pack, study: Study) -> list[Row]:
    """What is known of every run before it starts."""
    row: Row = {
        "pack_id": pack.pack_id,
        "setting_id": pack.setting_id,
        "model": pack.model.name,
        "activation": getattr(pack.model, "activation", None),
        "norm": getattr(pack.model, "norm", None),
        "model_settings": json.dumps(pack.model.plain()),
        "loss": study.training.loss,
        "executor": pack.executor,
        **_described_optimizer(pack),
    }
    if pack.recorded is not None:
        return [row | {"run_id": pack.recorded.run_id}]
    batch_size = None if study.training.batch_size == "full" else study.training.batch_size
    row |= {"batch_size": batch_size, "dtype": study.training.dtype}
    return [
        row | {"run_id": run_id, "seed": seed} for run_id, seed in zip(pack.run_ids, pack.seeds, strict=True)
    ]


def _described_optimizer(pack: Pack) -> Row:
    """Of a recorded run the schedule is not known, and of an optimizer of the user's own only the name."""
    optimizer, recorded = pack.optimizer, pack.recorded
    row: Row = {"optimizer": recorded.optimizer, "lr": recorded.lr} if recorded else {}
    if recorded and recorded.settings is not None:
        decay = json.loads(recorded.settings).get("weight_decay")
        return row | {
            "weight_decay": decay if isinstance(decay, float) else None,
            "optimizer_settings": recorded.settings,
            "adaptive": recorded.adaptive,
        }
    if optimizer is None:
        return row
    settings = optimizer.plain()
    if recorded:
        own = {key: value for key, value in settings.items() if key not in ScheduleSettings.model_fields}
        settings = own | {"lr": recorded.lr}
    return {
        "optimizer": optimizer.name,
        "lr": optimizer.lr,
        "weight_decay": getattr(optimizer, "weight_decay", 0.0),
        "schedule": None if recorded else optimizer.schedule,
        "optimizer_settings": json.dumps(settings),
        "adaptive": OPTIMIZERS[optimizer.name].adaptive,
        **row,
    }


def _value(number: Any) -> int | float | None:
    """A cell of a table: integers stay, NaN (not measured, or diverged) becomes null."""
    value = number.item()
    return None if isinstance(value, float) and math.isnan(value) else value
