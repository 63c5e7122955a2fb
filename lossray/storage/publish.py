"""The tables of a store, put together from what its tasks have committed.

tables/manifest.json is written last and names the records that the tables were made from, their sizes, and
the schemas that they have. While it does not match what is on disk, or cannot be read, the tables are out of
date, and readers put them together from the parts instead. Tables whose schemas are those of an earlier
version of lossray are good for readers, and made anew by the next run.
"""

import datetime
import socket
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from lossray.errors import StoreError
from lossray.settings import content_hash
from lossray.storage.rows import merge, to_arrow, to_bytes
from lossray.storage.store import DONE, Store
from lossray.storage.tables import TABLES

MANIFEST = "tables/manifest.json"


def publish_tables(store: Store) -> dict[str, int]:
    """Write tables/<table>.parquet for every table, then the manifest; nothing if they are current.

    The table `tasks` gets one row of kind "gather" for this call.

    Returns:
        The rows of each table.

    Raises:
        StoreError: a part that a committed task has published is missing or damaged, or two parts disagree.
    """
    started = datetime.datetime.now(datetime.UTC)
    if tables_current(store):
        return published_rows(store)
    source = tables_source(store)
    records = store.records()
    _check_parts(store, records)
    tables = {name: assemble(store, name) for name in TABLES if name != "tasks"}
    entries = {name: _write(store, name, table) for name, table in tables.items()}
    # `tasks` comes last, so that its gather row can tell how long the others took.
    entries["tasks"] = _write(store, "tasks", merge("tasks", [records, _gather_row(source, started)]))
    entries = {name: entries[name] for name in TABLES}
    store.write_json(MANIFEST, {"source": source, "tables": entries})
    return {name: entry["rows"] for name, entry in entries.items()}


def tables_current(store: Store) -> bool:
    """Whether the published tables hold everything committed, in the schemas of this version.

    Reads three listings and the manifest only.
    """
    source, entries = _published(store)
    return _schemas(entries) == _schemas(_declared()) and _is_current(store, source, entries)


def readable_tables(store: Store) -> dict[str, int]:
    """The rows of each published table; empty while they do not hold everything committed.

    They may be those of an earlier version of lossray, which has other schemas and lacks some tables.
    """
    source, entries = _published(store)
    current = _is_current(store, source, entries)
    return {name: entry["rows"] for name, entry in entries.items()} if current else {}


def publish_derived(store: Store, name: str, table: pa.Table, key: str) -> None:
    """Replace a table by one that was computed from the others, which must have been published.

    Args:
        store: the store.
        name: the table.
        table: its rows.
        key: hash of all that the rows depend on; see `derived_key`.
    """
    manifest = store.read_json(MANIFEST)
    manifest["tables"][name] = {**_write(store, name, table), "key": key}
    store.write_json(MANIFEST, manifest)


def derived_key(store: Store, name: str) -> str | None:
    """The key under which a table was derived; None where it was not since the tables were published."""
    try:
        key: str | None = store.read_json(MANIFEST)["tables"][name].get("key")
    except (StoreError, KeyError, TypeError, AttributeError):  # damaged or missing: it is made anew
        return None
    return key


def tables_source(store: Store) -> str:
    """Hash of what the tables are made from now."""
    return _source(store, _declared())


def published_rows(store: Store) -> dict[str, int]:
    """The rows of each published table; StoreError where none have been published."""
    return {name: entry["rows"] for name, entry in store.read_json(MANIFEST)["tables"].items()}


def assemble(store: Store, name: str) -> pa.Table:
    """A table as of now, from the parts of committed tasks: deduplicated and sorted by key."""
    parts = store.records() if name == "tasks" else store.read_parts(name)
    return merge(name, [parts])


def _source(store: Store, entries: Mapping[str, Any]) -> str:
    """Hash of what tables are made from: committed keys, failed keys, schemas. Commits never change."""
    columns = [entry["columns"] for entry in entries.values() if "columns" in entry]  # none until 0.1.0
    return content_hash(
        {
            "committed": sorted(store.committed_keys()),
            "failed": sorted(store.failed_keys()),
            "schemas": [entry["schema"] for entry in entries.values()],
            **({"columns": columns} if columns else {}),
        }
    )


def _declared() -> dict[str, dict[str, Any]]:
    """The schema of every table, as entries of the manifest have it."""
    return {
        name: {"schema": schema.label, "columns": ",".join(column.name for column in schema.columns)}
        for name, schema in TABLES.items()
    }


def _schemas(entries: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, entry.get("schema"), entry.get("columns")) for name, entry in entries.items()]


def _published(store: Store) -> tuple[str, dict[str, dict[str, Any]]]:
    """What the manifest says: the source and the tables by name; nothing where it is missing or damaged."""
    try:
        manifest = store.read_json(MANIFEST)
        entries = {name: dict(entry) for name, entry in manifest["tables"].items()}
        sound = all({"rows", "bytes", "schema"} <= set(entry) for entry in entries.values())
        return (manifest["source"], entries) if sound else ("", {})
    except (StoreError, KeyError, TypeError, ValueError, AttributeError):  # damaged: it is made anew
        return "", {}


def _write(store: Store, name: str, table: pa.Table) -> dict[str, Any]:
    """Write one table; its entry of the manifest."""
    data = to_bytes(table)
    store.write_bytes(store.table_path(name), data)
    return {"rows": table.num_rows, "bytes": len(data), **_declared()[name]}


def _is_current(store: Store, source: str, entries: Mapping[str, Any]) -> bool:
    """Whether published tables hold what is committed now, and their files are as they were written."""
    sizes = {name: entry["bytes"] for name, entry in entries.items()}
    return source == _source(store, entries) and all(
        store.size(store.table_path(name)) == size for name, size in sizes.items()
    )


def _check_parts(store: Store, records: pa.Table) -> None:
    """Refuse to make tables that silently lack the rows of a part that somebody has deleted."""
    present = set(store.paths("parts"))
    for record in records.select(["task_key", "status", "tables"]).to_pylist():
        published = (record["tables"] or "").split(",") if record["status"] in DONE else []
        for part in (store.part_path(table, record["task_key"]) for table in published if table):
            if part not in present:
                commit = store.part_path("tasks", record["task_key"])
                raise StoreError(
                    f"{store.url}/{part} is missing, but its task is committed: "
                    f"delete {commit} as well and run the study again"
                )


def _gather_row(source: str, started: datetime.datetime) -> pa.Table:
    finished = datetime.datetime.now(datetime.UTC)
    row: dict[str, Any] = {
        "task_key": source,
        "kind": "gather",
        "status": "done",
        "tables": ",".join(sorted(TABLES)),
        "attempts": 1,
        "wall_seconds": (finished - started).total_seconds(),
        "started": started,
        "finished": finished,
        "node": socket.gethostname(),
    }
    return to_arrow("tasks", [row])
