"""Ensembles of the base runs of a pack by one method: their logits, their scores, what was rescaled.

Every choice of a method is made on training and validation examples. The test split is evaluated once, when
the members are there.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossray.ensembles.bench import BaseRuns, Bench
from lossray.ensembles.diversity import pairwise
from lossray.ensembles.lines import pair_barriers
from lossray.ensembles.methods import METHODS
from lossray.ensembles.recipes import EnsembleMembers, Options
from lossray.ensembles.refusals import refusal
from lossray.ensembles.rescaling import Rescaling
from lossray.ensembles.scores import PrefixScores, example_scores, prefix_scores
from lossray.ensembles.settings import EnsemblesSettings
from lossray.measures.cells import Row, finite
from lossray.measures.pack_point import loss_of, stack_of
from lossray.networks.models import build_model
from lossray.networks.nests import chunks, rows
from lossray.networks.stack import build_stack
from lossray.storage.checkpoints import Checkpoint
from lossray.study import Pack, Study
from lossray.study.keys import ENSEMBLE_TABLES
from lossray.training.datasets import Dataset, Split
from lossray.training.evaluation import CHUNK

SPLITS = ("validation", "test")
BARRIER_EXAMPLES = 256  # of the training split, on which barriers between members are looked for

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Built:
    """The ensembles of one method under one budget.

    Attributes:
        pack: the base runs.
        method: by which the members were made.
        budget: nominal, in trainings of a run.
        members: an ensemble for each base run.
        logits: split -> [R, K, N, C]; NaN for members that have diverged.
        scores: of every run's first 1, 2, ... members.
    """

    pack: Pack
    method: str
    budget: float
    members: EnsembleMembers
    logits: Mapping[str, Array]
    scores: Sequence[Sequence[PrefixScores]]

    @property
    def alive(self) -> NDArray[np.bool_]:
        """Of every run's members, [R, K]."""
        alive: NDArray[np.bool_] = (
            torch.stack([point.alive for point in self.members.points], dim=1).cpu().numpy()
        )
        return alive

    def shared(self, r: int) -> Row:
        """What identifies the ensemble of one run."""
        run_id, method = self.pack.run_ids[r], self.method
        return {
            "ensemble_id": f"{run_id}/{method}/{self.budget:g}",
            "method": method,
            "base_run": run_id,
            "nominal_budget": self.budget,
        }

    def described(self, r: int) -> Row:
        """The same with the run's setting and seed."""
        return self.shared(r) | {"setting_id": self.pack.setting_id, "seed": self.pack.seeds[r]}


def ensemble_rows(
    pack: Pack, method: str, runs: BaseRuns, settings: EnsemblesSettings
) -> dict[str, list[Row]]:
    """The ensembles of one method on the runs of a pack, under every budget: rows by table.

    A method that the architecture or the optimizer does not allow has none.

    Args:
        pack: the runs.
        method: its name.
        runs: what the base runs have in common.
        settings: those of [ensembles].
    """
    rows: dict[str, list[Row]] = {name: [] for name in ENSEMBLE_TABLES}
    refused = refusal(METHODS[method], runs) is not None
    for budget in settings.budgets if not refused else ():
        built = _built(pack, method, runs, settings, budget)
        rows["ensembles"] += _score_rows(built, runs.dataset)
        rows["members"] += _member_rows(built, runs)
        rows["predictions"] += _prediction_rows(built, runs.dataset)
        rows["rescalings"] += _rescaling_rows(built)
        rows["logits"] += _logit_rows(built) if settings.logits else ()
    return rows


