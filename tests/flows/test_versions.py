"""A newer lossray meets an older store: what is read, what is computed again, and what is refused."""

import contextlib
import json
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

import lossray
import tasks.train_pack
from flows.estimate import dry_run
from flows.status import describe
from flows.study import run_study
from flows.superseded import withdraw
from lossray.errors import StoreError
from lossray.measures import checkpoint_spectra
from lossray.packages import running
from lossray.storage import checkpoints
from lossray.storage.lease import Lease
from lossray.storage.publish import assemble, publish_tables
from lossray.storage.rows import to_arrow, to_bytes
from lossray.storage.schema import number
from lossray.storage.store import Store
from lossray.storage.tables import TABLES
from lossray.study import keys, versions_of
from tasks.commit_record import versions_text

KEPT = Path(__file__).parents[1] / "fixtures" / "store-c4d9bfb"
# The versions that were not 1 at commit c4d9bfb.
AT_C4D9BFB = {"curvature": 3, "degeneracy": 2, "vectors": 2, "table directions": 2, "table angles": 2}
TINY = {
    "seeds": 1,
    "models": [{"name": "mlp", "widths": [2]}],
    "optimizers": [{"name": "sgd", "lr": 0.1}],
    "data": {"source": "gaussians", "n": 60, "dim": 2, "classes": 2},
    "training": {"steps": 4, "batch_size": 16, "checkpoints": {"steps": [0, 4]}, "log_every": 2},
    "curvature": {"top": 1, "probes": 1, "steps": 4},
    "angles": {"directions": ["gradient", "displacement"], "gauges": ["raw"], "window": 0},
    "degeneracy": {"checkpoints": "ends", "dense_up_to": 20},
    "trajectory": {},
}
EXTENSION = """
[trajectory]

[connectivity]
kinds = ["line"]
points = 3
align = ["none"]
rescaled = false
"""


def run(study, out, *overrides):
    return run_study(str(study), str(out), overrides=overrides, in_process=True)


