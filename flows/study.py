"""One study from file to tables: check, lease, session, freeze, drive, gather."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, chdir
from dataclasses import dataclass, replace

import ray
import torch
from ray.exceptions import RayTaskError

from flows.claims import claims_current, publish_claims
from flows.driver import WAIT_SECONDS, Driver
from flows.freeze import decide, study_device
from flows.interrupt import Interrupt
from flows.ledger import Ledger
from flows.notes import keep_notes, notes_of
from flows.plan import Plan, make_plan
from flows.progress import duration
from flows.serial import run_serially
from flows.session import capacity, has_gpus, ray_session
from flows.superseded import (
    Superseded,
    check_edited,
    explained,
    find_superseded,
    recorded_keys,
    withdraw,
)
from lossray.curvature.modes import ProductMode
from lossray.errors import DataError, ModelError, StoreError, StudyError
from lossray.imports import settle_imports
from lossray.source_hash import check_imported, source_hash
from lossray.storage.lease import Lease
from lossray.storage.publish import publish_tables, tables_current
from lossray.storage.recordings import FOLDER, read_recordings
from lossray.storage.store import Store
from lossray.study import (
    LoadedStudy,
    Pack,
    Setting,
    StudyInputs,
    check_against_data,
    check_recordings,
    load_study,
    partition,
    runs_of,
    settings_of,
    study_from_table,
    study_inputs,
)
from lossray.study.manifest import (
    Manifest,
    check_extension,
    edited_packs,
    extended,
    new_manifest,
    other_versions,
)
from lossray.training.datasets import Dataset, load_dataset
from tasks.context import Context
from tasks.gather import gather

PROBE = ".writable"
DONE, SOME_FAILED, INTERRUPTED = 0, 1, 130
Rule = Callable[[Setting], tuple[str, ProductMode]]  # executor and product mode


@dataclass(frozen=True)
class Request:
    """A study that has been checked against its data and its store; nothing has been written yet."""

    loaded: LoadedStudy
    store: Store
    context: Context
    inputs: StudyInputs
    dataset: Dataset
    manifest: Manifest | None  # of the store, where it has one
    recompute: bool = False  # withdraw what was computed with other source of the user's functions

    @property
    def edited(self) -> dict[str, list[str]]:
        """By pack id: functions of the user's that are others than its results were computed with."""
        return {} if self.manifest is None else edited_packs(self.manifest, self.loaded.study, self.inputs)

    @property
    def frozen(self) -> tuple[Pack, ...]:
        """The packs of the store that stay as they are; of an edited model all is decided anew."""
        packs = self.manifest.packs if self.manifest else ()
        return tuple(pack for pack in packs if pack.pack_id not in self.edited)


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
        room = None
        if not in_process:
            stack.enter_context(ray_session(address, user_folders(request.loaded), dashboard=dashboard))
            room = capacity(request.loaded.study.resources)
        rule = try_settings(request, study_device(request.loaded.study, gpus=has_gpus(in_process=in_process)))
        plan = make_plan(request.context, _partition(request, rule), request.inputs)
        for line in explained(superseded(request, plan)):  # before anything is written
            _say(f"note: {line}")
        interrupt = stack.enter_context(Interrupt())
        lease = stack.enter_context(_lease(request.store))  # the first thing that writes
        plan = freeze(request, rule)
        keep_notes(request.store, notes)
        _say(f"{request.loaded.study.name}: {len(plan.packs)} packs; results in {request.store.url}")
        ledger = Ledger(plan, request.store, request.store.committed(), guard=lease.check)
        with ledger.progress:
            if room is None:
                finished = run_serially(plan, ledger, interrupt)
            else:
                finished = Driver(plan, ledger, room, interrupt).run()
            if finished:
                ledger.progress.state = "gathering"
                ledger.progress.refresh(force=True)
                finished = _gather(request.store, interrupt, in_process=in_process)
                if finished:
                    publish_claims(request.store, plan.study)
            ledger.progress.state = "done" if finished else "interrupted"
    return _conclude(request.store, ledger, finished)


