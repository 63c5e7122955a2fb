"""Paths between the last checkpoints of a setting's runs: the tables `paths` and `barriers`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import ray
import torch
from torch import Tensor

from lossray.connectivity.barriers import barriers
from lossray.connectivity.curves import evaluate_path, train_curves
from lossray.connectivity.paths import Path, bent, geometric, straight
from lossray.connectivity.settings import ConnectivitySettings
from lossray.networks.batch_norm import has_statistics
from lossray.seeds import stream
from lossray.storage.checkpoints import read_checkpoint
from lossray.storage.store import Store
from lossray.study import Pack
from lossray.training.batches import takes_all
from lossray.training.datasets import on_device
from lossray.training.schedules import learning_rate
from lossray.training.steps import TrainingTask
from tasks.checkpoint_spectra import Row, finite
from tasks.commit_record import Stopwatch
from tasks.context import dataset_of, device_name, local_device, loss_of, prepare_worker, stack_of
from tasks.path_ends import RESCALED, ConnectivityJob, PathEnds, Site, ends_of, joinable, possible


@dataclass(frozen=True)
class Joined:
    """The paths of one kind between all pairs."""

    ends: PathEnds
    path: Path
    alive: Tensor  # [P] bool
    gradient_examples: int  # that training each path took


def connect_runs(job: ConnectivityJob, device: torch.device | None = None) -> None:
    """Align, train, evaluate, publish the rows, and commit.

    An architecture without the symmetry that an alignment or a rescaling needs has no rows of it, nor has a
    pair whose frozen parameters differ, or buffers other than batch norm's so that the loss would jump.

    Args:
        job: which runs.
        device: where; None takes this machine's GPU if it has one.
    """
    device = device or local_device()
    store, study = Store(job.context.out), job.context.study
    watch = Stopwatch(job.attempt, device_name(device))
    assert study.connectivity is not None
    dtype = getattr(torch, study.training.dtype)
    dataset = on_device(dataset_of(job.context, dtype), device)
    stack, _, _ = stack_of(job.pack, dataset, dtype=dtype, device=device)
    site = joinable(Site(job, study.connectivity, stack, dataset))
    paths: list[Row] = []
    found: list[Row] = []
    if site.job.pairs and possible(site):
        ends = ends_of(site)
        for kind in ("line", "geometric") if job.aligned == RESCALED else study.connectivity.kinds:
            own = _rows(site, _joined(site, kind, ends))
            paths, found = [*paths, *own[0]], [*found, *own[1]]
    store.publish("paths", job.key, paths)
    store.publish("barriers", job.key, found)
    store.commit(watch.record(job.key, job.kind, pack_id=job.pack.pack_id, step=job.step))


@ray.remote(num_cpus=1, max_retries=0)
def connectivity(job: ConnectivityJob, cpus: float) -> None:
    """`connect_runs` as a Ray task; what it finds is in the store."""
    connect_runs(job, prepare_worker(cpus))


def pairs_of(settings: ConnectivitySettings, pack: Pack, earlier: Sequence[Pack]) -> list[tuple[str, str]]:
    """The pairs whose second run is of this pack: with packs added, pairs are added and none changes."""
    runs = [run_id for other in (*earlier, pack) for run_id in other.run_ids]
    pairs = []
    for b in range(len(runs)):
        first = max(0, b - 1) if settings.pairs == "neighbours" else 0
        pairs += [(runs[a], runs[b]) for a in range(first, b) if runs[b] in pack.run_ids]
    return pairs


# ---- the paths


def _joined(site: Site, kind: str, ends: PathEnds) -> Joined:
    """The path of every pair, trained where it has bends."""
    if kind == "line":
        return Joined(ends, straight(ends.a, ends.b), ends.alive, 0)
    if kind == "geometric":
        return Joined(ends, geometric(ends.a, ends.b), ends.alive, 0)
    task = _training(site)
    path = bent("bezier" if kind == "bezier" else "polychain", ends.a, ends.b, site.settings.bends)
    curves = train_curves(task, path, ends.buffers_a, initial_loss=_initial_losses(site))
    n, size = len(site.dataset.train.targets), task.training.batch_size
    batch = n if takes_all(n, size) else int(size)
    return Joined(ends, curves.path, ends.alive & curves.alive, task.training.steps * batch)


def _training(site: Site) -> TrainingTask:
    """The runs' optimizer, its learning rate falling to 0 along half a cosine."""
    job, training, optimizer = site.job, site.job.context.study.training, site.job.pack.optimizer
    assert optimizer is not None  # no recorded run has such a job
    steps = site.settings.steps or training.steps
    falling = optimizer.model_copy(update={"schedule": "cosine", "floor": 0.0})
    return TrainingTask(
        site.stack,
        loss_of(job.context),
        site.dataset,
        training.model_copy(update={"steps": steps}),
        optimizer,
        "",
        tuple(stream(site.seed(b), f"connectivity/{a}") for a, b in job.pairs),
        rate=lambda step: learning_rate(falling, step, steps),
    )


