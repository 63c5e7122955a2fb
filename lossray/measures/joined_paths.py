"""Paths between the last checkpoints of a setting's runs: the tables `paths` and `barriers`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lossray.connectivity.barriers import barriers
from lossray.connectivity.curves import evaluate_path, train_curves
from lossray.connectivity.paths import Path, bent, geometric, straight
from lossray.connectivity.settings import RESCALED
from lossray.measures.cells import Row, finite
from lossray.measures.path_ends import PathEnds, PathSite, ends_of, joinable, possible
from lossray.networks.batch_norm import has_statistics
from lossray.seeds import stream
from lossray.training.batches import takes_all
from lossray.training.schedules import learning_rate
from lossray.training.steps import TrainingTask


@dataclass(frozen=True)
class Joined:
    """The paths of one kind between all pairs.

    Attributes:
        ends: of all P pairs.
        path: of P members.
        alive: [P] bool, whether neither end nor training has diverged.
        gradient_examples: gradients of single examples that training each path took.
    """

    ends: PathEnds
    path: Path
    alive: Tensor
    gradient_examples: int


def path_rows(site: PathSite) -> tuple[list[Row], list[Row]]:
    """Align, train, evaluate: rows of the tables `paths` and `barriers`.

    An architecture without the symmetry that an alignment or a rescaling needs has none, nor has a pair whose
    frozen parameters differ, or buffers other than batch norm's so that the loss would jump.
    """
    site = joinable(site) if site.pairs else site
    paths: list[Row] = []
    barrier_rows: list[Row] = []
    if site.pairs and possible(site):
        ends = ends_of(site)
        for kind in ("line", "geometric") if site.aligned == RESCALED else site.settings.kinds:
            along, across = _rows(site, _joined(site, kind, ends))
            paths, barrier_rows = [*paths, *along], [*barrier_rows, *across]
    return paths, barrier_rows


def _joined(site: PathSite, kind: str, ends: PathEnds) -> Joined:
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


def _training(site: PathSite) -> TrainingTask:
    """The runs' optimizer, its learning rate falling to 0 along half a cosine."""
    training, optimizer = site.study.training, site.pack.optimizer
    assert optimizer is not None  # no recorded run has such a job
    steps = site.settings.steps or training.steps
    falling = optimizer.model_copy(update={"schedule": "cosine", "floor": 0.0})
    return TrainingTask(
        site.stack,
        site.loss,
        site.dataset,
        training.model_copy(update={"steps": steps}),
        optimizer,
        "",
        tuple(stream(site.seed(b), f"connectivity/{a}") for a, b in site.pairs),
        rate=lambda step: learning_rate(falling, step, steps),
    )


def _initial_losses(site: PathSite) -> Tensor:
    """The initial losses of the second runs, [P]: what divergence is judged by."""
    _, checkpoint = site.last[site.pack.pack_id]
    return checkpoint.initial_loss[[site.pack.run_ids.index(run) for _, run in site.pairs]]


# ---- the rows


def _rows(site: PathSite, joined: Joined) -> tuple[list[Row], list[Row]]:
    """Of the tables `paths` and `barriers`."""
    points, path, ends, dead = site.settings.points, joined.path, joined.ends, ~joined.alive[:, None]
    ts = [i / (points - 1) for i in range(points)]
    loss = site.loss
    values = evaluate_path(path, site.stack, ends.buffers_a, ends.buffers_b, loss, site.dataset, ts)
    values = {name: value.masked_fill(dead, torch.nan) for name, value in values.items()}
    lengths = path.lengths(ts).masked_fill(dead, torch.nan)
    alike = _treated_alike(site, path, ends, values)
    paths: list[Row] = []
    barrier_rows: list[Row] = []
    for p in range(len(site.pairs)):
        shared = _shared(site, p, path.kind)
        pair_values = {name: value[p] for name, value in values.items()}
        paths += [
            shared
            | {"t": t, "arc_length": finite(float(lengths[p, i]))}
            | {name: finite(float(value[i])) for name, value in pair_values.items()}
            for i, t in enumerate(ts)
        ]
        barrier = asdict(barriers(ts, lengths[p], {name: value[p] for name, value in alike.items()}))
        described = _described(joined, p, float(lengths[p, -1]))
        barrier_rows.append(
            shared | {name: finite(float(value)) for name, value in barrier.items()} | described
        )
    return paths, barrier_rows


def _treated_alike(
    site: PathSite, path: Path, ends: PathEnds, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Values [P, T], those of the ends with recomputed batch-norm statistics as all between them have."""
    if not has_statistics(site.stack.template):
        return dict(values)
    loss, sides = site.loss, (ends.buffers_a, ends.buffers_b)
    end_values = evaluate_path(path, site.stack, *sides, loss, site.dataset, [0.0, 1.0], alike=True)
    return {
        name: torch.cat([end_values[name][:, :1], value[:, 1:-1], end_values[name][:, 1:]], dim=1)
        + 0 * value[:, :1]
        for name, value in values.items()
    }  # NaN where the pair has diverged


def _shared(site: PathSite, p: int, kind: str) -> Row:
    """What identifies a path."""
    run_a, run_b = site.pairs[p]
    suffix = "" if site.aligned == "none" else f"@{site.aligned}"
    return {
        "pair_id": f"{run_a}~{run_b}{suffix}",
        "kind": kind,
        "run_a": run_a,
        "run_b": run_b,
        "setting_id": site.pack.setting_id,
        "aligned": site.aligned,
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
