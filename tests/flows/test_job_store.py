"""Which stores a job may have: those that all nodes of its cluster see."""

import os
from types import SimpleNamespace

import pytest

from flows.job_store import check_seen_by_all, job_store
from lossray.errors import StudyError

HERE = SimpleNamespace(node_ip="127.0.0.1")
ELSEWHERE = SimpleNamespace(node_ip="192.0.2.77")  # an address that is set aside for documentation


@pytest.mark.parametrize(
    "out", ["s3://bucket/study/", "gs://bucket/study/", "simplecache::s3://bucket/study/"]
)
def test_a_uri_stays_as_it_is_and_needs_no_package_here(out):
    assert job_store(out) == out.rstrip("/")
    check_seen_by_all(job_store(out), [ELSEWHERE], shared=False)


def test_a_folder_gets_the_path_that_it_has_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        job_store("out")
        == job_store("./x/../out")
        == job_store(f"file://{tmp_path}/out")
        == f"{tmp_path}/out"
    )
    assert job_store("~/out") == os.path.expanduser("~/out")


@pytest.mark.parametrize(
    ("out", "words"),
    [("memory://x", "memory of its own"), ("s4://x", "did you mean s3://"), ("://x", "unknown protocol")],
)
def test_what_no_node_could_open_is_refused(out, words):
    with pytest.raises(StudyError, match=words) as refused:
        job_store(out)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [([ELSEWHERE], "192.0.2.77"), ([HERE, ELSEWHERE], "192.0.2.77"), ([], "lists no nodes")],
)
def test_a_folder_of_this_machine_alone_is_refused(nodes, words):
    with pytest.raises(StudyError, match=words) as refused:
        check_seen_by_all("/x/out", nodes, shared=False)
    assert "--shared" in str(refused.value)
    check_seen_by_all("/x/out", nodes, shared=True)


def test_a_folder_is_seen_by_a_cluster_of_this_machine():
    check_seen_by_all("/x/out", [HERE, SimpleNamespace(node_ip="::1")], shared=False)
