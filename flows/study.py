"""One study from file to tables: check, lease, session, freeze, drive, gather."""

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from flows.freeze import study_device
from flows.gpu_memory import gpu_packs, measure_here
from flows.gpu_packs import GpuPacks
from flows.interrupt import Interrupt
from flows.ledger import Ledger
from flows.metrics import StudyMetrics
from flows.notes import keep_notes, notes_of
from flows.plan import Plan, make_plan
from flows.progress import duration
from flows.request import (
    Request,
    Rule,
    check_request,
    freeze,
    is_complete,
    is_recorded,
    plan_of,
    superseded,
    try_settings,
    user_folders,
)
from flows.serial import run_serially
from flows.superseded import explained
from flows.verdicts import publish_claims
from lossray.errors import StoreError, StudyError
from lossray.imports import uncollected
from lossray.storage.lease import Lease
from lossray.storage.publish import publish_tables
from lossray.storage.store import Store
from lossray.study.manifest import other_versions

if TYPE_CHECKING:
    from flows.capacity import Shares

PROBE = ".writable"
DONE, SOME_FAILED, INTERRUPTED = 0, 1, 130


@dataclass
class Outcome:
    """What the rounds of one driver have come to.

    Attributes:
        rounds: how many there were.
        finished: whether the last one came to its end.
        failures: one line for each task that failed.
        untrained: ids of packs whose training failed; it is not tried again by this driver.
        started: when, on the monotonic clock.
    """

    rounds: int = 0
    finished: bool = False
    failures: list[str] = field(default_factory=list)
    untrained: set[str] = field(default_factory=set)
    started: float = field(default_factory=time.monotonic)

    def add(self, ledger: Ledger, *, finished: bool) -> None:
        """Take over what a round has come to."""
        self.rounds += 1
        self.finished = finished
        self.failures += ledger.failures
        self.untrained |= ledger.untrained


def run_study(
    study: str,
    out: str,
    *,
    overrides: Sequence[str] = (),
    address: str | None = None,
    in_process: bool = False,
    dashboard: bool = False,
    recompute: bool = False,
) -> int:
    """Run or resume a study; see `flows.run`."""
    request = replace(check_request(study, out, overrides), recompute=recompute)
    if not in_process and request.store.url.startswith("memory://"):
        raise StudyError(f"--out {out}: workers have memory of their own; allowed: with --in-process only")
    notes = notes_of(request.loaded.study, request.dataset, request.inputs.recordings)
    for line in [*notes, *other_versions(request.manifest)]:
        _say(f"note: {line}")
    if is_complete(request):
        if not is_recorded(request):
            with Lease(request.store):
                freeze(request, try_settings(request, "cpu"))
        _say(f"{request.store.url} is complete: nothing to do")
        return DONE
    if request.edited:
        superseded(request, make_plan(request.context, request.frozen, request.inputs))  # may refuse
    with ExitStack() as stack:
        shares, gpus = None, in_process and torch.cuda.is_available()
        if not in_process:
            shares, gpus = _join_ray(stack, request, address, dashboard=dashboard)
        device = study_device(request.loaded.study, gpus=gpus)
        rule = try_settings(request, device)
        for line in explained(superseded(request, plan_of(request, rule))):  # before anything is written
            _say(f"note: {line}")
        interrupt = stack.enter_context(Interrupt())
        lease = stack.enter_context(_lease(request.store))  # the first thing that writes
        if device == "cuda":
            packs = _gpu_packs(request, rule, shares, interrupt)
            if interrupt.received:  # nothing is frozen yet, least of all what was not measured
                _say("interrupted before anything began; the same command starts again")
                return INTERRUPTED
            request = replace(request, gpu=packs)
            shares = shares and packs.applied(shares, request.loaded.study.resources)
        outcome = _run_rounds(request, rule, notes, shares, interrupt, lease)
    return _conclude(request.store, outcome)


