"""The study file as settings: the rooms' sections, and those that concern the study as a whole."""

import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from lossray.connectivity.settings import ConnectivitySettings
from lossray.ensembles.settings import EnsemblesSettings
from lossray.geometry.direction_kinds import OF_NEXT_BATCH
from lossray.geometry.settings import EIGENVECTOR_KINDS, AnglesSettings, SurfacesSettings, TrajectorySettings
from lossray.networks.settings import ModelSettings
from lossray.nullity.settings import DegeneracySettings
from lossray.operators.settings import CurvatureSettings
from lossray.plugins import is_spec
from lossray.settings import Settings, each_once
from lossray.study.problems import KeyPath
from lossray.training.data_settings import DataSettings, data_settings
from lossray.training.settings import TrainingSettings
from lossray.training.update_rules import OptimizerSettings

MOST_SEEDS = 1_000_000
LABEL_VALUE = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?"
LABEL_KEY = re.compile(rf"(?:{LABEL_VALUE}/)?{LABEL_VALUE}")
LABEL_CONDITION = re.compile(rf"!?(?:{LABEL_VALUE}|in\({LABEL_VALUE}(?:, ?{LABEL_VALUE})*\))")
LARGEST_INTEGER = 2**63 - 1  # int64, as in the tables
OF_TRAINED_RUNS = ("connectivity", "ensembles")  # sections that retrain, which a recorded run cannot


def _seeds(value: Any) -> Any:
    """A number n stands for 0..n-1."""
    if type(value) is int and 1 <= value <= MOST_SEEDS:
        return tuple(range(value))
    if isinstance(value, list | tuple):
        return tuple(value)
    raise ValueError(f"allowed: a number of seeds, 1 to {MOST_SEEDS}, or a list of distinct integers from 0")


def _gpus(value: Any) -> Any:
    if value == "auto" or (
        type(value) in (int, float) and (0 <= value <= 1 or (value > 1 and value == int(value)))
    ):
        return value
    raise ValueError("allowed: 'auto', a number from 0 to 1, or a whole number")


def _pack(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError("allowed: 'auto', or a number of runs from 1")


def _labels(value: Any) -> Any:
    """Ray's form of what a node's labels must be."""
    if isinstance(value, dict):
        for key, condition in value.items():
            if not LABEL_KEY.fullmatch(key):
                raise ValueError(
                    f"found {key!r}; allowed: names of labels, such as 'ray.io/accelerator-type'"
                )
            if not (isinstance(condition, str) and LABEL_CONDITION.fullmatch(condition)):
                raise ValueError(
                    f"{key}: found {condition!r}; allowed: a label's value, 'in(A, B)', either with ! before"
                )
    return value


Labels = Annotated[dict[str, str], BeforeValidator(_labels)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, le=LARGEST_INTEGER)], ...], BeforeValidator(_seeds)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Level = Annotated[float, Field(gt=0, le=1)]


