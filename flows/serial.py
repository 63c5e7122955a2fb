"""A study in this process, without Ray: the same plan, task after task, for a debugger."""

import traceback

import torch

from flows.interrupt import Interrupt
from flows.ledger import Ledger
from flows.plan import PackPlan, Plan
from tasks.curvature import CurvatureJob, analyse_checkpoint
from tasks.record import Attempt
from tasks.training import train_pack


def run_serially(plan: Plan, ledger: Ledger, interrupt: Interrupt) -> bool:
    """Run what the plan still lacks, one task at a time, with as many threads as the tasks would have on Ray.

    Returns:
        Whether it came to the end; False after an interrupt.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(plan.study.resources.train.cpus)))
    try:
        return all(
            _train(plan, pack, ledger, interrupt) and _analyse_rest(plan, pack, ledger, interrupt)
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
        if published.step in ledger.unanalysed(pack):
            _analyse(plan.curvature_job(pack, published.step), ledger)
    return False


def _analyse_rest(plan: Plan, pack: PackPlan, ledger: Ledger, interrupt: Interrupt) -> bool:
    """Analyse what an earlier driver left undone in a pack that it had trained."""
    for step in ledger.unanalysed(pack) if ledger.is_trained(pack) else []:
        if interrupt.received:
            return False
        _analyse(plan.curvature_job(pack, step), ledger)
    return True


def _analyse(job: CurvatureJob, ledger: Ledger) -> None:
    try:
        analyse_checkpoint(job)
    except Exception as error:  # as above
        ledger.curvature_failed(job, f"{type(error).__name__}: {error}", traceback.format_exc())
    else:
        ledger.checkpoint_analysed()
    ledger.tick()
