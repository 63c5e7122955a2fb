"""A study in this process, without Ray: the same plan, task after task, for a debugger."""

import traceback
from collections import deque
from collections.abc import Sequence

import torch

from flows.interrupt import Interrupt
from flows.ledger import Ledger
from flows.plan import AnalysisJob, PackPlan, Plan
from tasks.analyse_checkpoint import analyse_checkpoint
from tasks.build_ensembles import build_ensembles
from tasks.compare_checkpoints import compare_checkpoints
from tasks.connect_runs import connect_runs
from tasks.evaluate_surfaces import evaluate_surfaces
from tasks.follow_runs import compare_runs, follow_trajectory
from tasks.jobs import (
    Attempt,
    ConnectivityJob,
    CurvatureJob,
    DegeneracyJob,
    EnsembleJob,
    PairJob,
    SeparationsJob,
    SurfaceJob,
    TrajectoryJob,
)
from tasks.measure_degeneracy import measure_degeneracy
from tasks.train_pack import train_pack


def run_serially(plan: Plan, ledger: Ledger, interrupt: Interrupt) -> bool:
    """Run what the plan still lacks, one task at a time, with as many threads as the tasks would have on Ray.

    Returns:
        Whether it came to the end; False after an interrupt.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(plan.study.resources.train.cpus)))
    try:
        return all(
            _train(plan, pack, ledger, interrupt) and _analyse_rest(pack, ledger, interrupt)
            for pack in plan.packs
        )
    finally:
        torch.set_num_threads(threads)


def _train(plan: Plan, pack: PackPlan, ledger: Ledger, interrupt: Interrupt) -> bool:
    """Train one pack, each checkpoint analysed as soon as it is published."""
    if ledger.is_trained(pack):
        return True
    attempt = Attempt()
    events = train_pack(plan.training_job(pack, attempt))
    while not interrupt.received:
        try:
            published = next(events, None)
        except Exception as error:  # whatever the user's model raises: recorded, and the other packs go on
            ledger.training_failed(pack, attempt, f"{type(error).__name__}: {error}", traceback.format_exc())
            return True
        if published is None:
            ledger.training_done(pack)
            return True
        ledger.checkpoint_trained()
        _analyse(ledger.next_jobs(pack, published.step), ledger, interrupt)
    return False


def _analyse_rest(pack: PackPlan, ledger: Ledger, interrupt: Interrupt) -> bool:
    """Analyse and compare what an earlier driver left undone in a pack that it had trained."""
    steps = pack.curvature_keys if ledger.is_trained(pack) else ()
    return all(_analyse(ledger.next_jobs(pack, step), ledger, interrupt) for step in steps)


def _analyse(jobs: Sequence[AnalysisJob], ledger: Ledger, interrupt: Interrupt) -> bool:
    """Run the jobs and those that they make possible; False after an interrupt."""
    waiting = deque(jobs)
    while waiting and not interrupt.received:
        job = waiting.popleft()
        try:
            _run(job)
        except Exception as error:  # as above
            ledger.analysis_failed(job, f"{type(error).__name__}: {error}", traceback.format_exc())
        else:
            waiting.extend(ledger.analysis_done(job))
        ledger.tick()
    return not interrupt.received


def _run(job: AnalysisJob) -> None:
    match job:
        case CurvatureJob():
            analyse_checkpoint(job)
        case PairJob():
            compare_checkpoints(job)
        case DegeneracyJob():
            measure_degeneracy(job)
        case TrajectoryJob():
            follow_trajectory(job)
        case SeparationsJob():
            compare_runs(job)
        case SurfaceJob():
            evaluate_surfaces(job)
        case ConnectivityJob():
            connect_runs(job)
        case EnsembleJob():
            build_ensembles(job)
