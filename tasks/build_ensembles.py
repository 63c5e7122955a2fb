"""Ensembles of the base runs of a pack by one method: their logits, their scores, what was rescaled.

Every choice of a method is made on training and validation examples. The test split is evaluated once, when
the members are there.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossray.ensembles.bench import BaseRuns, Bench
from lossray.ensembles.diversity import pairwise
from lossray.ensembles.lines import pair_barriers
from lossray.ensembles.methods import METHODS
from lossray.ensembles.recipes import EnsembleMembers, Options
from lossray.ensembles.rescaling import Rescaling
from lossray.ensembles.scores import PrefixScores, example_scores, prefix_scores
from lossray.ensembles.settings import EnsemblesSettings
from lossray.networks.models import build_model
from lossray.networks.nests import chunks, rows
from lossray.networks.stack import build_stack
from lossray.storage.checkpoints import Checkpoint, read_checkpoint
from lossray.storage.store import Store
from lossray.study import Pack
from lossray.training.datasets import Dataset, Split, on_device
from lossray.training.evaluation import CHUNK
from tasks.checkpoint_spectra import Row, finite
from tasks.commit_record import Attempt, Stopwatch
from tasks.context import Context, dataset_of, device_name, local_device, loss_of, prepare_worker, stack_of

SPLITS = ("validation", "test")
TABLES = ("ensembles", "members", "predictions", "rescalings", "logits")
BARRIER_EXAMPLES = 256  # of the training split, on which barriers between members are looked for

Array = NDArray[np.float64]


@dataclass(frozen=True)
class EnsembleJob:
    """Build and score the ensembles of one method on the runs of a pack, under every budget."""

    context: Context
    pack: Pack
    method: str
    steps: tuple[int, ...]  # of the checkpoints to start from
    key: str
    attempt: Attempt
    kind: ClassVar[str] = "ensemble"

    @property
    def step(self) -> int:
        """Of the last checkpoint."""
        return self.steps[-1]


@dataclass(frozen=True)
class Built:
    """The ensembles of one method under one budget."""

    job: EnsembleJob
    budget: float
    members: EnsembleMembers
    logits: Mapping[str, Array]  # split -> [R, K, N, C]; NaN for members that have diverged
    scores: Sequence[Sequence[PrefixScores]]  # of every run's first 1, 2, ... members

    @property
    def alive(self) -> NDArray[np.bool_]:
        """Of every run's members, [R, K]."""
        alive: NDArray[np.bool_] = (
            torch.stack([point.alive for point in self.members.points], dim=1).cpu().numpy()
        )
        return alive

    def shared(self, r: int) -> Row:
        """What identifies the ensemble of one run."""
        run_id, method = self.job.pack.run_ids[r], self.job.method
        return {
            "ensemble_id": f"{run_id}/{method}/{self.budget:g}",
            "method": method,
            "base_run": run_id,
            "nominal_budget": self.budget,
        }

    def described(self, r: int) -> Row:
        """The same with the run's setting and seed."""
        pack = self.job.pack
        return self.shared(r) | {"setting_id": pack.setting_id, "seed": pack.seeds[r]}


def build_ensembles(job: EnsembleJob, device: torch.device | None = None) -> None:
    """Build, score, publish the rows, and commit.

    A method that the architecture or the optimizer does not allow has no rows.

    Args:
        job: which method, on which runs.
        device: where; None takes this machine's GPU if it has one.
    """
    device = device or local_device()
    store, study = Store(job.context.out), job.context.study
    watch = Stopwatch(job.attempt, device_name(device))
    settings = study.ensembles
    assert settings is not None
    problem = problem_of(job, store, device)
    rows: dict[str, list[Row]] = {name: [] for name in TABLES}
    refused = METHODS[job.method].refusal(problem) is not None
    for budget in settings.budgets if not refused else ():
        built = _built(job, problem, settings, budget)
        rows["ensembles"] += _score_rows(built, problem.dataset)
        rows["members"] += _member_rows(built, problem)
        rows["predictions"] += _prediction_rows(built, problem.dataset)
        rows["rescalings"] += _rescaling_rows(built)
        rows["logits"] += _logit_rows(built) if settings.logits else ()
    for name, own in rows.items():
        store.publish(name, job.key, own)
    store.commit(watch.record(job.key, job.kind, pack_id=job.pack.pack_id, step=job.step))


@ray.remote(num_cpus=1, max_retries=0)
def ensemble(job: EnsembleJob, cpus: float) -> None:
    """`build_ensembles` as a Ray task; what it finds is in the store."""
    build_ensembles(job, prepare_worker(cpus))


