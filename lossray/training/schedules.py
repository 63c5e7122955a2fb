"""Learning-rate schedules: the keys that choose one, and the rate of every step."""

import math
from fractions import Fraction as Exact
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lossray.settings import Settings

# The bound keeps products of two settings within float32, outside of which torch raises instead of diverging.
PositiveFloat = Annotated[float, Field(gt=0, le=1e18, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e18, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Milestone = Annotated[float, Field(gt=0, lt=1)]

# Keys that belong to one schedule only, with their defaults.
SCHEDULE_KEYS: dict[str, dict[str, Any]] = {
    "constant": {},
    "cosine": {"floor": 0.0},
    "step": {"milestones": [0.5, 0.75], "factor": 0.1},
}


class ScheduleSettings(Settings):
    """A learning rate and how it changes in training.

    Attributes:
        lr: the learning rate at step 0.
        schedule: "constant"; "cosine", half a cosine from lr down to floor * lr at the last step;
            "step", multiplied by `factor` at each milestone.
        floor: cosine only, the last rate as a fraction of lr (default 0).
        milestones: step only, increasing fractions of the run's steps (default 0.5 and 0.75).
        factor: step only, what each milestone multiplies the rate by (default 0.1).
    """

    lr: PositiveFloat
    schedule: Literal["constant", "cosine", "step"] = "constant"
    floor: Fraction | None = None
    milestones: Annotated[tuple[Milestone, ...], Field(strict=False, min_length=1)] | None = None
    factor: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _schedule_keys(cls, table: Any) -> Any:
        """Fill in the defaults of the chosen schedule and refuse the keys of another one."""
        schedule = table.get("schedule", "constant") if isinstance(table, dict) else None
        if not isinstance(schedule, str) or schedule not in SCHEDULE_KEYS:
            return table  # pydantic says what is wrong
        for other, keys in SCHEDULE_KEYS.items():
            for key in keys:
                if other != schedule and table.get(key) is not None:
                    raise ValueError(
                        f'{key}: only schedule = "{other}" takes it; found schedule = "{schedule}"'
                    )
        unset = {key: value for key, value in SCHEDULE_KEYS[schedule].items() if table.get(key) is None}
        return {**table, **unset}

    @model_validator(mode="after")
    def _milestones_increase(self) -> "ScheduleSettings":
        if self.milestones is not None and list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones: found {list(self.milestones)}; they must increase")
        return self


def learning_rate(settings: ScheduleSettings, step: int, steps: int) -> float:
    """The learning rate of the update from `step` to `step + 1` in a run of `steps` steps; then it stays."""
    step = min(step, steps)  # half a cosine, which does not rise again
    if settings.schedule == "cosine":
        assert settings.floor is not None
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        return settings.lr * (settings.floor + (1 - settings.floor) * cosine)
    if settings.schedule == "step":
        assert settings.milestones is not None
        assert settings.factor is not None
        # As written in the study file: in binary, 0.07 * 100 would be more than 7.
        passed = sum(step >= Exact(str(milestone)) * steps for milestone in settings.milestones)
        return settings.lr * settings.factor**passed
    return settings.lr
