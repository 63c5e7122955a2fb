"""What the driver submits again: all that a lost worker had to do, with half in memory where that ran out."""

import pytest
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from flows.driver import Driver, SubmittedAnalysis, Trainer
from tasks.jobs import Attempt, CurvatureJob

LOST = [(OutOfMemoryError("killed by the memory monitor"), 2), (WorkerCrashedError(), 1)]


@pytest.fixture
def driver():
    """One that keeps what it would submit."""
    driver = object.__new__(Driver)
    driver.submitted = []
    driver._start_analysis = driver._start_trainer = driver.submitted.append
    return driver


@pytest.mark.parametrize(("error", "halvings"), LOST)
def test_an_analysis_is_tried_again(driver, error, halvings):
    job = CurvatureJob(None, None, 0, "key", Attempt(halvings=1))
    driver._end_analysis(SubmittedAnalysis(job), error)
    (again,) = driver.submitted
    assert (again.key, again.attempt.number, again.attempt.halvings) == ("key", 2, halvings)


@pytest.mark.parametrize(("error", "halvings"), LOST)
def test_a_training_is_tried_again(driver, error, halvings):
    driver._retry_or_fail_training(Trainer("plan", None, Attempt(halvings=1)), error)
    (again,) = driver.submitted
    assert (again.plan, again.attempt.number, again.attempt.halvings) == ("plan", 2, halvings)
