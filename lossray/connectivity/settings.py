"""The [connectivity] section of a study file."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from lossray.settings import Settings, each_once

Kind = Literal["line", "polychain", "bezier"]
AlignmentKind = Literal["none", "permutation", "scale", "both"]
RESCALED: Literal["rescaled"] = "rescaled"  # in place of an alignment: a run with a rescaled copy of itself


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class ConnectivitySettings(Settings):
    """The [connectivity] section, which switches on the tables `paths` and `barriers`.

    Attributes:
        pairs: each run of a setting with the one before it ("neighbours"), or "all" of them.
        kinds: which paths: straight lines, trained polygonal chains, trained Bezier curves.
        bends: control points of a trained path between its ends.
        steps: of its training; those of a run by default.
        points: where a path is evaluated, its ends included.
        align: what is done to the second run first; each on its own.
        matching: units are matched by their weights, or by their activations on the training examples.
        rescaled: also the straight and the geometric path of each run to a rescaled copy of itself.
        sigma: standard deviation of the logarithm of that copy's factors.
    """

    pairs: Literal["neighbours", "all"] = "neighbours"
    kinds: Annotated[tuple[Kind, ...], BeforeValidator(_listed), Field(strict=False, min_length=1)] = (
        "line",
        "bezier",
    )
    bends: Annotated[int, Field(ge=1, le=100)] = 1
    steps: Annotated[int, Field(ge=1)] | None = None
    points: Annotated[int, Field(ge=3, le=10_000)] = 25
    align: Annotated[
        tuple[AlignmentKind, ...], BeforeValidator(_listed), Field(strict=False, min_length=1)
    ] = (
        "none",
        "both",
    )
    matching: Literal["weights", "activations"] = "weights"
    rescaled: bool = True
    sigma: Annotated[float, Field(gt=0, le=10)] = 1.0

    @field_validator("kinds", "align")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return each_once(names)
