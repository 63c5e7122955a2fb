"""A study as a job of a Ray cluster: checked here, sent with what it needs, followed to its end."""

import logging
import sys
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from typing import Any

from flows.job_log import INTERRUPTED, JobLog, exit_code
from flows.job_server import JobServer, checked_address, connect, environment
from flows.job_store import check_seen_by_all, job_store
from flows.submission import SUBMITTED_WITH, Submission
from flows.upload import MIB, Upload, not_sent, upload_of
from lossray import __version__
from lossray.errors import StudyError
from lossray.study import load_study

# Loggers that tell of each ignore file, each package and large file in it, each connection that is closed.
TALKATIVE = (
    "ray._private.runtime_env.packaging",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
)
DRIVER_CPUS = 0.1  # of a worker, where the head does no work
ATTEMPTS = 10  # to find a free id while others submit
NO_SUCH_COMMAND = 127  # a shell's exit code


def submit(
    study: str,
    out: str,
    *,
    address: str | None = None,
    overrides: Sequence[str] = (),
    wait: bool = True,
    recompute: bool = False,
    shared: bool = False,
    driver_cpus: float | None = None,
) -> int:
    """Send a study to a cluster as a job, and follow it.

    Args:
        study: as for `flows.run`; a file lies in or below the current directory, which is the job's too.
        out: the store: a URI, or a folder that all nodes see.
        address: of the cluster's dashboard, http://HOST:PORT.
        overrides: as for `flows.run`.
        wait: whether to follow the job to its end.
        recompute: as for `flows.run`.
        shared: whether a folder `out` is one that all nodes share.
        driver_cpus: what the job's driver reserves; 0 puts it on the head. None: 0 where the head has CPUs
            for work, otherwise a small share of a worker.

    Returns:
        The exit code of the job's `lossray run`; 0 if it is not waited for.

    Raises:
        StudyError: the study, its upload, `out` or the address; or a job of this store is running.
        ConnectionError: the cluster was lost for good while its job was followed.
    """
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    with chdir("."):  # which a module of the user's may change
        loaded = load_study(study, overrides)
    submission = Submission(loaded, job_store(out), recompute)
    upload = upload_of(loaded)
    server = connect(checked_address(address))
    nodes = server.nodes()
    check_seen_by_all(submission.out, nodes, shared=shared)
    for line in [*server.notes(), *not_sent(loaded, upload)]:
        _say(f"note: {line}")
    cpus = _driver_cpus(nodes) if driver_cpus is None else driver_cpus
    submission_id = _send(server, submission, upload, cpus)
    _tell(server, submission, submission_id, upload)
    return _follow(server, submission_id) if wait else 0


def _send(server: JobServer, submission: Submission, upload: Upload, cpus: float) -> str:
    """Submit under the first free id; Ray gives an id to one job only, so one of two people wins."""
    for _ in range(ATTEMPTS):
        try:
            jobs = [job for job in server.client.list_jobs() if job.submission_id]
            _check_none_runs(server, submission, jobs)
            submission_id = submission.next_id({job.submission_id for job in jobs})
            _submit_job(server, submission, upload, cpus, submission_id)
        except RuntimeError as error:
            if "already exists" in str(error):
                continue
            raise StudyError(f"{server.address}: the job was not taken: {_last_line(error)}") from error
        return submission_id
    raise StudyError(f"{server.address}: no free id for the job in {ATTEMPTS} attempts; submit again")


def _submit_job(
    server: JobServer, submission: Submission, upload: Upload, cpus: float, submission_id: str
) -> None:
    # Ray's own list of excludes is part of ours; it warns of each that it meets.
    with tempfile.TemporaryDirectory() as empty, environment(RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES=""):
        server.client.submit_job(
            entrypoint=submission.entrypoint,
            submission_id=submission_id,
            runtime_env={
                "working_dir": str(upload.folder or empty),
                "excludes": list(upload.excludes),
                "env_vars": {SUBMITTED_WITH: __version__},
            },
            metadata=submission.metadata,
            entrypoint_num_cpus=cpus,
        )


def _check_none_runs(server: JobServer, submission: Submission, jobs: Sequence[Any]) -> None:
    for job in jobs:
        same = submission.owns(job.submission_id) or (job.metadata or {}).get("out") == submission.out
        if not same or job.status.is_terminal():
            continue
        raise StudyError(
            f"--out {submission.out}: job {job.submission_id} of this store is {job.status.name}; "
            f"status: `lossray status {submission.out}`; "
            f"log: `{server.command('logs --follow', job.submission_id)}`; "
            f"stop: `{server.command('stop', job.submission_id)}`"
        )


def _driver_cpus(nodes: Sequence[Any]) -> float:
    """Nothing on a head that does work: any share of a CPU there would cost the study a whole task.

    A head without CPUs is kept free on purpose: the driver goes to a worker, which an autoscaler may start.
    """
    heads = [node for node in nodes if node.is_head_node]
    return DRIVER_CPUS if heads and not heads[0].resources_total.get("CPU") else 0.0


def _tell(server: JobServer, submission: Submission, submission_id: str, upload: Upload) -> None:
    print(submission_id, flush=True)  # the first line of the standard output, for scripts
    if upload.folder is not None:
        _say(f"sent:      {upload.folder}: {len(upload.files)} files, {upload.size / MIB:.1f} MiB")
    _say(f"dashboard: {server.address}/#/jobs/{submission_id}")
    _say(f"status:    lossray status {submission.out}")
    _say(f"stop:      {server.command('stop', submission_id)}")


def _follow(server: JobServer, submission_id: str) -> int:
    try:
        job = JobLog(server.client, submission_id, write=_write, say=_say).follow()
    except KeyboardInterrupt:
        _say(f"job {submission_id} goes on")
        _say(f"log:  {server.command('logs --follow', submission_id)}")
        _say(f"stop: {server.command('stop', submission_id)}")
        return INTERRUPTED
    code = exit_code(job)
    _say(f"job {submission_id}: {job.status.name}")
    if code == NO_SUCH_COMMAND:
        _say("lossray is not on the PATH of the cluster's nodes: install it in their image or set-up")
    elif job.status.name == "STOPPED":
        _say("the same command resumes")
    elif job.driver_exit_code is None:
        _say(f"{_last_line(job.message)}; the same command resumes")
    return code


def _last_line(text: object) -> str:
    """The last words of a message that may hold a traceback of the server's."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip(" .")]
    return lines[-1] if lines else "no reason given"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
