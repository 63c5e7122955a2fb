"""Paths between the last checkpoints of a setting's runs: the tables `paths` and `barriers`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal

import ray
import torch
from torch import Tensor

from lossray.connectivity.alignment import aligned
from lossray.connectivity.barriers import barriers
from lossray.connectivity.curves import evaluate_path, train_curves
from lossray.connectivity.paths import Path, bent, geometric, straight
from lossray.connectivity.settings import Alignment, ConnectivitySettings
from lossray.errors import ModelError
from lossray.networks.layout import tensors_of
from lossray.networks.permutations import permutation_symmetry
from lossray.networks.random_gauges import random_factors
from lossray.networks.stack import Stack
from lossray.networks.symmetry import rescaling_symmetry
from lossray.seeds import stream
from lossray.storage.checkpoints import read_checkpoint
from lossray.storage.store import Store
from lossray.study import Pack
from lossray.training.batches import takes_all
from lossray.training.datasets import Dataset, on_device
from lossray.training.schedules import learning_rate
from lossray.training.steps import TrainingTask
from tasks.context import Context, dataset_of, device_name, local_device, loss_of, prepare_worker, stack_of
from tasks.record import Attempt, Stopwatch
from tasks.spectra import Row, finite

RESCALED: Literal["rescaled"] = (
    "rescaled"  # in place of an alignment: of a run with a rescaled copy of itself
)


@dataclass(frozen=True)
class ConnectivityJob:
    """Join runs of a pack, each to an earlier one or to a rescaled copy of itself."""

    context: Context
    pack: Pack
    earlier: tuple[Pack, ...]  # packs of the same setting that come before
    pairs: tuple[tuple[str, str], ...]  # runs; the second is of this pack
    aligned: Alignment | Literal["rescaled"]  # what is done to the second of each pair first
    step: int  # of the last checkpoint
    key: str
    attempt: Attempt
    kind: ClassVar[str] = "connectivity"


@dataclass(frozen=True)
class Ends:
    """Both ends of P pairs."""

    a: Tensor  # [P, d]
    b: Tensor
    alive: Tensor  # [P] bool: neither of the two runs has diverged
    buffers_a: Mapping[str, Tensor]  # name -> [P, *shape]
    buffers_b: Mapping[str, Tensor]
    distance_before: Tensor  # [P] float64, of a and b before the alignment
    function_change: Tensor  # [P] float64, by the alignment of b


def connect_runs(job: ConnectivityJob, device: torch.device | None = None) -> None:
    """Align, train, evaluate, publish the rows, and commit.

    An architecture without the symmetry that an alignment or a rescaling needs has no rows of it.

    Args:
        job: which runs.
        device: where; None takes this machine's GPU if it has one.
    """
    device = device or local_device()
    store, study = Store(job.context.out), job.context.study
    watch = Stopwatch(job.attempt, device_name(device))
    settings = study.connectivity
    assert settings is not None
    dtype = getattr(torch, study.training.dtype)
    dataset = on_device(dataset_of(job.context, dtype), device)
    stack, _, _ = stack_of(job.pack, dataset, dtype=dtype, device=device)
    paths: list[Row] = []
    found: list[Row] = []
    if _possible(job, stack):
        ends = _prepared(job, settings, stack, dataset, _ends(job, store, stack, device))
        for kind in _kinds(job, settings):
            path, alive, examples = _path(job, settings, kind, stack, dataset, ends)
            own = _rows(job, settings, path, alive, examples, stack, dataset, ends)
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


def _possible(job: ConnectivityJob, stack: Stack) -> bool:
    """Whether the architecture has the symmetry that the alignment or the rescaling needs."""
    try:
        if job.aligned in ("scale", RESCALED):
            rescaling_symmetry(stack.template, stack.layout)
        elif job.aligned != "none":
            permutation_symmetry(stack.template)
    except ModelError:
        return False
    return True


def _kinds(job: ConnectivityJob, settings: ConnectivitySettings) -> tuple[str, ...]:
    return ("line", "geometric") if job.aligned == RESCALED else settings.kinds


# ---- the ends


def _ends(job: ConnectivityJob, store: Store, stack: Stack, device: torch.device) -> Ends:
    """The runs of each pair as they are."""
    runs: dict[str, tuple[Tensor, dict[str, Tensor], Tensor]] = {}  # parameters, buffers, alive
    needed = {run for pair in job.pairs for run in pair}
    for pack in (*job.earlier, job.pack):
        if needed.isdisjoint(pack.run_ids):
            continue
        checkpoint = read_checkpoint(store, pack.pack_id, job.step, device)
        theta = stack.layout.join(checkpoint.parameters)
        for r, run_id in enumerate(pack.run_ids):
            own = {name: tensor[r] for name, tensor in checkpoint.buffers.items()}
            runs[run_id] = theta[r], own, checkpoint.alive[r]
    a, b = ([runs[pair[side]] for pair in job.pairs] for side in (0, 1))
    first, second = (torch.stack([theta for theta, _, _ in end]) for end in (a, b))
    alive = torch.stack([one[2] & other[2] for one, other in zip(a, b, strict=True)])
    distance = torch.linalg.vector_norm(first.double() - second.double(), dim=1)
    return Ends(
        first, second, alive, _stacked(a), _stacked(b), distance, torch.full_like(distance, torch.nan)
    )


def _stacked(ends: Sequence[tuple[Tensor, dict[str, Tensor], Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([own[name] for _, own, _ in ends]) for name in ends[0][1]}


def _prepared(
    job: ConnectivityJob, settings: ConnectivitySettings, stack: Stack, dataset: Dataset, ends: Ends
) -> Ends:
    """The second ends rescaled or aligned."""
    if job.aligned == "none":
        return ends
    if job.aligned == RESCALED:
        return _rescaled(job, settings, stack, dataset, ends)
    return _aligned(job, settings, stack, dataset, ends)


def _rescaled(
    job: ConnectivityJob, settings: ConnectivitySettings, stack: Stack, dataset: Dataset, ends: Ends
) -> Ends:
    symmetry = rescaling_symmetry(stack.template, stack.layout)
    seeds = [stream(_seed(job, run), "connectivity/rescaled") for _, run in job.pairs]
    sigma = torch.full((len(seeds),), settings.sigma, dtype=torch.float64)
    diagonal = symmetry.diagonal(random_factors(seeds, symmetry.units, sigma=sigma)).to(ends.b.device)
    b = (ends.b.double() * diagonal).to(ends.b.dtype)
    with torch.no_grad():
        double = stack.outputs(ends.b.double(), _doubled(ends.buffers_b), dataset.train.inputs.double())
        other = stack.outputs(
            ends.b.double() * diagonal, _doubled(ends.buffers_b), dataset.train.inputs.double()
        )
    change = (double - other).abs().flatten(1).amax(dim=1) / double.abs().flatten(1).amax(dim=1)
    return replace(ends, b=b, function_change=change)


def _doubled(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in buffers.items()}


def _aligned(
    job: ConnectivityJob, settings: ConnectivitySettings, stack: Stack, dataset: Dataset, ends: Ends
) -> Ends:
    kind = job.aligned
    assert kind != "none"
    assert kind != RESCALED
    rows, changes = list(ends.b), list(ends.function_change)
    buffers = [{name: tensor[p] for name, tensor in ends.buffers_b.items()} for p in range(len(rows))]
    for p in range(len(rows)):
        if not bool(ends.alive[p]):
            continue
        to = stack.module(ends.a[p], {name: tensor[p] for name, tensor in ends.buffers_a.items()})
        found = aligned(
            stack.module(ends.b[p], buffers[p]),
            to,
            dataset.train.inputs,
            kind=kind,
            matching=settings.matching,
        )
        parameters, buffers[p] = tensors_of(found.model)
        rows[p] = torch.cat([tensor.reshape(-1) for tensor in parameters.values()])
        changes[p] = torch.as_tensor(found.function_change, dtype=torch.float64, device=changes[p].device)
    stacked = {name: torch.stack([own[name] for own in buffers]) for name in ends.buffers_b}
    return replace(ends, b=torch.stack(rows), buffers_b=stacked, function_change=torch.stack(changes))


# ---- the paths


def _path(
    job: ConnectivityJob,
    settings: ConnectivitySettings,
    kind: str,
    stack: Stack,
    dataset: Dataset,
    ends: Ends,
) -> tuple[Path, Tensor, int]:
    """The path of every pair, which of them are alive [P], and the gradients that training each took."""
    alive = ends.alive
    if kind == "line":
        return straight(ends.a, ends.b), alive, 0
    if kind == "geometric":
        return geometric(ends.a, ends.b), alive, 0
    study = job.context.study
    task = _training(job, settings, stack, dataset)
    path = bent("bezier" if kind == "bezier" else "polychain", ends.a, ends.b, settings.bends)
    curves = train_curves(task, path, ends.buffers_a, initial_loss=_initial_losses(job, device=ends.b.device))
    n, size = len(dataset.train.targets), study.training.batch_size
    batch = n if takes_all(n, size) else int(size)
    return curves.path, alive & curves.alive, task.training.steps * batch


def _training(
    job: ConnectivityJob, settings: ConnectivitySettings, stack: Stack, dataset: Dataset
) -> TrainingTask:
    """The runs' optimizer, its learning rate falling to 0 along half a cosine."""
    study, optimizer = job.context.study, job.pack.optimizer
    assert optimizer is not None  # no recorded run has such a job
    steps = settings.steps or study.training.steps
    falling = optimizer.model_copy(update={"schedule": "cosine", "floor": 0.0})
    return TrainingTask(
        stack,
        loss_of(job.context),
        dataset,
        study.training.model_copy(update={"steps": steps}),
        optimizer,
        "",
        tuple(stream(_seed(job, b), f"connectivity/{a}") for a, b in job.pairs),
        rate=lambda step: learning_rate(falling, step, steps),
    )


