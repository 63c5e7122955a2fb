"""How a study divides a cluster between training and analysis, as the cluster is at this moment."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import ray

from lossray.errors import StudyError
from lossray.study import Resources, TaskResources

Kind = Literal["train", "curvature"]
Labels = Mapping[str, str]
CONDITION = re.compile(r"(!?)(?:in\((.*)\)|(.*))")
TOLERANCE = 1e-9  # of sums of fractions
UNLIMITED = 10**6  # tasks that ask for nothing
SHARED_BY = 2  # tasks on a GPU, with "auto"


@dataclass(frozen=True)
class Share:
    """What one task of a kind takes.

    Attributes:
        cpus: CPUs of Ray, or a fraction of one.
        gpus: GPUs, likewise.
        selectors: conditions on the labels of its node, the preferred first; none: any node will do.
    """

    cpus: float
    gpus: float
    selectors: tuple[Labels, ...] = ()

    def options(self) -> dict[str, Any]:
        """As keywords of ``.options``."""
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        if self.selectors:
            first, *others = self.selectors
            options["label_selector"] = dict(first)
            options["fallback_strategy"] = [{"label_selector": dict(other)} for other in others]
        return options

    def __str__(self) -> str:
        """For messages: "1 CPU and 0.5 GPUs with zone=a, or zone=b"."""
        what = _counted(self.cpus, "CPU") + (f" and {_counted(self.gpus, 'GPU')}" if self.gpus else "")
        chosen = [", ".join(f"{key}={value}" for key, value in one.items()) for one in self.selectors]
        return what + (f" with {'; or '.join(chosen)}" if chosen else "")


@dataclass(frozen=True)
class ClusterNode:
    """A node of the cluster.

    Attributes:
        cpus: all of its CPUs.
        gpus: all of its GPUs.
        labels: Ray's, and its owner's.
    """

    cpus: float
    gpus: float
    labels: Labels = field(default_factory=dict)

    def slots(self, share: Share) -> int:
        """How many tasks of a kind fit; a resource that is not asked for sets no limit."""
        if share.selectors and not any(satisfies(self.labels, selector) for selector in share.selectors):
            return 0
        sides = ((self.cpus, share.cpus), (self.gpus, share.gpus))
        counts = [int(there / each + TOLERANCE) for there, each in sides if each]
        return max(0, min([UNLIMITED, *counts]))

    def __str__(self) -> str:
        """For messages: "8 CPUs and 1 GPU"."""
        return f"{_counted(self.cpus, 'CPU')} and {_counted(self.gpus, 'GPU')}"

    def without(self, share: Share, times: int = 1) -> "ClusterNode":
        """What so many tasks leave of it."""
        return replace(self, cpus=self.cpus - times * share.cpus, gpus=self.gpus - times * share.gpus)


@dataclass(frozen=True)
class Shares:
    """What the tasks of a study take: decided once, however the cluster changes.

    Attributes:
        train: a training actor.
        curvature: an analysis.
    """

    train: Share
    curvature: Share

    def of(self, kind: Kind) -> Share:
        """That of a kind."""
        return self.train if kind == "train" else self.curvature


@dataclass(frozen=True)
class Capacity:
    """How much of a study can run at a time.

    Attributes:
        shares: what its tasks take.
        nodes: the cluster.
        trainers: training actors at a time; leaves one curvature slot wherever two tasks fit.
        trainers_alone: likewise, when nothing is to be analysed.
        beside: analyses at a time, by how many training actors there are.
    """

    shares: Shares
    nodes: tuple[ClusterNode, ...]
    trainers: int
    trainers_alone: int
    beside: tuple[int, ...]

    def curvatures(self, trainers: int = 0) -> int:
        """Analyses that fit beside so many training actors."""
        return self.beside[min(trainers, len(self.beside) - 1)]

    def fits(self, kind: Kind) -> bool:
        """Whether a node has what a task of a kind takes."""
        return any(node.slots(self.shares.of(kind)) for node in self.nodes)

    def __str__(self) -> str:
        """For messages: "8 CPUs and 1 GPU on 2 nodes"."""
        cpus, gpus = (sum(getattr(node, name) for node in self.nodes) for name in ("cpus", "gpus"))
        computing = sum(bool(node.cpus or node.gpus) for node in self.nodes)
        nodes = f" on {computing} nodes" if computing > 1 else ""
        return f"{_counted(cpus, 'CPU')} and {_counted(gpus, 'GPU')}{nodes}"


def shares_of(resources: Resources, *, gpus: bool) -> Shares:
    """What the tasks of a study take.

    Args:
        resources: as the study asks for them.
        gpus: whether the cluster has GPUs: with "auto" each is then shared by two tasks.
    """
    return Shares(_share(resources.train, gpus=gpus), _share(resources.curvature, gpus=gpus))


def capacity(shares: Shares) -> Capacity:
    """What the cluster holds of a study now."""
    return divided(shares, cluster_nodes())


def divided(shares: Shares, nodes: Sequence[ClusterNode]) -> Capacity:
    """Divide nodes between training and analysis."""
    train, curvature = shares.train, shares.curvature
    alone = sum(node.slots(train) for node in nodes)
    # The reserved analysis goes where it costs the fewest training actors.
    with_analysis = [node for node in nodes if node.slots(curvature)]
    costs = [node.slots(train) - node.without(curvature).slots(train) for node in with_analysis]
    return Capacity(
        shares,
        tuple(nodes),
        trainers=max(1, alone - min(costs, default=0)),
        trainers_alone=max(1, alone),
        beside=tuple(_beside(train, curvature, nodes)),
    )


def cluster_nodes() -> tuple[ClusterNode, ...]:
    """The living nodes."""
    return tuple(
        ClusterNode(has.get("CPU", 0.0), has.get("GPU", 0.0), dict(labels or {}))
        for has, labels in ((node["Resources"], node.get("Labels")) for node in ray.nodes() if node["Alive"])
    )


def satisfies(labels: Labels, selector: Labels) -> bool:
    """Whether a node's labels meet all conditions of Ray's form: "A", "!A", "in(A, B)", "!in(A, B)".

    A node without a label meets a condition on what it must not be.
    """
    return all(map(partial(_meets, labels), selector.items()))


def _meets(labels: Labels, condition: tuple[str, str]) -> bool:
    key, text = condition
    parts = CONDITION.fullmatch(text)
    assert parts is not None  # it matches any text
    negated, several, one = parts.groups()
    allowed = [value.strip() for value in several.split(",")] if several is not None else [one]
    return (labels.get(key) in allowed) != bool(negated)


def _beside(train: Share, curvature: Share, nodes: Sequence[ClusterNode]) -> Iterator[int]:
    """Analyses that fit beside 0, 1, 2, ... training actors, which fill one node after the other."""
    total = sum(node.slots(curvature) for node in nodes)
    yield total
    for node in nodes:
        for placed in range(1, node.slots(train) + 1):
            before, after = (node.without(train, times).slots(curvature) for times in (placed - 1, placed))
            total -= before - after
            yield total


def require_fits(room: Capacity) -> None:
    """Refuse a study of which a task would wait for ever.

    Raises:
        StudyError: naming what is asked for and what there is.
    """
    kinds: tuple[Kind, ...] = ("train", "curvature")
    for kind in kinds:
        if not room.fits(kind):
            raise StudyError(unmet(kind, room))


def unmet(kind: Kind, room: Capacity) -> str:
    """What is asked for, and what there is."""
    nodes = "; ".join(sorted({str(node) for node in room.nodes})) or "none"
    return (
        f"resources.{kind}: found {room.shares.of(kind)}; allowed: what one node of the cluster has ({nodes})"
    )


def _share(asked: TaskResources, *, gpus: bool) -> Share:
    selectors = (asked.labels, *asked.fallback) if asked.labels else ()
    if asked.gpus == "auto":
        return Share(asked.cpus, 1 / SHARED_BY if gpus else 0.0, selectors)
    return Share(asked.cpus, float(asked.gpus), selectors)


def _counted(number: float, unit: str) -> str:
    return f"{number:g} {unit}{'' if number == 1 else 's'}"
