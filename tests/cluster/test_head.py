"""On a cluster as `ray start` makes it: jobs, `--address`, what the dashboard lists, a node that dies."""

import json
import os

import pytest

import lossray

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.mark.slow
def test_the_work_of_a_node_that_dies_is_done_by_another(
    cluster, gates, helpers, lossray_run, study_path, undisturbed, tmp_path
):
    head = cluster(0, 1, 1)  # the training on one node, the analysis on the other
    out = tmp_path / "out"
    gates.shut("*/checkpoints/*/5.safetensors")
    run = lossray_run(study_path, "--out", out, "--address", head.address)
    helpers.kill_session(os.getsid(gates.wait(unless=run.ended)))  # the trainer's whole node
    gates.open()
    assert run.result() == 0, run.said
    helpers.assert_same_rows(out, undisturbed)
    tasks = lossray.open_study(out).table("tasks")
    assert tasks.set_index(["kind", "step"])["attempts"]["checkpoint", 5] == 2


@pytest.mark.slow
def test_a_stopped_job_resumes_as_a_job_and_grows_from_outside_and_the_dashboard_shows_it_all(
    cluster, gates, helpers, lossray_run, study_path, undisturbed, tmp_path
):
    head = cluster(2)
    folder, out = tmp_path / "job", tmp_path / "out"
    folder.mkdir()
    (folder / "small.toml").write_text(study_path.read_text())
    for decoy in ("tasks", "flows"):  # a job has its working directory first on its path
        (folder / f"{decoy}.py").write_text(f"raise SystemExit('the decoy {decoy}.py')")
    job = ("--working-dir", folder, "--", "lossray", "run", "small.toml", "--out", out)

    gates.shut("*/checkpoints/*/5.safetensors")
    submitted = head.job("submit", "--no-wait", "--submission-id=stopped", *job)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    gates.wait()
    assert head.job("stop", "stopped").returncode == 0
    assert json.loads(head.get("/api/jobs/stopped"))["status"] == "STOPPED"
    gates.open()
    assert not (out / "tables").exists()

    finished = head.job("submit", *job)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    helpers.assert_same_rows(out, undisturbed)

    run = lossray_run(study_path, "--out", out, "--set", "seeds=3", "--address", head.address)
    assert run.result() == 0, run.said
    packs = {pack["pack_id"] for pack in json.loads((out / "manifest.json").read_text())["packs"]}
    assert len(packs) == 2

    def missing():
        tasks, actors = ({entry["name"] for entry in head.listed(what)} for what in ("tasks", "actors"))
        return {"train", "curvature", "gather"} - tasks | {f"train/{pack}" for pack in packs} - actors

    helpers.wait_for(lambda: not missing(), "every task and actor in the dashboard")
