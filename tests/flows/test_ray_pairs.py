"""On Ray: comparisons that an earlier driver left undone, and a worker that dies in one."""

import os
import shutil
import signal

import pytest

import flows
import lossray

pytestmark = pytest.mark.ray


def attempts(out):
    tasks = lossray.open_study(out).table("tasks")
    return tasks[tasks["kind"] == "pair"].set_index("step")["attempts"].to_dict()


def forget(out, kind, step):
    """Delete the commit of a task."""
    tasks = lossray.open_study(out).table("tasks")
    (key,) = tasks[(tasks["kind"] == kind) & (tasks["step"] == step)]["task_key"]
    (out / "parts" / "tasks" / f"{key}.parquet").unlink()


def test_a_killed_comparison_is_repeated_and_the_rows_are_those_without_ray(
    session_ray, gates, helpers, study_path, undisturbed, tmp_path
):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    forget(out, "pair", 5)
    forget(out, "pair", 12)
    forget(out, "curvature", 12)
    for path in out.glob("parts/overlaps/*"):
        path.unlink()
    gates.shut("*/parts/overlaps/*")
    run = helpers.Background(study_path, out)
    victim = gates.wait(unless=run.ended)
    assert not [path for path in out.glob("parts/tasks/*") if path.stem in keys(out)]
    os.kill(victim, signal.SIGKILL)  # rows without their commit
    gates.open()
    assert run.result() == 0
    assert sorted(attempts(out).values()) in ([1, 2], [2, 2])  # two may have come to the gate
    helpers.assert_same_rows(out, undisturbed)


def keys(out):
    return {path.stem for path in out.glob("parts/overlaps/*.parquet")}


def test_a_comparison_that_cannot_be_made_is_recorded_and_the_others_are_done(
    session_ray, study_path, undisturbed, helpers, tmp_path
):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    forget(out, "pair", 5)
    forget(out, "pair", 12)
    (vectors,) = out.glob("vectors/*/12.safetensors")
    vectors.write_bytes(vectors.read_bytes()[:99])
    assert flows.run(study_path, out) == 1
    tasks = lossray.open_study(out).table("tasks")
    failed = tasks[tasks["status"] == "failed"]
    assert failed[["kind", "step", "attempts"]].to_numpy().tolist() == [["pair", 12, 1]]
    assert failed["error"].iloc[0].endswith("delete it and run the study again")
    assert len(tasks[(tasks["kind"] == "pair") & (tasks["status"] == "done")]) == 1
    vectors.unlink()
    assert flows.run(study_path, out) == 0
    helpers.assert_same_rows(out, undisturbed)
