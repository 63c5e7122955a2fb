"""A study of recorded runs: results of what is no longer recorded leave the store."""

from flows.plan import Plan
from lossray.storage.store import FAILED, Store


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
