"""Ctrl-C, SIGTERM and a second driver: one plain line each, and the study can be resumed."""

import json
import re
import signal
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]


def committed(out):
    return {path.stem for path in out.glob("parts/tasks/*.parquet")}


def state(out):
    return json.loads((out / "progress.json").read_text())["state"]


def assert_interrupted(run, out):
    assert run.result() == 130, run.said
    assert re.fullmatch(r"interrupted after .*; the same command resumes", run.said.splitlines()[-1])
    assert "Traceback" not in run.said
    assert state(out) == "interrupted"
    assert not (out / ".lease.json").exists()
    assert not (out / "tables").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_interrupted_study_keeps_what_is_done_and_resumes(
    lossray_run, gates, ray_address, helpers, study_path, undisturbed, tmp_path
):
    out = tmp_path / "out"

    def start_and_hold(*options):
        """A driver in the middle of an analysis."""
        gates.shut("*/parts/eigenvalues/*")
        run = lossray_run(study_path, "--out", out, *options)
        gates.wait(unless=run.ended)
        return run

    def open_once_they_are_gone():
        """The workers of a driver that has left end with it."""
        helpers.wait_for(lambda: not gates.living(), "the end of the workers")
        gates.open()

    # SIGTERM, as `ray job stop` sends it, waits 2 seconds for the analysis and no longer.
    run = start_and_hold("--address", ray_address)
    run.process.send_signal(signal.SIGTERM)
    assert_interrupted(run, out)
    assert not list(out.glob("parts/angles/*"))
    open_once_they_are_gone()

    # The first Ctrl-C waits, the second does not.
    run = start_and_hold()
    run.ctrl_c()
    helpers.wait_for(lambda: state(out) == "stopping", "the drain", unless=run.ended)
    run.ctrl_c()
    assert run.result() == 130
    assert "Traceback" not in run.said
    assert not (out / ".lease.json").exists()
    open_once_they_are_gone()

    # A second driver is refused. Ctrl-C waits for the analysis, whose rows are kept.
    run = start_and_hold("--address", ray_address)
    before = {path: path.stat().st_mtime_ns for path in (out / "study.toml", out / "manifest.json")}
    second = lossray_run(study_path, "--out", out, "--address", ray_address)
    assert second.result() == 2
    (line,) = second.said.splitlines()
    assert line.startswith(f"lossray: store {out} is in use by another driver: process {run.process.pid} ")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    run.ctrl_c()
    helpers.wait_for(lambda: state(out) == "stopping", "the drain", unless=run.ended)
    half_done = {path.stem for path in out.glob("parts/eigenvalues/*.parquet")}
    assert not half_done & committed(out)
    gates.open()
    assert_interrupted(run, out)
    assert half_done <= committed(out)

    run = lossray_run(study_path, "--out", out, "--address", ray_address)
    assert run.result() == 0, run.said
    helpers.assert_same_rows(out, undisturbed)


def test_nothing_is_ever_cancelled():
    """A cancel that races with completion aborts the driver's process."""
    sources = [path for package in ("flows", "tasks", "lossray") for path in (ROOT / package).rglob("*.py")]
    assert [str(path) for path in sources if re.search(r"\bray\.cancel\(", path.read_text())] == []