def check_request(study: str, out: str, overrides: Sequence[str]) -> Request:
    """Read and check everything that can be wrong before anything is written.

    Raises:
        LossrayError: the study, its data, its models or its store; one line for each problem.
    """
    with chdir("."):  # which a module of the user's may change
        loaded = load_study(study, overrides)
    settle_imports(user_folders(loaded))
    store = Store(out)
    dataset = read_data(loaded)
    check_against_data(loaded.study, dataset, str(loaded.path))
    recordings = read_recordings(store) if loaded.study.source == "checkpoints" else ()
    if loaded.study.source == "checkpoints":
        check_recordings(loaded.study, dataset, recordings, str(loaded.path), out=store.url)
    manifest = read_manifest(store, recorded=bool(recordings))
    before = manifest.inputs if manifest else None
    inputs = study_inputs(loaded.study, dataset.fingerprint, recordings, before=before)
    sources = {name: source_hash(name) for name in inputs.sources}
    check_imported(sources)
    if manifest is not None:
        check_extension(manifest, loaded.study, inputs)
    context = Context(store.url, loaded.study, str(loaded.folder), dataset.fingerprint, sources)
    return Request(loaded, store, context, inputs, dataset, manifest)


def read_data(loaded: LoadedStudy) -> Dataset:
    """The study's data, in the dtype of its training.

    Raises:
        DataError: naming the study file.
    """
    dtype = getattr(torch, loaded.study.training.dtype)
    try:
        with chdir("."):  # which a function of the user's may change
            return load_dataset(loaded.study.data, dtype=dtype, base=loaded.folder)
    except DataError as error:
        raise DataError(f"{loaded.path}: data: {error}") from error


def is_complete(request: Request) -> bool:
    """Whether the store has everything that the study asks for, its tables included."""
    if request.manifest is None or request.edited or _lacks_runs(request):
        return False
    plan = make_plan(request.context, request.manifest.packs, request.inputs)
    done = request.store.committed_keys() >= set(plan.keys()) and not superseded(request, plan)
    return done and tables_current(request.store) and claims_current(request.store, plan.study)


def superseded(request: Request, plan: Plan) -> list[Superseded]:
    """What the store has, and this plan of the study does not.

    Raises:
        StoreError: a later version of lossray has made some of it; or it was computed with other source of
            the user's functions, and is not to be computed again.
    """
    if request.manifest is None:
        return []
    made_with = request.manifest.versions.get("lossray", "unknown")
    kept = kept_keys(request, plan)
    found = find_superseded(request.store, plan, kept, made_with, request.edited)
    if not request.recompute:
        check_edited(found)
    return found


def kept_keys(request: Request, plan: Plan) -> set[str]:
    """The keys of what the store keeps: the plan's, and those of sections that the study leaves out."""
    keys = set(plan.keys())
    if request.manifest is None or recorded_keys(request.store) <= keys:
        return keys
    packs = tuple(pack.pack for pack in plan.packs)
    whole = _extended(request.manifest, request, packs).study
    if whole == request.loaded.study.plain():
        return keys
    study = study_from_table(whole, f"{request.store.url}/manifest.json")
    return {*keys, *make_plan(replace(request.context, study=study), packs, request.inputs).keys()}


def is_recorded(request: Request) -> bool:
    """Whether manifest.json and study.toml of a complete store are those that `freeze` would write."""
    old = request.manifest
    assert old is not None
    return _extended(old, request, old.packs) == old and _holds_study_file(request)


def try_settings(request: Request, device: str) -> Rule:
    """Decide for every setting that has no pack yet, while nothing is written.

    Raises:
        ModelError: a model that cannot be trained, naming the study file.
    """
    study, path = request.loaded.study, request.loaded.path
    known = {pack.setting_id for pack in request.frozen}
    settings = settings_of(study, request.inputs.recordings)
    new = [setting for setting in settings if setting.setting_id not in known]
    try:
        decided = {setting.setting_id: decide(study, request.dataset, device, setting) for setting in new}
    except ModelError as error:
        raise ModelError(f"{path}: models: {error}") from error
    return lambda setting: decided[setting.setting_id]


