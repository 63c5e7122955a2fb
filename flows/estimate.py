"""``--dry-run``: what a study would do, what it would cost, and what of it is done. Writes nothing.

The costs come from a few steps and products timed here, on the CPU, one setting at a time.
"""

import math
import os
from collections.abc import Sequence

import torch

from flows.costs import Cost, estimate
from flows.notes import notes_of
from flows.plan import PackPlan, Plan, make_plan
from flows.progress import duration
from flows.request import Request, check_request, superseded, try_settings, tuning_round
from flows.superseded import explained
from flows.tuning import Round, most_added, optimizer_of, rate_of, stand_ins
from lossray.errors import StudyError
from lossray.settings import content_hash
from lossray.study import Study, load_study, partition, surface_members
from lossray.study.manifest import other_versions
from lossray.training.datasets import Dataset

NO_STORE = "memory://dry-run"  # empty, and gone with the process
STARTUP_SECONDS = 6.0  # of Ray
WORKER_SECONDS = 5.0  # of a training actor, one for each pack: a Python process that imports torch


def dry_run(study: str, out: str | None, overrides: Sequence[str] = ()) -> str:
    """Packs, runs, products, estimated time and disk of a study.

    Args:
        study: a study file or the name of a ready-made one.
        out: its store, if what is done already is to be counted; None for a new one.
        overrides: as in ``--set``.

    Raises:
        LossrayError: bad input.
    """
    if out is None and load_study(study, overrides).study.source == "checkpoints":
        raise StudyError("--out is missing: name the folder or URI that was recorded into")
    request = check_request(study, out or NO_STORE, overrides)
    settings = request.loaded.study
    tuning, recordings = tuning_round(request), request.inputs.recordings
    rule = try_settings(request, "cpu")
    packs = partition(settings, request.frozen, rule, recordings, settings=tuning.settings)
    analysed = tuning.analysed if tuning.settled else stand_ins(tuning.settings)
    plan = make_plan(request.context, packs, request.inputs, analysed=analysed)
    costs = _costs(plan, request.dataset)
    lines = [*_packs(plan, costs), "", *_totals(plan, costs), *_tuned(request, tuning), *_done(request, plan)]
    notes = [f"note: {line}" for line in notes_of(settings, request.dataset, request.inputs.recordings)]
    return "\n".join([*lines, *notes])


def _costs(plan: Plan, dataset: Dataset) -> list[Cost]:
    """The cost of each pack; those that differ in seeds and learning rates only cost the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(plan.study.resources.train.cpus)))  # as a worker has
    try:
        alike = {_size(pack, plan.study): pack for pack in plan.packs}
        costs = {size: estimate(pack, plan, dataset) for size, pack in alike.items()}
    finally:
        torch.set_num_threads(threads)
    return [costs[_size(pack, plan.study)] for pack in plan.packs]


def _size(plan: PackPlan, study: Study) -> tuple[object, ...]:
    """What the cost of a pack depends on."""
    pack = plan.pack
    optimizer = {**pack.optimizer.plain(), "lr": None} if pack.optimizer else pack.setting_id
    alike = content_hash([pack.model.plain(), optimizer])
    surfaces = len(surface_members(pack, study)) if study.surfaces is not None else 0
    return alike, len(pack.seeds), len(plan.checkpoint_keys), len(plan.curvature_keys), surfaces


def wall_seconds(costs: Sequence[Cost], slots: int) -> float:
    """Wall time of all packs with ``slots`` tasks at a time, one of which is kept for curvature.

    The longest of: all work evenly divided, all training on the slots left to it, the longest training.
    """
    training = [WORKER_SECONDS + cost.training_seconds for cost in costs]
    work = sum(training) + sum(cost.curvature_seconds for cost in costs)
    return STARTUP_SECONDS + max(work / slots, sum(training) / max(1, slots - 1), *training)


def _packs(plan: Plan, costs: Sequence[Cost]) -> list[str]:
    """One line for each setting."""
    lines = [f"{'setting':36} {'parameters':>10} {'runs':>5} {'packs':>5}  executor  products       cost"]
    packs = [(plan.pack, cost) for plan, cost in zip(plan.packs, costs, strict=True)]
    for setting in dict.fromkeys(pack.setting_id for pack, _ in packs):
        of_setting = [(pack, cost) for pack, cost in packs if pack.setting_id == setting]
        (pack, cost), runs = of_setting[0], sum(len(pack.seeds) for pack, _ in of_setting)
        lines.append(
            f"{setting:36} {cost.n_params:10,} {runs:5} {len(of_setting):5}  {pack.executor:8}  "
            f"{pack.product_mode:9} {duration(sum(cost.seconds for _, cost in of_setting)):>8}"
        )
    return lines


def _totals(plan: Plan, costs: Sequence[Cost]) -> list[str]:
    study = plan.study
    runs = sum(len(pack.pack.seeds) for pack in plan.packs)
    training, curvature = sum(c.training_seconds for c in costs), sum(c.curvature_seconds for c in costs)
    cpus = max(study.resources.train.cpus, study.resources.curvature.cpus)
    slots = max(1, int((os.cpu_count() or 1) / cpus))
    wall = wall_seconds(costs, slots)
    counts = [len(pack.checkpoint_keys) for pack in plan.packs]
    checkpoints = " to ".join(map(str, dict.fromkeys([min(counts), max(counts)])))
    return [
        f"{len(plan.packs)} packs, {runs} runs, {checkpoints} checkpoints each, "
        f"about {sum(c.products for c in costs):,} products",
        f"time: about {duration(training)} of training and {duration(curvature)} of analysis, one after the "
        f"other; about {duration(wall)} with the {slots} tasks at a time that this machine runs",
        f"disk: about {_bytes(sum(c.disk_bytes for c in costs))}",
    ]


def _tuned(request: Request, tuning: Round) -> list[str]:
    """Which rates there are, and how many may come."""
    study = request.loaded.study
    if study.tuning is None:
        return []
    grids = len(stand_ins(tuning.settings))
    if tuning.settled:
        return list(tuning.lines)
    rates: dict[str, set[float]] = {}
    for setting in tuning.settings:
        rates.setdefault(optimizer_of(setting).name, set()).add(rate_of(setting))
    most, factor = study.tuning.extensions, study.tuning.factor
    return [
        f"learning rates are tuned: the best of each of {grids} grids is analysed, the other runs are only "
        f"trained; beyond an edge that is the best up to {most} rates are added, a factor of {factor:g} "
        f"each: {most_added(study)} settings at most",
        *(f"  {name}: lr {', '.join(f'{lr:g}' for lr in sorted(grid))}" for name, grid in rates.items()),
    ]


def _done(request: Request, plan: Plan) -> list[str]:
    keys = list(plan.keys())
    done = len(request.store.committed_keys().intersection(keys))
    lines = [f"done already: {done} of {len(keys)} tasks"] if done else []
    return [*lines, *other_versions(request.manifest), *explained(superseded(request, plan))]


def _bytes(number: int) -> str:
    unit = min(4, int(math.log(max(number, 1), 1000)))
    return f"{number / 1000**unit:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[unit]}"
