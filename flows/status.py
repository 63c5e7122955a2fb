"""What `lossray status` prints, from any machine that reads the store."""

import json
from typing import Any

import pandas as pd

from flows.plan import make_plan
from flows.progress import duration
from flows.superseded import explained, find_superseded
from lossray.errors import StoreError
from lossray.results import StudyResults, open_study
from lossray.storage.lease import is_free, read_holder
from lossray.storage.store import Store
from tasks.jobs import Context

SILENCE_SECONDS = 60.0  # heartbeat age after which a driver on another machine counts as gone


def describe(out: str) -> str:
    """State, counts, what runs now, and what failed."""
    study = open_study(out)
    store = study.store
    lines = [f"{study.study.name}: {store.url}"]
    if store.exists("progress.json"):
        lines += _state(store)
    tasks = study.table("tasks")
    if len(tasks):
        counts = tasks.groupby(["kind", "status"]).size().unstack(fill_value=0)
        lines += ["", counts.to_string()]
    lines += [f"next run: {line}" for line in _superseded(study)]
    return "\n".join([*lines, *_reduced(tasks), *_failures(tasks[tasks["status"] == "failed"])])


def as_json(out: str) -> str:
    """The same for programs: what progress.json says, and beside it what only the store tells.

    `driven` says whether a driver works on the store, `tasks` counts by kind and status, and `failures` names
    each task that failed. Rate and time left are those of a driver that works: null where none does.
    """
    study = open_study(out)
    store, tasks = study.store, study.table("tasks")
    progress, driven = _said(store)
    if not driven:
        progress |= {"units_per_minute": None, "seconds_left": None, "running": [], "waiting": ""}
    counts = tasks.groupby(["kind", "status"]).size()
    failed = tasks.loc[tasks["status"] == "failed", ["task_key", "kind", "pack_id", "step", "error"]]
    described = {
        "study": study.study.name,
        "out": store.url,
        **progress,
        "driven": driven,
        "tasks": {kind: counts[kind].to_dict() for kind in counts.index.unique("kind")},
        "failures": json.loads(failed.to_json(orient="records")),
    }
    return json.dumps(described, indent=2)


def _said(store: Store) -> tuple[dict[str, Any], bool]:
    """What the driver has said, as far as it can be read, and whether there is one."""
    try:
        driven = not is_free(read_holder(store), SILENCE_SECONDS)
        progress = store.read_json("progress.json") if store.exists("progress.json") else {}
    except StoreError:
        return {"state": "unknown"}, False
    return {"state": "unknown", **(progress if isinstance(progress, dict) else {})}, driven


def _superseded(study: StudyResults) -> list[str]:
    """What this version of lossray would compute again; of recorded runs only their files would tell."""
    if not study.store.exists("manifest.json") or study.study.source is not None:
        return []
    manifest, store = study.manifest, study.store
    inputs = manifest.inputs
    context = Context(store.url, study.study, manifest.folder, inputs.data_key, inputs.sources)
    plan = make_plan(context, manifest.packs, inputs)
    return explained(find_superseded(store, plan, (), manifest.versions.get("lossray", "unknown"), {}))


def _reduced(tasks: pd.DataFrame) -> list[str]:
    """One line for each kind and way in which tasks went on after they had run out of memory."""
    reduced = tasks.dropna(subset="reduced")
    return [
        f"reduced: {len(same)} {same.iloc[0]['kind']} tasks: {same.iloc[0]['reduced']}"
        for _, same in reduced.groupby(["kind", "reduced"])
    ]


def _failures(tasks: pd.DataFrame) -> list[str]:
    """One line for each kind and reason: how many tasks, the first of them, and where its traceback is."""
    lines = []
    for (_, error), same in tasks.groupby(["kind", "error"]):
        row = same.iloc[0]
        step = "" if pd.isna(row["step"]) else f" at step {int(row['step'])}"
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        lines.append(f"failed: {row['kind']} of {row['pack_id']}{step}{more}: {error}")
        lines.append(f"        traceback in logs/{row['task_key']}.log")
    return lines


def _state(store: Store) -> list[str]:
    """What the driver has said, if that can be read: it is no part of the results."""
    try:
        driven = not is_free(read_holder(store), SILENCE_SECONDS)
        return _progress(store.read_json("progress.json"), driven=driven)
    except StoreError as error:
        return [f"state: unknown: {error}"]
    except (KeyError, TypeError):
        return [f"state: unknown: {store.url}/progress.json is damaged; the next run writes it anew"]


def _progress(progress: dict[str, object], *, driven: bool) -> list[str]:
    state = str(progress["state"])
    if not state.startswith(("done", "interrupted", "failed")) and not driven:
        state = f"{state}, but its driver is gone; the same command resumes"
    checkpoints = progress["checkpoints"]
    to_analyse = progress.get("to_analyse", checkpoints)  # not in a store of an older version
    of_them = f" of {to_analyse}" if to_analyse != checkpoints else ""
    lines = [
        f"state: {state} (as of {progress['updated']})",
        f"runs: {progress['runs_done']} of {progress['runs']} done, {progress['runs_failed']} failed",
        f"checkpoints: {progress['checkpoints_trained']} of {checkpoints} trained, "
        f"{progress['checkpoints_analysed']}{of_them} analysed, {progress['checkpoints_failed']} failed",
    ]
    if pairs := progress.get("pairs"):  # none in a store of an older version
        lines.append(
            f"pairs: {progress['pairs_done']} of {pairs} compared, {progress['pairs_failed']} failed"
        )
    if further := progress.get("further"):
        done, failed = progress["further_done"], progress["further_failed"]
        lines.append(f"further analyses: {done} of {further} done, {failed} failed")
    if driven and (waiting := progress.get("waiting")):
        lines.insert(1, str(waiting))
    left = progress["seconds_left"]
    if driven and isinstance(left, int | float):
        lines.append(f"time left: about {duration(left)}")
    if driven and isinstance(running := progress["running"], list):
        lines += [f"running: {name}" for name in running]
    return lines