def _initial_losses(job: ConnectivityJob, *, device: torch.device) -> Tensor:
    """The initial losses of the second runs, [P]: what divergence is judged by."""
    checkpoint = read_checkpoint(Store(job.context.out), job.pack.pack_id, job.step, device)
    members = [job.pack.run_ids.index(run) for _, run in job.pairs]
    return checkpoint.initial_loss[members]


def _seed(job: ConnectivityJob, run_id: str) -> int:
    return job.pack.seeds[job.pack.run_ids.index(run_id)]


# ---- the rows


def _rows(
    job: ConnectivityJob,
    settings: ConnectivitySettings,
    path: Path,
    alive: Tensor,
    examples: int,
    stack: Stack,
    dataset: Dataset,
    ends: Ends,
) -> tuple[list[Row], list[Row]]:
    ts = [i / (settings.points - 1) for i in range(settings.points)]
    loss = loss_of(job.context)
    values = evaluate_path(path, stack, ends.buffers_a, ends.buffers_b, loss, dataset, ts)
    values = {name: own.masked_fill(~alive[:, None], torch.nan) for name, own in values.items()}
    lengths = path.lengths(ts).masked_fill(~alive[:, None], torch.nan)
    distance = torch.linalg.vector_norm(ends.a.double() - ends.b.double(), dim=1)
    paths: list[Row] = []
    found: list[Row] = []
    for p, (run_a, run_b) in enumerate(job.pairs):
        suffix = "" if job.aligned == "none" else f"@{job.aligned}"
        shared: Row = {
            "pair_id": f"{run_a}~{run_b}{suffix}",
            "kind": path.kind,
            "run_a": run_a,
            "run_b": run_b,
            "setting_id": job.pack.setting_id,
            "aligned": job.aligned,
        }
        own = {name: value[p] for name, value in values.items()}
        paths += [
            shared
            | {"t": t, "arc_length": finite(float(lengths[p, i]))}
            | {name: finite(float(value[i])) for name, value in own.items()}
            for i, t in enumerate(ts)
        ]
        barrier = asdict(barriers(ts, lengths[p], own))
        found.append(
            shared
            | {name: finite(float(value)) for name, value in barrier.items()}
            | {
                "bends": len(path.points) - 2,
                "endpoint_distance": finite(float(distance[p])),
                "distance_before": finite(float(ends.distance_before[p])),
                "path_length": finite(float(lengths[p, -1])),
                "function_change": finite(float(ends.function_change[p])),
                "gradient_examples": float(examples),
                "status": "done" if bool(alive[p]) else "diverged",
            }
        )
    return paths, found