class ClaimsSettings(Settings):
    """The [claims] section: by which margins the paper's claims are judged; it is in no key.

    Attributes:
        margin_energy: chi_1^2 below it counts as "almost perpendicular".
        margin_nll: the smallest improvement of an ensemble's test NLL that would count, as a share of its
            control's NLL.
        alpha: level of the tests.
        levels: training losses at which optimizers are compared, as shares of the loss at the start.
    """

    margin_energy: Fraction = 0.01
    margin_nll: Fraction = 0.05
    alpha: Fraction = 0.05
    levels: Annotated[tuple[Level, ...], Field(strict=False, min_length=1)] = (1.0, 0.3, 0.1, 0.03)

    @field_validator("levels")
    @classmethod
    def _distinct(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        return each_once(levels)


class TaskResources(Settings):
    """What one task asks of Ray.

    Attributes:
        cpus: how many, or a share of one.
        gpus: a share of one, or a whole number; "auto" takes what was measured where the cluster has any: a
            half, a quarter, or all of one.
        labels: what the labels of its node must be, such as {"ray.io/accelerator-type" = "H100"}; a value may
            also be "!H100" or "in(H100, A100)".
        fallback: other labels, in turn, where no node of the cluster has these.
    """

    cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    gpus: Annotated[Annotated[float, Field(ge=0)] | Literal["auto"], BeforeValidator(_gpus)] = "auto"
    labels: Labels = Field(default_factory=dict)
    fallback: Annotated[tuple[Labels, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _first_choice(self) -> "TaskResources":
        if self.fallback and not self.labels:
            raise ValueError("found fallback without labels; allowed: both, or labels alone")
        return self


class Resources(Settings):
    """The [resources] section; it is in no key, so a study may be resumed with others.

    Attributes:
        train: of a training actor.
        curvature: of a curvature task, and of the task that compares two checkpoints.
        pack: runs per new pack; "auto": 1 where they are computed in a loop; where as one stack, 16 on a CPU,
            and on a GPU as many as half of its memory holds, at most 64.
        wait: seconds for which the study waits until the cluster has a node for its tasks; a Ray that it has
            started itself has all that it will ever have, and is not waited for.
    """

    train: TaskResources = TaskResources()
    curvature: TaskResources = TaskResources()
    pack: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], BeforeValidator(_pack)] = "auto"
    wait: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 900.0


class TuningSettings(Settings):
    """The [tuning] section: every optimizer's learning rate is tuned for every model; it is in no key.

    All rates of a grid are trained, and only the runs at the best one are analysed: that of the lowest median
    final validation loss. Where it is at an edge of the grid, rates are added beyond until it is inside.

    Attributes:
        factor: between the rate at an edge and the one that is added.
        extensions: rates added at most, at either end of a grid.
    """

    factor: Annotated[float, Field(gt=1, le=100)] = 3.0
    extensions: Annotated[int, Field(ge=0, le=20)] = 3


class Study(Settings):
    """One study; `lossray.study.load_study` reads it, `study_from_table` checks it as a whole.

    `optimizers` holds one entry for each point of the grids in the file. With `source = "checkpoints"` a
    study analyses what `lossray.record` has put into its store: it has no seeds and optimizers, and one
    model, which says how to build the module that was recorded.

    Attributes:
        name: of the study.
        source: "checkpoints" analyses what `lossray.record` has put into the store, and nothing is trained.
        seeds: one run of every setting for each; a number n stands for 0 to n - 1. None of recorded runs.
        data: the examples.
        models: one or more.
        optimizers: one or more; every one trains every model that does not name its own.
        training: how every run is trained.
        curvature: what is computed of the curvature at every checkpoint.
        angles: which directions are held against the leading eigenvectors.
        claims: how the paper's claims are judged.
        tuning: whether learning rates are tuned.
        resources: what tasks take of the cluster.
        degeneracy: whether eigenvalues that are zero are counted.
        trajectory: whether the runs' paths are followed.
        surfaces: whether slices of the loss are evaluated.
        connectivity: whether runs are joined by paths.
        ensembles: whether ensembles are made of the runs.
    """

    name: Annotated[str, Field(min_length=1)]
    source: Literal["checkpoints"] | None = None
    seeds: Seeds = ()
    data: SerializeAsAny[DataSettings] = Field(default_factory=lambda: data_settings({}))
    models: tuple[SerializeAsAny[ModelSettings], ...] = ()
    optimizers: tuple[SerializeAsAny[OptimizerSettings], ...] = ()
    training: TrainingSettings = TrainingSettings()
    curvature: CurvatureSettings = CurvatureSettings()
    angles: AnglesSettings = AnglesSettings()
    claims: ClaimsSettings = ClaimsSettings()
    tuning: TuningSettings | None = None
    resources: Resources = Resources()
    degeneracy: DegeneracySettings | None = None
    trajectory: TrajectorySettings | None = None
    surfaces: SurfacesSettings | None = None
    connectivity: ConnectivitySettings | None = None
    ensembles: EnsemblesSettings | None = None

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        twice = [seed for seed, count in Counter(seeds).items() if count > 1]
        if twice:
            raise ValueError(f"found {twice[0]} twice; allowed: distinct integers from 0")
        return seeds

    def user_functions(self) -> dict[KeyPath, str]:
        """Each ``package.module:function`` that the study names, by its key path in the file."""
        named: dict[KeyPath, str] = {
            ("data", "source"): self.data.source,
            ("training", "loss"): self.training.loss,
        }
        named |= {("models", i, "name"): model.name for i, model in enumerate(self.models)}
        return {key_path: name for key_path, name in named.items() if is_spec(name)}

    def not_computed(self) -> list[str]:
        """One line for each thing that the file asks for and that is not computed.

        What the file leaves to its default is not listed.
        """
        lines = [
            f"[{name}]: not computed, since how a recorded run was trained is not known"
            for name in OF_TRAINED_RUNS
            if self.source is not None and getattr(self, name) is not None
        ]
        if self.source is not None and "directions" in self.angles.model_fields_set:
            missing = [repr(name) for name in self.angles.directions if name in OF_NEXT_BATCH]
            reason = "not computed, since the next batch of a recorded run is not known"
            lines += [f"angles.directions: {', '.join(missing)} {reason}"] if missing else []
        if self.source is not None:
            lines += [
                f"angles.{key}: not computed, since the steps of a recorded run are not known"
                for key in ("shadow", "window")
                if key in self.angles.model_fields_set and getattr(self.angles, key)
            ]
        if not self.curvature.vectors:
            displacement = "displacement" in self.angles.directions
            angles = ", and no angles of the displacement" if displacement else ""
            lines.append(f"curvature.vectors = false: no overlaps{angles}; both need the eigenvectors")
            kinds = [
                repr(kind) for kind in EIGENVECTOR_KINDS if self.surfaces and kind in self.surfaces.kinds
            ]
            reason = "not computed, since curvature.vectors = false keeps no eigenvectors"
            lines += [f"surfaces.kinds: {', '.join(kinds)} {reason}"] if kinds else []
        return lines
