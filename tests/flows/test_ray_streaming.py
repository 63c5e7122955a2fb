"""On Ray: analysis runs while training goes on, and the rows are those of a run without Ray."""

import pandas as pd
import pytest

import lossray

pytestmark = pytest.mark.ray


def test_the_first_analysis_is_done_before_training_ends_and_all_rows_are_those_without_ray(
    session_ray, gates, helpers, study_path, undisturbed, tmp_path
):
    out = tmp_path / "out"
    gates.shut("*/checkpoints/*/5.safetensors")  # training waits after its second checkpoint
    run = helpers.Background(study_path, out)
    gates.wait(unless=run.ended)
    helpers.wait_for(lambda: list(out.glob("parts/curvature/*")), "the first analysis", unless=run.ended)
    helpers.wait_for(lambda: committed(out, "curvature"), "its commit", unless=run.ended)
    assert not committed(out, "training")
    gates.open()
    assert run.result() == 0
    helpers.assert_same_rows(out, undisturbed)
    tasks = lossray.open_study(out).table("tasks")
    finished = tasks.groupby("kind")["finished"]
    assert finished.min()["curvature"] < finished.max()["training"]
    assert set(tasks["attempts"]) == {1}


def committed(out, kind):
    records = [pd.read_parquet(path) for path in out.glob("parts/tasks/*.parquet")]
    return [record for record in records if record["kind"][0] == kind]
