import itertools
import random
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lossray.errors import StoreError
from lossray.storage.rows import from_bytes, merge, to_arrow, to_bytes
from lossray.storage.tables import arrow_schema

CHECKPOINT = {"run_id": "a", "step": 1, "path": "checkpoints/p/1.safetensors", "train_loss": 0.5}


def training_rows(run_id, steps):
    return [{"run_id": run_id, "step": step, "train_loss": float(step)} for step in steps]


def test_rows_and_columns_give_the_same_table():
    rows = to_arrow(
        "training", [{"run_id": "a", "step": s, "lr": 0.1, "train_loss": s / 2} for s in range(3)]
    )
    columns = to_arrow(
        "training",
        {"run_id": "a", "step": np.arange(3), "lr": 0.1, "train_loss": torch.arange(3) / 2},
    )
    assert rows.equals(columns, check_metadata=True)
    assert rows.schema.equals(arrow_schema("training"), check_metadata=True)
    assert to_arrow("training", rows).equals(rows)


def test_what_is_left_out_or_not_a_number_is_null():
    table = to_arrow("checkpoints", [CHECKPOINT, CHECKPOINT | {"step": 2, "train_loss": float("nan")}])
    assert table["train_loss"].to_pylist() == [0.5, None]
    assert table["test_loss"].null_count == 2
    assert to_arrow("checkpoints", table).equals(table)
    nan = pa.table({"run_id": ["a"], "step": [1], "train_loss": pa.array([float("nan")])})
    assert to_arrow("checkpoints", nan)["train_loss"].null_count == 1


def test_infinity_stays():
    assert to_arrow("checkpoints", [CHECKPOINT | {"train_loss": float("inf")}])["train_loss"].to_pylist() == [
        float("inf")
    ]


def test_no_rows_are_a_table_too():
    assert to_arrow("runs", []).num_rows == 0
    assert to_arrow("runs", []).schema.equals(arrow_schema("runs"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train_los": 1.0},
            "'checkpoints' has no such column: found 'train_los'.*did you mean 'train_loss'",
        ),
        ({"run_id": None}, "'checkpoints': the key column 'run_id' has missing values"),
        ({"step": 1.5}, "'checkpoints', column 'step' needs int64: found double"),
        ({"step": 1.0}, "column 'step' needs int64: found double"),
        ({"step": True}, "column 'step' needs int64: found bool"),
        ({"step": "1"}, "column 'step' needs int64: found string"),
        ({"train_loss": "1.0"}, "column 'train_loss' needs double: found string"),
        ({"train_loss": True}, "column 'train_loss' needs double: found bool"),
        ({"alive": 1}, "column 'alive' needs bool: found int64"),
        ({"path": 3}, "column 'path' needs string: found int64"),
        ({"train_loss": [1.0, 2.0]}, "column 'train_loss' needs double: found list"),
    ],
)
def test_a_wrong_row_is_refused_naming_table_and_column(change, message):
    with pytest.raises(StoreError, match=message):
        to_arrow("checkpoints", [CHECKPOINT | change])


def test_mixed_types_in_a_column_are_refused():
    with pytest.raises(StoreError, match="column 'train_loss' needs double"):
        to_arrow("checkpoints", [CHECKPOINT, CHECKPOINT | {"train_loss": "high"}])


def test_a_missing_key_column_is_refused():
    with pytest.raises(StoreError, match="key column 'step' has missing values"):
        to_arrow("checkpoints", [{"run_id": "a"}])


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(StoreError, match="'training': the columns need one common length"):
        to_arrow("training", {"run_id": ["a", "b"], "step": [1]})


def test_times_are_utc():
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    row = {"task_key": "k", "kind": "training", "status": "done", "started": moment}
    assert to_arrow("tasks", [row])["started"].to_pylist() == [moment]
    with pytest.raises(StoreError, match="column 'started' needs timestamp"):
        to_arrow("tasks", [row | {"started": moment.replace(tzinfo=None)}])


