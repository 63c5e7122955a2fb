"""What a study tells Prometheus while it runs; `cluster/grafana.json` shows it.

The driver alone counts, from the records that its tasks send: one series per study and kind, and nothing is
lost with a worker that dies between two exports. No tag names a run, a pack or a step: Prometheus keeps a
series for every value that it has seen.

Seconds are counters beside the count of tasks. In a histogram Ray moves every value to the middle of its
bucket, so that the sum is not that of the values.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from tasks.commit_record import Record


@dataclass(frozen=True)
class MetricSpec:
    """A metric as it is declared.

    Attributes:
        type: a counter adds up from the driver's start, a gauge says how things stand.
        unit: of its values.
        description: what is counted.
        tags: what its series are told apart by.
    """

    type: Literal["counter", "gauge"]
    unit: str
    description: str
    tags: tuple[str, ...]


METRICS = {
    "lossray_tasks": MetricSpec(
        "counter",
        "tasks",
        "tasks that have ended, with their status in the table `tasks`: `done`, `diverged`, `failed`",
        ("study", "kind", "status"),
    ),
    "lossray_task_seconds": MetricSpec(
        "counter",
        "s",
        "time that tasks worked, failed ones left out; that of a `training` holds its `checkpoint`s",
        ("study", "kind"),
    ),
    "lossray_queue_seconds": MetricSpec(
        "counter", "s", "time that these tasks waited between submission and start", ("study", "kind")
    ),
    "lossray_products": MetricSpec(
        "counter",
        "products",
        "products of a curvature operator with a vector, those of every run counted",
        ("study", "kind"),
    ),
    "lossray_published_bytes": MetricSpec(
        "counter", "bytes", "parts, checkpoints and eigenvectors that tasks wrote", ("study", "kind")
    ),
    "lossray_units": MetricSpec(
        "gauge",
        "units",
        "checkpoints to train, checkpoints to analyse, pairs to compare and further analyses",
        ("study",),
    ),
    "lossray_units_done": MetricSpec("gauge", "units", "of them, what is done", ("study",)),
    "lossray_seconds_left": MetricSpec(
        "gauge", "s", "estimated time to the end, as in `lossray status`", ("study",)
    ),
    "lossray_runs": MetricSpec(
        "gauge",
        "runs",
        "runs that have ended, with their status in the table `runs`: `finished`, `diverged`, `failed`",
        ("study", "status"),
    ),
}


class StudyMetrics:
    """The metrics of a driver, in the Ray session that it has joined.

    Args:
        study: name of the study.
    """

    def __init__(self, study: str) -> None:
        self._tags = {"study": study}
        self._metrics = {name: _metric(name, spec) for name, spec in METRICS.items()}

    def task_ended(self, record: Record) -> None:
        """Count a task by its row of `tasks`."""
        kind = {"kind": record["kind"]}
        self._add("lossray_tasks", 1, kind | {"status": record["status"]})
        if record["status"] == "failed":
            return  # the driver has written the record, and knows no times
        self._add("lossray_task_seconds", record["wall_seconds"], kind)
        self._add("lossray_queue_seconds", record["queue_seconds"], kind)
        self._add("lossray_products", record["products"], kind)
        self._add("lossray_published_bytes", record["published_bytes"], kind)

    def progressed(self, progress: Mapping[str, Any]) -> None:
        """Show how far the study is, by what progress.json holds."""
        self._set("lossray_units", progress["units"])
        self._set("lossray_units_done", progress["units_done"])
        self._set("lossray_seconds_left", progress["seconds_left"])
        runs = {"diverged": progress["runs_diverged"], "failed": progress["runs_failed"]}
        runs["finished"] = progress["runs_done"] - runs["diverged"]
        for status, number in runs.items():
            self._set("lossray_runs", number, {"status": status})

    def _add(self, name: str, value: float | None, tags: dict[str, str]) -> None:
        if value:  # Ray refuses to add 0
            with suppress(Exception):  # whatever becomes of a metric, the study goes on
                self._metrics[name].inc(value, self._tags | tags)

    def _set(self, name: str, value: float | None, tags: dict[str, str] | None = None) -> None:
        with suppress(Exception):
            self._metrics[name].set(value, self._tags | (tags or {}))


def _metric(name: str, spec: MetricSpec) -> Any:
    from ray.util.metrics import Counter, Gauge  # here: a study in this process has no Ray

    metric = Counter if spec.type == "counter" else Gauge
    return metric(name, spec.description, spec.tags)
