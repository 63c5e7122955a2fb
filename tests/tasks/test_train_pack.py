"""Training one pack: what it leaves in the store, and that an interrupted one ends the same."""

from dataclasses import replace
from pathlib import Path

import pytest

from lossray.errors import DataError
from lossray.measures.run_rows import failed_run_rows
from lossray.storage import checkpoints
from lossray.storage.publish import assemble
from lossray.storage.store import Store
from lossray.storage.tables import TABLES
from lossray.study import settings_of
from tasks.events import Finished, Published
from tasks.jobs import Attempt
from tasks.planned_data import dataset_of
from tasks.train_pack import train_pack

NOISY_MODEL = {"name": "mlp", "widths": [4], "norm": "batch", "dropout": 0.3}
STEPS = (0, 5, 12)


def job_of(plan, attempt=1):
    return plan.training_job(plan.packs[0], Attempt(attempt))


def trained(plan, attempt=1):
    """Train the plan's pack to its end; the events of its checkpoints."""
    *events, last = train_pack(job_of(plan, attempt))
    assert isinstance(last, Finished)
    return events


def store_of(plan):
    return Store(plan.context.out)


def frame(plan, table):
    return assemble(store_of(plan), table).to_pandas()


def stable_rows(plan):
    """All rows of all tables but for volatile columns."""
    store = store_of(plan)
    return {
        name: assemble(store, name).drop_columns(schema.volatile).to_pylist()
        for name, schema in TABLES.items()
    }


def tensors(plan, step):
    """Every tensor in a checkpoint file, as bytes by name."""
    store, pack = store_of(plan), plan.packs[0].pack
    checkpoint = checkpoints.loads(store.read_bytes(store.checkpoint_path(pack.pack_id, step)))
    groups = {name: getattr(checkpoint, name) for name in checkpoints.GROUPS}
    named = {f"{group}/{name}": tensor for group, own in groups.items() for name, tensor in own.items()}
    named |= {name: getattr(checkpoint, name) for name in checkpoints.SINGLE}
    return {
        name: (str(tensor.dtype), tensor.shape, tensor.numpy().tobytes()) for name, tensor in named.items()
    }


def parts(plan):
    """Every part and commit record on disk: when it was written, and its bytes."""
    paths = [path for path in Path(plan.context.out, "parts").rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


# ---- what it leaves


def test_there_is_one_event_for_each_checkpoint_in_order(planned):
    plan = planned()
    pack_id = plan.packs[0].pack.pack_id
    *events, last = train_pack(job_of(plan))
    records = {record["step"]: record for record in frame(plan, "tasks").to_dict("records")}
    assert [replace(event, record=None) for event in events] == [
        Published(pack_id, step, alive=2, record=None) for step in STEPS
    ]
    for event in events:
        assert event.record["task_key"] == records[event.step]["task_key"]
    assert (last.record["kind"], last.record["status"]) == ("training", "done")
    assert all(event.record is None for event in trained(plan))  # committed before


def test_rows_are_committed_segment_by_segment(planned):
    plan = planned()
    logged = {0: [], 5: [0, 3], 12: [0, 3, 5, 6, 9, 12]}
    for event in train_pack(job_of(plan)):
        if isinstance(event, Finished):
            break
        assert sorted(set(frame(plan, "training")["step"])) == logged[event.step]
        assert set(frame(plan, "checkpoints")["step"]) == {step for step in STEPS if step <= event.step}
        assert len(frame(plan, "runs")) == 0
    assert set(frame(plan, "tasks")["kind"]) == {"checkpoint", "training"}
    assert len(frame(plan, "runs")) == 2


def test_the_runs_table_says_what_was_trained_and_how_it_ended(planned):
    plan = planned()
    trained(plan)
    runs, pack = frame(plan, "runs"), plan.packs[0].pack
    assert sorted(runs["run_id"]) == sorted(pack.run_ids)
    assert sorted(runs["seed"]) == [3, 8]
    for column, value in {
        "status": "finished",
        "steps_done": 12,
        "n_params": 6 * 4 + 4 + 4 * 3 + 3,
        "optimizer": "adam",
        "lr": 0.03,
        "adaptive": True,
        "model": "mlp",
        "activation": "tanh",
        "batch_size": 16,
        "data_fingerprint": plan.context.data_key,
    }.items():
        assert set(runs[column]) == {value}, column
    assert runs["diverged_at"].isna().all()
    last = frame(plan, "checkpoints").query("step == 12").set_index("run_id")
    assert runs.set_index("run_id")["test_accuracy"].to_dict() == last["test_accuracy"].to_dict()


def test_the_checkpoints_table_describes_the_files(planned):
    plan = planned()
    trained(plan)
    store = store_of(plan)
    for row in frame(plan, "checkpoints").to_dict("records"):
        first, now = (
            checkpoints.loads(store.read_bytes(store.checkpoint_path(row["pack_id"], step)))
            for step in (0, row["step"])
        )
        assert row["path"] == store.checkpoint_path(row["pack_id"], row["step"])
        squares = [own[row["member"]].double().square().sum() for own in now.parameters.values()]
        assert row["parameter_norm"] == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-12)
        moved = [
            (now.parameters[name] - first.parameters[name])[row["member"]].double().square().sum()
            for name in now.parameters
        ]
        assert row["distance_from_init"] == pytest.approx(float(sum(moved)) ** 0.5, rel=1e-6)
        assert (row["distance_from_init"] > 0) == (row["step"] > 0)
        assert row["train_loss"] == float(now.evaluation["train_loss"][row["member"]])


