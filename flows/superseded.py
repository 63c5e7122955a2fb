"""What a store has and its study does not plan any more: found, explained, and withdrawn.

A task's key holds the versions of the numbers that it computes, its settings and what it is computed from. So
a result whose key is not planned is one that this lossray, or the changed inputs, would give otherwise.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flows.plan import Plan
from lossray.errors import StoreError
from lossray.packages import installed
from lossray.storage.files import keyed
from lossray.storage.store import FAILED, Store
from lossray.study import versions_of
from tasks.commit_record import versions_in

COLUMNS = ["task_key", "kind", "status", "pack_id", "step", "versions", "lossray_version"]
REPLACED = "checkpoints of the run were replaced, deleted or added"
OTHERWISE = "the study asks for it otherwise"
OBJECTS = {  # what a line calls a kind of task, and what it counts, in the order of the work
    "checkpoint": ("training", "checkpoint"),
    "training": ("the record", "pack"),
    "curvature": ("curvature", "checkpoint"),
    "pair": ("comparison", "pair"),
    "degeneracy": ("degeneracy", "checkpoint"),
    "trajectory": ("trajectory", "pack"),
    "separations": ("separations", "pack"),
    "surfaces": ("surfaces", "checkpoint"),
    "connectivity": ("connectivity", "task"),
    "ensemble": ("ensembles", "task"),
}
FIRST = ("tasks", "failures")  # without its record a task's parts are invisible


@dataclass(frozen=True)
class Superseded:
    """A result, or a failure, that is not planned any more.

    Attributes:
        key: its task key.
        kind: as in the `tasks` table.
        done: whether it is a result.
        again: whether the study has a task in its place, which will be computed.
        reason: why it is superseded.
        pack_id: of the pack that it belongs to.
        edited: the functions of the user's that it was computed with and that are others now.
    """

    key: str
    kind: str
    done: bool
    again: bool
    reason: str
    pack_id: str | None = None
    edited: tuple[str, ...] = ()


def find_superseded(
    store: Store, plan: Plan, kept: Collection[str], made_with: str, edited: Mapping[str, Sequence[str]]
) -> list[Superseded]:
    """Every record of a store that is neither planned nor kept, with the reason.

    Args:
        store: the store.
        plan: of the study.
        kept: keys that stay although the study leaves them out.
        made_with: the lossray that has made the store, for records that do not tell their own.
        edited: by pack id, functions of the user's that are others than the results were computed with.

    Raises:
        StoreError: a later version of lossray has made some of it, and would lose it to this one.
    """
    keep = {*plan.keys(), *kept}
    if recorded_keys(store) <= keep:
        return []
    rows = store.records().select(COLUMNS).to_pylist()
    others = [row for row in rows if row["task_key"] not in keep]
    _check_not_later(store, others)
    planned = {(pack.pack.pack_id, kind, step) for pack in plan.packs for kind, step, _ in pack.tasks()}
    recorded = {pack.pack.pack_id for pack in plan.packs if pack.pack.recorded is not None}
    return [
        Superseded(
            row["task_key"],
            row["kind"],
            row["status"] != FAILED,
            (row["pack_id"], row["kind"], row["step"]) in planned,
            f"{' and '.join(edited[row['pack_id']])} was edited"
            if row["pack_id"] in edited
            else _reason(
                row, made_with, recorded=row["pack_id"] in recorded or plan.study.source is not None
            ),
            row["pack_id"],
            tuple(edited.get(row["pack_id"], ())),
        )
        for row in others
    ]


def check_edited(superseded: Sequence[Superseded]) -> None:
    """Refuse to lose results that were computed with functions of the user's that were edited since.

    A pack whose training has failed has nothing to lose: what is left of it was mended.

    Raises:
        StoreError: naming the functions and what depends on them.
    """
    failed = {entry.pack_id for entry in superseded if entry.kind == "training" and not entry.done}
    lost = [entry for entry in superseded if entry.done and entry.edited and entry.pack_id not in failed]
    if lost:
        functions = ", ".join(sorted({name for entry in lost for name in entry.edited}))
        counts = Counter(entry.kind for entry in lost)
        what = ", ".join(_counted(kind, count) for kind, count in sorted(counts.items()))
        raise StoreError(
            f"{functions}: its source, or that of a module it uses, has changed since the store was made, "
            f"and {len(lost)} results depend on it ({what}): restore it, run into another --out, or add "
            "--recompute, which withdraws these and computes them again, and nothing else"
        )


def recorded_keys(store: Store) -> set[str]:
    """The keys of all tasks that are committed or have failed, from two listings."""
    return store.committed_keys() | set(keyed(store.paths("parts/failures")))


def withdraw(store: Store, keep: Collection[str]) -> None:
    """Delete the records and parts of all tasks but some; call it under the lease.

    Records go first: whenever it is interrupted, what is left of a task is either whole or invisible, and the
    next run takes it away. Checkpoints and eigenvectors stay: whoever reads them knows them by their keys,
    and they are replaced when they are computed again.

    Args:
        store: the store.
        keep: the keys of the tasks that stay.
    """
    gone = [path for key, path in _parts(store) if key not in keep]
    gone.sort(key=lambda path: path.split("/")[1] not in FIRST)
    for path in gone:
        store.delete(path)


def explained(superseded: Iterable[Superseded]) -> list[str]:
    """One line for each kind and reason: "curvature of 24 checkpoints will be computed again: ..."."""
    groups = Counter((entry.kind, entry.again, entry.reason) for entry in superseded if entry.done)
    order = sorted(groups, key=lambda group: (list(OBJECTS).index(group[0]), not group[1], group[2]))
    return [
        f"{_counted(kind, groups[kind, again, reason])} will be "
        f"{'computed again' if again else 'withdrawn'}: {reason}"
        for kind, again, reason in order
    ]


def _parts(store: Store) -> Iterator[tuple[str, str]]:
    """Every record and part: its task key, and its path."""
    for path in store.paths("parts"):
        yield next(iter(keyed([path]))), path


def _check_not_later(store: Store, rows: Iterable[Mapping[str, str | None]]) -> None:
    for row in rows:
        later = _later(versions_in(row["versions"]), versions_of(str(row["kind"]))) if row["versions"] else []
        if later:
            raise StoreError(
                f"{store.url}: its {row['kind']} was computed by lossray {row['lossray_version']}, a later "
                f"version ({', '.join(later)}) than this, {installed('lossray')}: use the later version, or "
                "another --out"
            )


def _later(stored: Mapping[str, int], current: Mapping[str, int]) -> list[str]:
    """The versions found that are later than the current ones.

    One that this lossray does not know is a later lossray's, unless another one is earlier: then it was
    given up.
    """
    common = {name: version for name, version in stored.items() if name in current}
    if any(version < current[name] for name, version in common.items()):
        return [f"{name} {version}" for name, version in common.items() if version > current[name]]
    return [f"{name} {version}" for name, version in stored.items() if version > current.get(name, 0)]


def _reason(row: Mapping[str, str | None], made_with: str, *, recorded: bool) -> str:
    """Why the key of a record is not planned: other versions, or other inputs."""
    current = versions_of(str(row["kind"]))
    stored = versions_in(row["versions"]) if row["versions"] else None
    changed = [
        f"{name} {stored.get(name, 'none')}, now {version}"
        for name, version in current.items()
        if stored is not None and stored.get(name) != version
    ]
    if stored is not None and not changed:
        return REPLACED if recorded else OTHERWISE
    here, there = installed("lossray"), row["lossray_version"] or made_with
    them = f"the {there} that made them" if there != here else "the one that made them"
    what = "writes other tables" if changed and not _numbers(changed) else "computes other numbers"
    reason = f"lossray {here} {what} than {them}" + (f" ({'; '.join(changed)})" if changed else "")
    return f"{REPLACED}, or {reason}" if recorded and stored is None else reason


def _numbers(changed: Iterable[str]) -> bool:
    return any(not entry.startswith("table ") for entry in changed)


def _counted(kind: str, count: int) -> str:
    """How many results of one kind: "curvature of 24 checkpoints"."""
    what, unit = OBJECTS[kind]
    return f"{what} of {count} {unit}{'' if count == 1 else 's'}"
