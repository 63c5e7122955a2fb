"""What a task is told: small, and read without Ray and torch. Tasks pass paths, never tensors."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lossray.connectivity.settings import AlignmentKind
from lossray.study import Pack, Study


@dataclass(frozen=True)
class Context:
    """The same for all tasks of a study.

    Attributes:
        out: URL of the store.
        study: its settings.
        folder: of the study file: relative data paths start there.
        data_key: content hash of the data when the study was planned.
        sources: source hashes of the user's functions, likewise.
    """

    out: str
    study: Study
    folder: str | None
    data_key: str
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Attempt:
    """One try at a task, from its submission on (seconds since the epoch, on the driver's clock).

    Attributes:
        number: of the try, from 1.
        submitted: when.
        halvings: of what is held in memory at once, after tries that ran out of it.
    """

    number: int = 1
    submitted: float = field(default_factory=time.time)
    halvings: int = 0

    def next(self, *, halved: bool) -> "Attempt":
        """The try after this one, submitted now; with half as much in memory where that had run out."""
        return Attempt(self.number + 1, halvings=self.halvings + halved)


@dataclass(frozen=True)
class TrainingJob:
    """Train one pack from its newest checkpoint to the last step.

    Attributes:
        context: of the study.
        pack: the runs.
        key: task key of the whole training.
        checkpoint_keys: step -> task key of the segment that ends there.
        attempt: which one.
    """

    context: Context
    pack: Pack
    key: str
    checkpoint_keys: Mapping[int, str]
    attempt: Attempt


@dataclass(frozen=True)
class CurvatureJob:
    """Analyse the checkpoint of a pack at one step.

    Attributes:
        context: of the study.
        pack: the runs.
        step: of the checkpoint.
        key: of this task.
        attempt: which one.
    """

    context: Context
    pack: Pack
    step: int
    key: str
    attempt: Attempt
    kind: ClassVar[str] = "curvature"


@dataclass(frozen=True)
class PairJob:
    """Compare two neighbouring checkpoints of a pack, both of them analysed.

    Attributes:
        earlier: the analysis of the first.
        later: that of the second.
        key: of this task.
        attempt: which one.
    """

    earlier: CurvatureJob
    later: CurvatureJob
    key: str
    attempt: Attempt
    kind: ClassVar[str] = "pair"

    @property
    def context(self) -> Context:
        """What the task needs to know of its study."""
        return self.later.context

    @property
    def pack(self) -> Pack:
        """The pack."""
        return self.later.pack

    @property
    def step(self) -> int:
        """Of the later checkpoint."""
        return self.later.step


@dataclass(frozen=True)
class DegeneracyJob:
    """Count the small eigenvalues at one checkpoint of a pack.

    Attributes:
        context: of the study.
        pack: the runs.
        step: of the checkpoint.
        key: of this task.
        attempt: which one.
    """

    context: Context
    pack: Pack
    step: int
    key: str
    attempt: Attempt
    kind: ClassVar[str] = "degeneracy"


@dataclass(frozen=True)
class TrajectoryJob:
    """Find the principal axes of the runs of a pack, from the checkpoints at ``steps``.

    Attributes:
        context: of the study.
        pack: the runs.
        steps: of the checkpoints.
        key: of this task.
        attempt: which one.
    """

    context: Context
    pack: Pack
    steps: tuple[int, ...]
    key: str
    attempt: Attempt
    kind: ClassVar[str] = "trajectory"

    @property
    def step(self) -> int:
        """Of the last checkpoint."""
        return self.steps[-1]


@dataclass(frozen=True)
class SeparationsJob:
    """Compare the runs of a pack with each other, and with those of earlier packs of their setting.

    So a pack that is added to a store adds rows and changes none.

    Attributes:
        context: of the study.
        pack: the runs.
        earlier: packs of the same setting that come before.
        steps: of the checkpoints.
        key: of this task.
        attempt: which one.
    """

    context: Context
    pack: Pack
    earlier: tuple[Pack, ...]
    steps: tuple[int, ...]
    key: str
    attempt: Attempt
    kind: ClassVar[str] = "separations"

    @property
    def step(self) -> int:
        """Of the last checkpoint."""
        return self.steps[-1]


@dataclass(frozen=True)
class SurfaceJob:
    """Evaluate the slices through one checkpoint of a pack.

    Attributes:
        context: of the study.
        pack: the runs.
        step: of the checkpoint.
        members: indices of the runs that have surfaces.
        steps: of all the pack's checkpoints.
        curvature_key: of the checkpoint's analysis, which has left the eigenvectors.
        key: of this task.
        attempt: which one.
    """

    context: Context
    pack: Pack
    step: int
    members: tuple[int, ...]
    steps: tuple[int, ...]
    curvature_key: str
    key: str
    attempt: Attempt
    kind: ClassVar[str] = "surfaces"


@dataclass(frozen=True)
class ConnectivityJob:
    """Join runs of a pack, each to an earlier one or to a rescaled copy of itself.

    Attributes:
        context: of the study.
        pack: the runs.
        earlier: packs of the same setting that come before.
        pairs: runs; the second is of this pack.
        aligned: what is done to the second of each pair first.
        step: of the last checkpoint.
        key: of this task.
        attempt: which one.
    """

    context: Context
    pack: Pack
    earlier: tuple[Pack, ...]
    pairs: tuple[tuple[str, str], ...]
    aligned: AlignmentKind | Literal["rescaled"]
    step: int
    key: str
    attempt: Attempt
    kind: ClassVar[str] = "connectivity"


@dataclass(frozen=True)
class EnsembleJob:
    """Build and score the ensembles of one method on a pack's runs, from the checkpoints at ``steps``.

    Attributes:
        context: of the study.
        pack: the base runs.
        method: by its name in `lossray.ensembles.methods.METHODS`.
        steps: of the checkpoints.
        key: of this task.
        attempt: which one.
    """

    context: Context
    pack: Pack
    method: str
    steps: tuple[int, ...]
    key: str
    attempt: Attempt
    kind: ClassVar[str] = "ensemble"

    @property
    def step(self) -> int:
        """Of the last checkpoint."""
        return self.steps[-1]


FurtherJob = DegeneracyJob | TrajectoryJob | SeparationsJob | SurfaceJob | ConnectivityJob | EnsembleJob
AnalysisJob = CurvatureJob | PairJob | FurtherJob
