"""What a budget holds."""

import pytest

from lossray.ensembles.budget import Budget


@pytest.mark.parametrize(
    ("trainings", "base", "extra", "size"),
    [(1, 50, 50, 3), (2, 100, 100, 5), (3, 100, 200, 9), (1.5, 75, 75, 4)],
)
def test_half_goes_into_the_base_and_no_more_than_a_run(trainings, base, extra, size):
    budget = Budget(trainings, run_steps=100, cycle=25)
    assert (budget.base_steps, budget.extra_steps, budget.size) == (base, extra, size)
    assert budget.base_steps + budget.extra_steps == budget.total_steps == trainings * 100


def test_the_smallest_budget_still_has_a_step_of_each():
    budget = Budget(0.01, run_steps=5, cycle=3)
    assert (budget.base_steps, budget.extra_steps, budget.cycles) == (1, 1, 1)


@pytest.mark.parametrize("cycle", [1, 7, 25, 60, 100])
@pytest.mark.parametrize("trainings", [0.5, 1, 1.75, 3])
def test_cycles_fit_into_what_is_left(trainings, cycle):
    budget = Budget(trainings, run_steps=100, cycle=cycle)
    assert 0 < budget.cycles * budget.cycle_steps <= budget.extra_steps
    assert budget.cycle_steps <= cycle
