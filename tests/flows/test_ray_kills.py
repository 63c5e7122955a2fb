"""A driver that is killed, at its worst moments and at random: the same command ends with the same rows."""

import random

import psutil
import pytest

pytestmark = pytest.mark.ray

# These two of Ray's own processes try for a minute to report the death of their raylet before they end.
AGENTS = ("DashboardAgent", "RuntimeEnvAgent")


def keys(out, table):
    return {path.stem for path in out.glob(f"parts/{table}/*.parquet")}


def is_agent(process):
    return any(agent in " ".join(process.cmdline()) for agent in AGENTS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_driver_killed_three_times_ends_with_the_rows_of_an_undisturbed_run(
    lossray_run, gates, ray_address, helpers, study_path, undisturbed, tmp_path
):
    """A dead driver's processes end although nobody tells them to, those that are held included."""
    out = tmp_path / "out"

    def kill_at(pattern, *options):
        gates.shut(pattern)
        run = lossray_run(study_path, "--out", out, *options)
        held = psutil.Process(gates.wait(unless=run.ended))
        left_alone = [held, *(process for process in run.descendants() if not is_agent(process))]
        run.process.kill()
        run.process.wait()
        helpers.wait_for(lambda: not helpers.running(left_alone), "the end of a dead driver's processes")
        gates.open()

    kill_at("*/checkpoints/*/0.safetensors")  # with a Ray of its own
    assert not keys(out, "tasks")
    kill_at("*/parts/eigenvalues/*", "--address", ray_address)
    assert keys(out, "eigenvalues")
    assert not keys(out, "eigenvalues") & (keys(out, "curvature") | keys(out, "tasks"))
    kill_at("*/tables/runs.parquet", "--address", ray_address)
    assert len(keys(out, "tasks")) == 9  # 3 checkpoints, the training, 3 analyses, 2 comparisons
    assert [path.name for path in out.glob("tables/[!.]*")] == ["runs.parquet"]
    run = lossray_run(study_path, "--out", out, "--address", ray_address)
    assert run.result() == 0, run.said
    helpers.assert_same_rows(out, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_random_kills_of_driver_and_workers_leave_the_rows_of_an_undisturbed_run(
    lossray_run, helpers, study_path, undisturbed, tmp_path
):
    """Each kill comes when a random number of files has been added to the store."""
    rng = random.Random(20)
    out = tmp_path / "out"
    processes = []
    for victim in ("driver", "worker", "driver", "worker", "driver"):
        run = lossray_run(study_path, "--out", out)
        await_files(run, out, rng.randrange(2, 12), helpers)
        if run.ended():
            break
        processes += run.descendants()
        if victim == "worker" and (workers := [p for p in run.descendants() if is_worker(p)]):
            rng.choice(workers).kill()
            assert run.result() == 0, run.said
        else:
            run.process.kill()
            run.process.wait()
    run = lossray_run(study_path, "--out", out)
    assert run.result() == 0, run.said
    helpers.assert_same_rows(out, undisturbed)
    helpers.wait_for(lambda: not helpers.running(processes), "the end of all processes, Ray's agents too")


def await_files(run, out, number, helpers):
    """Until the run has added a number of files, or has ended."""
    before = len(list(out.rglob("*")))
    helpers.wait_for(lambda: len(list(out.rglob("*"))) >= before + number or run.ended(), "files")


def is_worker(process):
    try:
        kinds = ("ray::curvature", "ray::pair", "ray::train", "ray::Train", "ray::gather")
        return process.cmdline()[0].startswith(kinds)
    except (psutil.NoSuchProcess, IndexError):
        return False
