"""Progress: progress.json, plain lines where there is no terminal, and durations for a reader."""

import json
import time
from pathlib import Path

import pytest

from flows import progress
from flows.progress import Counts, Progress, duration
from lossray.storage.store import Store

COUNTS = {
    "runs": 4,
    "runs_done": 2,
    "checkpoints": 6,
    "checkpoints_trained": 3,
    "to_analyse": 6,
    "units": 12,
    "units_done": 3,
}


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def published(store):
    return json.loads(Path(store.url, "progress.json").read_text())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (45, "45 s"),
        (89, "89 s"),
        (90, "2 min"),
        (720, "12 min"),
        (89.4 * 60, "89 min"),
        (12000, "3 h 20 min"),
        (7199, "2 h 0 min"),
        (100 * 3600, "100 h 0 min"),
    ],
)
def test_durations_are_for_a_reader(seconds, text):
    assert duration(seconds) == text


def test_progress_json_says_what_is_done_what_runs_and_when(store):
    shown = Progress(store, Counts(**COUNTS), running=lambda: ["train a"], state="running")
    with shown:
        assert published(store) | {"updated": None, "elapsed_seconds": 0} == {
            "state": "running",
            **Counts(**COUNTS).__dict__,
            "units_per_minute": None,
            "seconds_left": None,
            "elapsed_seconds": 0,
            "waited_seconds": 0.0,
            "waiting": "",
            "running": ["train a"],
            "updated": None,
        }
        shown.counts.runs_done = 4
        shown.state = "done"
    assert (published(store)["state"], published(store)["runs_done"]) == ("done", 4)


def test_a_listener_hears_what_is_published(store):
    heard = []
    with Progress(store, Counts(**COUNTS), state="running", listener=heard.append) as shown:
        shown.counts.units_done = 12
        shown.refresh()  # too soon
        assert [snapshot["units_done"] for snapshot in heard] == [3]
    assert heard[-1] == published(store)
    assert [snapshot["units_done"] for snapshot in heard] == [3, 12]


def test_the_rate_counts_what_this_driver_did_and_gives_the_time_left(store):
    shown = Progress(store, Counts(**COUNTS), started=time.monotonic() - 60)
    shown.counts.units_done += 3  # three were done before it started
    snapshot = shown.snapshot()
    assert snapshot["units_per_minute"] == pytest.approx(3, rel=0.05)
    assert snapshot["seconds_left"] == pytest.approx(6 / 3 * 60, rel=0.05)


def test_where_there_is_no_terminal_a_line_appears_when_something_has_changed(store, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Progress(store, Counts(**COUNTS), state="running") as shown:
        for _ in range(5):
            shown.refresh()
        shown.counts.checkpoints_analysed = 1
        shown.refresh()
        shown.state = "done"
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "running: runs 2/4; checkpoints trained 3/6, analysed 0/6",
        "running: runs 2/4; checkpoints trained 3/6, analysed 1/6",
        "done: runs 2/4; checkpoints trained 3/6, analysed 1/6",
    ]


def test_neither_lines_nor_files_come_faster_than_their_intervals(store, capsys, monkeypatch):
    written = []
    monkeypatch.setattr(store, "write_json", lambda path, value: written.append(value))
    with Progress(store, Counts(**COUNTS), state="running") as shown:
        for _ in range(50):
            shown.counts.units_done += 1
            shown.refresh()
        assert len(written) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_line_names_failures_rate_and_time_left(store, capsys):
    counts = Counts(**COUNTS)
    with Progress(store, counts, state="running", started=time.monotonic() - 60) as shown:
        counts.runs_failed, counts.units_done = 2, 9
        shown.refresh(force=True)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        "running: runs 2/4, 2 failed; checkpoints trained 3/6, analysed 0/6; 6 a minute; about 30 s left"
    )


def test_pairs_are_told_where_there_are_some(store, capsys):
    with Progress(store, Counts(**COUNTS, pairs=4, pairs_done=1), state="running"):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "running: runs 2/4; checkpoints trained 3/6, analysed 0/6, pairs compared 1/4"


def test_notes_stay_as_they_are_written(store, capsys):
    Progress(store, Counts()).note("[bold]training[/bold] of x failed: " + "long " * 50)
    assert capsys.readouterr().err == "[bold]training[/bold] of x failed: " + "long " * 50 + "\n"


def test_time_without_resources_does_not_count_in_the_rate(store, monkeypatch, capsys):
    monkeypatch.setattr(Progress, "elapsed", 120.0)
    shown = Progress(store, Counts(**COUNTS), state="running")
    shown.counts.units_done += 3
    shown.wait_for("waiting for 1 CPU (the cluster has 0 CPUs and 0 GPUs)", 60.0)
    assert published(store)["units_per_minute"] == 3.0  # in the minute that was left
    assert published(store)["seconds_left"] == 120.0
    assert published(store)["waiting"].startswith("waiting for 1 CPU")
    assert capsys.readouterr().err.startswith(
        "waiting for 1 CPU (the cluster has 0 CPUs and 0 GPUs); running: "
    )
    shown.wait_for("", 60.0)
    assert published(store)["waiting"] == ""
    assert published(store)["waited_seconds"] == 60.0
