"""How a study divides a cluster, and what it says where there is none; no Ray is started, nor one used."""

import socket

import pytest
import ray

from flows.session import capacity, has_gpus, ray_session
from lossray.errors import StudyError
from lossray.study import Resources, TaskResources


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """As if no Ray were initialised: other tests may have started the one that all tests share."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture
def cluster(monkeypatch):
    """``cluster((cpus, gpus), ...)``: the nodes of a pretended cluster."""

    def pretend(*nodes):
        listed = [
            {"Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}} for cpus, gpus in nodes
        ]
        for node in listed:
            node["Resources"] = {name: value for name, value in node["Resources"].items() if value}
        total = {kind: sum(n["Resources"].get(kind, 0.0) for n in listed) for kind in ("CPU", "GPU")}
        monkeypatch.setattr(ray, "nodes", lambda: listed)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {k: v for k, v in total.items() if v})
        return listed

    return pretend


def asking(**tasks):
    return Resources(**{kind: TaskResources(**asked) for kind, asked in tasks.items()})


def test_a_curvature_slot_is_kept_wherever_two_tasks_fit(cluster):
    for cpus, trainers in ((1, 1), (2, 1), (3, 2), (16, 15)):
        cluster((cpus, 0))
        room = capacity(Resources())
        assert room.trainers == trainers
        assert room.curvatures > 0
        assert room.train.options() == {"num_cpus": 1.0, "num_gpus": 0.0}


def test_work_in_flight_is_bounded_by_the_cluster(cluster):
    cluster((4, 0))
    small = capacity(Resources()).curvatures
    cluster((400, 0))
    large = capacity(Resources()).curvatures
    assert 4 <= small < 10
    assert 400 <= large < 500


def test_a_gpu_is_shared_by_training_and_analysis_where_there_is_one(cluster):
    cluster((8, 1))
    room = capacity(Resources())
    assert (room.train.gpus, room.curvature.gpus) == (0.5, 0.5)
    assert room.trainers == 1
    assert has_gpus(in_process=False)


def test_without_gpus_none_is_asked_for(cluster):
    cluster((8, 0))
    assert capacity(Resources()).train.gpus == 0
    assert not has_gpus(in_process=False)


def test_a_study_that_wants_no_gpus_gets_none_of_a_cluster_that_has_them(cluster):
    cluster((8, 2))
    room = capacity(asking(train={"gpus": 0}, curvature={"gpus": 0}))
    assert (room.train.gpus, room.curvature.gpus) == (0, 0)
    assert room.trainers == 7


@pytest.mark.parametrize("kind", ["train", "curvature"])
@pytest.mark.parametrize("asked", [{"cpus": 3}, {"gpus": 1}])
def test_more_than_any_one_node_has_is_refused(cluster, kind, asked):
    cluster((2, 0), (2, 0))
    with pytest.raises(StudyError, match=rf"resources\.{kind}: found cpus = .*one node of") as caught:
        capacity(asking(**{kind: asked}))
    assert "2 CPUs and 0 GPUs" in str(caught.value)


def test_a_dead_node_does_not_count(cluster):
    nodes = cluster((8, 0), (2, 0))
    nodes[0]["Alive"] = False
    with pytest.raises(StudyError, match="one node"):
        capacity(asking(train={"cpus": 4}))


def test_a_fraction_of_a_cpu_makes_more_slots(cluster):
    cluster((2, 0))
    assert capacity(asking(train={"cpus": 0.5}, curvature={"cpus": 0.5})).trainers == 3


@pytest.mark.parametrize("error", [ConnectionError, ValueError, RuntimeError])
def test_where_no_cluster_is_found_the_address_is_named(monkeypatch, error):
    def refuse(address, **options):
        raise error("nobody there")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(StudyError, match="--address auto: no Ray cluster answers there"):
        ray_session("auto", []).__enter__()


def test_an_address_where_nobody_listens_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(ray, "init", None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free once the server is closed
    with pytest.raises(StudyError, match=f"--address 127.0.0.1:{port}: no Ray cluster answers there"):
        ray_session(f"127.0.0.1:{port}", []).__enter__()


def test_a_notebooks_ray_is_used_and_left_running(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the notebook's Ray was touched")

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "shutdown", refuse)
    with ray_session(None, []):
        pass
