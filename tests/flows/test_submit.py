"""`lossray submit` without a cluster: one job for a store at a time, and what the user reads."""

from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from flows import submit as submit_module
from flows.cli import run_command
from flows.job_server import JobServer
from flows.submit import submit
from lossray.errors import StudyError

ADDRESS = "http://head:8265"
OUT = "s3://bucket/study"
TAKEN = "Request failed with status code 500: Job with submission_id X already exists."


def a_job(submission_id, status, *, out=OUT, code=None, message=None):
    return SimpleNamespace(
        submission_id=submission_id,
        status=JobStatus(status),
        metadata={"out": out},
        driver_exit_code=code,
        message=message,
    )


def a_node(*, head, cpus=None):
    resources = {"memory": 1.0} if cpus is None else {"memory": 1.0, "CPU": cpus}
    return SimpleNamespace(node_ip="192.0.2.77", is_head_node=head, resources_total=resources)


class Client:
    """Ray's client, as far as a submission uses it; a refusal comes with the jobs that caused it."""

    def __init__(self, *, ends=("SUCCEEDED", 0), message=None):
        self.jobs, self.sent, self.refusals, self.ends = [], [], [], (*ends, message)

    def list_jobs(self):
        return [*self.jobs, SimpleNamespace(submission_id=None)]  # a driver that was no job

    def submit_job(self, **sent):
        if self.refusals:
            error, jobs = self.refusals.pop(0)
            self.jobs += jobs
            raise error
        self.sent.append(sent)
        return sent["submission_id"]

    async def tail_job_logs(self, submission_id):
        yield "a line of the log\n"

    def get_job_info(self, submission_id):
        status, code, message = self.ends
        return a_job(submission_id, status, code=code, message=message)


class Server(JobServer):
    """A job server of given nodes."""

    def nodes(self):
        return [a_node(head=True, cpus=2.0)]


@pytest.fixture
def client(monkeypatch, tmp_path):
    """The client behind every address."""
    monkeypatch.chdir(tmp_path)
    client = Client()
    monkeypatch.setattr(submit_module, "connect", lambda address: Server(address, client))
    return client


@pytest.fixture
def first_id(client):
    """The id that `quick` gets for OUT, whose job has come and gone."""
    assert submit("quick", OUT, address=ADDRESS, wait=False) == 0
    return client.sent.pop()["submission_id"]


