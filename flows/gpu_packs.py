"""Packs for GPUs: how many runs a pack takes, and how many packs share a GPU, from measured memory.

Memory grows along a line with the runs of a pack, which two small packs give. A new pack is as large as half
of a GPU takes, so that a training and an analysis run side by side; tasks that are smaller share it by more.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lossray.measures.pack_memory import PackPeaks
from lossray.memory import readable_bytes
from lossray.settings import content_hash
from lossray.storage.store import Store
from lossray.study import Pack, Resources, Setting

if TYPE_CHECKING:
    from flows.capacity import Share, Shares

PATH = "gpu_memory.json"  # in the store
USABLE = 0.8  # of a GPU's memory: allocators fragment, and a measure is a sample
CONTEXT_BYTES = 2**29  # that each process takes on a GPU before its first tensor
LARGEST_PACK = 64
SHARED_BY = (4, 2, 1)  # tasks on a GPU, the most first
SIDE_BY_SIDE = 2  # tasks for which a new pack leaves room


@dataclass(frozen=True)
class GpuRoom:
    """What the cluster's GPUs hold.

    Attributes:
        bytes: of the smallest of them.
        gpus: how many there are.
    """

    bytes: int
    gpus: int

    def holds(self, needed: float, tasks: int) -> bool:
        """Whether so many tasks that need so many bytes each run on a GPU at a time."""
        return tasks * (needed + CONTEXT_BYTES) <= USABLE * self.bytes

    def shared_by(self, needed: float) -> int:
        """How many such tasks run on a GPU at a time; one in any case, which halves its pack if it must."""
        return next((tasks for tasks in SHARED_BY if self.holds(needed, tasks)), 1)


@dataclass(frozen=True)
class PackMemory:
    """Bytes of packs of one kind by their number of runs: a line through what two of them took.

    Attributes:
        runs: of the two packs.
        peaks: of the two packs.
    """

    runs: tuple[int, int]
    peaks: tuple[PackPeaks, PackPeaks]

    def training(self, runs: int) -> float:
        """Bytes of the training of so many runs."""
        return self._at(runs, self.peaks[0].training, self.peaks[1].training)

    def analysis(self, runs: int) -> float:
        """Bytes of the analysis of so many."""
        return self._at(runs, self.peaks[0].analysis, self.peaks[1].analysis)

    def most(self, runs: int) -> float:
        """Bytes of the larger of both."""
        return max(self.training(runs), self.analysis(runs))

    def _at(self, runs: int, small: int, large: int) -> float:
        each = max(0.0, (large - small) / (self.runs[1] - self.runs[0]))
        return small + each * (runs - self.runs[0])


@dataclass(frozen=True)
class GpuPacks:
    """What follows from measured memory; nothing where none was measured.

    Attributes:
        sizes: runs per new pack, by kind of setting.
        shared_by: how many trainings, and how many analyses, run on a GPU at a time; None: not known.
        notes: a line for each thing that was found.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    shared_by: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    def keep(self, store: Store) -> None:
        """Write what was found into the store, for those who read it."""
        if self.notes:
            store.write_json(PATH, list(self.notes))

    def applied(self, shares: "Shares", resources: Resources) -> "Shares":
        """The shares of a GPU that tasks take, where the study leaves them open."""
        if self.shared_by is None:
            return shares
        training, analysis = self.shared_by
        return replace(
            shares,
            train=_shared(shares.train, training, auto=resources.train.gpus == "auto"),
            curvature=_shared(shares.curvature, analysis, auto=resources.curvature.gpus == "auto"),
        )


def kind_of(setting: Setting | Pack) -> str:
    """The same for all settings whose runs take the same memory: those that differ in their learning rate."""
    optimizer = {**setting.optimizer.plain(), "lr": None} if setting.optimizer else None
    return content_hash([setting.model.plain(), optimizer])


def pack_size(memory: PackMemory | None, room: GpuRoom, runs: int) -> int:
    """Runs of a new pack: a power of two.

    Args:
        memory: that its kind takes; None: so much that it could not be measured.
        room: of the GPUs.
        runs: in all, which are spread over the GPUs.
    """
    most = min(LARGEST_PACK, runs // room.gpus) if memory is not None else 1
    size = 1
    while memory is not None and 2 * size <= most and room.holds(memory.most(2 * size), SIDE_BY_SIDE):
        size *= 2
    return size


def decided(
    packs: Iterable[Pack], memory: Mapping[str, PackMemory], sizes: Mapping[str, int], room: GpuRoom
) -> GpuPacks:
    """How many packs share a GPU, and what is said of it.

    Args:
        packs: of the study.
        memory: by kind; those that did not fit are missing.
        sizes: runs per new pack, by kind.
        room: of the GPUs.
    """
    training, analysis = SHARED_BY[0], SHARED_BY[0]
    lines = []
    for (kind, runs), pack in {(kind_of(pack), len(pack.seeds)): pack for pack in packs}.items():
        named = f"a pack of {runs} run{'s' if runs > 1 else ''} of {pack.setting_id}"
        if kind not in memory:
            training = analysis = 1
            lines.append(f"{named}: a trial ran out of the memory of a GPU, {readable_bytes(room.bytes)}")
            continue
        to_train, to_analyse = memory[kind].training(runs), memory[kind].analysis(runs)
        training = min(training, room.shared_by(to_train))
        analysis = min(analysis, room.shared_by(to_analyse))
        lines.append(
            f"{named} takes {readable_bytes(int(to_train))} of a GPU to train and "
            f"{readable_bytes(int(to_analyse))} to analyse"
        )
    counts = f"{training} at a time are trained on a GPU of {readable_bytes(room.bytes)}, {analysis} analysed"
    return GpuPacks(sizes, (training, analysis), (*lines, f"packs: {counts}"))


def _shared(share: "Share", tasks: int, *, auto: bool) -> "Share":
    return replace(share, gpus=1 / tasks) if auto else share