def test_a_file_round_trip_keeps_values_types_and_metadata():
    table = to_arrow("checkpoints", [CHECKPOINT, CHECKPOINT | {"step": 2, "alive": False}])
    data = to_bytes(table)
    assert from_bytes("checkpoints", data, where="x").equals(table)
    assert pq.read_schema(pa.BufferReader(data)).equals(arrow_schema("checkpoints"), check_metadata=True)
    assert to_bytes(table) == data


def test_columns_can_be_chosen():
    data = to_bytes(to_arrow("checkpoints", [CHECKPOINT]))
    assert from_bytes("checkpoints", data, where="x", columns=["step", "run_id"]).to_pydict() == {
        "step": [1],
        "run_id": ["a"],
    }


def test_damaged_and_foreign_files_are_refused_by_name():
    data = to_bytes(to_arrow("checkpoints", [CHECKPOINT]))
    for damaged in (b"", b"PAR1", data[:-10], data[: len(data) // 2]):
        with pytest.raises(StoreError, match=r"OUT/x\.parquet is damaged"):
            from_bytes("checkpoints", damaged, where="OUT/x.parquet")
    with pytest.raises(StoreError, match=r"x\.parquet holds checkpoints/1, this lossray needs runs/1"):
        from_bytes("runs", data, where="OUT/x.parquet")


def labelled(table, version):
    return to_bytes(table.replace_schema_metadata({"lossray.schema": f"checkpoints/{version}"}))


def test_columns_that_a_file_does_not_have_yet_are_null():
    table = to_arrow("checkpoints", [CHECKPOINT, CHECKPOINT | {"step": 2}])
    for older in (labelled(table.drop_columns(["path"]), 1), labelled(table.drop_columns(["path"]), 0)):
        found = from_bytes("checkpoints", older, where="x")
        assert found.schema.equals(arrow_schema("checkpoints"), check_metadata=True)
        assert found["path"].null_count == 2
        assert found.drop_columns(["path"]).equals(table.drop_columns(["path"]))
        chosen = from_bytes("checkpoints", older, where="x", columns=["path", "step"])
        assert chosen.to_pydict() == {"path": [None, None], "step": [1, 2]}
        assert (
            merge("checkpoints", [found, to_arrow("checkpoints", [CHECKPOINT | {"step": 3}])]).num_rows == 3
        )


def test_an_earlier_version_loses_what_was_given_up_and_takes_the_types_of_now():
    table = to_arrow("checkpoints", [CHECKPOINT])
    older = table.append_column("given_up", [["x"]]).set_column(
        table.column_names.index("member"), "member", pa.array([7], pa.int32())
    )
    found = from_bytes("checkpoints", labelled(older, 0), where="x")
    assert found.column_names == table.column_names
    assert found.schema.field("member").type == pa.int64()
    assert found["member"].to_pylist() == [7]


@pytest.mark.parametrize(
    ("change", "version", "says"),
    [
        (lambda table: table, 2, r"holds checkpoints/2, which a later version .* knows checkpoints/1: use"),
        (
            lambda table: table.append_column("new", [[1]]),
            1,
            r"holds checkpoints/1 with new, which a later version .* knows checkpoints/1 without: use",
        ),
        (lambda table: table.append_column("new", [[1]]), 2, r"holds checkpoints/2 with new"),
        (lambda table: table.drop_columns(["step"]), 0, r"without the key 'step' of checkpoints/1"),
        (
            lambda table: table.set_column(0, "run_id", pa.array([1])),
            1,
            r"damaged: its column 'run_id' is int64, not string",
        ),
        (
            lambda table: table.set_column(0, "run_id", pa.array([1])).drop_columns(["step"]),
            1,
            "'step'|int64",
        ),
    ],
)
def test_what_a_later_version_wrote_and_what_lacks_a_key_is_refused(change, version, says):
    data = labelled(change(to_arrow("checkpoints", [CHECKPOINT])), version)
    with pytest.raises(StoreError, match=says) as caught:
        from_bytes("checkpoints", data, where="OUT/x.parquet")
    assert str(caught.value).startswith("OUT/x.parquet ")
    assert "\n" not in str(caught.value)


def test_merge_sorts_by_key_and_keeps_the_schema():
    parts = [
        to_arrow("training", training_rows("b", [2, 10])),
        to_arrow("training", training_rows("a", [10, 9])),
    ]
    merged = merge("training", parts)
    assert list(zip(merged["run_id"].to_pylist(), merged["step"].to_pylist(), strict=True)) == [
        ("a", 9),
        ("a", 10),
        ("b", 2),
        ("b", 10),
    ]
    assert merged.schema.equals(arrow_schema("training"), check_metadata=True)


def test_merge_does_not_depend_on_the_order_of_parts_or_on_repetition():
    rng = random.Random(0)
    parts = [to_arrow("training", training_rows(run, [i, i + 1])) for run in "ba" for i in (0, 2, 4)]
    parts += parts[:3]
    expected = merge("training", parts)
    assert expected.num_rows == 12
    for _ in range(5):
        rng.shuffle(parts)
        assert to_bytes(merge("training", parts)) == to_bytes(expected)


def test_duplicates_that_differ_in_volatile_columns_only_become_one_row_for_any_order():
    row = {"task_key": "k", "kind": "curvature", "status": "done", "step": None, "node": "x"}
    others = [row | {"wall_seconds": s, "node": n} for s, n in ((2.0, "a"), (1.0, "b"), (1.0, None))]
    parts = [to_arrow("tasks", [other]) for other in others]
    merged = [merge("tasks", order) for order in itertools.permutations(parts)]
    assert {table.num_rows for table in merged} == {1}
    assert all(table.equals(merged[0]) for table in merged)


@pytest.mark.parametrize("other", [1.0, None])
def test_one_key_with_two_different_rows_is_an_error_naming_it(other):
    parts = [
        to_arrow("checkpoints", [CHECKPOINT]),
        to_arrow("checkpoints", [CHECKPOINT | {"train_loss": other}]),
    ]
    with pytest.raises(StoreError, match="two different rows for run_id='a', step=1: train_loss is"):
        merge("checkpoints", parts)


def test_an_all_null_first_part_does_not_hide_the_values_of_others():
    empty = to_arrow("training", [{"run_id": "a", "step": 0}])
    full = to_arrow("training", [{"run_id": "a", "step": 1, "test_accuracy": 0.5, "test_loss": 1.0}])
    assert merge("training", [empty, full])["test_accuracy"].to_pylist() == [None, 0.5]


def test_merge_of_nothing_is_empty():
    assert merge("runs", []).num_rows == 0
    assert merge("runs", []).schema.equals(arrow_schema("runs"), check_metadata=True)


LOGITS = {"ensemble_id": "e", "member": 0, "split": "test"}


def test_lists_of_numbers_round_trip_and_repeated_rows_of_them_become_one():
    row = LOGITS | {"logits": np.arange(3, dtype=np.float32), "n_examples": 1, "n_outputs": 3}
    part = from_bytes("logits", to_bytes(to_arrow("logits", [row])), where="here")
    assert part["logits"].to_pylist() == [[0.0, 1.0, 2.0]]
    assert merge("logits", [part, part]).num_rows == 1
    with pytest.raises(StoreError, match="logits"):
        merge("logits", [part, to_arrow("logits", [row | {"logits": [0.0, 1.0, 3.0]}])])
    with pytest.raises(StoreError, match="'logits' needs list"):
        to_arrow("logits", [LOGITS | {"logits": 1.0}])
    with pytest.raises(StoreError, match="'logits' needs list"):
        to_arrow("logits", [LOGITS | {"logits": ["a"]}])
