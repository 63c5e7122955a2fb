"""A cluster that grows under a study: nodes that join, nodes on demand, and what never comes."""

import json

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

TWO_PACKS = """
[[optimizers]]
name = "sgd"
lr = 0.1
"""


def test_nodes_are_waited_for_and_used_as_they_join_and_what_never_comes_ends_in_a_line(
    cluster, gates, helpers, lossray_run, study_path, tmp_path
):
    head = cluster(1)
    study = tmp_path / "two.toml"
    study.write_text(study_path.read_text() + TWO_PACKS)
    out = tmp_path / "out"
    address = ("--address", head.address)

    wait = ("--set", "resources.wait=2", "--set", "resources.train.cpus=64")
    run = lossray_run(study, "--out", out, *address, *wait)
    assert run.result() == 2
    assert run.said.splitlines()[-1] == (
        "lossray: resources.train: found 64 CPUs; allowed: what one node of the cluster has "
        "(1 CPU and 0 GPUs); none with that came in 2 s (resources.wait); the same command resumes"
    )

    gates.shut("*/checkpoints/*/5.safetensors")
    run = lossray_run(study, "--out", out, *address, "--set", "resources.train.labels.zone=b")
    text = "waiting for 1 CPU with zone=b (the cluster has 1 CPU and 0 GPUs)"

    def progress():
        return json.loads((out / "progress.json").read_text())

    helpers.wait_for(lambda: progress()["waiting"] == text, "the wait", unless=run.ended)
    head.join(3, "--labels=zone=b")
    helpers.wait_for(lambda: len(gates.living()) == 2, "the training of both packs", unless=run.ended)
    assert progress()["waited_seconds"] > 0
    gates.open()
    assert run.result() == 0, run.said
    assert f"{text}; running: runs 0/4" in run.said
    tasks = head.listed("tasks")
    nodes = {task["node_id"] for task in tasks if task["name"] == "train" and task["node_id"]}
    assert len(nodes) == 1  # the one with the label
    assert {task["node_id"] for task in tasks if task["name"] == "curvature" and task["node_id"]} >= nodes


def test_a_cluster_without_workers_gets_them_on_demand(
    cluster, helpers, lossray_run, study_path, undisturbed, tmp_path
):
    head = cluster(0, worker_cpus=2)
    out = tmp_path / "out"
    run = lossray_run(study_path, "--out", out, "--address", head.address)
    assert run.result() == 0, run.said
    assert "waiting for 1 CPU (the cluster has 0 CPUs and 0 GPUs); running: runs 0/2" in run.said
    helpers.assert_same_rows(out, undisturbed)
    assert len(head.listed("nodes")) >= 2  # the head computes nothing
