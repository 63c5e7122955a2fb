"""cluster/slurm.sbatch with stand-ins for SLURM, Ray and lossray: what they are asked, how the job ends."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cluster" / "slurm.sbatch"
NODES = 3
TOOLS = {
    "hostname": "echo 10.1.2.3 172.17.0.1",
    "scontrol": "",
    "srun": 'while [ "$1" != ray ]; do shift; done; "$@"',
    # As the real one: the command's exit code, but 0 where Ray has not started.
    "ray": """
        [ "$1" = symmetric-run ] && [ "$RAY_STARTS" = yes ] || exit 0
        while [ "$1" != -- ]; do shift; done; shift
        "$@"
    """,
    "lossray": """
        trap 'exit 130' TERM
        [ "$STATE" ] && echo "{\\"state\\": \\"$STATE\\"}" >"$OUT/progress.json"
        while [ "$STATE" = running ]; do sleep 0.05; done
        exit "$CODE"
    """,
}


class Batch:
    """One run of the script: where its tools leave what they were asked, and its end."""

    def __init__(self, folder):
        self.folder = folder
        self.out = folder / "out"
        self.out.mkdir()
        (folder / "bin").mkdir()
        (folder / "bin" / "activate").write_text(
            f"PATH={folder / 'bin'}:{Path(sys.executable).parent}:$PATH\n"
        )
        for name, body in TOOLS.items():
            tool = folder / "bin" / name
            tool.write_text(
                f'#!/bin/bash\nprintf "%s\\n" "$*" >>"{folder / name}"\nenv >"{folder / name}.env"\n{body}'
            )
            tool.chmod(0o755)
        self.process = None

    def start(self, *arguments, state="", code=0, starts="yes", **environment):
        self.process = subprocess.Popen(
            ["bash", SCRIPT, *map(str, arguments or ["quick", self.out])],
            env=os.environ
            | {"LOSSRAY_ENVIRONMENT": str(self.folder), "SLURM_CPUS_ON_NODE": "8", "SLURM_JOB_ID": "77"}
            | {"SLURM_JOB_NUM_NODES": str(NODES), "RAY_ADDRESS": "elsewhere:1", "TMPDIR": str(self.folder)}
            | {"STATE": state, "CODE": str(code), "OUT": str(self.out), "RAY_STARTS": starts}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return self

    def result(self):
        """The exit code, and what was said."""
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said

    def asked(self, tool):
        """The arguments of each call of a tool."""
        path = self.folder / tool
        return path.read_text().splitlines() if path.exists() else []

    def environment(self, tool):
        """The environment of its last call."""
        return dict(
            line.split("=", 1)
            for line in (self.folder / f"{tool}.env").read_text().splitlines()
            if "=" in line
        )


@pytest.fixture
def batch(tmp_path):
    batch = Batch(tmp_path)
    yield batch
    if batch.process and batch.process.poll() is None:
        batch.process.kill()
        batch.process.wait()


def test_bash_reads_it():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0


def test_slurm_gives_whole_nodes_and_warns_and_requeues():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", SCRIPT.read_text(), re.MULTILINE))
    assert {"exclusive", "requeue", "nodes", "time"} <= set(options)
    assert options["ntasks-per-node"] == "1"
    assert options["signal"] == "B:USR1@120"


def test_ray_and_lossray_are_asked_for_what_slurm_has_given(batch):
    code, said = batch.start(
        "quick", batch.out, "--set", "seeds=5", state="done", SLURM_GPUS_ON_NODE="4"
    ).result()
    assert code == 0, said
    (step,) = batch.asked("srun")
    assert step.startswith("--ntasks-per-node=1 --cpus-per-task=8 --cpu-bind=none ray symmetric-run ")
    token, run = batch.asked("ray")
    assert token == "get-auth-token --generate"
    options, _, _ = run.partition(" -- ")
    assert shlex.split(options) == [
        *("symmetric-run", "--address", "10.1.2.3:6379", "--min-nodes", str(NODES)),
        *("--num-cpus=8", "--num-gpus=4"),
    ]
    assert batch.asked("lossray") == [f"run quick --out {batch.out} --address 10.1.2.3:6379 --set seeds=5"]
    assert batch.asked("scontrol") == []


def test_ray_has_time_to_join_a_token_and_no_other_cluster(batch):
    code, said = batch.start(state="done").result()
    assert code == 0, said
    for tool in ("ray", "lossray"):
        environment = batch.environment(tool)
        assert environment["RAY_AUTH_MODE"] == "token"
        assert int(environment["RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT"]) == 300
        assert not {"RAY_ADDRESS", "RAY_TMPDIR"} & set(environment)
    assert "--num-gpus=0" in batch.asked("srun")[0]


@pytest.mark.parametrize(
    ("state", "code", "expected", "words"),
    [
        ("done", 0, 0, "done"),
        ("done", 1, 1, "done"),  # some runs failed
        ("failed: no space", 1, 1, "failed: no space"),
        ("failed: no space", 0, 1, "failed: no space"),
        ("interrupted", 130, 130, "interrupted"),
        ("", 0, 1, "no progress.json"),
        ("", 2, 2, "no progress.json"),  # a mistake in the study
    ],
)
def test_the_job_ends_as_the_study_does(batch, state, code, expected, words):
    ended, said = batch.start(state=state, code=code).result()
    assert ended == expected
    assert said.splitlines()[-1] == f"{batch.out}: {words}"
    assert batch.asked("scontrol") == []


def test_a_ray_that_did_not_start_is_a_failure_also_where_the_study_was_done_before(batch):
    (batch.out / "progress.json").write_text(json.dumps({"state": "done"}))
    ended, said = batch.start(starts="no").result()
    assert ended == 1
    assert said.splitlines()[-1] == f"{batch.out}: Ray has not started"


@pytest.mark.parametrize(
    ("restarts", "requeued"), [(None, ["requeue 77"]), ("19", ["requeue 77"]), ("20", [])]
)
def test_out_of_time_the_driver_stops_and_the_job_is_queued_again(batch, helpers, restarts, requeued):
    environment = {} if restarts is None else {"SLURM_RESTART_COUNT": restarts}
    batch.start(state="running", **environment)
    helpers.wait_for((batch.out / "progress.json").exists, "the driver", unless=batch.process.poll)
    batch.process.send_signal(signal.SIGUSR1)
    ended, said = batch.result()
    assert ended == 130, said
    assert batch.asked("scontrol") == requeued


def test_study_and_out_are_asked_for(batch):
    ended, said = batch.start("quick").result()
    assert ended == 2
    assert "STUDY OUT" in said
    assert batch.asked("srun") == []
