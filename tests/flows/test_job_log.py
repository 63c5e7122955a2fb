"""Following a job: each part of its log once, whatever happens to the connection; the job's exit code."""

from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from flows import job_log
from flows.job_log import JobLog, exit_code

LOG = "first line\nsecond line\nthe end\n"


def job(status, code=None):
    return SimpleNamespace(status=JobStatus(status), driver_exit_code=code)


DONE = job("SUCCEEDED", 0)


class Client:
    """A job server that gives, in order, what a stream of the log does and what the job is then.

    A stream is a tuple of parts of the log, of which an exception is raised.
    """

    def __init__(self, *answers):
        self.answers = list(answers)

    async def tail_job_logs(self, submission_id):
        stream, self.job = self.answers.pop(0)
        for part in stream:
            if isinstance(part, Exception):
                raise part
            yield part

    def get_job_logs(self, submission_id):
        if isinstance(self.job, Exception):
            raise self.job
        return LOG

    def get_job_info(self, submission_id):
        if isinstance(self.job, Exception):
            raise self.job
        return self.job


@pytest.fixture
def follow(monkeypatch):
    """``follow(*answers)``: the job's end, what was written, and what was said."""
    monkeypatch.setattr(job_log, "RETRY_SECONDS", 0.0)

    def run(*answers):
        written, said = [], []
        end = JobLog(Client(*answers), "id", write=written.append, say=said.append).follow()
        return end, "".join(written), said

    return run


def test_a_log_is_written_as_it_comes(follow):
    assert follow(((LOG[:5], LOG[5:]), DONE)) == (DONE, LOG, [])


def test_a_stream_that_begins_anew_writes_nothing_twice(follow):
    running = job("RUNNING")
    lost = ConnectionError("reset")
    _, written, said = follow(((LOG[:7],), running), ((LOG[:3], lost), lost), ((LOG[:12], LOG[12:]), DONE))
    assert written == LOG
    assert said == ["the connection to the cluster is lost; trying again", "connected again"]


def test_where_no_stream_comes_through_the_log_is_asked_for(follow):
    blocked = RuntimeError("no upgrade to a websocket")
    assert follow(((LOG[:7], blocked), job("RUNNING")), ((blocked,), DONE)) == (DONE, LOG, [])


def test_a_job_that_waits_for_a_node_is_said_to_wait_once(follow):
    waiting = job("PENDING")
    _, _, said = follow(((), waiting), ((), waiting), ((LOG,), DONE))
    assert len(said) == 1
    assert "waits for a node" in said[0]


def test_a_silent_stream_is_left_to_look_at_the_job(follow, monkeypatch):
    import asyncio

    class Silent(Client):
        async def tail_job_logs(self, submission_id):
            _, self.job = self.answers.pop(0)
            yield LOG
            await asyncio.sleep(1000)

    monkeypatch.setattr(job_log, "SILENT_SECONDS", 0.01)
    written = []
    assert JobLog(Silent(((), DONE)), "id", write=written.append, say=print).follow() is DONE
    assert written == [LOG]


def test_a_new_head_that_does_not_know_the_job_ends_it(follow):
    unknown = RuntimeError("Request failed with status code 404: Job id does not exist.")
    with pytest.raises(ConnectionError, match="no longer knows job id"):
        follow(((unknown,), unknown))


def test_a_cluster_that_is_gone_for_good_is_given_up(follow, monkeypatch):
    monkeypatch.setattr(job_log, "LOST_SECONDS", -1.0)
    with pytest.raises(ConnectionError, match="refused"):
        follow(((), ConnectionError("refused")))


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", 130, 130),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 130),
    ],
)
def test_the_exit_code_is_the_job_s(status, code, expected):
    assert exit_code(job(status, code)) == expected
