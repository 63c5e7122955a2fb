"""The store of one study: where each thing lies, and what counts as done.

Execution is at-least-once, so a task may run twice, or die half-way. It publishes its parts first and commits
*last*, by writing parts/tasks/<key>.parquet. That file is the commit record: it is written once and never
changed, what has none is invisible to readers, and what has one is not computed again. A task that failed for
good is not committed, so the next run tries it again: its record lies in parts/failures/, and shows only the
parts that were published together with it (rows that say that a run failed).
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from lossray.errors import StoreError
from lossray.storage.files import LocalFiles, keyed, open_files
from lossray.storage.rows import Rows, from_bytes, to_arrow, to_bytes
from lossray.storage.tables import arrow_schema, schema_of

DONE = ("done", "diverged")  # a run that diverged is a result: it is committed and not tried again
FAILED = "failed"
RESULTS = ("parts/", "checkpoints/", "vectors/")  # folders of what tasks publish
VECTORS_FORMAT = "eigenpairs/2"  # of the files at `Store.vectors_path`; see `lossray.geometry.vectors`


class Store:
    """Files, parts and commit records under one local path or URI. Cheap to make, and to pickle."""

    def __init__(self, url: str):
        """Open a store; nothing is read or written yet.

        Args:
            url: a local path (made absolute, since workers have other working directories) or a URI such as
                s3://bucket/study, gs://bucket/study or memory://study.

        Raises:
            StoreError: the URI's protocol is unknown or needs a package that is not installed.
        """
        self.files = open_files(str(url))
        self.url = self.files.root if isinstance(self.files, LocalFiles) else str(url).rstrip("/")
        self._published: dict[str, list[str]] = {}  # key not yet committed -> its tables so far
        self._bytes = 0  # of RESULTS, written since the last commit

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    # Files

    def read_bytes(self, path: str) -> bytes:
        """The content of the file at a path relative to the store; StoreError where there is none."""
        try:
            return self.files.read(path)
        except FileNotFoundError as error:
            raise StoreError(f"{self.url}/{path} does not exist") from error

    def write_bytes(self, path: str, data: bytes) -> None:
        """Create or replace a file in one step: no reader ever sees a part of it."""
        self.files.write(path, data)
        if path.startswith(RESULTS):
            self._bytes += len(data)

    def read_json(self, path: str) -> Any:
        """The value in a JSON file; StoreError where there is none or it is not JSON."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise StoreError(f"{self.url}/{path} is damaged: {error}") from error

    def write_json(self, path: str, value: Any) -> None:
        """Write a JSON-compatible value, one line per entry, keys in the order given."""
        self.write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    def read_table(self, path: str, name: str) -> pa.Table:
        """One Parquet file, checked against the declared schema of table `name`."""
        return from_bytes(name, self.read_bytes(path), where=f"{self.url}/{path}")

    def exists(self, path: str) -> bool:
        """Whether there is a file at the path."""
        return self.files.exists(path)

    def size(self, path: str) -> int | None:
        """Bytes of the file at the path; None where there is none."""
        return self.files.size(path)

    def paths(self, prefix: str = "") -> list[str]:
        """Sorted paths of all files below a folder, relative to the store; temporary files are left out."""
        return self.files.names(prefix.strip("/"))

    def delete(self, path: str) -> None:
        """Remove a file; nothing happens where there is none."""
        self.files.delete(path)

    # Layout

    def checkpoint_path(self, pack_id: str, step: int) -> str:
        """Where the checkpoint of a pack at a step lies."""
        return f"checkpoints/{pack_id}/{step}.safetensors"

    def checkpoint_steps(self, pack_id: str) -> list[int]:
        """The steps of a pack that have a checkpoint on disk, ascending."""
        return sorted(int(step) for step in keyed(self.paths(f"checkpoints/{pack_id}")))

    def vectors_path(self, pack_id: str, step: int) -> str:
        """Where the top eigenvectors of a pack at a step lie."""
        return f"vectors/{pack_id}/{step}.safetensors"

    def part_path(self, table: str, key: str) -> str:
        """Where a task publishes its rows of a table."""
        return f"parts/{table}/{key}.parquet"

    def table_path(self, table: str) -> str:
        """Where gather publishes a table."""
        return f"tables/{table}.parquet"

    def log_path(self, name: str) -> str:
        """Where a log lies, for example a worker's traceback."""
        return f"logs/{name}"

    # Parts and commits

    def publish(self, table: str, key: str, rows: Rows) -> str:
        """Write a task's rows of one table; they stay invisible until the task is committed.

        Args:
            table: a name in tables.TABLES, not "tasks".
            key: the task's key, a name without "/".
            rows: see rows.to_arrow.

        Returns:
            The path written, relative to the store.

        Raises:
            StoreError: an unknown table, column or type, or a key that cannot be a file name.
        """
        if table == "tasks":
            raise StoreError("a row of the table 'tasks' is a commit record: use commit, not publish")
        path = self.part_path(table, _file_name(key))
        self.write_bytes(path, to_bytes(to_arrow(table, rows)))
        self._published.setdefault(key, []).append(table)
        return path

    def commit(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Record a task's end: with status "done" or "diverged", all its parts become visible at once.

        The first commit of a key stands, and later ones are ignored: what readers have seen does not change
        when a task that was thought lost finishes after its replacement. A failure is recorded beside; it
        shows only what this object published under its key, not what the failed task has left behind.

        The columns `tables` and `published_bytes` are filled in.

        Args:
            record: one row of the table `tasks`; `status` is "done", "diverged" or "failed".

        Returns:
            The row, whether it or an earlier one stands.

        Raises:
            StoreError: an unknown status, column or type.
        """
        key, status = _file_name(record.get("task_key")), record.get("status")
        if status not in (*DONE, FAILED):
            raise StoreError(f"task {key}: status {status!r} is none of {', '.join((*DONE, FAILED))}")
        if record.get("kind") == "gather":
            raise StoreError("the gather task is recorded by publish_tables, in the tables that it makes")
        published = sorted(set(self._published.pop(key, [])))
        row = {"tables": ",".join(published), "published_bytes": self._bytes, **record}
        if not self.exists(self.part_path("tasks", key)):
            folder = "failures" if status == FAILED else "tasks"
            self.write_bytes(self.part_path(folder, key), to_bytes(to_arrow("tasks", [row])))
        self._bytes = 0
        return row

    def committed_keys(self) -> set[str]:
        """The keys of all committed tasks, from one listing."""
        return set(keyed(self.paths("parts/tasks")))

    def failed_keys(self) -> set[str]:
        """The keys of the tasks that failed and have not been committed since, from two listings."""
        return set(keyed(self.paths("parts/failures"))) - self.committed_keys()

    def committed(self) -> dict[str, str]:
        """Task key -> "done" or "diverged", for every committed task."""
        paths = keyed(self.paths("parts/tasks"))
        rows = self._read_all("tasks", list(paths.values()), columns=["task_key", "status"])
        return dict(zip(rows["task_key"].to_pylist(), rows["status"].to_pylist(), strict=True))

    def records(self) -> pa.Table:
        """Rows of the table `tasks`: every commit record, and the failures that none has followed."""
        committed, failures = keyed(self.paths("parts/tasks")), keyed(self.paths("parts/failures"))
        return self._read_all("tasks", list({**failures, **committed}.values()))

    def read_parts(self, table: str, keys: Iterable[str] | None = None) -> pa.Table:
        """All visible rows of a table, neither sorted nor deduplicated: see `commit`.

        Args:
            table: a name in tables.TABLES; for "tasks", `records` gives the failures too.
            keys: read these tasks only; those that are not committed are left out all the same.

        Raises:
            StoreError: an unknown table, a damaged part, or one written with another version of the schema.
        """
        schema_of(table)
        # Parts are listed after the commits: a task commits last, so its parts are in this listing.
        visible = self.committed_keys() | self._failures_with(table)
        selected = visible if keys is None else visible & set(keys)
        parts = keyed(self.paths(f"parts/{table}"))
        return self._read_all(table, [path for key, path in parts.items() if key in selected])

    def _failures_with(self, table: str) -> set[str]:
        """The keys of the failed tasks whose record came with rows of a table."""
        paths = list(keyed(self.paths("parts/failures")).values())
        rows = self._read_all("tasks", paths, columns=["task_key", "tables"]).to_pylist()
        return {row["task_key"] for row in rows if table in (row["tables"] or "").split(",")}

    def _read_all(self, table: str, paths: list[str], columns: list[str] | None = None) -> pa.Table:
        """One table out of many small files; they are fetched together, since each fetch has a latency."""
        contents = self.files.read_many(paths)
        parts = [
            from_bytes(table, data, where=f"{self.url}/{path}", columns=columns)
            for path, data in zip(paths, contents, strict=True)
        ]
        empty = pa.Table.from_batches([], arrow_schema(table))  # `empty_table` would load pandas
        return pa.concat_tables([empty.select(columns) if columns else empty, *parts])


def _file_name(key: Any) -> str:
    """A task key, checked: it becomes a file name, and those that start with "." are never listed."""
    if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", key):
        raise StoreError(f"{key!r} cannot be a task key: it needs letters, digits, '-' and '_' only")
    return key
