"""How a driver asks for more of a cluster; no Ray is started, nor one used."""

from types import SimpleNamespace

import pytest
import ray

from flows import cluster_watch
from flows.capacity import shares_of
from flows.cluster_watch import Backlog, ClusterWatch
from lossray.study import Resources

SHARES = shares_of(Resources(), gpus=False)
BEHIND = Backlog(["train", "curvature"], running=True, packs=5, trainers=2, analyses=30, in_flight=4)


@pytest.fixture
def cluster(monkeypatch):
    """A pretended cluster and its clock: `nodes`, `now`; `pending`, the warm-ups that it has no room for."""

    class Cluster:
        nodes = 1
        now = 0.0
        pending = True
        asked = ()

        def watch(self, *, embedded=False):
            return ClusterWatch(SHARES, 60, embedded=embedded, warm=lambda share: self.asked.append(share))

        def asks_at(self, watch, seconds, backlog=BEHIND):
            """When the watch asks, if it looks once a second for so long; and for how many."""
            asks = []
            for _ in range(seconds):
                self.asked = []
                watch.look(lambda: backlog)
                if self.asked:
                    asks.append((self.now, len(self.asked)))
                self.now += 1
            return asks

    made = Cluster()
    node = {"Alive": True, "Resources": {"CPU": 2.0}, "Labels": {}}
    monkeypatch.setattr(ray, "nodes", lambda: [node] * made.nodes)
    monkeypatch.setattr(ray, "wait", lambda refs, **_: ([], refs) if made.pending else (refs, []))
    monkeypatch.setattr(cluster_watch, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_as_much_again_is_asked_for_once_while_it_is_on_its_way(cluster):
    watch = cluster.watch()
    assert cluster.asks_at(watch, 1000) == [(0, 2 + 4)]


def test_where_nodes_come_more_is_asked_for_soon(cluster):
    watch = cluster.watch()
    cluster.asks_at(watch, 95)
    cluster.pending, cluster.nodes = False, 2
    (first, many), *_ = cluster.asks_at(watch, 12)
    assert (100 <= first <= 105, many) == (True, 6)


def test_where_none_come_it_is_asked_ever_less_often(cluster):
    cluster.pending = False
    watch = cluster.watch()
    times = [time for time, _ in cluster.asks_at(watch, 1500)]
    assert times == [0, 10, 30, 70, 150, 310, 610, 910, 1210]


def test_nothing_is_asked_for_that_would_have_no_work(cluster):
    cluster.pending = False
    idle = Backlog([], running=True, packs=0, trainers=2, analyses=0, in_flight=4)
    assert cluster.asks_at(cluster.watch(), 100, idle) == []
    few = Backlog(["train"], running=False, packs=1, trainers=0, analyses=2, in_flight=0)
    assert cluster.asks_at(cluster.watch(), 5, few) == [(100, 1 + 1)]


def test_a_ray_of_ones_own_is_not_asked(cluster):
    cluster.pending = False
    assert cluster.asks_at(cluster.watch(embedded=True), 100) == []
