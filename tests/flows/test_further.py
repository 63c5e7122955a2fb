"""Degeneracy, trajectories, surfaces and claims in a study: when they run, how they resume, what extends."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import flows
import flows.serial
import lossray
from lossray.errors import StoreError
from lossray.storage.publish import derived_key
from lossray.storage.store import Store
from tasks.measure_degeneracy import measure_degeneracy

SECTIONS = {
    "seeds": 3,
    "resources": {"pack": 2},  # two packs of each setting
    "degeneracy": {"dense_up_to": 100},
    "trajectory": {},
    "surfaces": {"points": 3, "seeds": 1},
    "angles": {"window": 3, "shadow": ["adam"]},
}
FURTHER = ("degeneracy", "trajectory", "separations", "surfaces")


@pytest.fixture(scope="module")
def whole(finished):
    """The store of the study with all sections, when nothing happens to it; and its study file."""
    return finished(SECTIONS)


def run(path, out, *overrides):
    return flows.run(str(path), out, overrides=overrides, in_process=True)


def table(out, name):
    return lossray.open_study(out).table(name)


def kinds(out):
    return table(out, "tasks")["kind"].value_counts().to_dict()


def test_every_section_has_its_tasks_and_rows(whole):
    _, out = whole
    found = kinds(out)
    # Two settings of two packs each; the first seed, which has surfaces, is in the first of them.
    assert [found[kind] for kind in FURTHER] == [4 * 2, 4, 4, 2]
    said = json.loads((out / "progress.json").read_text())
    assert (said["further"], said["further_done"], said["further_failed"]) == (18, 18, 0)
    assert said["units"] == said["units_done"]
    for name in ("degeneracy", "trajectory", "separations", "surfaces", "alignment", "claims"):
        assert len(table(out, name)) > 0, name
    assert "shadow:adam" in set(table(out, "alignment")["direction"])


def test_runs_of_one_setting_are_compared_across_packs(whole):
    _, out = whole
    separations = table(out, "separations")
    pairs = separations[["run_a", "run_b"]].drop_duplicates()
    assert len(pairs) == 2 * 3  # three seeds of two settings
    assert len(separations) == 2 * 3 * 3
    seeds = [tuple(run.rpartition("-s")[2] for run in pair) for pair in pairs.to_numpy()]
    assert set(seeds) == {("0", "1"), ("0", "2"), ("1", "2")}


def test_degeneracy_starts_as_soon_as_its_checkpoint_is_on_disk(whole):
    _, out = whole
    tasks = table(out, "tasks").sort_values("finished")
    first = tasks[tasks["pack_id"] == tasks["pack_id"].dropna().iloc[0]]
    order = list(zip(first["kind"], first["step"], strict=True))
    assert order.index(("degeneracy", 0)) < order.index(("checkpoint", 5))


def test_a_study_that_is_complete_does_nothing(whole, capsys):
    path, out = whole
    before = {file: file.stat().st_mtime_ns for file in Path(out).rglob("*")}
    assert run(path, out) == 0
    assert "is complete: nothing to do" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in Path(out).rglob("*")} == before


def test_sections_that_are_added_extend_a_store_and_train_nothing(whole, tmp_path, monkeypatch, helpers):
    path, out = whole
    monkeypatch.setattr(sys, "path", list(sys.path))
    bare = tmp_path / "study.toml"
    text = path.read_text()
    cut = text.index("[degeneracy]")
    bare.write_text(text[:cut] + text[text.index("[angles]") :])
    other = tmp_path / "out"
    assert run(bare, other) == 0
    assert not set(kinds(other)) & set(FURTHER)
    monkeypatch.setattr(flows.serial, "train_pack", None)
    monkeypatch.setattr("tasks.run_analysis.analyse_checkpoint", None)
    assert run(path, other) == 0
    helpers.assert_same_rows(other, out)


def test_seeds_that_are_added_extend_the_rows_and_change_none(whole, tmp_path, monkeypatch):
    path, out = whole
    monkeypatch.setattr(sys, "path", list(sys.path))
    other = shutil.copytree(out, tmp_path / "out")
    assert run(path, other, "seeds=4") == 0
    for name in ("separations", "trajectory", "degeneracy", "surfaces"):
        before, after = table(out, name), table(other, name)
        keys = [column for column in ("run_id", "run_a", "run_b", "surface_id") if column in before]
        kept = after.merge(before[keys].drop_duplicates(), on=keys)
        assert kept.equals(before), name
    assert len(table(other, "separations")) == 2 * 6 * 3


def test_a_section_of_a_store_cannot_change(whole, tmp_path, monkeypatch):
    path, out = whole
    monkeypatch.setattr(sys, "path", list(sys.path))
    other = shutil.copytree(out, tmp_path / "out")
    with pytest.raises(StoreError, match=r"degeneracy.dense_up_to: the store has 100, the study says 50"):
        run(path, other, "degeneracy.dense_up_to=50")
    with pytest.raises(StoreError, match=r"surfaces.points: the store has 3, the study says 5"):
        run(path, other, "surfaces.points=5")


@pytest.mark.slow
def test_what_fails_is_recorded_and_tried_again(whole, tmp_path, monkeypatch, helpers, capsys):
    path, out = whole
    monkeypatch.setattr(sys, "path", list(sys.path))
    other = tmp_path / "out"

    def fail_at_the_end(job, device=None):
        if job.step == 12:
            raise ValueError("no eigenvalues today")
        measure_degeneracy(job)

    with monkeypatch.context() as patch:
        patch.setattr("tasks.run_analysis.measure_degeneracy", fail_at_the_end)
        assert run(path, other) == 1
    assert "4 tasks failed" in capsys.readouterr().err
    failed = table(other, "tasks").query("status == 'failed'")
    assert set(failed["kind"]) == {"degeneracy"}
    monkeypatch.setattr(flows.serial, "train_pack", None)
    monkeypatch.setattr("tasks.run_analysis.analyse_checkpoint", None)
    assert run(path, other) == 0
    helpers.assert_same_rows(other, out)


def test_a_checkpoint_that_only_a_further_job_needs_is_trained_again(whole, tmp_path, monkeypatch, helpers):
    path, out = whole
    monkeypatch.setattr(sys, "path", list(sys.path))
    other = shutil.copytree(out, tmp_path / "out")
    tasks = table(other, "tasks")
    row = tasks[tasks["kind"] == "trajectory"].iloc[0]
    for part in other.glob(f"parts/*/{row['task_key']}.parquet"):
        part.unlink()
    shutil.rmtree(other / "tables")
    checkpoint = other / "checkpoints" / row["pack_id"] / "5.safetensors"
    checkpoint.unlink()
    monkeypatch.setattr("tasks.run_analysis.analyse_checkpoint", None)
    assert run(path, other) == 0
    assert checkpoint.exists()
    helpers.assert_same_rows(other, out)


# ---- claims


def test_claims_are_published_with_the_tables_and_follow_their_settings(whole, tmp_path, monkeypatch):
    path, out = whole
    monkeypatch.setattr(sys, "path", list(sys.path))
    other = shutil.copytree(out, tmp_path / "out")
    claims = table(other, "claims")
    assert {"A", "B"} <= set(claims["claim"])
    verdicts = claims[claims["claim"].isin(["A", "B"])]["verdict"]
    assert verdicts.notna().all()
    parts = {file: file.stat().st_mtime_ns for file in other.glob("parts/*/*")}
    key = derived_key(Store(str(other)), "claims")
    assert run(path, other, "claims.margin_energy=0.5") == 0  # nothing but the claims is made anew
    assert {file: file.stat().st_mtime_ns for file in other.glob("parts/*/*")} == parts
    assert derived_key(Store(str(other)), "claims") != key
    assert table(other, "angles").equals(table(out, "angles"))


def test_the_command_prints_the_verdicts_of_a_store_in_any_state(whole, tmp_path):
    from flows.verdicts import describe

    _, out = whole
    other = shutil.copytree(out, tmp_path / "out")
    text = describe(str(other))
    assert "A. Perpendicularity" in text
    assert "B. Degeneracy" in text
    assert "UNDECIDED" in text  # three seeds decide nothing
    shutil.rmtree(other / "tables")  # not gathered yet
    assert describe(str(other)) == text
    for file in other.glob("parts/alignment/*"):
        file.unlink()
    for file in other.glob("parts/tasks/*"):
        file.unlink()  # nothing is committed
    assert "UNDECIDED" in describe(str(other))
    with pytest.raises(StoreError, match="is no store"):
        describe(str(tmp_path / "nothing"))


def test_damaged_claims_are_made_again(whole, tmp_path, monkeypatch):
    path, out = whole
    monkeypatch.setattr(sys, "path", list(sys.path))
    other = shutil.copytree(out, tmp_path / "out")
    (other / "tables" / "claims.parquet").unlink()
    assert run(path, other) == 0
    assert table(other, "claims").equals(table(out, "claims"))
    assert Store(str(other)).exists("tables/claims.parquet")


@pytest.mark.slow
@pytest.mark.ray
def test_on_ray_the_rows_are_those_without_it(session_ray, whole, tmp_path, helpers):
    path, out = whole
    run = helpers.Background(path, tmp_path / "out")
    assert run.result() == 0
    helpers.assert_same_rows(tmp_path / "out", out)
