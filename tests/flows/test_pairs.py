"""Comparisons of neighbours in a study without Ray: when they run, what stops them, what is made again."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

import flows
import flows.serial
import lossray
from lossray.storage.store import Store
from tasks.analyse_checkpoint import analyse_checkpoint
from tasks.compare_checkpoints import compare_checkpoints


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A place for a new store."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # the folders of a study are appended to it
    return tmp_path / "out"


@pytest.fixture
def out(undisturbed, fresh):
    """A finished store that the test may damage."""
    return shutil.copytree(undisturbed, fresh)


def run(study, out, *overrides):
    return flows.run(study, out, overrides=overrides, in_process=True)


def tasks(out, **keys):
    table = lossray.open_study(out).table("tasks")
    for column, value in keys.items():
        table = table[table[column] == value]
    return table


def forget(out, kind, step):
    """Delete the commit of a task, its rows, and the tables: what is compared later is made anew."""
    (key,) = tasks(out, kind=kind, step=step)["task_key"]
    for path in out.glob(f"parts/*/{key}.parquet"):
        path.unlink()
    shutil.rmtree(out / "tables")


def vectors(out, step):
    (path,) = out.glob(f"vectors/*/{step}.safetensors")
    return path


def progress(out):
    return json.loads((out / "progress.json").read_text())


def count_jobs(monkeypatch):
    """The steps that are analysed and compared from now on."""
    done = {"curvature": [], "pair": []}

    def analyse(job, device=None):
        done["curvature"].append(job.step)
        analyse_checkpoint(job)

    def compare(job, device=None):
        done["pair"].append(job.step)
        compare_checkpoints(job)

    monkeypatch.setattr("tasks.run_analysis.analyse_checkpoint", analyse)
    monkeypatch.setattr("tasks.run_analysis.compare_checkpoints", compare)
    return done


def test_neighbours_are_compared_as_soon_as_both_are_analysed(study_path, fresh):
    assert run(study_path, fresh) == 0
    ended = tasks(fresh).sort_values("finished")
    order = [(kind, step) for kind, step in zip(ended["kind"], ended["step"], strict=True)]
    relevant = [entry for entry in order if entry[0] in ("curvature", "pair")]
    assert relevant == [("curvature", 0), ("curvature", 5), ("pair", 5), ("curvature", 12), ("pair", 12)]
    assert order.index(("pair", 5)) < [kind for kind, _ in order].index("training")
    said = progress(fresh)
    assert (said["pairs"], said["pairs_done"], said["pairs_failed"]) == (2, 2, 0)
    assert said["units"] == said["units_done"] == 3 + 3 + 2


def test_rows_of_the_displacement_belong_to_the_earlier_checkpoint(out):
    study = lossray.open_study(out)
    for table, column in (("directions", "curvature"), ("angles", "energy")):
        rows = study.table(table).query("direction == 'displacement'")
        assert set(rows["step"]) == {0, 5}
        assert rows[column].notna().all()
    overlaps = study.table("overlaps")
    assert set(zip(overlaps["previous_step"], overlaps["step"], strict=True)) == {(0, 5), (5, 12)}
    assert overlaps["subspace_overlap"].between(0, 1).all()


def test_a_comparison_left_undone_is_done_without_anything_else(
    out, helpers, study_path, undisturbed, monkeypatch
):
    forget(out, "pair", 5)
    done = count_jobs(monkeypatch)
    monkeypatch.setattr(flows.serial, "train_pack", None)
    assert run(study_path, out) == 0
    assert done == {"curvature": [], "pair": [5]}
    helpers.assert_same_rows(out, undisturbed)


def test_an_interrupt_between_an_analysis_and_a_comparison_leaves_it_for_the_next_run(
    fresh, helpers, study_path, undisturbed, monkeypatch
):
    def interrupt_after(job, device=None):
        analyse_checkpoint(job)
        if job.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("tasks.run_analysis.analyse_checkpoint", interrupt_after)
        assert run(study_path, fresh) == 130
    assert len(tasks(fresh, kind="curvature")) == 2
    assert len(tasks(fresh, kind="pair")) == 0
    assert run(study_path, fresh) == 0
    helpers.assert_same_rows(fresh, undisturbed)


def test_neighbours_of_a_failed_analysis_are_not_compared_until_it_succeeds(
    fresh, helpers, study_path, undisturbed, monkeypatch
):
    def fail_at_5(job, device=None):
        if job.step == 5:
            raise ValueError("no curvature today")
        analyse_checkpoint(job)

    with monkeypatch.context() as patch:
        patch.setattr("tasks.run_analysis.analyse_checkpoint", fail_at_5)
        assert run(study_path, fresh) == 1
    assert tasks(fresh, status="failed")["kind"].tolist() == ["curvature"]
    assert len(tasks(fresh, kind="pair")) == 0
    assert run(study_path, fresh) == 0
    helpers.assert_same_rows(fresh, undisturbed)


def test_a_comparison_that_fails_is_recorded_and_tried_again(
    fresh, helpers, study_path, undisturbed, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr("tasks.run_analysis.compare_checkpoints", lambda job, device=None: 1 / 0)
        assert run(study_path, fresh) == 1
    assert "2 tasks failed" in capsys.readouterr().err
    failed = tasks(fresh, status="failed").sort_values("step")
    assert failed[["kind", "step"]].to_numpy().tolist() == [["pair", 5], ["pair", 12]]
    assert set(failed["error"]) == {"ZeroDivisionError: division by zero"}
    assert "Traceback" in (fresh / "logs" / f"{failed['task_key'].iloc[0]}.log").read_text()
    assert (progress(fresh)["pairs_failed"], progress(fresh)["checkpoints_failed"]) == (2, 0)
    done = count_jobs(monkeypatch)
    assert run(study_path, fresh) == 0
    assert done == {"curvature": [], "pair": [5, 12]}
    helpers.assert_same_rows(fresh, undisturbed)


def test_eigenvectors_that_are_still_needed_are_computed_again(
    out, helpers, study_path, undisturbed, monkeypatch
):
    forget(out, "pair", 12)
    sound = vectors(out, 12).read_bytes()
    vectors(out, 12).unlink()
    vectors(out, 0).unlink()  # no longer needed
    done = count_jobs(monkeypatch)
    monkeypatch.setattr(flows.serial, "train_pack", None)
    assert run(study_path, out) == 0
    assert done == {"curvature": [12], "pair": [12]}
    assert vectors(out, 12).read_bytes() == sound
    assert not list(out.glob("vectors/*/0.safetensors"))
    helpers.assert_same_rows(out, undisturbed)


def test_damaged_eigenvectors_are_named_and_made_again_once_they_are_deleted(
    out, helpers, study_path, undisturbed
):
    forget(out, "pair", 12)
    vectors(out, 5).write_bytes(vectors(out, 0).read_bytes())
    assert run(study_path, out) == 1
    (error,) = tasks(out, status="failed")["error"]
    assert f"{vectors(out, 5)} is the result of task" in error
    assert error.endswith("delete it and run the study again")
    vectors(out, 5).unlink()
    assert run(study_path, out) == 0
    helpers.assert_same_rows(out, undisturbed)


def test_a_checkpoint_that_is_still_needed_is_trained_again(
    out, helpers, study_path, undisturbed, monkeypatch
):
    forget(out, "pair", 5)
    (checkpoint,) = out.glob("checkpoints/*/0.safetensors")
    checkpoint.unlink()
    done = count_jobs(monkeypatch)
    assert run(study_path, out) == 0
    assert done == {"curvature": [], "pair": [5]}
    assert checkpoint.exists()
    helpers.assert_same_rows(out, undisturbed)


def test_a_study_that_keeps_no_eigenvectors_has_the_displacement_only(study_path, fresh, undisturbed, capsys):
    assert run(study_path, fresh, "curvature.vectors=false") == 0
    assert "note: curvature.vectors = false: no overlaps" in capsys.readouterr().err
    study, full = lossray.open_study(fresh), lossray.open_study(undisturbed)
    assert len(study.table("overlaps")) == 0
    assert "displacement" not in set(study.table("angles")["direction"])
    ours, theirs = study.table("directions"), full.table("directions")
    assert ours.equals(theirs)
    assert Store(str(fresh)).paths("vectors") == []


def test_a_study_without_displacement_and_eigenvectors_compares_nothing(study_path, fresh):
    options = ("curvature.vectors=false", "angles.directions=['update']")
    assert run(study_path, fresh, *options) == 0
    assert "pair" not in set(tasks(fresh)["kind"])
    assert progress(fresh)["pairs"] == 0
    before = {path: path.stat().st_mtime_ns for path in Path(fresh).rglob("*")}
    assert run(study_path, fresh, *options) == 0
    assert {path: path.stat().st_mtime_ns for path in Path(fresh).rglob("*")} == before
