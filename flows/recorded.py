"""A study of recorded runs: what of them is not known; results of what is no longer recorded go."""

from collections.abc import Sequence

from flows.plan import Plan
from lossray.storage.recordings import Recording
from lossray.storage.store import FAILED, Store

SHOWN_RUNS = 4  # that a line names


def optimizer_notes(recordings: Sequence[Recording]) -> list[str]:
    """One line for each thing that is not known of the runs' optimizers, with the runs of which it is not."""
    runs: dict[str, list[str]] = {}
    for recording in recordings:
        for note in recording.notes or _older(recording):
            runs.setdefault(note, []).append(recording.run)
    return [f"{_named(names)}: {note}" for note, names in runs.items()]


def _older(recording: Recording) -> tuple[str, ...]:
    """What is not noted where no optimizer was given, or an older version of lossray has recorded."""
    if recording.optimizer is None:
        return ("no optimizer was recorded: no momentum, preconditioner, threshold",)
    if recording.settings is None and recording.kind is None:
        return (f"optimizer {recording.optimizer} is not known: no momentum, preconditioner, threshold",)
    return ()


def _named(runs: Sequence[str]) -> str:
    if len(runs) == 1:
        return f"run {runs[0]}"
    more = len(runs) - SHOWN_RUNS
    return f"runs {', '.join(runs[:SHOWN_RUNS])}" + (f" and {more} more" if more > 0 else "")


def withdraw(store: Store, plan: Plan) -> int:
    """Delete the commits of tasks that the plan does not have: their checkpoints were replaced or deleted.

    Without it, rows of two trajectories would stand side by side. Call it under the lease.

    Returns:
        How many results were withdrawn.
    """
    planned = set(plan.keys())
    withdrawn = 0
    for record in store.records().select(["task_key", "status", "tables"]).to_pylist():
        key = record["task_key"]
        if key in planned:
            continue
        withdrawn += record["status"] != FAILED
        store.delete(store.part_path("tasks", key))  # first: what has no commit is invisible
        store.delete(store.part_path("failures", key))
        for table in filter(None, (record["tables"] or "").split(",")):
            store.delete(store.part_path(table, key))
    return withdrawn
