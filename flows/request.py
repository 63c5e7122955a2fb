"""A study that is asked for, and its store: what is checked, what is there, and what is to be done now."""

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import chdir
from dataclasses import dataclass, field, replace

import torch

from flows.freeze import decide
from flows.gpu_packs import GpuPacks, kind_of
from flows.plan import Plan, make_plan
from flows.superseded import (
    Superseded,
    check_edited,
    find_superseded,
    recorded_keys,
    withdraw,
)
from flows.tuning import Round, round_of, trained_runs
from flows.verdicts import claims_current
from lossray.errors import DataError, ModelError, StoreError
from lossray.imports import settle_imports
from lossray.operators.settings import ProductMode
from lossray.source_hash import check_imported, source_hash
from lossray.storage.publish import tables_current
from lossray.storage.recordings import FOLDER, read_recordings
from lossray.storage.store import Store
from lossray.study import (
    LoadedStudy,
    Pack,
    Setting,
    StudyInputs,
    load_study,
    partition,
    runs_of,
    settings_of,
    study_from_table,
    study_inputs,
)
from lossray.study.checks import check_against_data, check_recordings
from lossray.study.manifest import Manifest, check_extension, edited_packs, extended, new_manifest
from lossray.study.packs import AUTO_SIZE
from lossray.training.datasets import Dataset, load_dataset
from tasks.jobs import Context

Rule = Callable[[Setting], tuple[str, ProductMode]]  # executor and product mode


@dataclass(frozen=True)
class Request:
    """A study that has been checked against its data and its store; nothing has been written yet.

    Attributes:
        loaded: the study as its file has it.
        store: where its results go.
        context: what all jobs share.
        inputs: what the study depends on and does not contain.
        dataset: its data.
        manifest: of the store; None where it has none.
        recompute: whether to withdraw what was computed with other source of the user's functions.
        gpu: what follows from measured memory; nothing where none was.
    """

    loaded: LoadedStudy
    store: Store
    context: Context
    inputs: StudyInputs
    dataset: Dataset
    manifest: Manifest | None
    recompute: bool = False
    gpu: GpuPacks = field(default_factory=GpuPacks)

    @property
    def edited(self) -> dict[str, list[str]]:
        """By pack id: functions of the user's that are others than its results were computed with."""
        return {} if self.manifest is None else edited_packs(self.manifest, self.loaded.study, self.inputs)

    @property
    def frozen(self) -> tuple[Pack, ...]:
        """The packs of the store that stay as they are; of an edited model all is decided anew."""
        packs = self.manifest.packs if self.manifest else ()
        return tuple(pack for pack in packs if pack.pack_id not in self.edited)


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
    if request.manifest is None or request.edited:
        return False
    tuning = tuning_round(request)
    if _lacks_runs(request, tuning):
        return False
    plan = make_plan(request.context, request.manifest.packs, request.inputs, analysed=tuning.analysed)
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
    entries = find_superseded(request.store, plan, kept, made_with, request.edited)
    if not request.recompute:
        check_edited(entries)
    return entries


def kept_keys(request: Request, plan: Plan) -> set[str]:
    """The keys of what the store keeps: the plan's, and those of what the study leaves out.

    That is the analysis of settings that were the best ones once, and sections.
    """
    packs = tuple(pack.pack for pack in plan.packs)
    keys = set(plan.keys())
    if request.manifest is None or recorded_keys(request.store) <= keys:
        return keys
    keys |= set(make_plan(request.context, packs, request.inputs).keys())
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
    """Decide for every setting that has no pack yet, while nothing is written; each model is tried once.

    Raises:
        ModelError: a model that cannot be trained, naming the study file.
    """
    study, path = request.loaded.study, request.loaded.path
    decided: dict[str, tuple[str, ProductMode]] = {}

    def rule(setting: Setting) -> tuple[str, ProductMode]:
        model = setting.model.model_dump_json()
        if model not in decided:
            decided[model] = decide(study, request.dataset, device, setting)
        return decided[model]

    frozen = {pack.setting_id for pack in request.frozen}
    try:
        for setting in settings_of(study, request.inputs.recordings):
            if setting.setting_id not in frozen:
                rule(setting)
    except ModelError as error:
        raise ModelError(f"{path}: models: {error}") from error
    return rule


def tuning_round(request: Request, given_up: Collection[str] = ()) -> Round:
    """What is trained and analysed now; all of a study whose learning rates are not tuned.

    Args:
        request: for the study.
        given_up: ids of packs whose training has failed and is not tried again.
    """
    study = request.loaded.study
    if study.tuning is None:
        return Round(settings_of(study, request.inputs.recordings))
    plan = make_plan(request.context, request.frozen, request.inputs, analysed=())
    return round_of(study, request.frozen, trained_runs(request.store, plan, given_up))


def plan_of(request: Request, rule: Rule) -> Plan:
    """Every task of what is to be trained and analysed now; nothing is written."""
    tuning = tuning_round(request)
    packs = _partition(request, rule, tuning)
    return make_plan(request.context, packs, request.inputs, analysed=tuning.analysed)


def freeze(request: Request, rule: Rule, given_up: Collection[str] = ()) -> tuple[Plan, Round]:
    """Complete the partition, write manifest.json and study.toml where they change, and plan every task.

    Reads the manifest once more: until this driver had the lease, another one may have written it.

    Returns:
        The plan, and the round of tuning that it is of.

    Raises:
        StoreError: it has, for another study.
    """
    study, store = request.loaded.study, request.store
    old = read_manifest(store, recorded=bool(request.inputs.recordings))
    if old is not None:
        check_extension(old, study, request.inputs)
    request = replace(request, manifest=old)
    tuning = tuning_round(request, given_up)
    packs = _partition(request, rule, tuning)
    plan = make_plan(request.context, packs, request.inputs, analysed=tuning.analysed)
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
    return plan, tuning


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


def _partition(request: Request, rule: Rule, tuning: Round) -> tuple[Pack, ...]:
    study, recordings = request.loaded.study, request.inputs.recordings

    def auto_size(setting: Setting, executor: str) -> int:
        return request.gpu.sizes.get(kind_of(setting), AUTO_SIZE[executor])

    return partition(study, request.frozen, rule, recordings, settings=tuning.settings, auto_size=auto_size)


def _extended(old: Manifest, request: Request, packs: Sequence[Pack]) -> Manifest:
    """The folder goes with a study of the user's; a ready-made one may be run again from anywhere."""
    loaded = request.loaded
    folder = None if loaded.ready_made else loaded.folder
    return extended(old, loaded.study, request.inputs, packs, folder=folder)


def _holds_study_file(request: Request) -> bool:
    store, text = request.store, request.loaded.text.encode()
    return store.exists("study.toml") and store.read_bytes("study.toml") == text


def _lacks_runs(request: Request, tuning: Round) -> bool:
    """Whether some run of the study is in no pack of the store."""
    assert request.manifest is not None
    have = {run_id for pack in request.manifest.packs for run_id in pack.run_ids}
    study, recordings = request.loaded.study, request.inputs.recordings
    return not runs_of(study, recordings, settings=tuning.settings) <= have
