"""The [ensembles] section of a study file."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from lossray.ensembles.budget import Budget
from lossray.ensembles.methods import METHODS
from lossray.names import unknown_name
from lossray.settings import Settings, each_once

Trainings = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]


def _methods(value: Any) -> Any:
    if value == "all":
        return tuple(METHODS)
    if isinstance(value, list | tuple):
        return tuple(value)
    raise ValueError(f"found {value!r}; allowed: 'all', or a list of {', '.join(METHODS)}")


def _numbers(value: Any) -> Any:
    return (
        tuple(float(n) if type(n) is int else n for n in value) if isinstance(value, list | tuple) else value
    )


class EnsemblesSettings(Settings):
    """The [ensembles] section, which switches on the tables of ensembles.

    Attributes:
        methods: which, by their names, or "all" of them.
        budgets: what each may spend, the base run included, in trainings of a run.
        cycle: steps of one retraining, as a share of a run's.
        sigma: standard deviation of the logarithm of the factors by which units are rescaled. It is halved
            until the learning rate is stable at the rescaled point.
        powers_of_two: rescale by the nearest powers of two, so that a rescaled network computes the same
            outputs bit for bit.
        bends: control points of a trained curve between its ends.
        logits: keep the members' outputs on the validation and test splits, four bytes a number.
    """

    methods: Annotated[tuple[str, ...], BeforeValidator(_methods), Field(min_length=1)] = tuple(METHODS)
    budgets: Annotated[tuple[Trainings, ...], BeforeValidator(_numbers), Field(min_length=1)] = (
        1.0,
        2.0,
        3.0,
    )
    cycle: Annotated[float, Field(gt=0, le=1)] = 0.25
    sigma: Annotated[float, Field(gt=0, le=10)] = 0.5
    powers_of_two: bool = True
    bends: Annotated[int, Field(ge=1, le=100)] = 1
    logits: bool = True

    def budget(self, trainings: float, run_steps: int) -> Budget:
        """One of the budgets, for runs of so many steps."""
        return Budget(trainings, run_steps, max(1, round(self.cycle * run_steps)))

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for name in methods:
            if name not in METHODS:
                raise ValueError(unknown_name(str(name), METHODS))
        return each_once(methods)

    @field_validator("budgets")
    @classmethod
    def _distinct(cls, budgets: tuple[float, ...]) -> tuple[float, ...]:
        return each_once(budgets)
