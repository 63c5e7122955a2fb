"""Studies as jobs of a cluster, open or with a token: `lossray submit` beside Ray's own `ray job submit`."""

import json
import secrets

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

# `quick`, down to one run and two checkpoints.
SHORT = (
    *("--set", "seeds=1", "--set", "training.steps=20", "--set", "training.checkpoints.count=2"),
    *("--set", 'optimizers=[{name = "adam", lr = 3e-3}]', "--set", "surfaces.points=3"),
    *("--set", "connectivity.steps=10"),
)


@pytest.mark.parametrize("token", [None, secrets.token_hex(32)], ids=["open", "token"])
def test_a_study_is_submitted_by_lossray_and_by_ray(cluster, helpers, tmp_path, token):
    head = cluster(2, token=token)
    folder = tmp_path / "folder"
    folder.mkdir()
    if token:
        stranger = head.lossray_submit("quick", "--out", tmp_path / "none", cwd=folder, token="0" * 64)
        assert stranger.returncode == 2
        assert stranger.stdout == ""
        assert "Invalid authentication token" in stranger.stderr
        assert len(stranger.stderr.splitlines()) == 1

    first, second = tmp_path / "lossray", tmp_path / "ray"
    done = head.lossray_submit("quick", "--out", first, *SHORT, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    submission_id = done.stdout.splitlines()[0]
    job = json.loads(head.get(f"/api/jobs/{submission_id}"))
    assert (job["status"], job["driver_exit_code"]) == ("SUCCEEDED", 0)
    assert job["metadata"]["out"] == str(first)
    assert "done in" in done.stdout  # the job's log

    command = ("lossray", "run", "quick", "--out", second, *SHORT)
    plain = head.job("submit", "--working-dir", folder, "--", *command)
    assert plain.returncode == 0, plain.stdout + plain.stderr
    helpers.assert_same_rows(first, second)
    assert len(helpers.published(first)["curvature"]) > 0

    def listed():
        return {"curvature", "gather"} <= {task["name"] for task in head.listed("tasks")}

    helpers.wait_for(listed, "the tasks in the dashboard")
    counted = "ray_lossray_tasks_total{"  # which stays when the study is over
    helpers.wait_for(lambda: head.scraped(counted), "the study's metrics")


def test_a_second_submit_is_caught_and_one_after_the_end_resumes(
    cluster, gates, helpers, study_path, undisturbed, tmp_path
):
    head = cluster(2, token=secrets.token_hex(32))
    folder, out = tmp_path / "folder", tmp_path / "out"
    (folder / "studies").mkdir(parents=True)
    (folder / "studies" / "small.toml").write_text(study_path.read_text())
    study = ("studies/small.toml", "--out", out)

    gates.shut("*/checkpoints/*/5.safetensors")
    first = head.lossray_submit(*study, "--no-wait", cwd=folder)
    assert first.returncode == 0, first.stderr
    submission_id = first.stdout.strip()
    gates.wait()
    again = head.lossray_submit(*study, cwd=folder)
    assert again.returncode == 2
    assert f"job {submission_id} of this store is RUNNING" in again.stderr
    assert len(again.stderr.splitlines()) == 1
    assert head.job("stop", submission_id).returncode == 0
    assert json.loads(head.get(f"/api/jobs/{submission_id}"))["status"] == "STOPPED"
    gates.open()
    assert not (out / "tables").exists()

    resumed = head.lossray_submit(*study, cwd=folder)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert resumed.stdout.splitlines()[0] == f"{submission_id}-2"
    helpers.assert_same_rows(out, undisturbed)

    wrong = head.lossray_submit("studies/small.toml", "--out", out, "--set", "data.seed=7", cwd=folder)
    assert wrong.returncode == 2  # of the job: the store is another study's
    assert f"job {submission_id}-3: FAILED" in wrong.stderr
