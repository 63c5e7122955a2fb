"""What the tests of a cluster share: a head as `ray start` makes it, and nodes beside it."""

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
        self.metrics = f"http://127.0.0.1:{ports['metrics-export-port']}/metrics"
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

    def scraped(self, prefix):
        """The lines that the node serves to Prometheus of metrics whose names begin with a prefix."""
        with urllib.request.urlopen(self.metrics, timeout=60) as response:
            return [line for line in response.read().decode().splitlines() if line.startswith(prefix)]

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