def _join_ray(
    stack: ExitStack, request: Request, address: str | None, *, dashboard: bool
) -> tuple["Shares", bool]:
    """`flows.on_ray.join`; without Ray (and without its import) a study runs in this process.

    Raises:
        StudyError: Ray is not installed.
    """
    try:
        with uncollected():
            from flows.on_ray import join
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise StudyError("Ray is not installed here; allowed without it: --in-process") from None
    folders = user_folders(request.loaded)
    return stack.enter_context(join(address, folders, request.loaded.study.resources, dashboard=dashboard))


def _gpu_packs(request: Request, rule: Rule, shares: "Shares | None", interrupt: Interrupt) -> GpuPacks:
    """What packs take of a GPU, measured where the study will run."""
    if shares is None:
        packs = gpu_packs(request, rule, measure_here, sharing=False)
    else:
        from flows.cluster_memory import measure_with  # here: it loads Ray

        wait = request.loaded.study.resources.wait
        measure = measure_with(shares, interrupt, wait=wait, say=_say)
        packs = gpu_packs(request, rule, measure, sharing=True)
    for line in packs.notes:
        _say(f"note: {line}")
    return packs


def _run_rounds(
    request: Request,
    rule: Rule,
    notes: list[str],
    shares: "Shares | None",
    interrupt: Interrupt,
    lease: Lease,
) -> Outcome:
    """Run what the study lacks: in one round, or in as many as the tuning of its learning rates takes."""
    store, outcome = request.store, Outcome()
    metrics = None if shares is None else StudyMetrics(request.loaded.study.name)
    while True:
        plan, tuning = freeze(request, rule, outcome.untrained)
        if not outcome.rounds:
            keep_notes(store, notes)
            request.gpu.keep(store)
            _say(f"{plan.study.name}: {len(plan.packs)} packs; results in {store.url}")
        for line in tuning.lines:
            _say(line)
        left = [pack for pack in plan.packs if pack.pack.pack_id not in outcome.untrained]
        plan = replace(plan, packs=tuple(left))
        ledger = Ledger(plan, store, store.committed(), guard=lease.check, metrics=metrics)
        with ledger.progress:
            finished = _run_round(plan, ledger, shares, interrupt)
            if finished and tuning.settled:
                ledger.progress.state = "gathering"
                ledger.progress.refresh(force=True)
                finished = _gather(store, interrupt, in_process=shares is None)
                if finished:
                    publish_claims(store, plan.study)
                    ledger.progress.state = "done"
            if not finished:
                ledger.progress.state = "interrupted"
        outcome.add(ledger, finished=finished)
        if tuning.settled or not finished:
            return outcome


def _run_round(plan: Plan, ledger: Ledger, shares: "Shares | None", interrupt: Interrupt) -> bool:
    """Run what the plan lacks, on Ray or in this process; False after an interrupt."""
    if shares is None:
        return run_serially(plan, ledger, interrupt)
    from flows.driver import Driver

    return Driver(plan, ledger, shares, interrupt).run()


def _gather(store: Store, interrupt: Interrupt, *, in_process: bool) -> bool:
    """Publish the tables; False after an interrupt.

    Raises:
        StoreError: a part is missing or damaged.
    """
    if in_process:
        publish_tables(store)
        return True
    from flows.on_ray import gather_tables

    return gather_tables(store, interrupt)


def _conclude(store: Store, outcome: Outcome) -> int:
    elapsed = duration(time.monotonic() - outcome.started)
    if not outcome.finished:
        _say(f"interrupted after {elapsed}; the same command resumes")
        return INTERRUPTED
    _say(f"done in {elapsed}: `lossray tables {store.url}`")
    if failed := len(outcome.failures):
        _say(f"{failed} tasks failed: `lossray status {store.url}`; the same command tries again")
    return SOME_FAILED if outcome.failures else DONE


def _lease(store: Store) -> Lease:
    """A lease that can be taken; whether nobody else holds it shows when it is.

    Raises:
        StoreError: nothing can be written there.
    """
    try:
        store.files.write(PROBE, b"")
        store.files.delete(PROBE)
    except OSError as error:
        raise StoreError(f"--out {store.url}: cannot be written: {error.strerror or error}") from error
    return Lease(store)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
