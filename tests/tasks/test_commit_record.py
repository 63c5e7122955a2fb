"""The commit record of a task."""

import time

import pytest
import torch

from lossray.operators.product_count import PRODUCTS
from lossray.storage.rows import to_arrow
from lossray.storage.store import Store
from tasks.commit_record import Stopwatch, failure
from tasks.jobs import Attempt


def test_a_record_is_a_row_of_the_tasks_table_with_times_that_add_up():
    attempt = Attempt(number=2, submitted=time.time() - 30)
    watch = Stopwatch(attempt, "cpu")
    time.sleep(0.05)
    row = watch.record("k", "curvature", pack_id="p", step=5)
    (stored,) = to_arrow("tasks", [row]).to_pylist()
    assert (stored["task_key"], stored["kind"], stored["step"], stored["status"]) == (
        "k",
        "curvature",
        5,
        "done",
    )
    assert stored["attempts"] == 2
    assert 0.05 <= stored["wall_seconds"] < 5
    assert 30 <= stored["queue_seconds"] < 35
    elapsed = (stored["finished"] - stored["started"]).total_seconds()
    assert abs(elapsed - stored["wall_seconds"]) < 1e-3
    assert stored["peak_bytes"] > 10**6
    assert stored["error"] is None


def test_restart_begins_the_next_piece_of_work():
    watch = Stopwatch(Attempt(submitted=time.time() - 30), "cpu")
    time.sleep(0.1)
    watch.restart()
    row = watch.record("k", "checkpoint")
    assert row["wall_seconds"] < 0.1
    assert row["queue_seconds"] == 0  # one piece follows the other


def test_a_record_counts_the_products_of_its_task_alone():
    PRODUCTS.total += 5
    watch = Stopwatch(Attempt(), "cpu")
    PRODUCTS.total += 3
    assert watch.record("k", "curvature")["products"] == 3
    assert watch.record("k", "training")["products"] is None
    assert failure("k", "curvature", Attempt(), "ValueError: no")["products"] is None


def test_a_node_whose_clock_is_behind_the_drivers_does_not_queue_for_negative_time():
    watch = Stopwatch(Attempt(submitted=time.time() + 60), "cpu")
    assert watch.record("k", "curvature")["queue_seconds"] == 0


def test_a_failure_is_shown_and_does_not_count_as_done(tmp_path):
    store = Store(str(tmp_path))
    store.commit(failure("k", "curvature", Attempt(), "ValueError: no", pack_id="p", step=5))
    (row,) = store.records().to_pylist()
    assert (row["status"], row["error"], row["step"]) == ("failed", "ValueError: no", 5)
    assert store.committed_keys() == set()


@pytest.mark.parametrize(("device", "begins_anew"), [("cpu", False), ("some GPU", True)])
def test_on_a_gpu_each_task_has_a_peak_of_its_own(monkeypatch, device, begins_anew):
    peaks = {"largest": 3 * 10**12}  # of an earlier task of this worker
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peaks["largest"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peaks.update(largest=10**12))
    row = Stopwatch(Attempt(), device).record("k", "curvature")
    assert row["peak_bytes"] == (10**12 if begins_anew else 3 * 10**12)