def problem_of(job: EnsembleJob, store: Store, device: torch.device) -> BaseRuns:
    """What the base runs of a pack have in common."""
    study, pack = job.context.study, job.pack
    assert pack.optimizer is not None  # no recorded run has such a job
    dtype = getattr(torch, study.training.dtype)
    dataset = on_device(dataset_of(job.context, dtype), device)
    stack, _, _ = stack_of(pack, dataset, dtype=dtype, device=device)
    build = partial(build_model, pack.model, dataset.input_shape, dataset.n_outputs)

    def fresh(seeds: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        _, theta, buffers = build_stack(build, seeds, executor=pack.executor, dtype=dtype, device=device)
        return theta, buffers

    def checkpoint(step: int) -> Checkpoint:
        newest = max(own for own in job.steps if own <= step)
        return read_checkpoint(store, pack.pack_id, newest, device)

    return BaseRuns(
        stack,
        fresh,
        loss_of(job.context),
        dataset,
        study.training,
        pack.optimizer,
        pack.seeds,
        checkpoint,
    )


def _built(job: EnsembleJob, problem: BaseRuns, settings: EnsemblesSettings, budget: float) -> Built:
    bench = Bench(problem, settings.budget(budget, problem.training.steps), settings.bends)
    options = Options(settings.sigma, settings.powers_of_two)
    members = METHODS[job.method].build(bench, options)
    logits = {name: _logits(problem, members, getattr(problem.dataset, name)) for name in SPLITS}
    targets = {name: getattr(problem.dataset, name).targets.cpu().numpy() for name in SPLITS}
    scores = [
        prefix_scores(*(part for name in SPLITS for part in (logits[name][r], targets[name])))
        for r in range(len(problem.seeds))
    ]
    return Built(job, budget, members, logits, scores)


@torch.no_grad()
def _logits(problem: BaseRuns, members: EnsembleMembers, split: Split) -> Array:
    """Outputs of every run's members, [R, K, N, C]."""
    found = []
    for point in members.points:
        size = max(1, CHUNK // len(point.theta))
        parts = [problem.stack.outputs(point.theta, point.buffers, x) for x in chunks(split.inputs, size)]
        outputs = torch.cat(parts, dim=1).flatten(2)
        found.append(outputs.masked_fill(~point.alive[:, None, None], torch.nan))
    stacked: Array = torch.stack(found, dim=1).double().cpu().numpy()
    return stacked


# ---- rows


def _score_rows(built: Built, dataset: Dataset) -> Iterator[Row]:
    validation, test = (getattr(dataset, name).targets.cpu().numpy() for name in SPLITS)
    costs, size = built.members.costs, len(built.members.points)
    for r in range(len(built.job.pack.seeds)):
        for count, *scores in built.scores[r]:
            healthy = bool(built.alive[r, :count].all())
            for split, targets, own in zip(SPLITS, (validation, test), scores, strict=True):
                shared = built.described(r) | {
                    "members": count,
                    "split": split,
                    "budget": float(costs[count - 1][r]),
                    "size": size,
                    "n_examples": len(targets),
                    "status": "done" if healthy else "diverged",
                }
                for metric, value in asdict(own).items():
                    yield shared | {"metric": metric, "value": finite(value)}


def _prediction_rows(built: Built, dataset: Dataset) -> Iterator[Row]:
    """Of whole ensembles without a member that has diverged."""
    validation, test = (getattr(dataset, name).targets.cpu().numpy() for name in SPLITS)
    for r in np.flatnonzero(built.alive.all(axis=1)).tolist():
        temperature = built.scores[r][-1].test.temperature
        for split, targets in zip(SPLITS, (validation, test), strict=True):
            own = example_scores(built.logits[split][r], targets, temperature=temperature)
            yield built.described(r) | {
                "split": split,
                "nll": own.nll.astype(np.float32),
                "nll_scaled": own.nll_scaled.astype(np.float32),
                "error": own.error.astype(np.float32),
            }


def _logit_rows(built: Built) -> Iterator[Row]:
    """Of members that have not diverged."""
    for split in SPLITS:
        logits = built.logits[split]
        for r, k in zip(*np.nonzero(built.alive), strict=True):
            own = logits[r, k]
            yield built.shared(int(r)) | {
                "member": int(k),
                "split": split,
                "n_examples": own.shape[0],
                "n_outputs": own.shape[1],
                "logits": own.astype(np.float32).reshape(-1),
            }


def _rescaling_rows(built: Built) -> Iterator[Row]:
    for cycle, rescaling in enumerate(built.members.rescalings):
        for r in range(len(built.job.pack.seeds)):
            yield built.shared(r) | {"cycle": cycle} | _rescaling_values(rescaling, r)


def _rescaling_values(rescaling: Rescaling, r: int) -> Row:
    names = (
        "sigma",
        "lambda_max_before",
        "lambda_max_after",
        "function_change",
        "distance",
        "line_barrier",
    )
    values: Row = {name: finite(float(getattr(rescaling, name)[r])) for name in names}
    return values | {"dead_units": int(rescaling.dead_units[r])}


def _member_rows(built: Built, problem: BaseRuns) -> Iterator[Row]:
    """Of every pair of members that have not diverged."""
    points = built.members.points
    pairs = list(itertools.combinations(range(len(points)), 2))
    if not pairs:
        return
    train = problem.dataset.train
    first = slice(BARRIER_EXAMPLES)
    some = Split(rows(train.inputs, first), train.targets[first])
    rises = pair_barriers(problem, points, some).cpu().numpy()  # [R, pairs]
    for r in range(len(built.job.pack.seeds)):
        diversity = pairwise(built.logits["test"][r])
        for n, (i, j) in enumerate(pairs):
            if not (built.alive[r, i] and built.alive[r, j]):
                continue
            apart = points[i].theta[r].double() - points[j].theta[r].double()
            yield built.shared(r) | {
                "i": i,
                "j": j,
                "disagreement": finite(float(diversity.disagreement[i, j])),
                "kl": finite(float(diversity.kl[i, j])),
                "weight_distance": finite(float(torch.linalg.vector_norm(apart))),
                "barrier": finite(float(rises[r, n])),
            }
