"""What `lossray status` and `lossray tables` say of a store."""

import json
from pathlib import Path

import pytest

import tasks.run_analysis
from flows.listing import head, list_tables
from flows.status import as_json, describe
from flows.study import run_study
from lossray.errors import StoreError, StudyError
from lossray.storage.lease import Lease
from lossray.storage.store import Store
from lossray.storage.tables import TABLES


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


def run(study, out):
    return run_study(study, out, in_process=True)


@pytest.fixture
def finished(study_file, out):
    assert run(study_file(optimizers=[{"name": "sgd"}]), out) == 0
    return out


@pytest.fixture
def abandoned(study_file, out, monkeypatch):
    """A store whose driver died after two analyses, without a word."""
    analyse, count = tasks.run_analysis.analyse_checkpoint, []

    def analyse_or_die(job, device=None):
        count.append(job)
        if len(count) == 3:
            raise KeyboardInterrupt
        analyse(job)

    monkeypatch.setattr("tasks.run_analysis.analyse_checkpoint", analyse_or_die)
    with pytest.raises(KeyboardInterrupt):
        run(study_file(), out)
    monkeypatch.undo()
    progress = json.loads(Path(out, "progress.json").read_text())
    Path(out, "progress.json").write_text(json.dumps(progress | {"state": "running"}))  # its last word unsaid
    return out


def test_a_finished_study_says_done_and_counts_its_tasks(finished):
    lines = describe(finished).splitlines()
    assert lines[0] == f"small: {finished}"
    assert lines[1].startswith("state: done (as of ")
    assert "runs: 2 of 2 done, 0 failed" in lines
    assert "checkpoints: 3 of 3 trained, 3 analysed, 0 failed" in lines
    assert "pairs: 2 of 2 compared, 0 failed" in lines
    counts = {line.split()[0]: int(line.split()[1]) for line in lines[-5:]}
    assert counts == {"checkpoint": 3, "curvature": 3, "gather": 1, "pair": 2, "training": 1}
    assert "resumes" not in describe(finished)


def test_a_study_whose_driver_is_gone_says_so_and_what_to_do(abandoned):
    text = describe(abandoned)
    assert "state: running, but its driver is gone; the same command resumes" in text
    assert "runs: 0 of 4 done" in text
    assert "checkpoints: 3 of 6 trained, 2 analysed" in text
    assert "time left" not in text


def test_a_driver_killed_with_its_lease_is_gone_too(abandoned):
    with Lease(Store(abandoned)):
        holder = json.loads(Path(abandoned, ".lease.json").read_text())
    dead = holder | {"pid": 2**22 - 1}  # of no process on this machine
    Path(abandoned, ".lease.json").write_text(json.dumps(dead))
    assert "but its driver is gone" in describe(abandoned)


@pytest.mark.parametrize(("silent", "gone"), [(20, False), (300, True)])
def test_of_a_driver_on_another_machine_the_heartbeat_decides(abandoned, silent, gone):
    with Lease(Store(abandoned)):
        holder = json.loads(Path(abandoned, ".lease.json").read_text())
    theirs = holder | {"host": "elsewhere", "heartbeat": holder["heartbeat"] - silent}
    Path(abandoned, ".lease.json").write_text(json.dumps(theirs))
    assert ("but its driver is gone" in describe(abandoned)) == gone


def test_a_study_at_work_says_what_runs_and_how_long_it_takes(abandoned):
    progress = json.loads(Path(abandoned, "progress.json").read_text())
    progress |= {"seconds_left": 720.0, "running": ["train mlp-sgd"]}
    Path(abandoned, "progress.json").write_text(json.dumps(progress))
    with Lease(Store(abandoned)):
        lines = describe(abandoned).splitlines()
    assert lines[1].startswith("state: running (as of ")
    assert "time left: about 12 min" in lines
    assert "running: train mlp-sgd" in lines


def test_a_study_that_waits_says_for_what(abandoned):
    progress = json.loads(Path(abandoned, "progress.json").read_text())
    text = "waiting for 1 CPU (the cluster has 0 CPUs and 0 GPUs)"
    Path(abandoned, "progress.json").write_text(json.dumps(progress | {"waiting": text}))
    with Lease(Store(abandoned)):
        assert describe(abandoned).splitlines()[2] == text
        assert json.loads(as_json(abandoned))["waiting"] == text
    assert text not in describe(abandoned)
    assert json.loads(as_json(abandoned))["waiting"] == ""


