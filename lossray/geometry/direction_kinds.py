"""The directions of a study by name, and what each is: how it turns in a gauge, what it takes to know it.

A new direction is one more name here; its vector is formed in `lossray.measures.checkpoint_directions`.
"""

from dataclasses import dataclass
from typing import Literal

Direction = Literal[
    "gradient", "minibatch_gradient", "update", "momentum", "preconditioned_gradient", "displacement"
]


@dataclass(frozen=True)
class DirectionKind:
    """What a direction is.

    Attributes:
        covector: whether it turns as a gradient does, into S u in the gauge S (theory 2.6); a displacement
            becomes S^-1 u.
        times_rate: whether the step that it stands for is the rate times it.
        of_next_batch: whether it takes the run's next batch, which is not known of a recorded run.
    """

    covector: bool = False
    times_rate: bool = False
    of_next_batch: bool = False


DIRECTION_KINDS: dict[Direction, DirectionKind] = {
    "gradient": DirectionKind(covector=True, times_rate=True),
    "minibatch_gradient": DirectionKind(covector=True, times_rate=True, of_next_batch=True),
    "update": DirectionKind(of_next_batch=True),
    "momentum": DirectionKind(covector=True, times_rate=True),
    "preconditioned_gradient": DirectionKind(times_rate=True, of_next_batch=True),
    "displacement": DirectionKind(),
}

COVECTORS = tuple(name for name, kind in DIRECTION_KINDS.items() if kind.covector)
TIMES_RATE = tuple(name for name, kind in DIRECTION_KINDS.items() if kind.times_rate)
OF_NEXT_BATCH = tuple(name for name, kind in DIRECTION_KINDS.items() if kind.of_next_batch)
