import uuid

import pandas as pd
import pytest

from lossray.errors import StoreError
from lossray.storage.publish import assemble, publish_tables, tables_current
from lossray.storage.store import Store
from lossray.storage.tables import TABLES, arrow_schema


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(str(tmp_path / "out") if request.param == "local" else f"memory://{uuid.uuid4().hex}/out")


def task(store, key, run_id, *steps, status="done"):
    """One task that publishes training rows and commits."""
    store.publish("training", key, [{"run_id": run_id, "step": s, "train_loss": float(s)} for s in steps])
    store.commit({"task_key": key, "kind": "checkpoint", "status": status})


def contents(store):
    return {path: store.read_bytes(path) for path in store.paths("tables")}


def test_every_table_is_published_sorted_with_a_manifest(store):
    task(store, "k2", "b", 1)
    task(store, "k1", "a", 3, 2)
    rows = publish_tables(store)
    assert rows == {name: 0 for name in TABLES} | {"training": 3, "tasks": 3}
    assert {store.table_path(name) for name in TABLES} < set(store.paths("tables"))
    training = store.read_table("tables/training.parquet", "training")
    assert training.select(["run_id", "step"]).to_pydict() == {"run_id": ["a", "a", "b"], "step": [2, 3, 1]}
    manifest = store.read_json("tables/manifest.json")
    size = len(store.read_bytes("tables/training.parquet"))
    columns = ",".join(arrow_schema("training").names)
    declared = {"schema": "training/1", "columns": columns}
    assert manifest["tables"]["training"] == {"rows": 3, "bytes": size, **declared}


def test_the_tasks_table_tells_of_the_gather_that_made_it(store):
    task(store, "k1", "a", 1)
    publish_tables(store)
    tasks = store.read_table("tables/tasks.parquet", "tasks").to_pandas()
    assert sorted(tasks["kind"]) == ["checkpoint", "gather"]
    gather = tasks[tasks["kind"] == "gather"].iloc[0]
    assert gather["started"] <= gather["finished"]


def test_publishing_again_changes_no_file(store, monkeypatch):
    task(store, "k1", "a", 1)
    before = publish_tables(store), contents(store)

    def refuse(path, data):
        raise AssertionError(f"wrote {path}")

    monkeypatch.setattr(store.files, "write", refuse)
    assert (publish_tables(store), contents(store)) == before


def test_tables_are_current_until_something_is_committed(store):
    assert not tables_current(store)
    publish_tables(store)
    assert tables_current(store)
    store.publish("training", "k1", [{"run_id": "a", "step": 1}])
    assert tables_current(store)
    store.commit({"task_key": "k1", "kind": "checkpoint", "status": "done"})
    assert not tables_current(store)
    publish_tables(store)
    assert tables_current(store)
    store.commit({"task_key": "k2", "kind": "curvature", "status": "failed", "error": "boom"})
    assert not tables_current(store)
    assert publish_tables(store)["tasks"] == 3
    assert tables_current(store)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"source": "x", "tables": 3}', b"\xff"])
def test_a_damaged_manifest_is_made_anew(store, damage):
    task(store, "k1", "a", 1)
    publish_tables(store)
    store.write_bytes("tables/manifest.json", damage)
    assert not tables_current(store)
    assert publish_tables(store)["training"] == 1
    assert tables_current(store)


@pytest.mark.parametrize("remains", [None, b"junk"])
def test_a_table_that_is_gone_or_cut_off_is_published_again(store, remains):
    task(store, "k1", "a", 1)
    publish_tables(store)
    before = store.read_table("tables/training.parquet", "training")
    store.delete("tables/training.parquet")
    if remains is not None:
        store.write_bytes("tables/training.parquet", remains)
    assert not tables_current(store)
    publish_tables(store)
    assert store.read_table("tables/training.parquet", "training").equals(before)


def test_tables_do_not_depend_on_the_history_but_for_volatile_columns(tmp_path):
    one, other = Store(str(tmp_path / "one")), Store(str(tmp_path / "other"))
    task(one, "k1", "a", 1)
    publish_tables(one)
    task(one, "k2", "a", 2)
    publish_tables(one)
    task(other, "k2", "a", 2)
    other.commit({"task_key": "k1", "kind": "checkpoint", "status": "failed"})
    task(other, "k1", "a", 1)
    publish_tables(other)
    for name in TABLES:
        tables = [
            s.read_table(s.table_path(name), name).drop_columns(TABLES[name].volatile) for s in (one, other)
        ]
        assert tables[0].equals(tables[1]), name


def test_a_gather_killed_before_its_manifest_is_not_taken_for_complete(store, monkeypatch):
    task(store, "k1", "a", 1)
    publish_tables(store)
    task(store, "k2", "a", 2)
    monkeypatch.setattr(Store, "write_json", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        publish_tables(store)
    monkeypatch.undo()
    assert not tables_current(store)
    assert publish_tables(store)["training"] == 2


def test_assemble_reads_what_is_committed_now(store):
    task(store, "k1", "a", 2)
    task(store, "k0", "a", 1, status="diverged")
    store.publish("training", "k2", [{"run_id": "a", "step": 3}])
    assert assemble(store, "training")["step"].to_pylist() == [1, 2]
    assert assemble(store, "tasks")["task_key"].to_pylist() == ["k0", "k1"]


def test_a_committed_part_that_was_deleted_is_missed(store):
    task(store, "k1", "a", 1)
    store.delete("parts/training/k1.parquet")
    with pytest.raises(StoreError, match=r"training/k1\.parquet is missing.*delete parts/tasks/k1\.parquet"):
        publish_tables(store)


def test_tasks_that_contradict_each_other_are_refused(store):
    task(store, "k1", "a", 1)
    store.publish("training", "k2", [{"run_id": "a", "step": 1, "train_loss": 7.0}])
    store.commit({"task_key": "k2", "kind": "checkpoint", "status": "done"})
    with pytest.raises(StoreError, match="run_id='a', step=1: train_loss is"):
        publish_tables(store)
    assert contents(store) == {}


def test_pandas_reads_the_tables(tmp_path):
    store = Store(str(tmp_path))
    task(store, "k1", "a", 1, 2)
    publish_tables(store)
    frame = pd.read_parquet(tmp_path / "tables" / "training.parquet")
    assert frame["train_loss"].tolist() == [1.0, 2.0]
    assert frame["test_loss"].isna().all()