def test_the_training_table_counts_examples_and_evaluates_at_checkpoints_only(planned):
    plan = planned()
    trained(plan)
    training = frame(plan, "training")
    assert (training["examples_seen"] == 16 * training["step"]).all()
    assert set(training[training["validation_loss"].notna()]["step"]) == set(STEPS)
    assert set(training[training["update_norm"].isna()]["step"]) == {12}  # no step leads on from the last
    assert training["train_loss"].notna().all()


def test_a_diverged_run_is_done_with_its_step_and_null_numbers(planned):
    plan = planned(optimizers=[{"name": "sgd", "lr": 1e12}])
    events = trained(plan)
    assert [event.alive for event in events] == [2, 0, 0]
    runs = frame(plan, "runs")
    assert set(runs["status"]) == {"diverged"}
    assert (runs["diverged_at"] == runs["steps_done"]).all()
    assert runs["diverged_at"].between(1, 5).all()
    assert runs["reason"].str.contains("at step").all()
    assert runs[["train_loss", "test_loss", "test_accuracy"]].isna().all(axis=None)
    late = frame(plan, "checkpoints").query("step > 0")
    assert not late["alive"].any()
    assert late[["train_loss", "parameter_norm", "distance_from_init"]].isna().all(axis=None)
    tasks = frame(plan, "tasks")
    assert set(tasks[tasks["kind"] == "training"]["status"]) == {"diverged"}
    assert plan.packs[0].training_key in store_of(plan).committed_keys()  # not tried again


def test_rows_of_a_failed_pack_name_every_run_and_the_reason(planned):
    plan = planned()
    rows = failed_run_rows(plan.packs[0].pack, plan.study, "ValueError: no")
    assert [row["run_id"] for row in rows] == list(plan.packs[0].pack.run_ids)
    assert {row["status"] for row in rows} == {"failed"}
    assert {row["reason"] for row in rows} == {"ValueError: no"}
    store_of(plan).publish("runs", "k", rows)  # they fit the schema
    assert {row["setting_id"] for row in rows} == {settings_of(plan.study)[0].setting_id}


# ---- starting again


@pytest.fixture
def undisturbed(planned):
    plan = planned("undisturbed", models=[NOISY_MODEL])
    trained(plan)
    return plan


def assert_same_end(plan, undisturbed):
    for step in STEPS:
        assert tensors(plan, step) == tensors(undisturbed, step), step
    assert stable_rows(plan) == stable_rows(undisturbed)


def test_dropout_batch_norm_and_the_optimizer_leave_something_to_resume(undisturbed):
    names = tensors(undisturbed, 5)
    assert any("running_mean" in name for name in names)
    assert any(name.startswith("optimizer/exp_avg") for name in names)
    assert tensors(undisturbed, 5) != tensors(undisturbed, 12)


