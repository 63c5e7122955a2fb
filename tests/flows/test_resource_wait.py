"""What a study says that it waits for, for how long, and when it gives up."""

import pytest

from flows.capacity import ClusterNode, divided, shares_of
from flows.resource_wait import BUSY_SECONDS, ResourceWait
from lossray.errors import StudyError
from lossray.study import Resources, TaskResources

SHARES = shares_of(Resources(train=TaskResources(gpus=1)), gpus=False)
NOBODY = divided(SHARES, [])
CPUS = divided(SHARES, [ClusterNode(8, 0)])
GPUS = divided(SHARES, [ClusterNode(8, 0), ClusterNode(8, 1)])


def look(wait, now, room, needed, *, running=False, embedded=False):
    wait.look(now, room, needed, running=running, embedded=embedded)
    return wait.text


def test_a_node_that_is_missing_is_named_at_once_and_its_time_is_counted():
    wait = ResourceWait(100)
    text = "waiting for 1 CPU and 1 GPU (the cluster has 0 CPUs and 0 GPUs)"
    assert look(wait, 10, NOBODY, ["train"]) == text
    assert (
        look(wait, 40, CPUS, ["train"]) == "waiting for 1 CPU and 1 GPU (the cluster has 8 CPUs and 0 GPUs)"
    )
    assert wait.seconds == 30
    assert look(wait, 41, GPUS, ["train"], running=True) == ""
    assert look(wait, 90, GPUS, ["train"], running=True) == ""
    assert wait.seconds == 30
    look(wait, 100, NOBODY, ["train"])
    look(wait, 105, NOBODY, ["train"])
    assert wait.seconds == 35


def test_what_never_comes_ends_the_study_with_what_there_is():
    wait = ResourceWait(60)
    look(wait, 0, CPUS, ["train"])
    look(wait, 59, CPUS, ["train"])
    with pytest.raises(StudyError) as caught:
        look(wait, 60, CPUS, ["train"])
    assert str(caught.value) == (
        "resources.train: found 1 CPU and 1 GPU; allowed: what one node of the cluster has "
        "(8 CPUs and 0 GPUs); none with that came in 60 s (resources.wait); the same command resumes"
    )


def test_nobody_gives_up_while_something_runs_but_says_what_is_missing():
    wait = ResourceWait(60)
    for now in (0, 100, 200):
        text = look(wait, now, CPUS, ["train", "curvature"], running=True)
        assert text.startswith("waiting for 1 CPU and 1 GPU")
    assert wait.seconds == 0
    look(wait, 201, CPUS, ["train"])
    look(wait, 250, CPUS, ["train"])
    with pytest.raises(StudyError):
        look(wait, 261, CPUS, ["train"])


def test_room_that_others_use_is_waited_for_without_an_end():
    wait = ResourceWait(60)
    assert look(wait, 0, GPUS, ["train"]) == ""  # a worker takes some seconds to start
    assert wait.seconds == 0
    text = look(wait, BUSY_SECONDS, GPUS, ["train"])
    assert text == (
        "waiting for 1 CPU and 1 GPU (the cluster has 16 CPUs and 1 GPU on 2 nodes, which others use)"
    )
    look(wait, 1000, GPUS, ["train"])
    assert wait.seconds == 1000


def test_a_node_that_has_just_come_is_not_in_use_by_others():
    wait = ResourceWait(600)
    look(wait, 0, NOBODY, ["train"])
    look(wait, 100, NOBODY, ["train"])
    assert look(wait, 101, GPUS, ["train"]) == look(wait, 100 + BUSY_SECONDS, GPUS, ["train"]) == ""
    assert wait.seconds == 100
    assert "others use" in look(wait, 101 + BUSY_SECONDS, GPUS, ["train"])
    assert wait.seconds == 100 + BUSY_SECONDS


def test_where_nobody_else_is_a_slow_start_is_no_wait():
    wait = ResourceWait(60)
    look(wait, 0, GPUS, ["curvature"], embedded=True)
    assert look(wait, 500, GPUS, ["curvature"], embedded=True) == ""


def test_nothing_to_do_is_no_wait():
    assert look(ResourceWait(0), 5, NOBODY, []) == ""
