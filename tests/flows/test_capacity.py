"""How a study divides a cluster between training and analysis; no Ray is started, nor one used."""

import pytest
import ray

from flows.capacity import ClusterNode, Share, capacity, divided, require_fits, satisfies, shares_of
from flows.session import has_gpus
from lossray.errors import StudyError
from lossray.study import Resources, TaskResources


@pytest.fixture
def cluster(monkeypatch):
    """``cluster((cpus, gpus), ...)``: the nodes of a pretended cluster, as Ray lists them."""

    def pretend(*nodes):
        listed = [
            {"Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}, "Labels": {"zone": "a"}}
            for cpus, gpus in nodes
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


def room_of(resources=None):
    return capacity(shares_of(resources or Resources(), gpus=has_gpus()))


def test_a_curvature_slot_is_kept_wherever_two_tasks_fit(cluster):
    for cpus, trainers in ((1, 1), (2, 1), (3, 2), (16, 15)):
        cluster((cpus, 0))
        room = room_of()
        assert (room.trainers, room.trainers_alone) == (trainers, cpus)
        assert room.curvatures(0) == cpus
        assert room.curvatures(trainers) == min(1, cpus - trainers)
        assert room.curvatures(cpus) == room.curvatures(cpus + 5) == 0


def test_a_large_training_leaves_room_for_many_analyses(cluster):
    cluster((8, 0), (8, 0))
    room = room_of(asking(train={"cpus": 3}))
    assert room.trainers == room.trainers_alone == 4  # two are left on each node
    assert [room.curvatures(trainers) for trainers in range(5)] == [16, 13, 10, 7, 4]


def test_what_fits_is_counted_on_each_node(cluster):
    cluster((3, 0), (3, 0))
    room = room_of(asking(train={"cpus": 2}))
    assert (room.trainers, room.trainers_alone) == (2, 2)  # not three of two, in six
    assert room.curvatures(2) == 2


def test_analyses_elsewhere_cost_no_training(cluster):
    cluster((4, 2), (4, 0))
    room = room_of(asking(train={"gpus": 1}, curvature={"gpus": 0, "cpus": 4}))
    assert (room.trainers, room.trainers_alone) == (2, 2)
    assert [room.curvatures(trainers) for trainers in range(3)] == [2, 1, 1]


def test_a_cluster_without_nodes_has_room_for_the_first_of_each_to_wait(cluster):
    cluster()
    room = room_of()
    assert (room.trainers, room.trainers_alone, room.curvatures()) == (1, 1, 0)
    assert not room.fits("train")
    assert str(room) == "0 CPUs and 0 GPUs"


def test_a_gpu_is_shared_by_training_and_analysis_where_there_is_one(cluster):
    cluster((8, 1))
    room = room_of()
    assert (room.shares.train.gpus, room.shares.curvature.gpus) == (0.5, 0.5)
    assert room.trainers == 1
    assert room.shares.train.options() == {"num_cpus": 1.0, "num_gpus": 0.5}


def test_without_gpus_none_is_asked_for(cluster):
    cluster((8, 0))
    assert room_of().shares.train.gpus == 0


def test_a_study_that_wants_no_gpus_gets_none_of_a_cluster_that_has_them(cluster):
    cluster((8, 2))
    room = room_of(asking(train={"gpus": 0}, curvature={"gpus": 0}))
    assert (room.shares.train.gpus, room.shares.curvature.gpus) == (0, 0)
    assert room.trainers == 7


@pytest.mark.parametrize("kind", ["train", "curvature"])
@pytest.mark.parametrize(("asked", "text"), [({"cpus": 3}, "3 CPUs"), ({"gpus": 1}, "1 CPU and 1 GPU")])
def test_more_than_any_one_node_has_is_refused(cluster, kind, asked, text):
    cluster((2, 0), (2, 0))
    message = rf"resources\.{kind}: found {text}; allowed: what one node .* \(2 CPUs and 0 GPUs\)"
    with pytest.raises(StudyError, match=message):
        require_fits(room_of(asking(**{kind: asked})))


def test_a_dead_node_does_not_count(cluster):
    nodes = cluster((8, 0), (2, 0))
    nodes[0]["Alive"] = False
    with pytest.raises(StudyError, match="one node"):
        require_fits(room_of(asking(train={"cpus": 4})))


def test_a_fraction_of_a_cpu_makes_more_slots(cluster):
    cluster((2, 0))
    assert room_of(asking(train={"cpus": 0.5}, curvature={"cpus": 0.5})).trainers == 3
    tenths = room_of(asking(train={"cpus": 0.1}, curvature={"cpus": 0.1}))
    assert (tenths.trainers_alone, tenths.curvatures(19)) == (20, 1)


@pytest.mark.parametrize(
    ("selector", "met"),
    [
        ({"zone": "a"}, True),
        ({"zone": "b"}, False),
        ({"zone": "!b"}, True),
        ({"zone": "!a"}, False),
        ({"zone": "in(b, a)"}, True),
        ({"zone": "in(b,c)"}, False),
        ({"zone": "!in(b, a)"}, False),
        ({"zone": "!in(b, c)"}, True),
        ({"kind": "a"}, False),
        ({"kind": "!a"}, True),
        ({"zone": "a", "kind": "spot"}, False),
        ({}, True),
    ],
)
def test_labels_are_selected_as_ray_does(selector, met):
    assert satisfies({"zone": "a"}, selector) == met


def test_a_labelled_task_counts_nodes_of_any_of_its_choices():
    nodes = [
        ClusterNode(2, 0, {"zone": "a"}),
        ClusterNode(4, 0, {"zone": "b"}),
        ClusterNode(8, 0, {"zone": "c"}),
    ]
    train = TaskResources(labels={"zone": "a"}, fallback=({"zone": "b"},))
    shares = shares_of(Resources(train=train), gpus=False)
    room = divided(shares, nodes)
    assert (room.trainers, room.trainers_alone) == (6, 6)  # an analysis fits on the third node
    assert shares.train.options() == {
        "num_cpus": 1.0,
        "num_gpus": 0.0,
        "label_selector": {"zone": "a"},
        "fallback_strategy": [{"label_selector": {"zone": "b"}}],
    }
    assert str(shares.train) == "1 CPU with zone=a; or zone=b"
    assert str(Share(2, 0.5)) == "2 CPUs and 0.5 GPUs"
    assert not divided(shares, nodes[2:]).fits("train")
