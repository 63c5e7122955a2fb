"""cluster/grafana.json and prometheus.yml: their metrics are ours or Ray's, and a node serves ours."""

import json
import re
from pathlib import Path

import pytest
import yaml

import lossray
from flows.metrics import METRICS

ROOT = Path(__file__).parents[2]
SELECTOR = re.compile(
    r"(?P<sum>sum by \((?P<by>[^)]+)\) \((?P<rate>rate\()?)?(?P<name>ray_\w+){(?P<filter>[^}]*)}"
)
RAYS_OWN = {  # what a node of Ray serves, with the tags that a panel may keep
    "ray_resources": {"Name"},
    "ray_node_cpu_utilization": {"instance"},
    "ray_node_mem_used": {"instance"},
    "ray_node_mem_total": {"instance"},
    "ray_node_gpus_utilization": {"instance", "GpuIndex"},
    "ray_node_gram_used": {"instance", "GpuIndex"},
    "ray_node_gram_available": {"instance", "GpuIndex"},
}
OURS = {f"ray_{name}" + "_total" * (spec.type == "counter"): spec for name, spec in METRICS.items()}
DASHBOARD = json.loads((ROOT / "cluster" / "grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def selectors():
    return [match for expression in EXPRESSIONS for match in SELECTOR.finditer(expression)]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_of_a_panel_exists(expression):
    names = re.findall(r"ray_\w+", expression)
    assert names
    assert set(names) <= {*OURS, *RAYS_OWN}
    assert len(names) == len(SELECTOR.findall(expression))  # so that the tests below see them all


@pytest.mark.parametrize("name", OURS)
def test_every_metric_is_in_a_panel(name):
    assert name in {match["name"] for match in selectors()}


@pytest.mark.parametrize("match", selectors(), ids=lambda match: match["name"])
def test_every_series_is_summed_over_the_workers_by_tags_that_it_has(match):
    tags = set(OURS[match["name"]].tags) if match["name"] in OURS else RAYS_OWN[match["name"]]
    assert match["sum"]
    assert set(match["by"].split(", ")) <= tags


@pytest.mark.parametrize("match", selectors(), ids=lambda match: match["name"])
def test_a_counter_is_shown_as_a_rate_and_a_gauge_as_it_is(match):
    counts = match["name"] in OURS and OURS[match["name"]].type == "counter"
    assert bool(match["rate"]) == counts


@pytest.mark.parametrize("match", selectors(), ids=lambda match: match["name"])
def test_a_panel_shows_the_session_and_the_study_that_are_chosen(match):
    assert 'SessionName=~"$SessionName"' in match["filter"]
    assert ('study=~"$study"' in match["filter"]) == (match["name"] in OURS)


@pytest.mark.parametrize("name", METRICS)
def test_no_tag_tells_runs_apart(name):
    assert "study" in METRICS[name].tags
    assert set(METRICS[name].tags) <= {"study", "kind", "status"}


def test_panels_and_variables_are_told_apart():
    panels = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(panels)) == len(panels)
    assert [entry["name"] for entry in DASHBOARD["templating"]["list"]] == [
        "datasource",
        "SessionName",
        "study",
    ]
    queries = [entry["definition"] for entry in DASHBOARD["templating"]["list"][1:]]
    assert {name for query in queries for name in re.findall(r"ray_\w+", query)} <= set(OURS)


def test_no_panel_covers_another():
    cells = [
        (x, y)
        for area in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(area["x"], area["x"] + area["w"])
        for y in range(area["y"], area["y"] + area["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_prometheus_scrapes_the_nodes_that_ray_lists():
    (job,) = yaml.safe_load((ROOT / "cluster" / "prometheus.yml").read_text())["scrape_configs"]
    (files,) = job["file_sd_configs"]
    assert [Path(file).name for file in files["files"]] == ["prom_metrics_service_discovery.json"]


@pytest.mark.parametrize("name", OURS)
def test_the_page_lists_every_metric(name):
    spec = OURS[name]
    row = f"| `{name}` | {spec.unit} | {', '.join(spec.tags)} | {spec.description} |"
    assert row in (ROOT / "docs" / "cluster.md").read_text().splitlines()


SERIES = re.compile(r"(?P<name>\w+){(?P<tags>.*)} (?P<value>\S+)")
TAG = re.compile(r'(\w+)="([^"]*)"')
COLUMNS = {
    "ray_lossray_task_seconds_total": "wall_seconds",
    "ray_lossray_queue_seconds_total": "queue_seconds",
    "ray_lossray_products_total": "products",
    "ray_lossray_published_bytes_total": "published_bytes",
}
RAYS_TAGS = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}


def served(head):
    """What the node serves of ours: (name, tags) -> value; two workers with a series would be an error."""
    values = {}
    for line in head.scraped("ray_lossray"):
        series = SERIES.fullmatch(line)
        tags = {tag: value for tag, value in TAG.findall(series["tags"]) if not tag.startswith("otel_")}
        ours = {tag: value for tag, value in tags.items() if tag not in RAYS_TAGS}
        assert set(ours) == set(OURS[series["name"]].tags)
        assert ours.pop("study") == "small"
        assert (series["name"], *ours.values()) not in values
        values[series["name"], *ours.values()] = float(series["value"])
    return values


@pytest.mark.cluster
@pytest.mark.slow
def test_a_node_serves_what_its_study_has_done(cluster, gates, helpers, lossray_run, study_path, tmp_path):
    head, out = cluster(2), tmp_path / "out"
    gates.shut("*/checkpoints/*/12.safetensors")
    run = lossray_run(study_path, "--out", out, "--address", head.address)
    half = {
        ("ray_lossray_tasks_total", "checkpoint", "done"): 2,
        ("ray_lossray_tasks_total", "curvature", "done"): 2,
        ("ray_lossray_tasks_total", "pair", "done"): 1,
        ("ray_lossray_units",): 3 + 3 + 2,
        ("ray_lossray_units_done",): 2 + 2 + 1,
        ("ray_lossray_runs", "finished"): 0,
    }
    helpers.wait_for(lambda: half.items() <= served(head).items(), "half of the study", unless=run.ended)
    groups = json.loads(head.get("/api/v0/tasks/summarize"))["data"]["result"]["result"]
    names = set(groups["node_id_to_summary"]["cluster"]["summary"])
    assert {"train", "curvature", "pair"} <= {name for name in names if not name.endswith(".__init__")}
    gates.open()
    assert run.result() == 0, run.said

    tasks = lossray.open_study(out).table("tasks").query("kind != 'gather'")
    counts = tasks.groupby(["kind", "status"]).size()
    totals = {("ray_lossray_tasks_total", *names): number for names, number in counts.items()}
    for name, column in COLUMNS.items():
        sums = tasks.groupby("kind")[column].sum()
        totals |= {(name, kind): pytest.approx(total) for kind, total in sums.items() if total}

    def counters():
        return {series: value for series, value in served(head).items() if series[0].endswith("_total")}

    helpers.wait_for(lambda: counters() == totals, "the whole study")
