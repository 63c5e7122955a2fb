"""What the tests of a cluster share: a head as `ray start` makes it, and nodes beside it."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
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


AUTOSCALER = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "3600",  # it does not see those of nodes that share a machine
}


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
    """A Ray head on ports that were free, with its files in a folder with a short name.

    With a token it lets in only who has it. With ``worker_cpus`` it has an autoscaler, which adds nodes of so
    many CPUs on demand: on this machine, in the session of the head.
    """

    def __init__(self, cpus, folder, environment, log, *, token=None, worker_cpus=None):
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.address = f"127.0.0.1:{ports['port']}"
        self.dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
        self.metrics = f"http://127.0.0.1:{ports['metrics-export-port']}/metrics"
        self.token = token
        options = [f"--{name}={number}" for name, number in ports.items()]
        options += [f"--num-cpus={cpus}", f"--temp-dir={folder}"]
        environment = environment | self.secret
        if worker_cpus is not None:
            config = Path(folder) / "autoscaler.json"
            config.write_text(json.dumps(autoscaler_config(self.address, worker_cpus)))
            options.append(f"--autoscaling-config={config}")
            environment |= AUTOSCALER
        self.process = ray_start("--head", *options, environment=environment, log=log)

    @property
    def secret(self):
        """The environment of a process of Ray's that is let in."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token} if self.token else {}

    def get(self, path):
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        request = urllib.request.Request(self.dashboard + path, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read()

    def is_ready(self):
        try:
            return self.get("/api/gcs_healthz")
        except OSError:
            return False

    def scraped(self, prefix):
        """The lines that the node serves to Prometheus of metrics whose names begin with a prefix."""
        time.sleep(0.5)  # who polls leaves the node some time
        try:
            with urllib.request.urlopen(self.metrics, timeout=60) as response:
                lines = response.read().decode().splitlines()
        except OSError:  # its agent starts after the head
            return []
        return [line for line in lines if line.startswith(prefix)]

    def listed(self, what):
        """What the State API of the dashboard lists: "tasks", "actors" or "nodes"."""
        return json.loads(self.get(f"/api/v0/{what}?limit=1000"))["data"]["result"]["result"]

    def job(self, verb, *arguments):
        """`ray job VERB`, run to its end."""
        command = [BIN / "ray", "job", verb, "--address", self.dashboard, *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | self.secret
        )

    def lossray_submit(self, *arguments, cwd, token=None):
        """`lossray submit`, run to its end; a token alone is enough to be let in."""
        token = token or self.token
        command = [BIN / "lossray", "submit", *map(str, arguments), "--address", self.dashboard]
        environment = os.environ | ({"RAY_AUTH_TOKEN": token} if token else {})
        environment.pop("RAY_AUTH_MODE")
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def autoscaler_config(address, worker_cpus):
    """Of Ray's provider for tests, whose nodes are processes beside the head."""
    worker = {"resources": {"CPU": worker_cpus, "object_store_memory": 10**8}, "max_workers": 2}
    types = {"head": {"resources": {"CPU": 0}, "max_workers": 0}, "worker": worker}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "grows",
        "provider": {"type": "fake_multinode", "gcs_address": address},
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 60,
        "head_node_type": "head",
        "available_node_types": {name: node | {"node_config": {}} for name, node in types.items()},
        **{f"{name}_commands": [] for name in commands},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts_sync_continuously": False,
    }


def free_ports(number):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def cluster(ray_files, gates, helpers, tmp_path):
    """``cluster(head_cpus, node_cpus, ...)``: a head, and nodes beside it; ``head.join(cpus)`` adds one."""
    processes = []

    log = tmp_path / "ray.log"

    def ended():
        return log.read_text() if any(process.poll() is not None for process in processes) else None

    def start(head_cpus, *node_cpus, token=None, worker_cpus=None):
        folder = tempfile.mkdtemp(prefix="h", dir=ray_files)
        with log.open("w") as file:
            head = Head(head_cpus, folder, gates.environment, file, token=token, worker_cpus=worker_cpus)
        processes.append(head.process)
        helpers.wait_for(head.is_ready, "the head", unless=ended)

        def join(cpus, *options):
            options = (f"--address={head.address}", f"--num-cpus={cpus}", *options)
            with log.open("a") as file:
                processes.append(ray_start(*options, environment=gates.environment | head.secret, log=file))
            helpers.wait_for(lambda: len(head.listed("nodes")) == len(processes), "a node", unless=ended)

        head.join = join
        for cpus in node_cpus:  # one by one: started together on one machine they get in each other's way
            join(cpus)
        return head

    yield start
    for process in reversed(processes):
        helpers.end(process)
