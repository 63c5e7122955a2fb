"""What the driver counts of the records that tasks send, and that no metric can end a study."""

from collections import Counter

import pytest
import ray.util.metrics

from flows.metrics import METRICS, StudyMetrics
from flows.progress import Counts, Progress
from lossray.storage.store import Store
from tasks.commit_record import Stopwatch, failure
from tasks.jobs import Attempt


class Recorded:
    """Takes the place of Ray's metrics: (name, tags) -> value."""

    values: Counter

    def __init__(self, name, description, tags):
        self.name, self.tags = name, tags

    def inc(self, value, tags):
        assert value > 0  # Ray refuses others
        assert set(tags) == set(self.tags)
        self.values[self.name, *tags.values()] += value

    def set(self, value, tags):
        assert set(tags) == set(self.tags)
        self.values[self.name, *tags.values()] = value


@pytest.fixture
def values(monkeypatch):
    monkeypatch.setattr(Recorded, "values", Counter(), raising=False)
    for name in ("Counter", "Gauge"):
        monkeypatch.setattr(ray.util.metrics, name, Recorded)
    return Recorded.values


def record(kind, **columns):
    return Stopwatch(Attempt(), "cpu").record("k", kind) | {"published_bytes": 0} | columns


def test_tasks_add_up_by_kind_and_a_failed_one_only_counts(values):
    study = StudyMetrics("s")
    columns = {"wall_seconds": 2.5, "queue_seconds": 0.5, "products": 40, "published_bytes": 1000}
    study.task_ended(record("curvature", **columns))
    study.task_ended(record("curvature", **columns | {"queue_seconds": 0.0}))
    study.task_ended(record("training", wall_seconds=9.0, queue_seconds=1.0, status="diverged"))
    study.task_ended(failure("k", "curvature", Attempt(submitted=0.0), "ValueError: no"))
    assert values == {
        ("lossray_tasks", "s", "curvature", "done"): 2,
        ("lossray_tasks", "s", "curvature", "failed"): 1,
        ("lossray_tasks", "s", "training", "diverged"): 1,
        ("lossray_task_seconds", "s", "curvature"): 5.0,
        ("lossray_task_seconds", "s", "training"): 9.0,
        ("lossray_queue_seconds", "s", "curvature"): 0.5,
        ("lossray_queue_seconds", "s", "training"): 1.0,
        ("lossray_products", "s", "curvature"): 80,
        ("lossray_published_bytes", "s", "curvature"): 2000,
    }


def test_progress_shows_units_and_runs_by_status(values, tmp_path):
    counts = Counts(runs=9, runs_done=5, runs_diverged=2, runs_failed=1, units=12, units_done=3)
    StudyMetrics("s").progressed(Progress(Store(str(tmp_path)), counts).snapshot())
    assert values == {
        ("lossray_units", "s"): 12,
        ("lossray_units_done", "s"): 3,
        ("lossray_seconds_left", "s"): None,  # nothing to tell it from yet; Ray leaves the gauge as it is
        ("lossray_runs", "s", "finished"): 3,
        ("lossray_runs", "s", "diverged"): 2,
        ("lossray_runs", "s", "failed"): 1,
    }


def test_a_metric_that_fails_ends_nothing(values, monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("no Ray")

    monkeypatch.setattr(Recorded, "inc", fail)
    monkeypatch.setattr(Recorded, "set", fail)
    study = StudyMetrics("s")
    study.task_ended(record("curvature"))
    study.progressed(Progress(Store(str(tmp_path)), Counts()).snapshot())
    assert not values


def test_a_counter_is_one_of_ray_and_a_gauge_likewise():
    made = StudyMetrics("s")._metrics
    assert {name: type(metric).__name__.lower() for name, metric in made.items()} == {
        name: spec.type for name, spec in METRICS.items()
    }