def base_runs(
    study: Study, pack: Pack, dataset: Dataset, checkpoint: Callable[[int], Checkpoint]
) -> BaseRuns:
    """What the base runs of a pack have in common.

    Args:
        study: the settings.
        pack: the runs.
        dataset: the study's data, on the device.
        checkpoint: the newest that is no later than a step, on the device.
    """
    assert pack.optimizer is not None  # recorded runs have no ensembles
    dtype, device = getattr(torch, study.training.dtype), dataset.train.targets.device
    stack, _, _ = stack_of(pack, dataset, dtype=dtype, device=device)
    build = partial(build_model, pack.model, dataset.input_shape, dataset.n_outputs)

    def fresh(seeds: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        _, theta, buffers = build_stack(build, seeds, executor=pack.executor, dtype=dtype, device=device)
        return theta, buffers

    return BaseRuns(
        stack,
        fresh,
        loss_of(study),
        dataset,
        study.training,
        pack.optimizer,
        pack.seeds,
        checkpoint,
    )


def _built(pack: Pack, method: str, runs: BaseRuns, settings: EnsemblesSettings, budget: float) -> Built:
    bench = Bench(runs, settings.budget(budget, runs.training.steps), settings.bends)
    options = Options(settings.sigma, settings.powers_of_two)
    members = METHODS[method].build(bench, options)
    logits = {name: _logits(runs, members, getattr(runs.dataset, name)) for name in SPLITS}
    targets = {name: getattr(runs.dataset, name).targets.cpu().numpy() for name in SPLITS}
    scores = [
        prefix_scores(*(part for name in SPLITS for part in (logits[name][r], targets[name])))
        for r in range(len(runs.seeds))
    ]
    return Built(pack, method, budget, members, logits, scores)


@torch.no_grad()
def _logits(runs: BaseRuns, members: EnsembleMembers, split: Split) -> Array:
    """Outputs of every run's members, [R, K, N, C]."""
    member_outputs = []
    for point in members.points:
        size = max(1, runs.stack.limits.portion(CHUNK) // len(point.theta))
        parts = [runs.stack.outputs(point.theta, point.buffers, x) for x in chunks(split.inputs, size)]
        outputs = torch.cat(parts, dim=1).flatten(2)
        member_outputs.append(outputs.masked_fill(~point.alive[:, None, None], torch.nan))
    stacked: Array = torch.stack(member_outputs, dim=1).double().cpu().numpy()
    return stacked


# ---- rows


def _score_rows(built: Built, dataset: Dataset) -> Iterator[Row]:
    validation, test = (getattr(dataset, name).targets.cpu().numpy() for name in SPLITS)
    costs, size = built.members.costs, len(built.members.points)
    for r in range(len(built.pack.seeds)):
        for count, *scores in built.scores[r]:
            healthy = bool(built.alive[r, :count].all())
            for split, targets, split_scores in zip(SPLITS, (validation, test), scores, strict=True):
                shared = built.described(r) | {
                    "members": count,
                    "split": split,
                    "budget": float(costs[count - 1][r]),
                    "size": size,
                    "n_examples": len(targets),
                    "status": "done" if healthy else "diverged",
                }
                for metric, value in asdict(split_scores).items():
                    yield shared | {"metric": metric, "value": finite(value)}


def _prediction_rows(built: Built, dataset: Dataset) -> Iterator[Row]:
    """Of whole ensembles without a member that has diverged."""
    validation, test = (getattr(dataset, name).targets.cpu().numpy() for name in SPLITS)
    for r in np.flatnonzero(built.alive.all(axis=1)).tolist():
        temperature = built.scores[r][-1].test.temperature
        for split, targets in zip(SPLITS, (validation, test), strict=True):
            scores = example_scores(built.logits[split][r], targets, temperature=temperature)
            yield built.described(r) | {
                "split": split,
                "nll": scores.nll.astype(np.float32),
                "nll_scaled": scores.nll_scaled.astype(np.float32),
                "error": scores.error.astype(np.float32),
            }


def _logit_rows(built: Built) -> Iterator[Row]:
    """Of members that have not diverged."""
    for split in SPLITS:
        logits = built.logits[split]
        for r, k in zip(*np.nonzero(built.alive), strict=True):
            member_logits = logits[r, k]
            yield built.shared(int(r)) | {
                "member": int(k),
                "split": split,
                "n_examples": member_logits.shape[0],
                "n_outputs": member_logits.shape[1],
                "logits": member_logits.astype(np.float32).reshape(-1),
            }


def _rescaling_rows(built: Built) -> Iterator[Row]:
    for cycle, rescaling in enumerate(built.members.rescalings):
        for r in range(len(built.pack.seeds)):
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


def _member_rows(built: Built, runs: BaseRuns) -> Iterator[Row]:
    """Of every pair of members that have not diverged."""
    points = built.members.points
    pairs = list(itertools.combinations(range(len(points)), 2))
    if not pairs:
        return
    train = runs.dataset.train
    first = slice(BARRIER_EXAMPLES)
    some = Split(rows(train.inputs, first), train.targets[first])
    rises = pair_barriers(runs, points, some).cpu().numpy()  # [R, pairs]
    for r in range(len(built.pack.seeds)):
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