def refused(**options):
    with pytest.raises(StudyError) as error:
        submit("quick", OUT, address=ADDRESS, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_a_user_reads_and_what_is_sent(client, capsys):
    assert submit("quick", OUT, address=ADDRESS, overrides=["seeds=1"]) == 0
    printed = capsys.readouterr()
    (sent,) = client.sent
    submission_id = sent["submission_id"]
    assert printed.out == f"{submission_id}\na line of the log\n"
    for line in (
        f"dashboard: {ADDRESS}/#/jobs/{submission_id}",
        f"status:    lossray status {OUT}",
        f"stop:      ray job stop --address {ADDRESS} {submission_id}",
        f"job {submission_id}: SUCCEEDED",
    ):
        assert line in printed.err.splitlines()
    assert sent["entrypoint"] == f"lossray run quick --out {OUT} --set seeds=1"
    assert sent["metadata"]["out"] == OUT
    assert sent["entrypoint_num_cpus"] == 0.0


def test_without_waiting_the_id_is_all_of_the_output(client, capsys):
    assert submit("quick", OUT, address=ADDRESS, wait=False) == 0
    assert capsys.readouterr().out == client.sent[0]["submission_id"] + "\n"


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_second_submit_is_told_of_the_first(client, first_id, status):
    client.jobs = [a_job(first_id, status)]
    message = refused()
    for words in (f"{first_id} of this store is {status}", f"lossray status {OUT}", f"{ADDRESS} {first_id}`"):
        assert words in message
    assert client.sent == []


def test_another_study_for_the_store_of_a_running_job_is_refused(client):
    client.jobs = [a_job("lossray-other-1", "RUNNING")]
    assert "lossray-other-1" in refused()
    client.jobs = [a_job("lossray-other-1", "RUNNING", out="s3://bucket/other"), a_job("x", "FAILED")]
    assert submit("quick", OUT, address=ADDRESS, wait=False) == 0


@pytest.mark.parametrize("status", ["SUCCEEDED", "FAILED", "STOPPED"])
def test_after_its_end_a_job_is_submitted_again_under_an_id_of_its_own(client, first_id, status):
    client.jobs = [a_job(first_id, status)]
    assert submit("quick", OUT, address=ADDRESS, wait=False) == 0
    assert client.sent[0]["submission_id"] == f"{first_id}-2"


def test_of_two_submits_at_once_one_wins(client, first_id):
    client.refusals = [(RuntimeError(TAKEN), [a_job(first_id, "PENDING")])]
    assert f"{first_id} of this store is PENDING" in refused()


def test_an_id_that_came_and_went_meanwhile_is_passed_over(client, first_id):
    client.refusals = [(RuntimeError(TAKEN), [a_job(first_id, "FAILED")])]
    assert submit("quick", OUT, address=ADDRESS, wait=False) == 0
    assert client.sent[0]["submission_id"] == f"{first_id}-2"


def test_a_job_server_that_takes_no_job_is_a_line(client):
    traceback = "Request failed with status code 500: Traceback:\n  File x\nValueError: no agent\n."
    client.refusals = [(RuntimeError(traceback), [])]
    assert refused().endswith("the job was not taken: ValueError: no agent")


@pytest.mark.parametrize(
    ("ends", "message", "code", "words"),
    [
        (("FAILED", 2), None, 2, "FAILED"),
        (("FAILED", 127), None, 127, "not on the PATH"),
        (("STOPPED", None), None, 130, "the same command resumes"),
        (("FAILED", None), "the node died\n", 1, "the node died; the same command resumes"),
    ],
)
def test_the_end_of_a_job_is_the_end_of_the_command(client, capsys, ends, message, code, words):
    client.ends = (*ends, message)
    assert submit("quick", OUT, address=ADDRESS) == code
    assert words in capsys.readouterr().err


def test_ctrl_c_leaves_the_job_running(client, capsys):
    def interrupted(submission_id):
        raise KeyboardInterrupt

    client.get_job_info = interrupted
    assert submit("quick", OUT, address=ADDRESS) == 130
    said = capsys.readouterr().err
    assert "goes on" in said
    assert "ray job logs --follow" in said


@pytest.mark.parametrize(
    ("nodes", "cpus"),
    [
        ([a_node(head=True, cpus=2.0)], 0.0),
        ([a_node(head=True), a_node(head=False, cpus=8.0)], submit_module.DRIVER_CPUS),
        ([a_node(head=True, cpus=0.0)], submit_module.DRIVER_CPUS),
        ([], 0.0),
    ],
)
def test_a_driver_is_on_a_head_that_works_and_not_on_one_that_does_not(client, monkeypatch, nodes, cpus):
    monkeypatch.setattr(Server, "nodes", lambda self: nodes)
    for given, expected in ((None, cpus), (2.0, 2.0), (0.0, 0.0)):
        submit("quick", OUT, address=ADDRESS, wait=False, driver_cpus=given)
        assert client.sent.pop()["entrypoint_num_cpus"] == expected


def test_a_bad_study_and_a_folder_that_no_node_sees_are_refused_before_anything_is_sent(client):
    with pytest.raises(StudyError, match="did you mean 'training'"):
        submit("quick", OUT, address=ADDRESS, overrides=["trining.steps=2"])
    with pytest.raises(StudyError, match="--shared"):
        submit("quick", "out", address=ADDRESS)
    assert client.sent == []
    assert submit("quick", "out", address=ADDRESS, wait=False, shared=True) == 0


def test_the_command_line_gives_every_option(client, monkeypatch, capsys):
    options = ("--no-wait", "--recompute", "--set", "seeds=1", "--driver-cpus", "0.5")
    monkeypatch.setattr(
        "sys.argv", ["lossray", "submit", "quick", "--out", OUT, "--address", ADDRESS, *options]
    )
    with pytest.raises(SystemExit) as end:
        run_command()
    assert end.value.code == 0
    (sent,) = client.sent
    assert sent["entrypoint"].endswith("--set seeds=1 --recompute")
    assert sent["entrypoint_num_cpus"] == 0.5

    monkeypatch.setattr("sys.argv", ["lossray", "submit", "quick", "--address", ADDRESS])
    with pytest.raises(SystemExit) as end:
        run_command()
    assert end.value.code == 2
    assert "--out is missing" in capsys.readouterr().err