@pytest.mark.parametrize("events", [1, 2, 3])
def test_a_training_abandoned_after_a_checkpoint_ends_bit_identically(planned, undisturbed, events):
    plan = planned(models=[NOISY_MODEL])
    training = train_pack(job_of(plan))
    for _ in range(events):
        next(training)
    training.close()
    before = parts(plan)
    assert len(before) == 3 * events  # training, checkpoints, tasks
    assert [event.step for event in trained(plan, attempt=2)] == list(STEPS)
    assert_same_end(plan, undisturbed)
    after = parts(plan)
    assert {path: after[path] for path in before} == before  # nothing was published or committed twice
    attempts = frame(plan, "tasks").groupby("attempts").size().to_dict()
    assert attempts == {1: events, 2: 4 - events}


@pytest.mark.parametrize("table", ["training", "checkpoints", "runs"])
def test_a_training_that_dies_between_its_parts_ends_bit_identically(
    planned, undisturbed, monkeypatch, table
):
    plan = planned(models=[NOISY_MODEL])
    publish, published = Store.publish, []

    def die_once(self, name, key, rows):
        published.append(name)
        if name == table and published.count(name) == (1 if table == "runs" else 2):
            raise KeyboardInterrupt
        return publish(self, name, key, rows)

    monkeypatch.setattr(Store, "publish", die_once)
    with pytest.raises(KeyboardInterrupt):
        trained(plan)
    monkeypatch.undo()
    assert stable_rows(plan) != stable_rows(undisturbed)
    trained(plan, attempt=2)
    assert_same_end(plan, undisturbed)


@pytest.mark.parametrize("committed", [True, False])
def test_a_damaged_checkpoint_is_trained_again(planned, undisturbed, monkeypatch, committed):
    plan = planned(models=[NOISY_MODEL])
    training = train_pack(job_of(plan))
    next(training), next(training)
    training.close()
    store, pack = store_of(plan), plan.packs[0]
    path = store.checkpoint_path(pack.pack.pack_id, 5)
    store.write_bytes(path, store.read_bytes(path)[:-100])
    if not committed:
        store.delete(store.part_path("tasks", pack.checkpoint_keys[5]))
    trained(plan, attempt=2)
    assert_same_end(plan, undisturbed)


def test_a_finished_training_run_again_changes_no_commit_and_no_checkpoint(undisturbed):
    store = store_of(undisturbed)
    before = stable_rows(undisturbed), {path: store.read_bytes(path) for path in store.paths("checkpoints")}
    commits = {path: content for path, content in parts(undisturbed).items() if path.parent.name == "tasks"}
    trained(undisturbed, attempt=2)
    after = stable_rows(undisturbed), {path: store.read_bytes(path) for path in store.paths("checkpoints")}
    assert after == before
    assert commits.items() <= parts(undisturbed).items()


def test_a_second_training_started_from_the_same_store_gives_the_same_bytes(planned, undisturbed):
    again = planned("again", models=[NOISY_MODEL])
    trained(again)
    assert_same_end(again, undisturbed)
    first = store_of(undisturbed).read_bytes(
        f"parts/training/{undisturbed.packs[0].checkpoint_keys[12]}.parquet"
    )
    assert first == store_of(again).read_bytes(f"parts/training/{again.packs[0].checkpoint_keys[12]}.parquet")


# ---- the data


def test_data_that_changed_since_the_plan_are_refused(planned):
    plan = planned()
    job = replace(job_of(plan), context=replace(plan.context, data_key="0" * 64))
    with pytest.raises(DataError, match=r"content hash .* but 000000000000 when the study was planned"):
        list(train_pack(job))
    assert store_of(plan).paths("checkpoints") == []


def test_a_worker_reads_its_data_once(planned, monkeypatch):
    plan = planned(data={"seed": 5})
    first = dataset_of(plan.context)
    monkeypatch.setattr("tasks.planned_data.load_dataset", None)
    assert dataset_of(plan.context) is first
