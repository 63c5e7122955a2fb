"""The [angles], [trajectory] and [surfaces] sections of a study file."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from lossray.geometry.direction_kinds import Direction
from lossray.names import unknown_name
from lossray.settings import ADDED, Settings, each_once
from lossray.training.update_rules import OPTIMIZERS

GaugeName = Literal["raw", "balanced", "adaptive", "preconditioned"]
SliceKind = Literal["v1", "eigenvectors", "pca", "random"]
EIGENVECTOR_KINDS: tuple[SliceKind, ...] = ("v1", "eigenvectors")


class AnglesSettings(Settings):
    """The [angles] section: which directions are held against the leading eigenvectors, in which metrics.

    Attributes:
        directions: vectors whose angles are measured.
        gauges: metrics in which they are (theory 2.6).
        shadow: optimizers fed the same gradients, whose updates become directions too.
        window: steps replayed from each checkpoint for the alignment statistic; 0 for none.
        subspaces: for which ones eigenpairs are computed in every gauge: "all", or "v1", the top eigenvector
            alone, which takes a third of the products.
        layers: whether the curvature along a direction is told apart into what lies within each layer and
            what between layers, in the table `shares`: a product for each direction and layer.
    """

    directions: Annotated[tuple[Direction, ...], Field(strict=False)] = (
        "gradient",
        "minibatch_gradient",
        "update",
        "momentum",
        "displacement",
    )
    gauges: Annotated[tuple[GaugeName, ...], Field(strict=False, min_length=1)] = (
        "raw",
        "balanced",
        "adaptive",
        "preconditioned",
    )
    shadow: Annotated[tuple[str, ...], Field(strict=False)] = ()
    window: Annotated[int, Field(ge=0)] = 50
    subspaces: Annotated[Literal["all", "v1"], ADDED] = "all"
    layers: Annotated[bool, ADDED] = False

    @field_validator("directions", "gauges", "shadow")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return each_once(names)

    @field_validator("shadow")
    @classmethod
    def _optimizers(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in OPTIMIZERS:
                raise ValueError(unknown_name(name, OPTIMIZERS))
        return names


class TrajectorySettings(Settings):
    """The [trajectory] section, which switches on the tables `trajectory` and `separations`.

    Attributes:
        between_seeds: whether runs of one setting are compared with each other.
    """

    between_seeds: bool = True


def _odd(points: int) -> int:
    if points % 2 == 0:
        raise ValueError(f"found {points}; allowed: an odd number, so that the checkpoint is on the grid")
    return points


def _seeds(value: Any) -> Any:
    if value == "all" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"found {value!r}; allowed: a number of seeds from 1, or 'all'")


class SurfacesSettings(Settings):
    """The [surfaces] section, which switches on the table `surfaces`.

    Attributes:
        kinds: which slices.
        points: along each axis, an odd number.
        span: the axes reach from -span to span, in units of their lengths.
        checkpoints: the last, the first and the last, or all.
        seeds: how many of each setting's seeds have surfaces, the first ones, or "all".
    """

    kinds: Annotated[tuple[SliceKind, ...], Field(strict=False, min_length=1)] = (
        "v1",
        "eigenvectors",
        "pca",
        "random",
    )
    points: Annotated[int, Field(ge=3), AfterValidator(_odd)] = 25
    span: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    checkpoints: Literal["last", "ends", "all"] = "last"
    seeds: Annotated[Annotated[int, Field(ge=1)] | Literal["all"], BeforeValidator(_seeds)] = 1

    @field_validator("kinds")
    @classmethod
    def _distinct(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        return each_once(kinds)
