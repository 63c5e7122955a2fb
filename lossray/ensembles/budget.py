"""What an ensemble may spend, in steps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """A budget in trainings of a run, the base run included.

    Half of it goes into the base run, which takes no more than its own training; the rest is divided into
    cycles of retraining. Nothing is without a step, so that the smallest budgets are exceeded.

    Attributes:
        trainings: how many, the base run included.
        run_steps: steps of one training.
        cycle: steps that one retraining is to have.
    """

    trainings: float
    run_steps: int
    cycle: int

    @property
    def base_steps(self) -> int:
        """Steps of the base run."""
        return max(1, round(self.run_steps * min(1.0, self.trainings / 2)))

    @property
    def extra_steps(self) -> int:
        """Steps that are left after the base run."""
        return max(1, self.total_steps - self.base_steps)

    @property
    def total_steps(self) -> int:
        """Steps of all."""
        return max(2, round(self.trainings * self.run_steps))

    @property
    def cycles(self) -> int:
        """Retrainings for the extra steps, as near to the wanted length as can be."""
        return max(1, round(self.extra_steps / self.cycle))

    @property
    def cycle_steps(self) -> int:
        """Steps of one retraining: those wanted, or fewer where the extra steps do not hold them."""
        return min(self.cycle, self.extra_steps // self.cycles)

    @property
    def size(self) -> int:
        """Members of an ensemble: the base, and one for each cycle."""
        return self.cycles + 1
