"""What is deleted or damaged in a store is made again by the same command."""

import shutil
import sys

import pytest

import flows
import lossray
from lossray.errors import StoreError


@pytest.fixture
def out(undisturbed, tmp_path, monkeypatch):
    """A finished store that the test may damage."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # the folders of a study are appended to it
    return shutil.copytree(undisturbed, tmp_path / "out")


def forget_analysis(out, step):
    """Delete the commit of the analysis at a step, and the tables: what is compared later is made anew."""
    tasks = lossray.open_study(out).table("tasks")
    (key,) = tasks[(tasks["kind"] == "curvature") & (tasks["step"] == step)]["task_key"]
    (out / "parts" / "tasks" / f"{key}.parquet").unlink()
    shutil.rmtree(out / "tables")


def checkpoint(out, step):
    (path,) = out.glob(f"checkpoints/*/{step}.safetensors")
    return path


def test_a_checkpoint_that_is_still_needed_is_trained_again(out, helpers, study_path, undisturbed):
    forget_analysis(out, 5)
    checkpoint(out, 5).unlink()
    assert flows.run(study_path, out, in_process=True) == 0
    helpers.assert_same_rows(out, undisturbed)
    assert checkpoint(out, 5).exists()


def test_a_checkpoint_that_is_not_needed_is_left_alone(out, study_path):
    checkpoint(out, 5).unlink()
    assert flows.run(study_path, out, in_process=True) == 0
    assert not list(out.glob("checkpoints/*/5.safetensors"))


def test_the_record_of_a_checkpoint_is_made_again_without_training(
    out, helpers, study_path, undisturbed, monkeypatch
):
    tasks = lossray.open_study(out).table("tasks")
    key = tasks[(tasks["kind"] == "checkpoint") & (tasks["step"] == 5)]["task_key"].iloc[0]
    for table in ("tasks", "training"):
        (out / "parts" / table / f"{key}.parquet").unlink()
    shutil.rmtree(out / "tables")
    monkeypatch.setattr("tasks.train_pack.train", None)
    assert flows.run(study_path, out, in_process=True) == 0
    helpers.assert_same_rows(out, undisturbed)


@pytest.mark.slow
@pytest.mark.ray
def test_so_it_is_on_ray(session_ray, out, helpers, study_path, undisturbed):
    forget_analysis(out, 5)
    checkpoint(out, 5).unlink()
    assert flows.run(study_path, out) == 0
    helpers.assert_same_rows(out, undisturbed)


@pytest.mark.parametrize("content", ["another step", "cut off"])
def test_a_checkpoint_that_is_not_what_its_name_says_is_never_analysed(
    out, helpers, study_path, undisturbed, content
):
    forget_analysis(out, 5)
    whole = checkpoint(out, 5).read_bytes()
    checkpoint(out, 5).write_bytes(
        checkpoint(out, 0).read_bytes() if content == "another step" else whole[:999]
    )
    assert flows.run(study_path, out, in_process=True) == 1
    tasks = lossray.open_study(out).table("tasks")
    (error,) = tasks[tasks["status"] == "failed"]["error"]
    assert ("holds step 0 of pack" if content == "another step" else "is damaged") in error
    assert error.endswith("delete it and run the study again")
    run_id = lossray.open_study(out).table("runs")["run_id"][0]
    with pytest.raises(StoreError, match="delete it"):
        lossray.open_study(out).model(run_id, 5)
    checkpoint(out, 5).unlink()
    assert flows.run(study_path, out, in_process=True) == 0
    helpers.assert_same_rows(out, undisturbed)


@pytest.mark.parametrize("remains", [None, b"junk"])
def test_a_damaged_table_is_read_from_its_parts_and_published_again(
    out, helpers, study_path, undisturbed, remains
):
    path = out / "tables" / "eigenvalues.parquet"
    path.unlink()
    if remains:
        path.write_bytes(remains)
    assert len(lossray.open_study(out).table("eigenvalues")) == 2 * 3 * (
        10 + 1
    )  # the ten that a window needs; and the smallest
    assert flows.run(study_path, out, in_process=True) == 0
    helpers.assert_same_rows(out, undisturbed)


def test_a_training_that_fails_when_it_is_repeated_leaves_the_rows_it_had(out, study_path, monkeypatch):
    forget_analysis(out, 5)
    checkpoint(out, 5).unlink()
    monkeypatch.setattr(flows.serial, "train_pack", lambda job: (1 / 0 for _ in range(1)))
    assert flows.run(study_path, out, in_process=True) == 1
    assert set(lossray.open_study(out).table("runs")["status"]) == {"finished"}
