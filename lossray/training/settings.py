"""The [training] section of a study file, and the steps at which a run is checkpointed."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from lossray.names import unknown_name
from lossray.networks.settings import LOSSES
from lossray.plugins import is_spec
from lossray.settings import Settings

Step = Annotated[int, Field(ge=0)]


def _batch_size(value: Any) -> Any:
    if value == "full" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"found {value!r}; allowed: a whole number from 1, or 'full'")


class CheckpointsSettings(Settings):
    """Which steps are checkpoints; step 0 and the last step always are.

    Attributes:
        count: how many, the ends included (fewer where the run has not that many steps).
        spacing: how they lie between the ends.
        steps: these steps instead; goes with neither of the other two.
    """

    count: Annotated[int, Field(ge=2)] = 12
    spacing: Literal["log", "linear"] = "log"
    steps: Annotated[tuple[Step, ...], Field(strict=False)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_way(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("steps") is not None:
            # The defaults may stand beside `steps`: that is how settings are written to a manifest.
            defaults = {key: cls.model_fields[key].default for key in ("count", "spacing")}
            extra = [key for key, default in defaults.items() if table.get(key, default) != default]
            if extra:
                raise ValueError(
                    f"found {extra[0]!r} beside 'steps'; allowed: either 'steps' or 'count' and 'spacing'"
                )
        return table


class TrainingSettings(Settings):
    """The [training] section: how every run is trained.

    Attributes:
        loss: its name, or a function of your own.
        steps: optimizer steps of every run.
        batch_size: examples per step, or "full"; the whole split also where it is not larger than this.
        checkpoints: which steps are checkpoints.
        log_every: steps between rows of the training table (checkpoints have rows in any case).
        dtype: of parameters, data and arithmetic.
        diverged_above: a run has diverged when its training loss exceeds this multiple of the initial one
            (where that is not negative), or anything in it is not finite.
    """

    loss: str = "cross_entropy"
    steps: Annotated[int, Field(ge=1)] = 1000
    batch_size: Annotated[Annotated[int, Field(ge=1)] | Literal["full"], BeforeValidator(_batch_size)] = 64
    checkpoints: CheckpointsSettings = CheckpointsSettings()
    log_every: Annotated[int, Field(ge=1)] = 10
    dtype: Literal["float32", "float64"] = "float32"
    diverged_above: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 1e3

    @field_validator("loss")
    @classmethod
    def _loss_exists(cls, name: str) -> str:
        if name not in LOSSES and not is_spec(name):
            raise ValueError(unknown_name(name, [*LOSSES, "package.module:function"]))
        return name

    @model_validator(mode="after")
    def _checkpoints_within(self) -> "TrainingSettings":
        late = [step for step in self.checkpoints.steps or () if step > self.steps]
        if late:
            raise ValueError(
                f"checkpoints.steps: found {late[0]}; allowed: 0 to {self.steps}, the run's steps"
            )
        return self


def checkpoint_steps(settings: TrainingSettings) -> tuple[int, ...]:
    """The steps to checkpoint, increasing, from 0 to `settings.steps`.

    "linear": equally spaced, rounded. "log": 0, then a geometric sequence from 1, rounded; where rounding
    would repeat a step the next one is taken, so that there are `count` steps if the run has as many.
    """
    last, plan = settings.steps, settings.checkpoints
    if plan.steps is not None:
        return tuple(sorted({0, *plan.steps, last}))
    count = min(plan.count, last + 1)
    chosen = [0]
    for i in range(1, count):
        if plan.spacing == "linear":
            ideal = round(last * i / (count - 1))
        else:
            ideal = round(last ** ((i - 1) / (count - 2))) if count > 2 else last
        chosen.append(max(ideal, chosen[-1] + 1))
    return tuple(chosen)