def files(out):
    paths = [path for path in Path(out).rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def stable(out, name, runs=None):
    """Rows of a table but for volatile columns and the row of the gather task; of some runs only."""
    rows = assemble(Store(str(out)), name).drop_columns(TABLES[name].volatile).to_pylist()
    return [
        row for row in rows if row.get("kind") != "gather" and (runs is None or row.get("run_id") in runs)
    ]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A copy of the study that lossray of c4d9bfb has left: its folder, with the store in ``out``."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "kept"
    shutil.copytree(KEPT, folder)
    with tarfile.open(folder / "store.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def _tiny(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny") / "out"


@pytest.fixture
def tiny(study_file, _tiny, tmp_path):
    """The file of a tiny study, and a copy of its finished store."""
    study, out = study_file(**TINY), tmp_path / "out"
    if not _tiny.exists():
        assert run(study, _tiny) == 0
    shutil.copytree(_tiny, out)
    return study, out


# ---- the store of an earlier version


def test_a_kept_store_is_read_as_it_is(kept):
    before = files(kept)
    study = lossray.open_study(kept / "out")
    assert set(study.tables) == set(TABLES)
    assert {
        name: study.tables[name] for name in ("runs", "eigenvalues", "angles", "degeneracy", "logits")
    } == {
        "runs": 2,
        "eigenvalues": 24,
        "angles": 30,
        "degeneracy": 180,
        "logits": 0,
    }
    for name, schema in TABLES.items():
        frame = study.table(name)
        assert list(frame.columns) == [column.name for column in schema.columns]
        assert len(frame) == study.tables[name]
    assert study.table("tasks")["lossray_version"].isna().all()
    assert files(kept) == before
    shutil.rmtree(kept / "out" / "tables")  # from its parts
    assert lossray.open_study(kept / "out").table("eigenvalues")["eigenvalue"].notna().all()


def test_a_kept_store_is_extended_and_what_stands_stays_bit_for_bit(kept, capsys, monkeypatch):
    out, text = kept / "out", (kept / "study.toml").read_text()
    runs = set(lossray.open_study(out).table("runs")["run_id"])
    names = ("runs", "training", "checkpoints", "curvature", "degeneracy", "trajectory", "separations")
    before = {name: stable(out, name, runs) for name in names}
    trained = []
    monkeypatch.setattr(
        tasks.train_pack,
        "train",
        lambda *a, train=tasks.train_pack.train, **k: trained.append(k["pack_id"]) or train(*a, **k),
    )
    text = text.partition("[degeneracy]")[0].replace("seeds = 2", "seeds = 3", 1)  # whose rows stay
    text = text.replace("[training]", '[[optimizers]]\nname = "sgd"\nlr = 0.05\n\n[training]')
    (kept / "study.toml").write_text(text + EXTENSION)
    assert run(kept / "study.toml", out) == 0
    said = capsys.readouterr().err
    same = {kind for kind in ("training", "degeneracy", "curvature", "trajectory") if _unchanged(kind)}
    assert {kind for kind in same if f"note: {kind} of" in said} == set()
    assert ("curvature of 2 checkpoints will be computed again: " in said) == ("curvature" not in same)
    again = [pack for pack in trained if "momentum" in pack and pack.endswith("-p0")]
    assert bool(again) == ("training" not in same)
    depends = {"curvature": "curvature", "degeneracy": "degeneracy"}
    depends |= dict.fromkeys(("runs", "training", "checkpoints"), "training")
    depends |= dict.fromkeys(("trajectory", "separations"), "trajectory")
    for name, rows in before.items():
        if depends[name] in same:
            assert [row for row in stable(out, name, runs) if row in rows] == rows
    study = lossray.open_study(out)
    assert len(study.table("runs")) == 6
    assert len(study.table("barriers")) == 4  # of the old runs with the new one's too
    assert len(study.table("tasks").query("kind == 'curvature'")) == 6
    assert study.model(min(runs), 4).training is False
    assert run(kept / "study.toml", out) == 0
    assert "is complete: nothing to do" in capsys.readouterr().err


@pytest.mark.slow
def test_a_kept_store_is_resumed_with_all_its_sections(kept, capsys):
    assert run(kept / "study.toml", kept / "out") == 0
    said = capsys.readouterr().err
    kinds = ("curvature", "degeneracy", "trajectory", "separations", "surfaces")
    assert {kind: f"note: {kind} of" in said for kind in kinds} == {
        kind: not _unchanged(kind) for kind in kinds
    }
    assert len(lossray.open_study(kept / "out").table("tasks")) == 12
    assert run(kept / "study.toml", kept / "out") == 0
    assert "is complete: nothing to do" in capsys.readouterr().err


def _unchanged(kind):
    """Whether a kind's numbers are those of c4d9bfb still."""
    return all(AT_C4D9BFB.get(name, 1) == version for name, version in versions_of(kind).items())


# ---- changed numbers


def _again(kind, name, version="_VERSION"):
    constant = f"{name.upper()}{version}"

    def bump(monkeypatch):
        monkeypatch.setattr(keys, constant, getattr(keys, constant) + 1)

    return bump


def _schema(name):
    def bump(monkeypatch):
        monkeypatch.setitem(TABLES, name, replace(TABLES[name], version=TABLES[name].version + 1))

    return bump


@pytest.mark.parametrize(
    ("bump", "kinds"),
    [
        (_again("curvature", "curvature"), {"curvature": 2, "comparison": 1}),
        (_again("degeneracy", "degeneracy"), {"degeneracy": 2}),
        (_again("places", "places"), {"trajectory": 1}),
        (_schema("eigenvalues"), {"curvature": 2, "comparison": 1}),
        (_schema("tasks"), {}),
        (
            _again("key", "key"),
            {
                "the record": 1,
                "training": 2,
                "curvature": 2,
                "degeneracy": 2,
                "comparison": 1,
                "trajectory": 1,
            },
        ),
    ],
)
def test_what_a_version_changes_is_named_first_computed_again_and_never_mixed(
    tiny, bump, kinds, capsys, monkeypatch
):
    study, out = tiny
    bump(monkeypatch)
    said = []
    monkeypatch.setattr(
        "flows.study.Lease", lambda store, lease=Lease: said.append(capsys.readouterr().err) or lease(store)
    )
    before = files(out)
    status = describe(str(out)).splitlines()
    assert len([line for line in status if line.startswith("next run: ")]) == len(kinds)
    assert run(study, out) == 0
    assert "next run: " not in describe(str(out))
    notes = [line.partition(" of ") for line in said[0].splitlines() if "will be computed again" in line]
    assert {kind.removeprefix("note: "): int(what.split()[0]) for kind, _, what in notes} == kinds
    tables = assemble(Store(str(out)), "tasks").to_pylist()
    assert {row["versions"] for row in tables} == {versions_text(versions_of(row["kind"])) for row in tables}
    assert len([row for row in tables if row["kind"] == "curvature"]) == 2
    after = files(out)
    assert {path for path in before if path.startswith("parts/")} - set(after) != set() or not kinds
    assert run(study, out) == 0
    assert "is complete: nothing to do" in capsys.readouterr().err
    assert files(out) == after


def test_an_interrupted_withdrawal_goes_on_and_every_number_is_a_new_one(tiny, monkeypatch):
    study, out = tiny
    before = stable(out, "eigenvalues")
    monkeypatch.setattr(keys, "CURVATURE_VERSION", keys.CURVATURE_VERSION + 1)
    monkeypatch.setattr(
        checkpoint_spectra,
        "eigenvalue_rows",
        lambda *a, rows=checkpoint_spectra.eigenvalue_rows: [
            row | {"eigenvalue": row["eigenvalue"] * 1.5} for row in rows(*a)
        ],
    )
    deleted = []

    def delete(store, path, delete=Store.delete):
        if path.startswith("parts/"):
            if len(deleted) == 2:
                raise KeyboardInterrupt
            deleted.append(path)
        delete(store, path)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", delete)
        with pytest.raises(KeyboardInterrupt):
            run(study, out)
    assert all(path.startswith("parts/tasks/") for path in deleted)
    assert run(study, out) == 0
    after = stable(out, "eigenvalues")
    assert [row["eigenvalue"] for row in after] == [1.5 * row["eigenvalue"] for row in before]
    committed = Store(str(out)).committed_keys()
    assert {Path(path).stem for path in files(out / "parts")} == committed  # nothing is left behind


def test_after_any_number_of_deletes_what_is_left_is_whole_or_invisible(monkeypatch):
    for stop in range(9):
        store = Store(f"memory://withdrawal-{stop}")
        for key in ("a", "b", "stays"):
            for table in ("training", "checkpoints"):
                store.publish(table, key, [{"run_id": key, "step": 1}])
            if key == "b":
                store.commit({"task_key": key, "kind": "checkpoint", "status": "failed"})
                for table in ("training", "checkpoints"):
                    store.publish(table, key, [{"run_id": key, "step": 2}])
            store.commit({"task_key": key, "kind": "checkpoint", "status": "done"})
        left = [stop]

        def delete(store, path, delete=Store.delete, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            delete(store, path)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Store, "delete", delete)
            withdraw(store, {"stays"})
        publish_tables(store)  # refuses what is half there
        assert {row["status"] for row in assemble(store, "tasks").to_pylist()} == {"done"}
        withdraw(store, {"stays"})
        assert {Path(path).stem for path in store.paths("parts")} == {"stays"}


def test_another_training_never_takes_the_checkpoints_of_this_one(tiny, monkeypatch):
    study, out = tiny
    before = files(out / "checkpoints")
    monkeypatch.setattr(keys, "KEY_VERSION", keys.KEY_VERSION + 1)
    trained = []

    def train(*args, train=tasks.train_pack.train, **options):
        for checkpoint in train(*args, **options):
            trained.append((options["resume"] and options["resume"].step, checkpoint.step))
            if len(trained) == 1:
                raise KeyboardInterrupt  # before it is written
            yield checkpoint
            if len(trained) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(tasks.train_pack, "train", train)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(study, out)
    assert run(study, out) == 0
    assert trained == [(None, 0), (None, 0), (0, 4)]
    found = {path: checkpoints.loads(data) for path, data in files(out / "checkpoints").items()}
    assert found.keys() == before.keys()
    old = {checkpoints.loads(data).training_key for data in before.values()}
    (row,) = [row for row in stable(out, "tasks") if row["kind"] == "training"]
    assert {checkpoint.training_key for checkpoint in found.values()} == {row["task_key"]} != old
    assert all(checkpoint.versions == running() for checkpoint in found.values())


def test_checkpoints_without_a_key_count_where_their_rows_are_committed_alone(tiny, monkeypatch):
    study, out = tiny
    for path in (out / "checkpoints").rglob("*.safetensors"):  # as c4d9bfb wrote them
        old = replace(checkpoints.loads(path.read_bytes()), training_key=None)
        path.write_bytes(checkpoints.dumps(old))
    records = {row["step"]: row["task_key"] for row in stable(out, "tasks") if row["kind"] == "checkpoint"}
    (training,) = [row["task_key"] for row in stable(out, "tasks") if row["kind"] == "training"]
    (out / f"parts/tasks/{training}.parquet").unlink()
    resumed = []
    monkeypatch.setattr(
        tasks.train_pack,
        "train",
        lambda *a, train=tasks.train_pack.train, **k: resumed.append(k["resume"]) or train(*a, **k),
    )
    assert run(study, out) == 0
    assert resumed == []
    for key in (training, records[4]):
        (out / f"parts/tasks/{key}.parquet").unlink()
    assert run(study, out) == 0
    assert [checkpoint.step for checkpoint in resumed] == [0]


def test_a_left_out_section_keeps_its_rows_until_its_numbers_change(tiny, study_file, capsys, monkeypatch):
    _, out = tiny
    study = study_file(**TINY | {"degeneracy": None, "seeds": 1})
    rows = stable(out, "degeneracy")
    assert run(study, out) == 0
    assert stable(out, "degeneracy") == rows != []
    monkeypatch.setattr(keys, "DEGENERACY_VERSION", keys.DEGENERACY_VERSION + 1)
    before = files(out)
    assert "\ndegeneracy of 2 checkpoints will be withdrawn: lossray" in dry_run(study, str(out))
    assert files(out) == before
    assert run(study, out) == 0
    assert "note: degeneracy of 2 checkpoints will be withdrawn: lossray" in capsys.readouterr().err
    assert stable(out, "degeneracy") == []


# ---- added columns and settings


def test_an_added_column_is_null_in_older_rows_and_nothing_is_computed_again(tiny, capsys, monkeypatch):
    study, out = tiny
    before, parts = stable(out, "curvature"), files(out / "parts")
    for name in ("curvature", "tasks"):
        columns = (*TABLES[name].columns, number("added", "1", "a column of the next version"))
        monkeypatch.setitem(TABLES, name, replace(TABLES[name], columns=columns))
        assert lossray.open_study(out).table(name)["added"].isna().all()  # from the published table
    assert run(study, out) == 0
    assert "computed again" not in capsys.readouterr().err
    assert files(out / "parts") == parts
    assert stable(out, "curvature") == [row | {"added": None} for row in before]
    assert "added" in lossray.open_study(out).table("curvature")
    assert run(study, out) == 0
    assert "is complete: nothing to do" in capsys.readouterr().err


# ---- a later version


def test_what_a_later_version_has_computed_is_refused_and_not_touched(tiny, monkeypatch):
    study, out = tiny
    with monkeypatch.context() as patch:
        patch.setattr(keys, "DEGENERACY_VERSION", keys.DEGENERACY_VERSION + 1)
        assert run(study, out) == 0
    before = files(out)
    now = keys.DEGENERACY_VERSION + 1
    for action in (run, dry_run):
        with pytest.raises(
            StoreError, match=rf"degeneracy was computed by .* \(degeneracy {now}\) than this"
        ):
            action(study, str(out))
    assert files(out) == before


def test_a_part_of_a_later_schema_is_refused_in_one_line(tiny):
    study, out = tiny
    path = next((out / "parts" / "runs").iterdir())
    table = to_arrow("runs", [{"run_id": "x"}]).append_column("more", pa.array([1]))
    path.write_bytes(to_bytes(table))
    shutil.rmtree(out / "tables")
    for action in (lambda: lossray.open_study(out).table("runs"), lambda: run(study, out)):
        with pytest.raises(StoreError, match=r"holds runs/1 with more, which a later version") as caught:
            action()
        assert "\n" not in str(caught.value)


# ---- other packages


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({}, None),
        ({"python": "3.9.1", "ray": "1.0"}, None),
        ({"torch": "1.13"}, "the store was made with torch 1.13, and this is torch "),
        ({"torch": "1.13", "lossray": "0.0.1"}, "made with lossray 0.0.1, torch 1.13, and this is lossray "),
    ],
)
def test_another_torch_or_lossray_is_named(tiny, capsys, versions, says):
    study, out = tiny
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["versions"] |= versions
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert run(study, out) == 0
    said = capsys.readouterr().err
    assert "is complete: nothing to do" in said
    assert (says or "nothing to do") in said
    assert ("the store was made with" in said) == (says is not None)
    assert ("the store was made with" in dry_run(study, str(out))) == (says is not None)
    assert lossray.open_study(out).table("tasks").query("kind != 'gather'")["torch_version"].notna().all()