def _initial_losses(site: Site) -> Tensor:
    """The initial losses of the second runs, [P]: what divergence is judged by."""
    job, device = site.job, site.dataset.train.targets.device
    checkpoint = read_checkpoint(site.store, job.pack.pack_id, job.step, device)
    return checkpoint.initial_loss[[job.pack.run_ids.index(run) for _, run in job.pairs]]


# ---- the rows


def _rows(site: Site, joined: Joined) -> tuple[list[Row], list[Row]]:
    """Of the tables `paths` and `barriers`."""
    points, path, ends, dead = site.settings.points, joined.path, joined.ends, ~joined.alive[:, None]
    ts = [i / (points - 1) for i in range(points)]
    loss = loss_of(site.job.context)
    values = evaluate_path(path, site.stack, ends.buffers_a, ends.buffers_b, loss, site.dataset, ts)
    values = {name: own.masked_fill(dead, torch.nan) for name, own in values.items()}
    lengths = path.lengths(ts).masked_fill(dead, torch.nan)
    alike = _treated_alike(site, path, ends, values)
    paths: list[Row] = []
    found: list[Row] = []
    for p in range(len(site.job.pairs)):
        shared = _shared(site.job, p, path.kind)
        own = {name: value[p] for name, value in values.items()}
        paths += [
            shared
            | {"t": t, "arc_length": finite(float(lengths[p, i]))}
            | {name: finite(float(value[i])) for name, value in own.items()}
            for i, t in enumerate(ts)
        ]
        barrier = asdict(barriers(ts, lengths[p], {name: value[p] for name, value in alike.items()}))
        described = _described(joined, p, float(lengths[p, -1]))
        found.append(shared | {name: finite(float(value)) for name, value in barrier.items()} | described)
    return paths, found


def _treated_alike(site: Site, path: Path, ends: PathEnds, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values [P, T], those of the ends with recomputed batch-norm statistics as all between them have."""
    if not has_statistics(site.stack.template):
        return dict(values)
    loss, sides = loss_of(site.job.context), (ends.buffers_a, ends.buffers_b)
    own = evaluate_path(path, site.stack, *sides, loss, site.dataset, [0.0, 1.0], alike=True)
    return {
        name: torch.cat([own[name][:, :1], value[:, 1:-1], own[name][:, 1:]], dim=1) + 0 * value[:, :1]
        for name, value in values.items()
    }  # NaN where the pair has diverged


def _shared(job: ConnectivityJob, p: int, kind: str) -> Row:
    """What identifies a path."""
    run_a, run_b = job.pairs[p]
    suffix = "" if job.aligned == "none" else f"@{job.aligned}"
    return {
        "pair_id": f"{run_a}~{run_b}{suffix}",
        "kind": kind,
        "run_a": run_a,
        "run_b": run_b,
        "setting_id": job.pack.setting_id,
        "aligned": job.aligned,
    }


def _described(joined: Joined, p: int, length: float) -> Row:
    ends = joined.ends
    distance = torch.linalg.vector_norm(ends.a[p].double() - ends.b[p].double())
    return {
        "bends": len(joined.path.points) - 2,
        "endpoint_distance": finite(float(distance)),
        "distance_before": finite(float(ends.distance_before[p])),
        "path_length": finite(length),
        "function_change": finite(float(ends.function_change[p])),
        "gradient_examples": float(joined.gradient_examples),
        "status": "done" if bool(joined.alive[p]) else "diverged",
    }