def test_programs_are_told_the_same_with_rate_and_time_left(abandoned):
    progress = json.loads(Path(abandoned, "progress.json").read_text())
    progress |= {"units_per_minute": 5.0, "seconds_left": 720.0, "running": ["train mlp-sgd"]}
    Path(abandoned, "progress.json").write_text(json.dumps(progress))
    with Lease(Store(abandoned)):
        said = json.loads(as_json(abandoned))
    assert said | progress == said
    assert said["driven"]
    assert said["tasks"] == {"checkpoint": {"done": 3}, "curvature": {"done": 2}, "pair": {"done": 1}}
    assert said["failures"] == []
    gone = json.loads(as_json(abandoned))
    assert not gone["driven"]
    assert (gone["units_per_minute"], gone["seconds_left"], gone["running"]) == (None, None, [])


def test_an_interrupted_study_does_not_count_as_abandoned(abandoned):
    progress = json.loads(Path(abandoned, "progress.json").read_text())
    Path(abandoned, "progress.json").write_text(json.dumps(progress | {"state": "interrupted"}))
    assert "state: interrupted (as of" in describe(abandoned)
    assert "driver is gone" not in describe(abandoned)


def test_failures_are_named_once_for_each_reason_with_their_log(study_file, out, monkeypatch):
    def fail(job, device=None):
        raise ValueError("no curvature today")

    monkeypatch.setattr("tasks.run_analysis.analyse_checkpoint", fail)
    assert run(study_file(), out) == 1
    lines = describe(out).splitlines()
    (failed,) = [line for line in lines if line.startswith("failed:")]
    assert "curvature of mlp-" in failed
    assert failed.endswith("and 5 more: ValueError: no curvature today")
    (log,) = [line.split()[-1] for line in lines if "traceback in" in line]
    assert "no curvature today" in Path(out, log).read_text()
    failures = json.loads(as_json(out))["failures"]
    assert len(failures) == 6
    assert {(failure["kind"], failure["error"]) for failure in failures} == {
        ("curvature", "ValueError: no curvature today")
    }
    assert json.loads(as_json(out))["tasks"]["curvature"] == {"failed": 6}
    assert "checkpoints: 6 of 6 trained, 0 analysed, 6 failed" in lines


def test_all_tables_are_listed_with_their_rows_finished_or_not(finished):
    (title, *lines) = list_tables(finished).splitlines()
    assert title == f"{finished}/tables"
    rows = {line.split()[0]: int(line.split()[1]) for line in lines}
    assert set(rows) == set(TABLES)
    # 2 runs x 3 checkpoints x the 10 eigenvalues that a window needs, and the smallest
    assert (rows["runs"], rows["curvature"], rows["eigenvalues"]) == (2, 6, 66)


def test_the_tables_of_an_abandoned_study_hold_what_is_committed(abandoned):
    rows = {line.split()[0]: int(line.split()[1]) for line in list_tables(abandoned).splitlines()[1:]}
    assert (rows["runs"], rows["checkpoints"], rows["curvature"]) == (0, 6, 4)


def test_the_head_of_a_table_shows_rows_and_no_empty_columns(finished):
    (title, header, *rows) = head(finished, "runs", 1).splitlines()
    assert title == "runs: 2 rows"
    assert len(rows) == 1
    assert {"run_id", "status", "steps_done"} <= set(header.split())
    assert "diverged_at" not in header  # of no row
    assert len(head(finished, "curvature", 100).splitlines()) == 2 + 6


def test_unknown_tables_and_places_are_refused(finished, tmp_path):
    with pytest.raises(StudyError, match=r"'curvatures'.*did you mean 'curvature'"):
        head(finished, "curvatures", 10)
    with pytest.raises(StoreError, match="is no store of a study"):
        describe(str(tmp_path))


def test_a_study_that_cannot_go_on_says_why(study_file, finished, capsys):
    path = next(Path(finished).glob("parts/eigenvalues/*.parquet"))
    path.unlink()
    with pytest.raises(StoreError, match="is missing, but its task is committed"):
        run(study_file(seeds=3, optimizers=[{"name": "sgd"}]), finished)
    line = describe(finished).splitlines()[1]
    assert line.startswith(f"state: failed: {path} is missing")
    assert "resumes" not in line


@pytest.mark.parametrize("damage", ["", "{}", "[]"])
def test_results_are_told_also_where_the_drivers_words_are_damaged(finished, damage):
    Path(finished, "progress.json").write_text(damage)
    lines = describe(finished).splitlines()
    assert lines[1].startswith("state: unknown: ")
    assert "progress.json is damaged" in lines[1]
    assert any(line.startswith("curvature") for line in lines)
    said = json.loads(as_json(finished))
    assert (said["state"], said["tasks"]["curvature"]) == ("unknown", {"done": 3})
