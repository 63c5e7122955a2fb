import subprocess
import sys
import threading
import uuid

import pandas as pd
import pytest

from lossray.errors import StoreError
from lossray.storage.rows import merge
from lossray.storage.store import Store


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(str(tmp_path / "out") if request.param == "local" else f"memory://{uuid.uuid4().hex}/out")


def rows(run_id, *steps):
    return [{"run_id": run_id, "step": step, "train_loss": 1.0} for step in steps]


def record(key, status="done", **more):
    return {"task_key": key, "kind": "checkpoint", "status": status, **more}


def steps(table):
    return sorted(table["step"].to_pylist())


def test_parts_are_invisible_until_their_task_is_committed(store):
    path = store.publish("training", "k1", rows("a", 1, 2))
    store.publish("checkpoints", "k1", [{"run_id": "a", "step": 2}])
    assert path == "parts/training/k1.parquet"
    assert store.exists(path)
    assert store.read_parts("training").num_rows == 0
    assert store.committed() == {}
    store.commit(record("k1"))
    assert steps(store.read_parts("training")) == [1, 2]
    assert steps(store.read_parts("checkpoints")) == [2]
    assert store.committed() == {"k1": "done"}
    assert store.committed_keys() == {"k1"}


def test_read_parts_takes_the_committed_ones_of_the_keys_asked_for(store):
    for i in range(3):
        store.publish("training", f"k{i}", rows("a", i))
    store.commit(record("k0"))
    store.commit(record("k1"))
    assert steps(store.read_parts("training", ["k1", "k2", "unknown"])) == [1]
    assert store.read_parts("training", []).num_rows == 0


def test_divergence_is_done_and_failure_is_not(store):
    store.commit(record("k0"))
    store.commit(record("k1", "diverged"))
    store.commit(record("k2", "failed", error="out of memory"))
    assert store.committed() == {"k0": "done", "k1": "diverged"}
    assert store.failed_keys() == {"k2"}
    statuses = dict(zip(*(store.records()[c].to_pylist() for c in ("task_key", "status")), strict=True))
    assert statuses == {"k0": "done", "k1": "diverged", "k2": "failed"}


def test_a_success_replaces_the_failure_and_nothing_replaces_a_success(store):
    store.commit(record("k", "failed", attempts=1))
    store.commit(record("k", attempts=2))
    store.commit(record("k", "failed", attempts=3))
    store.commit(record("k", "diverged", attempts=4))
    assert store.committed() == {"k": "done"}
    assert store.failed_keys() == set()
    assert store.records()["attempts"].to_pylist() == [2]


def test_a_failure_shows_the_rows_recorded_with_it_and_no_leftovers_of_the_task(store):
    dead = Store(store.url)
    dead.publish("training", "k", rows("a", 1))  # a task that died before its commit
    store.publish("runs", "k", [{"run_id": "a", "status": "failed", "reason": "out of memory"}])
    store.commit(record("k", "failed"))
    assert store.read_parts("runs")["status"].to_pylist() == ["failed"]
    assert store.read_parts("training").num_rows == 0


def test_the_commit_record_names_the_tables_published(store):
    store.publish("training", "k", rows("a", 1))
    store.publish("checkpoints", "k", rows("a", 1))
    store.publish("training", "k", rows("a", 1))
    store.commit(record("k"))
    assert store.records()["tables"].to_pylist() == ["checkpoints,training"]


def test_the_commit_record_counts_the_bytes_published_since_the_last(store):
    store.write_json("progress.json", {"state": "running"})  # no result
    store.write_bytes(store.checkpoint_path("p", 1), b"12345")
    part = store.publish("training", "k1", rows("a", 1))
    first = store.commit(record("k1"))
    store.write_bytes(store.vectors_path("p", 1), b"123")
    second = store.commit(record("k2"))
    assert [first["published_bytes"], second["published_bytes"]] == [5 + store.size(part), 3]
    assert store.records().sort_by("task_key")["published_bytes"].to_pylist() == [5 + store.size(part), 3]


def test_executing_a_task_twice_gives_one_set_of_rows(store):
    for _ in range(2):
        store.publish("training", "k", rows("a", 1, 2))
        store.commit(record("k"))
    assert steps(merge("training", [store.read_parts("training")])) == [1, 2]


@pytest.mark.parametrize("key", ["", "a/b", ".hidden", "../up", "a.b", None])
def test_a_key_must_be_a_visible_file_name(store, key):
    with pytest.raises(StoreError, match="cannot be a task key"):
        store.publish("training", key, rows("a", 1))
    with pytest.raises(StoreError, match="cannot be a task key"):
        store.commit(record(key))
    assert store.paths() == []