def freeze(request: Request, rule: Rule) -> Plan:
    """Complete the partition, write manifest.json and study.toml where they change, and plan every task.

    Reads the manifest once more: until this driver had the lease, another one may have written it.

    Raises:
        StoreError: it has, for another study.
    """
    study, store = request.loaded.study, request.store
    old = read_manifest(store, recorded=bool(request.inputs.recordings))
    if old is not None:
        check_extension(old, study, request.inputs)
    request = replace(request, manifest=old)
    packs = _partition(request, rule)
    plan = make_plan(request.context, packs, request.inputs)
    superseded(request, plan)  # refuses what a later version has made
    if old is None:
        manifest = new_manifest(study, request.inputs, packs, folder=request.loaded.folder)
        for path in store.paths("parts"):  # of an attempt that committed nothing
            store.delete(path)
    else:
        manifest = _extended(old, request, packs)
    if manifest != old:
        store.write_json("manifest.json", manifest.plain())
    if not _holds_study_file(request):
        store.write_bytes("study.toml", request.loaded.text.encode())
    if old is not None:
        withdraw(store, kept_keys(request, plan))
    return plan


def read_manifest(store: Store, *, recorded: bool = False) -> Manifest | None:
    """The manifest of a store, None where there is no store yet, or where nothing depends on it yet.

    Args:
        store: the store.
        recorded: whether the study analyses recorded checkpoints, which are there before it.

    Raises:
        StoreError: the manifest is damaged, or the folder holds something else.
    """
    if store.exists("manifest.json"):
        manifest = Manifest.from_plain(store.read_json("manifest.json"), f"{store.url}/manifest.json")
        needed = store.committed_keys() or (store.paths("checkpoints") and not recorded)
        return manifest if needed else None
    try:
        strangers = store.paths()
    except OSError as error:
        raise StoreError(f"--out {store.url}: cannot be a store: {error.strerror}") from error
    if recorded:
        strangers = [path for path in strangers if not path.startswith((f"{FOLDER}/", "checkpoints/"))]
    if strangers:
        raise StoreError(
            f"--out {store.url}: found files that are no store of lossray's, such as {strangers[0]}; "
            "allowed: a new or empty folder, or the store of this study"
        )
    return None


def user_folders(loaded: LoadedStudy) -> list[str]:
    """Where modules of the user's are looked for: the current directory, then the study file's folder."""
    return list(dict.fromkeys([os.getcwd(), str(loaded.folder)]))


def _partition(request: Request, rule: Rule) -> tuple[Pack, ...]:
    return partition(request.loaded.study, request.frozen, rule, request.inputs.recordings)


def _extended(old: Manifest, request: Request, packs: Sequence[Pack]) -> Manifest:
    """The folder goes with a study of the user's; a ready-made one may be run again from anywhere."""
    loaded = request.loaded
    folder = None if loaded.ready_made else loaded.folder
    return extended(old, loaded.study, request.inputs, packs, folder=folder)


def _holds_study_file(request: Request) -> bool:
    store, text = request.store, request.loaded.text.encode()
    return store.exists("study.toml") and store.read_bytes("study.toml") == text


def _lacks_runs(request: Request) -> bool:
    """Whether some run of the study is in no pack of the store."""
    assert request.manifest is not None
    have = {run_id for pack in request.manifest.packs for run_id in pack.run_ids}
    return not runs_of(request.loaded.study, request.inputs.recordings) <= have


def _gather(store: Store, interrupt: Interrupt, *, in_process: bool) -> bool:
    """Publish the tables; False after an interrupt.

    Raises:
        StoreError: a part is missing or damaged.
    """
    if in_process:
        publish_tables(store)
        return True
    reference = gather.options(name="gather").remote(store.url)
    while not ray.wait([reference], timeout=WAIT_SECONDS)[0]:
        if interrupt.received:
            return False
    try:
        ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None  # the user's message, without the worker's traceback
    return True


def _conclude(store: Store, ledger: Ledger, finished: bool) -> int:
    elapsed = duration(ledger.progress.elapsed)
    if not finished:
        _say(f"interrupted after {elapsed}; the same command resumes")
        return INTERRUPTED
    _say(f"done in {elapsed}: `lossray tables {store.url}`")
    if ledger.failures:
        _say(
            f"{len(ledger.failures)} tasks failed: `lossray status {store.url}`; the same command tries again"
        )
    return SOME_FAILED if ledger.failures else DONE


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
