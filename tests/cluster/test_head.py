"""On a cluster as `ray start` makes it: jobs, `--address`, what the dashboard lists, a node that dies."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

import lossray

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

BIN = Path(sys.executable).parent
PORTS = (
    "port",
    "dashboard-port",
    "ray-client-server-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
)


def ray_start(*options, environment, log):
    """One node, its processes in a session of their own."""
    return subprocess.Popen(
        [
            BIN / "ray",
            "start",
            "--block",
            "--disable-usage-stats",
            "--object-store-memory=100000000",
            *options,
        ],
        env=os.environ | environment | {"PATH": f"{BIN}:{os.environ['PATH']}"},
        start_new_session=True,
        stdout=log,
        stderr=log,
    )


class Head:
    """A Ray head on ports that were free, with its files in a folder with a short name."""

    def __init__(self, cpus, folder, environment, log):
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.address = f"127.0.0.1:{ports['port']}"
        self.dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
        options = [f"--{name}={number}" for name, number in ports.items()]
        options += [f"--num-cpus={cpus}", f"--temp-dir={folder}"]
        self.process = ray_start("--head", *options, environment=environment, log=log)

    def get(self, path):
        with urllib.request.urlopen(self.dashboard + path, timeout=60) as response:
            return response.read()

    def is_ready(self):
        try:
            return self.get("/api/gcs_healthz")
        except OSError:
            return False

    def listed(self, what):
        """What the State API of the dashboard lists: "tasks", "actors" or "nodes"."""
        return json.loads(self.get(f"/api/v0/{what}?limit=1000"))["data"]["result"]["result"]

    def job(self, verb, *arguments):
        """`ray job VERB`, run to its end."""
        command = [BIN / "ray", "job", verb, "--address", self.dashboard, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)


def free_ports(number):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def cluster(ray_files, gates, helpers, tmp_path):
    """``cluster(head_cpus, node_cpus, ...)``: a head, and nodes beside it."""
    processes = []

    log = tmp_path / "ray.log"

    def ended():
        return log.read_text() if any(process.poll() is not None for process in processes) else None

    def start(head_cpus, *node_cpus):
        with log.open("w") as file:
            head = Head(head_cpus, tempfile.mkdtemp(prefix="h", dir=ray_files), gates.environment, file)
            processes.append(head.process)
            helpers.wait_for(head.is_ready, "the head", unless=ended)
            for cpus in node_cpus:  # one by one: started together on one machine they get in each other's way
                options = (f"--address={head.address}", f"--num-cpus={cpus}")
                processes.append(ray_start(*options, environment=gates.environment, log=file))
                helpers.wait_for(lambda: len(head.listed("nodes")) == len(processes), "a node", unless=ended)
        return head

    yield start
    for process in reversed(processes):
        helpers.end(process)


@pytest.mark.slow
def test_the_work_of_a_node_that_dies_is_done_by_another(
    cluster, gates, helpers, lossray_run, study_path, undisturbed, tmp_path
):
    head = cluster(0, 1, 1)  # the training on one node, the analysis on the other
    out = tmp_path / "out"
    gates.shut("*/checkpoints/*/5.safetensors")
    run = lossray_run(study_path, "--out", out, "--address", head.address)
    helpers.kill_session(os.getsid(gates.wait(unless=run.ended)))  # the trainer's whole node
    gates.open()
    assert run.result() == 0, run.said
    helpers.assert_same_rows(out, undisturbed)
    tasks = lossray.open_study(out).table("tasks")
    assert tasks.set_index(["kind", "step"])["attempts"]["checkpoint", 5] == 2


@pytest.mark.slow
def test_a_stopped_job_resumes_as_a_job_and_grows_from_outside_and_the_dashboard_shows_it_all(
    cluster, gates, helpers, lossray_run, study_path, undisturbed, tmp_path
):
    head = cluster(2)
    folder, out = tmp_path / "job", tmp_path / "out"
    folder.mkdir()
    (folder / "small.toml").write_text(study_path.read_text())
    for decoy in ("tasks", "flows"):  # a job has its working directory first on its path
        (folder / f"{decoy}.py").write_text(f"raise SystemExit('the decoy {decoy}.py')")
    job = ("--working-dir", folder, "--", "lossray", "run", "small.toml", "--out", out)

    gates.shut("*/checkpoints/*/5.safetensors")
    submitted = head.job("submit", "--no-wait", "--submission-id=stopped", *job)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    gates.wait()
    assert head.job("stop", "stopped").returncode == 0
    assert json.loads(head.get("/api/jobs/stopped"))["status"] == "STOPPED"
    gates.open()
    assert not (out / "tables").exists()

    finished = head.job("submit", *job)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    helpers.assert_same_rows(out, undisturbed)

    run = lossray_run(study_path, "--out", out, "--set", "seeds=3", "--address", head.address)
    assert run.result() == 0, run.said
    packs = {pack["pack_id"] for pack in json.loads((out / "manifest.json").read_text())["packs"]}
    assert len(packs) == 2

    def missing():
        tasks, actors = ({entry["name"] for entry in head.listed(what)} for what in ("tasks", "actors"))
        return {"train", "curvature", "gather"} - tasks | {f"train/{pack}" for pack in packs} - actors

    helpers.wait_for(lambda: not missing(), "every task and actor in the dashboard")