def test_bad_rows_write_nothing(store):
    with pytest.raises(StoreError, match="column 'train_loss'"):
        store.publish("training", "k", [{"run_id": "a", "step": 1, "train_loss": "x"}])
    with pytest.raises(StoreError, match="no such table"):
        store.publish("trainings", "k", [])
    with pytest.raises(StoreError, match="use commit"):
        store.publish("tasks", "k", [record("k")])
    with pytest.raises(StoreError, match="status 'finished' is none of done, diverged, failed"):
        store.commit(record("k", "finished"))
    with pytest.raises(StoreError, match="gather"):
        store.commit(record("k") | {"kind": "gather"})
    assert store.paths() == []


def test_empty_folders_and_temporary_leftovers_do_no_harm(tmp_path):
    store = Store(str(tmp_path))
    for folder in ("training", "tasks", "runs", "failures"):
        (tmp_path / "parts" / folder).mkdir(parents=True)
    (tmp_path / "parts" / "training" / ".k9.parquet-123").write_bytes(b"half a fi")
    (tmp_path / "parts" / "tasks" / ".k9.parquet-123").write_bytes(b"")
    assert store.read_parts("runs").num_rows == 0
    store.publish("training", "k", rows("a", 1))
    store.commit(record("k"))
    assert store.committed() == {"k": "done"}
    assert steps(store.read_parts("training")) == [1]


def test_pandas_reads_a_folder_of_parts(tmp_path):
    store = Store(str(tmp_path))
    store.publish("training", "a", [{"run_id": "a", "step": 1}])  # all measures null
    store.publish("training", "b", rows("b", 1))
    (tmp_path / "parts" / "training" / ".c.parquet-1").write_bytes(b"half a fi")
    frame = pd.read_parquet(tmp_path / "parts" / "training").sort_values("run_id")
    assert frame["train_loss"].isna().tolist() == [True, False]


def test_a_damaged_committed_part_is_named(store):
    path = store.publish("training", "k", rows("a", 1))
    store.commit(record("k"))
    store.write_bytes(path, store.read_bytes(path)[:-20])
    with pytest.raises(StoreError, match=r"parts/training/k\.parquet is damaged"):
        store.read_parts("training")


def test_readers_see_whole_tasks_only_while_many_are_written(store):
    def work(worker):
        own = Store(store.url)
        for i in range(15):
            own.publish("training", f"k{worker}-{i}", rows(f"r{worker}", 2 * i, 2 * i + 1))
            own.publish("checkpoints", f"k{worker}-{i}", rows(f"r{worker}", 2 * i))
            own.commit(record(f"k{worker}-{i}"))

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        done = store.committed_keys()
        for table, per_task in (("training", 2), ("checkpoints", 1)):
            assert store.read_parts(table, done).num_rows == per_task * len(done)
    for thread in threads:
        thread.join()
    assert len(store.committed()) == 45


def test_two_thousand_tasks_are_read(tmp_path):
    store = Store(str(tmp_path))
    store.publish("training", "k0", rows("a", 0))
    store.commit(record("k0"))
    part, commit = (store.read_bytes(f"parts/{table}/k0.parquet") for table in ("training", "tasks"))
    for i in range(1, 2000):  # written plainly: this is about reading
        (tmp_path / "parts" / "training" / f"k{i}.parquet").write_bytes(part)
        (tmp_path / "parts" / "tasks" / f"k{i}.parquet").write_bytes(commit)
    assert len(store.committed_keys()) == 2000
    assert store.records().num_rows == 2000
    assert merge("training", [store.read_parts("training")]).num_rows == 1


def test_reading_many_parts_is_one_request_on_an_object_store(monkeypatch):
    store = Store(f"memory://{uuid.uuid4().hex}/out")
    for i in range(20):
        store.commit(record(f"k{i}"))
    requests = []
    filesystem = type(store.files.filesystem)
    for name in ("cat", "find", "isfile"):
        original = getattr(filesystem, name)

        def counted(self, *args, original=original, name=name, **kwargs):
            requests.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(filesystem, name, counted)
    assert len(store.committed()) == 20
    assert requests == ["find", "cat"]


KILLED_TASK = """
import os, signal, sys
from lossray.storage.store import Store

store = Store(sys.argv[1])
store.publish("training", "k", [{"run_id": "a", "step": 1, "train_loss": 1.0}])
os.kill(os.getpid(), signal.SIGKILL)
store.commit({"task_key": "k", "kind": "checkpoint", "status": "done"})
"""


def test_a_task_killed_before_its_commit_leaves_no_visible_row_and_can_run_again(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED_TASK, str(tmp_path)], check=False)
    assert done.returncode == -9
    store = Store(str(tmp_path))
    assert store.paths() == ["parts/training/k.parquet"]
    assert store.read_parts("training").num_rows == 0
    store.publish("training", "k", rows("a", 1))
    store.commit(record("k"))
    assert steps(store.read_parts("training")) == [1]
