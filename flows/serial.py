"""A study in this process, without Ray: the same plan, task after task, for a debugger."""

import traceback
from collections import deque
from collections.abc import Sequence

import torch

from flows.interrupt import Interrupt
from flows.ledger import Ledger
from flows.plan import PackPlan, Plan
from tasks.events import Published
from tasks.jobs import AnalysisJob, Attempt
from tasks.run_analysis import run_analysis
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
            event = next(events)
        except Exception as error:  # whatever the user's model raises: recorded, and the other packs go on
            ledger.training_failed(pack, attempt, f"{type(error).__name__}: {error}", traceback.format_exc())
            return True
        if not isinstance(event, Published):
            ledger.training_done(pack)
            return True
        ledger.checkpoint_trained()
        _analyse(ledger.next_jobs(pack, event.step), ledger, interrupt)
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
            run_analysis(job)
        except Exception as error:  # as above
            ledger.analysis_failed(job, f"{type(error).__name__}: {error}", traceback.format_exc())
        else:
            waiting.extend(ledger.analysis_done(job))
        ledger.tick()
    return not interrupt.received
