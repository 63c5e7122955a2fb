"""What the tests with Ray share: one embedded Ray, gates, `lossray` as a process of its own, rows to compare.

Nothing here is started unless a test asks for it. LOSSRAY_TEST_SEED moves every unseeded draw; the
outcome of no test may depend on it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import psutil
import pytest

LOSSRAY = Path(sys.executable).with_name("lossray")
HOOKS = Path(__file__).parent / "gates"
PATIENCE = 240.0  # seconds after which an event that a test waits for counts as missing

# Set before any Ray starts: otherwise ray.init() writes a token that later clusters of the user ask for.
os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ.pop("RAY_ADDRESS", None)

STUDY = """
name = "small"
seeds = 2

[data]
source = "gaussians"
n = 90
dim = 6

[[models]]
name = "mlp"
widths = [4]

[[optimizers]]
name = "adam"
lr = 0.03

[training]
steps = 12
batch_size = 16
checkpoints = {steps = [0, 5, 12]}
log_every = 3

[curvature]
top = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder at the end of the path; what is imported from it is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("lrt_"):
            del sys.modules[name]


def wait_for(condition, what, *, unless=lambda: None):
    """Poll until ``condition()`` is true, and return it; fail once ``unless()`` is not None, or at last."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        ended = unless()
        assert ended is None, f"{what} never came: {ended}"
        assert time.monotonic() < deadline, f"{what} did not come in {PATIENCE:g} seconds"
        time.sleep(0.01)
    return found


class Gates:
    """Holds processes just after they have put a certain file in place; see gates/sitecustomize.py."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    @property
    def environment(self):
        """For the processes that are to be held."""
        path = os.pathsep.join(filter(None, [str(HOOKS), os.environ.get("PYTHONPATH")]))
        return {"PYTHONPATH": path, "LOSSRAY_TEST_GATES": str(self.folder)}

    def shut(self, pattern):
        """From now on hold whoever writes a file whose path matches; "*" also matches "/"."""
        temporary = self.folder / ".new"
        temporary.write_text(pattern)
        temporary.rename(self.folder / "pattern.gate")

    def held(self):
        """The process ids at the gate."""
        return [int(path.suffix[1:]) for path in self.folder.glob("pattern.gate.*")]

    def living(self):
        """The processes that have come and are still there."""
        return running(psutil.Process(pid) for pid in self.held() if psutil.pid_exists(pid))

    def wait(self, *, unless=lambda: None):
        """The id of the first process that comes."""
        return wait_for(self.held, f"a process at {self.folder}", unless=unless)[0]

    def open(self):
        """Let everybody go on."""
        for path in sorted(self.folder.glob("pattern.gate*")):  # the gate itself first
            path.unlink()


class Run:
    """One `lossray run` as a process, in a process group of its own, as a shell would start it."""

    def __init__(self, folder, arguments, environment, cwd):
        self.log = folder / f"{uuid.uuid4().hex}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [LOSSRAY, "run", *map(str, arguments)],
                env=os.environ | environment,
                cwd=cwd,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    @property
    def said(self):
        """All that it has written to stderr."""
        return self.log.read_text()

    def ended(self):
        """None while it runs."""
        code = self.process.poll()
        return None if code is None else f"lossray ended with {code}:\n{self.said}"

    def result(self):
        """The exit code, once it has ended."""
        wait_for(self.ended, "the end of lossray")
        return self.process.returncode

    def descendants(self):
        """Ray's processes and the workers."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def ctrl_c(self):
        """As a terminal does it: to the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)


def running(processes):
    """Those that are still there; a process id that was used again is another process."""
    alive = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def kill_session(leader):
    """SIGKILL to all processes in the session of a process that a test has started as its leader."""
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == leader:
                os.kill(pid, signal.SIGKILL)


def end(process):
    """Kill a process that a test has started, and all that is in its session."""
    kill_session(process.pid)
    process.wait()


def published(out):
    """The tables that gather has published: name -> frame, without the columns that may differ."""
    from lossray.storage.tables import TABLES

    return {
        name: pd.read_parquet(Path(out) / "tables" / f"{name}.parquet").drop(columns=schema.volatile)
        for name, schema in TABLES.items()
    }


class Background:
    """A study run in this process, in the Ray of `session_ray`, while the test does something to it."""

    def __init__(self, *arguments, **options):
        import flows

        self.future = ThreadPoolExecutor(1).submit(flows.run, *arguments, **options)

    def ended(self):
        """None while it runs."""
        return f"flows.run ended: {self.future}" if self.future.done() else None

    def result(self):
        """The exit code, once it has ended."""
        return self.future.result(PATIENCE)


class Helpers:
    """The functions above, for test files (which cannot import a conftest)."""

    wait_for = staticmethod(wait_for)
    running = staticmethod(running)
    kill_session = staticmethod(kill_session)
    end = staticmethod(end)
    published = staticmethod(published)
    Background = Background

    @staticmethod
    def assert_same_rows(out, expected):
        """Two stores hold the same, bit for bit, but for the volatile columns."""
        found = published(out)
        for name, frame in published(expected).items():
            pd.testing.assert_frame_equal(found[name], frame, check_exact=True, obj=name)


@pytest.fixture(autouse=True)
def _same_draws():
    """What a test draws from torch's own generator depends neither on its neighbours nor on their order."""
    import torch

    torch.manual_seed(int(os.environ.get("LOSSRAY_TEST_SEED", "0")))


@pytest.fixture(scope="session")
def helpers():
    return Helpers


@pytest.fixture(scope="session")
def ray_files():
    """Where Ray keeps its session folders: a short path, since it holds sockets; removed at the end."""
    folder = tempfile.mkdtemp(prefix="lr-")
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    yield folder
    if before is None:
        del os.environ["RAY_TMPDIR"]
    else:
        os.environ["RAY_TMPDIR"] = before
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def _gates(tmp_path_factory):
    return Gates(tmp_path_factory.mktemp("held") / "gates")


@pytest.fixture
def gates(_gates):
    """The gates of every process that these fixtures start; all open at first, and afterwards."""
    yield _gates
    _gates.open()


@pytest.fixture(scope="session")
def ray_address(ray_files, _gates):
    """The one embedded Ray of all tests: 2 CPUs and 1 logical GPU; its address, for other drivers."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in _gates.environment.items():
            patch.setenv(name, value)
        ray.init(
            "local",
            num_cpus=2,
            num_gpus=1,  # declared only: torch sees none
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
        )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def session_ray(ray_address, gates, monkeypatch):
    """For tests that use the embedded Ray from this process."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # the folders of a study are appended to it


@pytest.fixture
def lossray_run(ray_files, tmp_path, gates):
    """``lossray_run(*arguments, cwd=..., **environment)`` starts `lossray run`; it ends with the test."""
    started = []

    def start(*arguments, cwd=tmp_path, **environment):
        started.append(Run(tmp_path, arguments, gates.environment | environment, cwd))
        return started[-1]

    yield start
    for run in started:
        end(run.process)


@pytest.fixture(scope="session")
def study_path(tmp_path_factory):
    """STUDY as a file."""
    path = tmp_path_factory.mktemp("study") / "small.toml"
    path.write_text(STUDY)
    return path


@pytest.fixture(scope="session")
def undisturbed(study_path, tmp_path_factory):
    """The store of STUDY when nothing happens to it, and without Ray."""
    import flows

    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        assert flows.run(study_path, out, in_process=True) == 0
    return out
