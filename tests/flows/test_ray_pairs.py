"""On Ray: comparisons that an earlier driver left undone, and a worker that dies in one of them."""

import json
import os
import shutil
import signal

import pytest

import lossray

pytestmark = pytest.mark.ray


def attempts(out):
    tasks = lossray.open_study(out).table("tasks")
    return tasks[tasks["kind"] == "pair"].set_index("step")["attempts"].to_dict()


def running(out):
    """The kinds of what runs."""
    return [name.split()[0] for name in json.loads((out / "progress.json").read_text())["running"]]


def forget(out, kind, step):
    """Delete the commit of a task."""
    tasks = lossray.open_study(out).table("tasks")
    (key,) = tasks[(tasks["kind"] == kind) & (tasks["step"] == step)]["task_key"]
    (out / "parts" / "tasks" / f"{key}.parquet").unlink()


@pytest.mark.slow
def test_a_killed_comparison_is_repeated_and_the_rows_are_those_without_ray(
    session_ray, gates, helpers, study_path, undisturbed, tmp_path
):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    forget(out, "pair", 5)
    forget(out, "pair", 12)
    forget(out, "curvature", 12)
    shutil.rmtree(out / "tables")  # they are made of the same keys, and would pass for what is to come
    gates.shut("*/parts/overlaps/*")
    run = helpers.Background(study_path, out)
    victim = gates.wait(unless=run.ended)
    helpers.wait_for(lambda: "pair" in running(out), "the comparison in progress.json", unless=run.ended)
    os.kill(victim, signal.SIGKILL)  # rows without their commit
    gates.open()
    assert run.result() == 0
    assert max(attempts(out).values()) == 2
    helpers.assert_same_rows(out, undisturbed)
